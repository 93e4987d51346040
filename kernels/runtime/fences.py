"""Fences that Triton's compiler leaves out, as a jit function that kernels call where they load what they multiply."""

from __future__ import annotations

import re

import triton
import triton.language as tl

from .. import env

VERSION = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:3])
# cp.async writes through the generic proxy, and products read through the asynchronous one: PTX asks for a fence
# between. Up to 3.7.0 Triton issues none; the interpreter has no proxies. On sm_100 its pipeliner fails at the assembly
# (products there wait in tensor memory), so that kernels for sm_100 stay without the fence before 3.7.1.
LEFT_OUT: tl.constexpr = tl.constexpr(VERSION < (3, 7, 1) and not env.INTERPRET)


@triton.jit
def fence_copies():
    """Let the products that follow see what was copied to shared memory for the loads before."""
    if LEFT_OUT and tl.target_info.cuda_capability_geq(9, 0) and not tl.target_info.cuda_capability_geq(10, 0):
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
