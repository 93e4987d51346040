"""Distributed layer: one process against every layout, on real processes; and seventeen bugs that must be noticed."""

from __future__ import annotations

from collections.abc import Iterator

import parity
import pytest
import torch

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.testing import RankPool

pytestmark = pytest.mark.distributed

# (layout, sequence parallel)
LAYOUTS = [
    ("dp4", True),
    ("fsdp4", True),
    ("tp4", True),
    ("tp4", False),
    ("dp2 x tp2", True),
    ("dp2 x tp2", False),
    ("fsdp2 x tp2", True),
    ("fsdp2 x tp2", False),
]
IDS = [f"{text.replace(' ', '')}-{'sp' if sp else 'nosp'}" for text, sp in LAYOUTS]
# The interpreter takes a second of each rank for a step, so two of the products wait for the long sweep.
LATER = ("dp2xtp2-nosp", "fsdp2xtp2-nosp")

FP64, FP32 = 1e-12, 5e-6
TRITON_STEPS = 2


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool) -> parity.Run:
    return rank_pool.run(parity.one_process, torch.float64, "reference", ranks=1)[0]


@pytest.fixture(scope="module")
def triton_pool() -> Iterator[RankPool]:
    """Ranks that inherit the backend, as users' do, and run Triton's kernels in its interpreter."""
    with RankPool(4, env={"TRITON_INTERPRET": "1", "FUSEMESH_BACKEND": "triton"}, timeout=180) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def triton_expected(triton_pool: RankPool) -> parity.Run:
    return triton_pool.run(parity.one_process, torch.float32, "auto", TRITON_STEPS, ranks=1)[0]


def calls(backend: str, steps: int) -> dict[tuple[str, str], int]:
    """Per step: query, key, value, output, gate with up, down in each layer, and the head; attention in each layer."""
    linear = steps * (6 * parity.CONFIG.num_layers + 1)
    attention = steps * parity.CONFIG.num_layers
    counts = {("linear_forward", backend): linear, ("attention_forward", backend): attention}
    if backend == "triton":
        counts |= {("linear_backward", backend): linear, ("attention_backward", backend): attention}
    return counts


@pytest.mark.parametrize(("layout", "sequence_parallel"), LAYOUTS, ids=IDS)
def test_fp64_on_the_reference_backend(
    rank_pool: RankPool, expected: parity.Run, layout: str, sequence_parallel: bool
) -> None:
    """Losses, every gradient, clipped norm and updated parameters, at every one of three AdamW steps."""
    found = rank_pool.run(parity.on_layout, layout, sequence_parallel, torch.float64, "reference")
    parity.assert_parity(found, expected, FP64, every_step=True)
    for run in (expected, *found):
        assert run.counts == calls("reference", parity.STEPS)


@pytest.mark.parametrize(
    ("layout", "sequence_parallel"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in LATER else [])
        for case, name in zip(LAYOUTS, IDS, strict=True)
    ],
)
def test_fp32_through_the_fused_kernels(
    triton_pool: RankPool, triton_expected: parity.Run, layout: str, sequence_parallel: bool
) -> None:
    """All tensors at the first step, the loss at the later ones; the Triton kernels ran, and nothing else did."""
    found = triton_pool.run(parity.on_layout, layout, sequence_parallel, torch.float32, "auto", TRITON_STEPS)
    parity.assert_parity(found, triton_expected, FP32, every_step=False)
    for run in (triton_expected, *found):
        assert run.counts == calls("triton", TRITON_STEPS)


@pytest.mark.parametrize("vocabulary", [5, 6])
def test_a_vocabulary_too_small_for_the_ranks(rank_pool: RankPool, vocabulary: int) -> None:
    """On tp4 a vocabulary of 5 or 6 leaves the last rank no column of the head and no row of the embedding."""
    expected = rank_pool.run(parity.one_process, torch.float64, "reference", 1, vocabulary, ranks=1)[0]
    found = rank_pool.run(parity.on_layout, "tp4", True, torch.float64, "reference", 1, "", vocabulary)
    parity.assert_parity(found, expected, FP64, every_step=True)


@pytest.mark.parametrize(
    ("layout", "sequence_parallel"), sorted({(bug.layout, bug.sequence_parallel) for bug in parity.MUTATIONS.values()})
)
def test_without_a_bug(rank_pool: RankPool, expected: parity.Run, layout: str, sequence_parallel: bool) -> None:
    """The runs that the bugs below are put into pass without them, so that it is the bug that is noticed."""
    parity.assert_parity(one_step(rank_pool, layout, sequence_parallel, ""), first(expected), FP64, every_step=True)


@pytest.mark.parametrize("bug", parity.MUTATIONS)
def test_a_bug_is_noticed(rank_pool: RankPool, expected: parity.Run, bug: str) -> None:
    """The comparison that passes above fails with each of these bugs put in."""
    mutation = parity.MUTATIONS[bug]
    found = one_step(rank_pool, mutation.layout, mutation.sequence_parallel, bug)
    with pytest.raises(AssertionError, match="differ by more than"):
        parity.assert_parity(found, first(expected), FP64, every_step=True)


def one_step(rank_pool: RankPool, layout: str, sequence_parallel: bool, bug: str) -> list[parity.Run]:
    ranks = Layout.parse(layout).world_size
    return rank_pool.run(parity.on_layout, layout, sequence_parallel, torch.float64, "reference", 1, bug, ranks=ranks)


def first(run: parity.Run) -> parity.Run:
    return parity.Run(run.steps[:1], {})


def test_the_comparison_covers_everything(expected: parity.Run) -> None:
    """Clipping really clips, every parameter has a gradient that is not zero, and no sample weighs as another."""
    for step in expected.steps:
        assert step.norm > parity.MAX_NORM
        for name, gradient in step.gradients.items():
            assert gradient.abs().max() > 0, name
    _, targets = parity.batch(parity.CONFIG.vocab_size)
    assert len({int(row) for row in (targets != -100).sum(1)}) == parity.BATCH
    tensors = 2 * len(expected.steps[0].gradients)
    assert len(parity.errors(expected, expected, every_step=True)) == parity.STEPS * (2 + tensors)
