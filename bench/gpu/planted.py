"""A kernel with a bug, for the memcheck stage: it writes one element beyond a tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusemesh.kernels.runtime.launch import launch


@triton.jit
def write_beyond_kernel(p_x, size):
    """Write to the element after the last."""
    tl.store(p_x + size, 1.0)


def write_beyond(x: torch.Tensor) -> None:
    """Write to the element after the last of ``x``, which is contiguous."""
    launch(write_beyond_kernel, (1,), x, x.numel())
