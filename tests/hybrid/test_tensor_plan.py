"""Distributed layer: a user's model of plain torch modules, split over tp by a table of names, equals one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.ranks import parity
from tests.support.ranks import plan as plan_ranks

pytestmark = pytest.mark.distributed

FP64 = 1e-12


def check(found: list[dict[str, torch.Tensor]], want: dict[str, torch.Tensor]) -> None:
    """Loss and every gradient on every rank."""
    for rank, own in enumerate(found):
        assert own.keys() == want.keys()
        errors = {name: parity.error(own[name], x) for name, x in want.items()}
        # not (e <= t) rather than e > t: a NaN is a failure.
        wrong = {name: e for name, e in errors.items() if not e <= FP64}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize(
    ("layout", "plan", "sequence_parallel", "options"),
    [
        ("dp2 x tp2", "plan", True, {}),
        ("dp2 x tp2", "sequence", True, {}),
        ("fsdp2 x tp2", "sequence", True, {"tied": True}),
        pytest.param("fsdp2 x tp2", "plan", True, {"tied": True}, marks=pytest.mark.slow),
        ("dp2 x tp2", "sequence", False, {}),
        ("dp2 x tp2", "gathered", True, {}),
        ("dp2 x tp2", "head_alone", True, {"tied": True}),
        ("tp4", "plan", True, {}),  # two key and value heads on four ranks
        ("tp4", "sequence", True, {"kv_heads": 1}),
        pytest.param("fsdp4", "plan", True, {}, marks=pytest.mark.slow),  # nothing of the plan applies
    ],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_loss_and_gradients_equal_one_process(
    rank_pool: RankPool, layout: str, plan: str, sequence_parallel: bool, options: dict[str, Any]
) -> None:
    want = plan_ranks.on_one(**options)
    # The padding id gets no gradient from the embedding, and with tied weights one from the head.
    assert bool(want["embedding.weight"][3].any()) == options.get("tied", False)
    check(rank_pool.run(plan_ranks.on_layout, layout, plan, sequence_parallel, "", options), want)


@pytest.mark.parametrize("bug", plan_ranks.BUGS)
def test_a_bug_is_noticed(rank_pool: RankPool, bug: str) -> None:
    found = rank_pool.run(plan_ranks.on_layout, "tp2", "plan", True, bug, ranks=2)
    assert parity.error(found[0]["loss"], plan_ranks.on_one()["loss"]) <= FP64
    with pytest.raises(AssertionError, match="rank 0"):
        check(found, plan_ranks.on_one())


REFUSED: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "style": ("tp2", {**plan_ranks.PLAN, "head": "colum"}, {}, ["plan: expected one of column", "received 'colum'"]),
    "pattern": ("tp2", {**plan_ranks.PLAN, "heads": "vocab"}, {}, ["received 'heads', which names none"]),
    "twice": ("tp2", {**plan_ranks.PLAN, "hea*": "column"}, {}, ["one style for head, received 'vocab' and 'column'"]),
    "kind": ("tp2", {**plan_ranks.PLAN, "norm": "column"}, {}, ["torch.nn.Linear", "at 'norm', received LayerNorm"]),
    "container": ("tp2", {**plan_ranks.PLAN, "layers": "whole"}, {}, ["at 'layers', received ModuleList"]),
    "heads": (
        "tp4",
        plan_ranks.PLAN,
        {"heads": 6},
        ["tp4 divides, received 6 in layers.0.attention.query", "[1, 2, 3"],
    ),
    "kv heads": ("tp4", plan_ranks.PLAN, {"heads": 12, "kv_heads": 3}, ["num_heads: 3 heads fit tp4 only if"]),
    "columns": (
        "tp4",
        {**plan_ranks.PLAN, "norm": "whole", "head": "column"},
        {},
        ["tp4 divides for head, received 23", "'vocab'"],
    ),
    "norm left out": (
        "tp2",
        {name: style for name, style in plan_ranks.PLAN.items() if style != "heads"},
        {},
        ["a style for layers.0.attention.query_norm", "stands beside layers.0.attention.query", "'heads'"],
    ),
    "sequence left out": (
        "tp2",
        {**plan_ranks.PLAN, "norm": "sequence"},
        {},
        ["a style for layers.0.norms.0, received none, and sequence parallel is on"],
    ),
    "tied": (
        "tp2",
        {name: style for name, style in plan_ranks.PLAN.items() if name != "head"},
        {"tied": True},
        ["embedding.weight and head.weight are one parameter"],
    ),
    "wrapped": (
        "tp2",
        {**plan_ranks.PLAN, "norm": "column"},
        {},
        ["at 'norm', received LayerNorm; give one that keeps Linear's forward, or use fsdp", "wrappers such as LoRA's"],
    ),
    "no plan": ("tp2", None, {}, ["tp: Plain brings no tensor-parallel table; pass one", "plan=, or use fsdp"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused(rank_pool: RankPool, name: str) -> None:
    """Every rank refuses by itself, before any communication, and leaves the model as it was."""
    layout, plan, options, parts = REFUSED[name]
    for message in rank_pool.run(plan_ranks.refused, layout, plan, options, ranks=int(layout[-1])):
        for part in parts:
            assert part in message, message


@pytest.mark.parametrize("layout", ["fsdp2 x tp2", "tp2"])
def test_parts_alone_move_to_the_device(rank_pool: RankPool, layout: str) -> None:
    """Each parameter once, cut before; and a layer when those before it are shards already."""
    for sizes, held, wrapped in rank_pool.run(plan_ranks.moved, layout, ranks=2 if layout == "tp2" else 4):
        assert len(sizes) == len(held)
        assert wrapped == sorted(wrapped) and set(wrapped) == {0, 1, 2} and wrapped.count(0) == wrapped.count(1)
        # The largest is half of the weight of the queries. fully_shard cuts what has arrived once more, rounded up.
        assert max(sizes) == 32 * 16 // 2
        shards = 2 if "fsdp2" in layout else 1
        assert sum(held) <= sum(sizes) <= shards * (sum(held) + 16 * len(held))


def test_a_model_on_meta_is_cut_there_and_filled_later(rank_pool: RankPool) -> None:
    check(rank_pool.run(plan_ranks.from_meta, "fsdp2 x tp2"), plan_ranks.on_one())


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def test_a_checkpoint_loads_into_another_layout(rank_pool: RankPool, tmp_path: Path, tied: bool) -> None:
    for found in rank_pool.run(plan_ranks.through_a_checkpoint, str(tmp_path), "dp2 x tp2", "tp4", tied):
        for name, x in plan_ranks.stepped(tied).items():
            torch.testing.assert_close(found[name], x, rtol=1e-11, atol=1e-13)


HEAD = "layers.1.mlp.2.weight"


@pytest.mark.parametrize(
    ("layout", "changed", "seeds", "told"),
    [
        ("dp2", {}, (0, 1), "'embedding.weight' that differs on ranks 0, 1 from each other"),
        ("tp2", {1: HEAD}, (), f"'{HEAD}' that differs on ranks 0, 1 from each other"),
        ("fsdp2", {1: "scale"}, (), "'scale' that differs on ranks 0, 1 from each other"),
        ("fsdp2 x tp2", {}, (5, 5, 7, 5), "'embedding.weight' that differs on rank 2 from the others"),
        ("dp2", {1: "-norm.weight"}, (), "'norm.weight' that differs on ranks 0, 1 from each other"),
        ("dp2", {1: "=norm.weight"}, (), "'norm.weight' whose requires_grad differs on ranks 0, 1 from each other"),
        ("tp2", dict.fromkeys(range(2), "=head.bias"), (), ""),
        ("dp2", dict.fromkeys(range(2), "meta"), (), ""),
        pytest.param("tp2", {}, (0, 1), "'embedding.weight' that differs on ranks 0, 1 from", marks=pytest.mark.slow),
        pytest.param(
            "fsdp4", {1: "+more"}, (), "'more' that differs on rank 1 from the others", marks=pytest.mark.slow
        ),
        pytest.param("dp4", {0: "meta"}, (), "that differs on rank 0 from the others", marks=pytest.mark.slow),
    ],
)
def test_models_that_differ_among_ranks_are_refused(
    rank_pool: RankPool, layout: str, changed: dict[int, str], seeds: tuple[int, ...], told: str
) -> None:
    number = Layout.parse(layout).world_size
    for message in rank_pool.run(plan_ranks.of_other_values, layout, changed, seeds, ranks=number):
        if told:
            assert message.startswith("model: expected the same whole model on every rank") and told in message
            remedies = "freeze the same parameters on", "set the same seed on every rank before the model is built"
            assert remedies["requires_grad" not in told] in message
        else:
            assert message == ""


def test_replicas_drop_what_one_process_drops(rank_pool: RankPool) -> None:
    want = plan_ranks.dropped(None, "")
    found = torch.cat(rank_pool.run(plan_ranks.dropped, "dp2", ranks=2))
    assert parity.error(found, want) <= FP64
