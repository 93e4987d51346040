"""A kernel of one line."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double_kernel(p_x, p_out, SIZE: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(p_out + o, tl.load(p_x + o) * 2)
