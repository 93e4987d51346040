"""Pure layer, and up to 4 gloo ranks where said: our models as the planner sees them, against the real ones."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions, deal_blocks
from fusemesh.hybrid.planner import cost, memory, operations, search
from fusemesh.hybrid.planner.hardware import find_hardware
from fusemesh.hybrid.planner.job import BatchSplit, TrainingJob
from fusemesh.hybrid.planner.model import ModelDescription, weights_of
from fusemesh.hybrid.ranks.local import RankError
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.transformer import Transformer
from fusemesh.transformer.description import describe
from fusemesh.transformer.stage import state_shapes
from tests.support.ranks import planner as ranks

LENGTH = 64
H100 = find_hardware("h100")


@pytest.mark.parametrize("kind", ranks.CONFIGS)
def test_names_and_shapes_are_the_transformers(kind: str) -> None:
    config = ranks.CONFIGS[kind]
    model, real = describe(config), Transformer(config)
    shapes = {name: tuple(p.shape) for name, p in real.named_parameters()}
    assert {weight.name: weight.shape for weight in model.weights} == shapes
    assert model.parameters == sum(p.numel() for p in real.parameters())
    assert model.num_layers == config.num_blocks and model.memory_at == config.memory_at


def test_a_parameter_that_no_module_splits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected every parameter in a module .*received 0\.weight of Linear"):
        weights_of(torch.nn.Sequential(torch.nn.Linear(2, 2)))


QUICK = [
    *(("decoder-bias", text, 1) for text in ("single", "tp4", "fsdp2 x tp2", "dp2 x fsdp2")),
    ("decoder", "pp3", 1),
    *((kind, text, 1) for kind in ("class", "span") for text in ("tp4", "pp2 x tp2")),
    *(("translation", text, 1) for text in ("fsdp2 x tp2", "pp4")),
    ("translation-tied", "pp2 x fsdp2", 1),
    ("translation-tied", "pp3", 2),
]
LONG = [
    *(("decoder", text, 1) for text in ("single", "tp4", "fsdp2 x tp2", "dp2 x fsdp2")),
    *((kind, text, 1) for kind in ("decoder", "decoder-bias") for text in ("dp2", "fsdp4", "tp2", "dp2 x tp2")),
    *((kind, text, 1) for kind in ("class", "span") for text in ("single", "fsdp2 x tp2", "pp3")),
    *(("translation", text, 1) for text in ("single", "tp4", "pp2 x fsdp2", "pp2 x tp2")),
    *(("translation-tied", text, 1) for text in ("single", "tp4", "fsdp2 x tp2", "pp2 x tp2", "pp4")),
    ("translation", "pp2", 2),
]
STORED = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "text", "virtual_stages"), STORED)
def test_parameters_are_exact_on_every_rank(rank_pool: RankPool, kind: str, text: str, virtual_stages: int) -> None:
    """Every name and shape that parallelize makes; bytes of parameters, gradients and optimizer states."""
    config, layout = ranks.CONFIGS[kind], Layout.parse(text)
    schedule = "interleaved1f1b" if virtual_stages > 1 else "1f1b"
    job = TrainingJob(8, LENGTH, dtype="float32", pipeline=PipelineOptions(0, schedule, virtual_stages))
    model = describe(config)
    spans = deal_blocks(model.num_layers, layout.pp * virtual_stages)
    for found in rank_pool.run(ranks.stored, text, config, virtual_stages, ranks=layout.world_size):
        at = found["at"]
        place = {"tp_rank": at["tp"], "fsdp_rank": at["fsdp"]}
        expected = memory.stored(model, job, layout, stage=at["pp"], **place)
        assert (found["parameters"], found["gradients"], found["optimizer"]) == expected, (text, at)
        first = memory.stored(model, job, layout, stage=at["pp"])
        assert all(mine <= largest for mine, largest in zip(expected, first, strict=True))
        own = [number for span in spans[at["pp"] :: layout.pp] for number in span]
        weights = {weight.name: weight for weight in model.weights}
        names = {f"blocks.{number}.{weight.name}" for number in own for weight in model.layers[number].weights}
        names |= {outer.weight.name for outer in model.outer if set(outer.layers) & set(own)}
        assert found["shapes"] == {
            name: weights[name].local_shape(layout.tp, layout.fsdp, at["tp"], at["fsdp"]) for name in names
        }


@pytest.mark.distributed
def test_stages_of_one_rank_that_share_a_parameter_are_refused(rank_pool: RankPool) -> None:
    """The decoder begins in stage 3 and ends in stage 5: by the planner in the words of the runtime."""
    config, message = ranks.CONFIGS["translation-tied"], r"pipeline\.virtual_stages: .*share target_embedding\.weight"
    with pytest.raises(RankError, match=message):
        rank_pool.run(ranks.stored, "pp2", config, 3, ranks=2)
    job = TrainingJob(8, LENGTH, pipeline=PipelineOptions(0, "interleaved1f1b", 3))
    found = search.consider(describe(config), job, H100, Layout(pp=2))
    assert isinstance(found, search.Rejected) and re.search(message, found.why)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["decoder", "class", "span", "translation", "translation-tied"])
@pytest.mark.parametrize(
    ("text", "sequence_parallel"),
    [
        ("single", True),
        ("tp2", True),
        pytest.param("tp2", False, marks=pytest.mark.slow),
        pytest.param("tp4", True, marks=pytest.mark.slow),
        ("tp4", False),
    ],
)
def test_activations_are_what_autograd_keeps(
    rank_pool: RankPool, kind: str, text: str, sequence_parallel: bool
) -> None:
    config, layout, samples = ranks.CONFIGS[kind], Layout.parse(text), 4
    job = TrainingJob(samples, LENGTH, dtype="float32", sequence_parallel=sequence_parallel)
    found = rank_pool.run(ranks.saved, text, config, samples, sequence_parallel, ranks=layout.world_size)
    model = describe(config)
    share = model.share(layout, 0)
    expected = memory.saved_around(model, share, job, layout.tp, samples, "cpu")
    for layer, count in share.layers:
        expected += count * memory.saved_by_layer(model, layer, job, layout.tp, samples, "cpu")
    # Not counted: token ids and masks, the loss's numbers of a token, the table of rotary positions.
    assert max(found) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", ranks.CONFIGS)
def test_between_stages_travels_what_the_transformer_hands_on(kind: str) -> None:
    """h; at the border of an encoder its output; behind that both."""
    config, layout = ranks.CONFIGS[kind], Layout(pp=3)
    model, batch = describe(config), {"tokens": (1, LENGTH), "target_tokens": (1, LENGTH)}
    for stage, span in enumerate(deal_blocks(config.num_blocks, 3)):
        border = span.stop if stage < 2 else span.start
        assert model.share(layout, stage).states == len(state_shapes(config, border, 1, batch))


def named(model: ModelDescription, number: int) -> dict[str, float]:
    """FLOPs of each product of one layer, forward, by name."""
    job = TrainingJob(4, LENGTH, dtype="float32")
    found = operations.layer_operations(model, model.layers[number], job, 1, 4, "cpu")
    return {op.name: op.flops for op in found if op.flops and not op.backward}


def test_attention_computes_what_its_layer_sees() -> None:
    decoder, encoder = (named(describe(ranks.CONFIGS[kind]), 0) for kind in ("decoder", "class"))
    assert encoder["attention.core"] == 2 * decoder["attention.core"]
    span, translation = describe(ranks.CONFIGS["span"]), describe(ranks.CONFIGS["translation"])
    # Each token of a window of 8 sees 17, less at the ends of the text; every other layer sees all.
    seen = torch.ones(LENGTH, LENGTH).triu(-8).tril(8).sum().item() / LENGTH**2
    assert named(span, 0)["attention.core"] == pytest.approx(seen * encoder["attention.core"])
    assert named(span, 1) == encoder
    causal = dataclasses.replace(describe(ranks.CONFIGS["decoder"]).layers[0], window=(8, 0))
    assert causal.visible(LENGTH) == torch.ones(LENGTH, LENGTH).triu(-8).tril().sum().item() / LENGTH**2
    assert named(translation, 0) == encoder
    behind = named(translation, 3)
    assert behind["cross_attention.core"] == encoder["attention.core"] == 2 * behind["attention.core"]
    assert behind["cross_attention.key"] == behind["attention.key"]
    assert {name for name in behind if name.startswith("cross")} == {
        f"cross_attention.{part}" for part in ("query", "key", "value", "core", "output")
    }


@pytest.mark.parametrize(
    ("kind", "products"),
    [
        ("decoder", {"head": 2.0 * 4 * LENGTH * 101 * 48}),
        ("class", {"head": 2.0 * 4 * 3 * 48}),
        ("span", {"head.query": 2.0 * 4 * 96 * 48, "head": 2.0 * 4 * LENGTH * 2 * 48}),
        ("translation", {"head": 2.0 * 4 * LENGTH * 101 * 48}),
    ],
)
def test_heads_multiply_what_they_are(kind: str, products: dict[str, float]) -> None:
    job = TrainingJob(4, LENGTH, dtype="float32")
    found = operations.last_operations(describe(ranks.CONFIGS[kind]), job, 1, 4, "cpu")
    assert {op.name: op.flops for op in found if op.flops and not op.backward} == products


@pytest.mark.parametrize("kind", ranks.CONFIGS)
def test_a_step_of_every_kind_has_a_price(kind: str) -> None:
    model, job = describe(ranks.CONFIGS[kind]), TrainingJob(8, LENGTH)
    for layout in (Layout(), Layout(fsdp=2, tp=2), Layout(pp=2, tp=2)):
        split = BatchSplit(1, 4) if layout.pp > 1 else BatchSplit(2)
        found = cost.estimate(model, job, layout, H100, split)
        assert found.seconds == pytest.approx(sum(item.seconds for item in found.items)) and found.seconds > 0
        needed = memory.estimate(model, job, layout, H100, split)
        assert needed.tensors == max(needed.phases.values()) > needed.parameters
    names = {item.name for item in cost.estimate(model, job, Layout(), H100, BatchSplit()).items}
    assert ("cross attention core" in names) == (model.memory_at is not None)
