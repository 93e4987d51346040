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
layouts = pytest.mark.parametrize(
    ("layout", "sequence_parallel"),
    LAYOUTS,
    ids=[f"{text.replace(' ', '')}-{'sp' if sp else 'nosp'}" for text, sp in LAYOUTS],
)

FP64, FP32 = 1e-12, 5e-6


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
    return triton_pool.run(parity.one_process, torch.float32, "auto", ranks=1)[0]


def calls(backend: str, steps: int) -> dict[tuple[str, str], int]:
    """Per step: query, key, value, output, gate with up, down in each layer, and the head; attention in each layer."""
    linear = steps * (6 * parity.CONFIG.num_layers + 1)
    attention = steps * parity.CONFIG.num_layers
    counts = {("linear_forward", backend): linear, ("attention_forward", backend): attention}
    if backend == "triton":
        counts |= {("linear_backward", backend): linear, ("attention_backward", backend): attention}
    return counts


@layouts
def test_fp64_on_the_reference_backend(
    rank_pool: RankPool, expected: parity.Run, layout: str, sequence_parallel: bool
) -> None:
    """Losses, every gradient, clipped norm and updated parameters, at every one of three AdamW steps."""
    found = rank_pool.run(parity.on_layout, layout, sequence_parallel, torch.float64, "reference")
    parity.assert_parity(found, expected, FP64, every_step=True)
    for run in (expected, *found):
        assert run.counts == calls("reference", parity.STEPS)


@layouts
def test_fp32_through_the_fused_kernels(
    triton_pool: RankPool, triton_expected: parity.Run, layout: str, sequence_parallel: bool
) -> None:
    """All tensors at the first step, the loss at the later ones; the Triton kernels ran, and nothing else did."""
    found = triton_pool.run(parity.on_layout, layout, sequence_parallel, torch.float32, "auto")
    parity.assert_parity(found, triton_expected, FP32, every_step=False)
    for run in (triton_expected, *found):
        assert run.counts == calls("triton", parity.STEPS)


@pytest.mark.parametrize("bug", parity.MUTATIONS)
def test_a_bug_is_noticed(rank_pool: RankPool, expected: parity.Run, bug: str) -> None:
    """The comparison that passes above fails with each of these bugs put in, and the same run without it passes."""
    mutation = parity.MUTATIONS[bug]
    ranks = Layout.parse(mutation.layout).world_size
    run = (parity.on_layout, mutation.layout, mutation.sequence_parallel, torch.float64, "reference", 1)
    one_step = parity.Run(expected.steps[:1], {})
    parity.assert_parity(rank_pool.run(*run, ranks=ranks), one_step, FP64, every_step=True)
    with pytest.raises(AssertionError, match="differ by more than"):
        parity.assert_parity(rank_pool.run(*run, bug, ranks=ranks), one_step, FP64, every_step=True)


def test_the_comparison_covers_everything(expected: parity.Run) -> None:
    """Clipping really clips, every parameter has a gradient that is not zero, and no sample weighs as another."""
    for step in expected.steps:
        assert step.norm > parity.MAX_NORM
        for name, gradient in step.gradients.items():
            assert gradient.abs().max() > 0, name
    _, targets = parity.batch()
    assert len({int(row) for row in (targets != -100).sum(1)}) == parity.BATCH
    tensors = 2 * len(expected.steps[0].gradients)
    assert len(parity.errors(expected, expected, every_step=True)) == parity.STEPS * (2 + tensors)
