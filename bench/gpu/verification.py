"""The check that proves kernels on a GPU: forward and gradients over poisoned memory, by the error budget, bit by bit.

Each case goes through the public function with backend="triton"; results are measured by the error budget of
fusemesh.kernels.testing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from fusemesh.kernels import backends
from fusemesh.kernels.measure.cases import Case
from fusemesh.kernels.runtime.launch import TARGETS, any_device, assume_target, intercept
from fusemesh.kernels.testing import budget, poison


def verify(case: Case, device: torch.device | str, *, repeats: int = 0, seed: int = 0) -> list[budget.Budget]:
    """Run one case on ``device``, ``repeats`` times where that is more than once; return how far its results are off.

    Raises:
        AssertionError: outside the budget, bits that differ between repeats, or a backend that was not the one meant.
    """
    x = case.inputs(device, seed)
    want = case.expected(x)
    before = backends.call_counts()
    with poison.poisoned_empty():
        outputs = case.compute(x, "triton")
    for op in case.counted:
        calls = backends.call_counts().get((op, "triton"), 0) - before.get((op, "triton"), 0)
        if calls != 1:
            raise AssertionError(f"{op}: expected 1 call of the triton backend, counted {calls}")
    measured = case.check(outputs, want)
    for repeat in range(1, repeats):
        again = case.compute(x, "triton")
        differing = [name for name in outputs if not torch.equal(_bits(again[name]), _bits(outputs[name]))]
        if differing:
            raise AssertionError(f"repeat {repeat} differs in the bits of {', '.join(differing)}")
    return measured


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of ``x`` as integers: NaN, which a cache holds in slots without a key, is not equal to itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Within the block the triton backend takes CPU tensors, and launches are recorded by name and not started."""
    names: list[str] = []

    def hook(kernel: Callable[..., None], grid: object, args: object, kwargs: object) -> None:
        names.append(kernel.__name__)

    with any_device(), assume_target(TARGETS["sm_90"]), intercept(hook):
        yield names
