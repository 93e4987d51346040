"""A peer for the sweep: attention as Triton's tutorial on fused attention teaches it, forward only.

Written from the published algorithm: FlashAttention-2's forward (Dao, arXiv:2307.08691, algorithm 1) with the
tutorial's structure: the scale folded with log2(e) into one factor so that softmax runs on exp2, and under a causal
mask two stages, first the key blocks wholly before the queries without a mask, then those on the diagonal with one. As
in the tutorial, lengths are multiples of the block and D is a power of two; there is no GQA, no bias and no window.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from fusemesh.kernels.measure import time_call
from fusemesh.kernels.measure.cases import AttentionCase
from fusemesh.kernels.measure.cases.common import Tensors
from fusemesh.kernels.measure.contest import Contender
from fusemesh.kernels.runtime.launch import launch

NAME = "triton tutorial"
# (BLOCK_M, BLOCK_N, num_warps, num_stages): some of those that the tutorial's autotuner tries.
TILES = ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 4, 3))
HEAD_DIMS = (16, 32, 64, 128, 256)


@triton.jit
def _key_blocks(
    b_acc, b_l, b_m, b_q, p_k, p_v, factor, i_from, i_to, i_m, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Take the key blocks from ``i_from`` to ``i_to`` into the accumulators."""
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D)
    for i_n in tl.range(i_from, i_to, BLOCK_N):
        i_n = tl.multiple_of(i_n, BLOCK_N)
        o_n = i_n + tl.arange(0, BLOCK_N)
        # [D, N]
        b_k = tl.load(p_k + o_n[None, :] * D + o_d[:, None])
        # [M, N]
        b_s = tl.dot(b_q, b_k)
        if IS_DIAGONAL:
            b_s = tl.where(o_m[:, None] >= o_n[None, :], b_s * factor, -1.0e6)
            b_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_s -= b_new[:, None]
        else:
            b_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
            b_s = b_s * factor - b_new[:, None]
        b_p = tl.exp2(b_s)
        b_alpha = tl.exp2(b_m - b_new)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        # [N, D]
        b_v = tl.load(p_v + o_n[:, None] * D + o_d[None, :])
        # [M, D]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])
        b_m = b_new
    return b_acc, b_l, b_m


@triton.jit
def tutorial_attention_kernel(
    p_q, p_k, p_v, p_out, p_lse, factor, S, D: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Grid: (S / BLOCK_M, B * H); tensors [B, H, S, D], contiguous."""
    i_m = tl.program_id(0) * BLOCK_M
    i_head = tl.program_id(1).to(tl.int64) * S * D
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_rows = o_m[:, None] * D + tl.arange(0, D)[None, :]
    # [M, D]
    b_q = tl.load(p_q + i_head + o_rows)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, D], tl.float32)
    p_k += i_head
    p_v += i_head
    before = i_m if IS_CAUSAL else S
    b_acc, b_l, b_m = _key_blocks(
        b_acc, b_l, b_m, b_q, p_k, p_v, factor, 0, before, i_m, D, BLOCK_M, BLOCK_N, IS_DIAGONAL=False
    )
    if IS_CAUSAL:
        b_acc, b_l, b_m = _key_blocks(
            b_acc, b_l, b_m, b_q, p_k, p_v, factor, i_m, i_m + BLOCK_M, i_m, D, BLOCK_M, BLOCK_N, IS_DIAGONAL=True
        )
    tl.store(p_out + i_head + o_rows, (b_acc / b_l[:, None]).to(p_out.dtype.element_ty))
    # Base 2, as the tutorial keeps it for its backward.
    tl.store(p_lse + tl.program_id(1).to(tl.int64) * S + o_m, b_m + tl.log2(b_l))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, tile: tuple[int, int, int, int]
) -> torch.Tensor:
    """out [B, H, S, D], all tensors of one shape, with one of :data:`TILES`.

    Raises:
        ValueError: a shape that the tutorial's kernel does not take.
    """
    B, H, S, D = q.shape
    if q.shape != k.shape or k.shape != v.shape or D not in HEAD_DIMS or S % max(tile[:2]):
        raise ValueError(
            f"q, k, v: expected one shape with D of {HEAD_DIMS} and a length that {max(tile[:2])} divides, received "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; give it such a case"
        )
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = torch.empty_like(q), torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    factor = D**-0.5 / math.log(2)
    block_m, block_n, warps, stages = tile
    launch(
        tutorial_attention_kernel,
        (S // block_m, B * H),
        q,
        k,
        v,
        out,
        lse,
        factor,
        S,
        D=D,
        IS_CAUSAL=causal,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def contender(case: AttentionCase) -> Contender | None:
    """The tutorial as a contender in a case, or None where it cannot run; its fastest tile is found at its first call.

    It knows no GQA: repeating the heads is what its user pays, so it is timed.
    """
    if case.D not in HEAD_DIMS or case.Dv != case.D or case.Sq != case.Sk or case.Sq % 128:
        return None
    groups = case.H // case.Hkv
    chosen: list[tuple[int, int, int, int]] = []

    def forward(x: Tensors) -> torch.Tensor:
        k, v = (x[n] if groups == 1 else x[n].repeat_interleave(groups, 1) for n in ("k", "v"))
        if not chosen:
            chosen.append(_fastest(x["q"], k, v, case.causal))
        return attention(x["q"], k, v, causal=case.causal, tile=chosen[0])

    return Contender(NAME, False, forward, differentiable=False)


def _fastest(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[int, int, int, int]:
    times: dict[tuple[int, int, int, int], float] = {}
    failures: list[Exception] = []
    for tile in TILES:
        timing: dict[str, Any] = {"seconds": 0.02, "least": 3, "pause": 0.0}
        try:
            call = functools.partial(attention, q, k, v, causal=causal, tile=tile)
            times[tile] = time_call(call, q.device, **timing).median
        except Exception as error:  # more shared memory than this GPU has
            failures.append(error)
    if not times:
        raise failures[0]
    return min(times, key=times.__getitem__)
