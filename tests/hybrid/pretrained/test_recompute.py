"""Layer: hybrid, most of it on gloo ranks. Blocks that backward computes again: equal bits, and what they keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import fusemesh
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.planner import memory
from fusemesh.hybrid.planner.job import TrainingJob
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.hybrid.recompute import check_recompute, recompute_blocks
from fusemesh.transformer.description import describe
from tests.support.pretrained.folders import PRETRAINED
from tests.support.ranks import dropout as hugging_face
from tests.support.ranks import planner, recompute


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("text", "kind", "dtype"),
    [
        ("fsdp2 x tp2", "decoder", None),
        slow("single", "decoder", None),
        slow("pp2 x tp2", "translation-tied", None),
        slow("pp2 x fsdp2", "decoder", torch.bfloat16),
        slow("fsdp2", "class", torch.bfloat16),
        slow("tp4", "span", None),
        slow("dp2 x tp2", "translation", None),
    ],
)
def test_our_transformer_learns_the_same_to_the_bit(
    rank_pool: RankPool, text: str, kind: str, dtype: torch.dtype | None
) -> None:
    ranks = Layout.parse(text).world_size
    for without, again in rank_pool.run(recompute.both_ways, text, planner.CONFIGS[kind], dtype, ranks=ranks):
        assert without.keys() == again.keys() and len(without) > 1
        assert all(torch.equal(without[name], again[name]) for name in without)


def saved(model: nn.Module, call: Any) -> int:
    """The bytes of tensors, parameters left out, that autograd keeps of ``call``."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(size for place, size in kept.items() if place not in parameters)


@pytest.mark.parametrize(
    "name", [name if name == "t5" else pytest.param(name, marks=pytest.mark.slow) for name in PRETRAINED]
)
def test_a_hugging_face_model_learns_the_same_to_the_bit_and_keeps_less(name: str) -> None:
    """Dropout included, in fp32, where transformers' own functions are as they are."""
    found, kept = [], []
    for again in (False, True):
        model = hugging_face.build(name, PRETRAINED[name].kinds[0], {}).float()
        if again:
            recompute_blocks(model.blocks)
        with fusemesh.use_backend("reference"):
            kept.append(saved(model, lambda: found.append(hugging_face.learned(model, range(8), 2))))  # noqa: B023
    assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("text", "sequence_parallel", "kind"),
    [
        *(
            slow(text, sequence_parallel, kind)
            for kind in ("decoder", "class", "span", "translation", "translation-tied")
            for text, sequence_parallel in (("single", True), ("tp2", True), ("tp4", False))
        ),
    ],
)
def test_the_planner_counts_what_is_kept(rank_pool: RankPool, text: str, sequence_parallel: bool, kind: str) -> None:
    """Each block's input, what is kept around the blocks, and while one is computed again what it saves."""
    layout, samples = Layout.parse(text), 4
    job = TrainingJob(samples, 64, dtype="float32", sequence_parallel=sequence_parallel, recompute="full")
    expected, found = [], []
    for more in (0, 2):
        config = dataclasses.replace(planner.CONFIGS[kind], num_layers=3 + more)
        model = describe(config)
        share = model.share(layout, 0)
        kept, again = memory.kept_by_layers(model, share, job, layout.tp, "cpu", samples, 1.0)
        expected.append(kept + memory.saved_around(model, share, job, layout.tp, samples, "cpu"))
        found.append(max(rank_pool.run(planner.recomputed, text, config, samples, sequence_parallel, ranks=layout.tp)))
        # What test_planner_models.py compares with autograd's.
        assert again == max(
            memory.saved_by_layer(model, layer, job, layout.tp, samples, "cpu") for layer, _ in share.layers
        )
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], rel=0.01)
    # Not counted: token ids and masks, the table of rotary positions and the loss, together some numbers a token.
    assert 0 <= found[0] - expected[0] <= 0.03 * expected[0] + samples * 64 * 32


def test_a_word_that_is_not_known_and_a_model_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="recompute: expected one of none, full, received 'selective'"):
        check_recompute("selective", 1)
    with pytest.raises(ValueError, match=r"expected a model whose layers are in a nn\.ModuleList"):
        parallelize(nn.Linear(2, 2), None, Layout(), recompute="full")  # type: ignore[arg-type]


def test_generating_is_as_before() -> None:
    """A block fills its caches where nothing is learned."""
    model = hugging_face.build("llama", PRETRAINED["llama"].kinds[0], {}).float()
    ids = torch.randint(3, 80, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model.eval()
    want = model.generate(ids, **options)
    recompute_blocks(model.blocks)
    assert torch.equal(model.generate(ids, **options), want)
    model.train()
    cache = model(ids, use_cache=True).past_key_values
    assert cache is None or cache.get_seq_length() == 0
