"""Distributed layer: one process against every layout, on real processes; and bugs that must be noticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.ranks import parity, parity_bugs
from tests.support.ranks.parity import Case, Run, Variant

pytestmark = pytest.mark.distributed

UNTIED, TIED = Variant(4), Variant(4, tied=True)
# Three blocks are two and one.
UNEVEN, UNEVEN_TIED = Variant(3), Variant(3, tied=True)
INTERLEAVED = PipelineOptions(2, "interleaved1f1b", 2)

# Those of one layout follow each other: DTensor remembers how it planned an operation while few meshes are open.
CASES = [
    Case("dp4"),
    Case("fsdp4"),
    Case("tp4"),
    Case("tp4", False),
    Case("tp4", True, TIED),
    Case("dp2 x tp2"),
    Case("dp2 x tp2", False),
    Case("dp2 x tp2", False, TIED),
    Case("fsdp2 x tp2"),
    Case("fsdp2 x tp2", False),
    Case("fsdp2 x tp2", True, TIED),
    *(Case("pp4", True, variant, PipelineOptions(4)) for variant in (UNTIED, TIED)),
    *(Case("pp2 x dp2", True, variant, PipelineOptions(2)) for variant in (UNEVEN, UNEVEN_TIED)),
    *(Case("pp2 x tp2", True, variant, PipelineOptions(4)) for variant in (UNTIED, TIED)),
    *(Case("pp2 x tp2", False, variant, PipelineOptions(2, "gpipe")) for variant in (UNEVEN, UNEVEN_TIED)),
    *(Case("pp2 x tp2", True, variant, INTERLEAVED) for variant in (UNTIED, TIED)),
    *(Case("pp2 x fsdp2", True, variant, PipelineOptions(2)) for variant in (UNTIED, TIED)),
    *(Case("pp2 x fsdp2", True, variant, INTERLEAVED) for variant in (UNTIED, TIED)),
    *(Case("pp2", True, v, PipelineOptions(4, "interleaved1f1b", 2)) for v in (UNTIED, TIED)),
]
# Every layout with stages, in every schedule, is shown with a tied weight or without one: with it beside replicas, tp
# and, interleaved, shards. The other of the two waits for the long sweep.
LATER_IN_FP64 = [
    Case("pp4", True, TIED, PipelineOptions(4)),
    Case("pp2 x dp2", True, UNEVEN, PipelineOptions(2)),
    Case("pp2 x tp2", True, UNTIED, PipelineOptions(4)),
    Case("pp2 x tp2", False, UNEVEN_TIED, PipelineOptions(2, "gpipe")),
    Case("pp2 x tp2", True, TIED, INTERLEAVED),
    Case("pp2 x fsdp2", True, TIED, PipelineOptions(2)),
    Case("pp2 x fsdp2", True, UNTIED, INTERLEAVED),
    Case("pp2", True, TIED, PipelineOptions(4, "interleaved1f1b", 2)),
]
# The interpreter takes a second of each rank for a step, so these products wait for the long sweep. Replicas, shards
# of them and the sequence's are shown by dp2 x tp2 and fsdp2 x tp2.
LATER = [
    Case("dp4"),
    Case("fsdp4"),
    Case("tp4"),
    Case("dp2 x tp2", False),
    Case("fsdp2 x tp2", False),
    *(case for case in CASES if case.variant.tied and "pp" not in case.layout),
    *(case for case in CASES if case.variant in (UNEVEN, UNEVEN_TIED)),
    *(Case("pp4", True, variant, PipelineOptions(4)) for variant in (UNTIED, TIED)),
    Case("pp2", True, UNTIED, PipelineOptions(4, "interleaved1f1b", 2)),
    *(Case("pp2 x tp2", True, variant, PipelineOptions(4)) for variant in (UNTIED, TIED)),
    Case("pp2 x fsdp2", True, TIED, PipelineOptions(2)),
    Case("pp2", True, TIED, PipelineOptions(4, "interleaved1f1b", 2)),
    *(Case("pp2 x tp2", True, variant, INTERLEAVED) for variant in (UNTIED, TIED)),
    *(Case("pp2 x fsdp2", True, variant, INTERLEAVED) for variant in (UNTIED, TIED)),
]

FP64, FP32 = 1e-12, 5e-6
TRITON_STEPS = 2


class Expected:
    """Runs of one process, each made when it is first asked for."""

    def __init__(self, pool: RankPool, dtype: torch.dtype, backend: str, steps: int) -> None:
        self.pool, self.arguments = pool, (dtype, backend)
        self.steps = steps
        self.runs: dict[Variant, Run] = {}

    def __call__(self, variant: Variant) -> Run:
        if variant not in self.runs:
            self.runs[variant] = self.pool.run(parity.one_process, *self.arguments, variant, self.steps, ranks=1)[0]
        return self.runs[variant]


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool) -> Expected:
    return Expected(rank_pool, torch.float64, "reference", parity.STEPS)


@pytest.fixture(scope="module")
def triton_pool() -> Iterator[RankPool]:
    """Ranks that inherit the backend, as users' do, and run Triton's kernels in its interpreter."""
    with RankPool(4, env={"TRITON_INTERPRET": "1", "FUSEMESH_BACKEND": "triton"}, timeout=180) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def triton_expected(triton_pool: RankPool) -> Expected:
    return Expected(triton_pool, torch.float32, "auto", TRITON_STEPS)


def assert_calls(run: Run, backend: str, steps: int, microbatches: int) -> None:
    """Of each micro-batch: query, key, value, output, gate with up, down in each layer that the rank holds, and
    attention once; the loss, which has the head's product, where the last norm is: of PyTorch's chunks in fp64."""
    names = run.steps[0].gradients
    layers = sum(name.endswith("mlp.down.weight") for name in names)
    linear, attention = (steps * microbatches * calls for calls in (6 * layers, layers))
    counts = {("linear_forward", backend): linear, ("attention_forward", backend): attention}
    if backend == "triton":
        counts |= {("linear_backward", backend): linear, ("attention_backward", backend): attention}
    if "norm.weight" in names:
        of_loss = {"reference": "torch"}.get(backend, backend)
        counts |= {(f"vocab_loss_{way}", of_loss): steps * microbatches for way in ("forward", "backward")}
    assert run.counts == counts


def microbatches(case: Case) -> int:
    return case.pipeline.microbatches if "pp" in case.layout else 1


def cases(later: list[Case]) -> list[Any]:
    return [pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case in later else []) for case in CASES]


@pytest.mark.parametrize("case", cases(LATER_IN_FP64))
def test_fp64_on_the_reference_backend(rank_pool: RankPool, expected: Expected, case: Case) -> None:
    """Losses, every gradient, clipped norm and updated parameters, at each of two AdamW steps."""
    found = on(rank_pool, case, torch.float64, "reference", parity.STEPS)
    parity.assert_parity(found, expected(case.variant), FP64, every_step=True)
    for run in found:
        assert_calls(run, "reference", parity.STEPS, microbatches(case))


@pytest.mark.parametrize("case", cases(LATER))
def test_fp32_through_the_fused_kernels(triton_pool: RankPool, triton_expected: Expected, case: Case) -> None:
    """All tensors at the first step, the loss at the later ones; the Triton kernels ran, and nothing else did."""
    found = on(triton_pool, case, torch.float32, "auto", TRITON_STEPS)
    parity.assert_parity(found, triton_expected(case.variant), FP32, every_step=False)
    for run in found:
        assert_calls(run, "triton", TRITON_STEPS, microbatches(case))
    assert_calls(triton_expected(case.variant), "triton", TRITON_STEPS, 1)


def on(pool: RankPool, case: Case, dtype: torch.dtype, backend: str, steps: int) -> list[Run]:
    ranks = Layout.parse(case.layout).world_size
    return pool.run(parity.on_layout, case, dtype, backend, steps, ranks=ranks)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocabulary", [5, 6])
def test_a_vocabulary_too_small_for_the_ranks(rank_pool: RankPool, vocabulary: int, tied: bool) -> None:
    """On tp4 a vocabulary of 5 or 6 leaves the last rank no column of the head and no row of the embedding."""
    variant = Variant(tied=tied, vocabulary=vocabulary)
    expected = Expected(rank_pool, torch.float64, "reference", 1)(variant)
    found = on(rank_pool, Case("tp4", True, variant), torch.float64, "reference", 1)
    parity.assert_parity(found, expected, FP64, every_step=True)


@pytest.mark.slow
def test_three_axes_on_eight_ranks(expected: Expected) -> None:
    """pp, fsdp and tp at once, interleaved stages, tied embeddings."""
    case = Case("pp2 x fsdp2 x tp2", True, TIED, INTERLEAVED)
    with RankPool(8, timeout=300) as ranks:
        found = on(ranks, case, torch.float64, "reference", parity.STEPS)
    parity.assert_parity(found, expected(TIED), FP64, every_step=True)


@pytest.mark.parametrize("case", dict.fromkeys(mutation.case for mutation in parity_bugs.MUTATIONS.values()), ids=str)
def test_without_a_bug(rank_pool: RankPool, expected: Expected, case: Case) -> None:
    """The runs that the bugs below are put into pass without them, so that it is the bug that is noticed."""
    found = on(rank_pool, case, torch.float64, "reference", 1)
    parity.assert_parity(found, first(expected(case.variant)), FP64, every_step=True)


@pytest.mark.parametrize("bug", parity_bugs.MUTATIONS)
def test_a_bug_is_noticed(rank_pool: RankPool, expected: Expected, bug: str) -> None:
    """The comparison that passes above fails with each of these bugs put in."""
    case = parity_bugs.MUTATIONS[bug].case
    ranks = Layout.parse(case.layout).world_size
    found = rank_pool.run(parity_bugs.on_layout, bug, torch.float64, "reference", 1, ranks=ranks)
    with pytest.raises(AssertionError, match="differ by more than"):
        parity.assert_parity(found, first(expected(case.variant)), FP64, every_step=True)


def first(run: Run) -> Run:
    return Run(run.steps[:1], {})


@pytest.mark.parametrize("variant", [Variant(), UNTIED, TIED], ids=["untied", "4layers", "tied"])
def test_the_comparison_covers_everything(expected: Expected, variant: Variant) -> None:
    """Clipping really clips, every parameter has a gradient that is not zero, and no sample weighs as another."""
    run = expected(variant)
    assert ("head.weight" in run.steps[0].gradients) != variant.tied
    for step in run.steps:
        assert step.norm > parity.MAX_NORM
        for name, gradient in step.gradients.items():
            assert gradient.abs().max() > 0, name
    _, targets = parity.batch(parity.CONFIG.vocab_size)
    assert len({int(row) for row in (targets != -100).sum(1)}) == parity.BATCH
    tensors = 2 * len(run.steps[0].gradients)
    assert len(parity.errors(run, run, every_step=True)) == parity.STEPS * (2 + tensors)
