"""Attention forward in Triton: one program a block of queries, online softmax over the keys it sees.

Source: Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 1. The loop over keys runs in three parts, so that tiles
inside the window pay for no mask (masks.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.launch import launch
from ..call import options as attention
from ..call.tensors import empty_laid_out_like
from . import tiles
from .device.dropout import kept
from .device.loads import at_head, load_rows, store_rows
from .device.masks import key_range, origins, range_part, window_bounds
from .device.packed import at_row, sequence
from .device.scores import descale_of, modify_scores
from .device.softmax import finish, online_step
from .inputs import prepare
from .mask_tiles import shown_range, shown_tile, tiles_of, with_tiles


@triton.jit
def _visit_keys(
    b_acc,
    b_m,
    b_l,
    b_q,
    p_k,
    p_v,
    stride_k,
    stride_v,
    scores,
    p_tiles,
    aux,
    numbers,
    at,
    descale,
    i_b,
    i_h,
    i_m,
    i_from,
    i_to,
    lo,
    hi,
    Sq,
    Sk,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """Take the key tiles from ``i_from`` to ``i_to`` into the accumulators."""
    # [M, 1]
    o_m = (i_m + tl.arange(0, BLOCK_M))[:, None]
    STEP: tl.constexpr = 1 if MODE.mask_code & 2 else BLOCK_N
    i_from, i_to = shown_range(p_tiles, i_from, i_to, Sk, MODE, 2, BLOCK_N)
    for i_loop in tl.range(i_from, i_to, STEP):
        i_n = shown_tile(p_tiles, i_loop, scores, MODE, 2, BLOCK_N)
        # [1, N]
        o_n = (i_n + tl.arange(0, BLOCK_N))[None, :]
        # [N, D]
        b_k = load_rows(p_k, stride_k, i_n, Sk, BLOCK_N, MODE.d, MODE.block_d, IS_EDGE)
        # [M, N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=MODE.precision)
        if MODE.has_descale:
            b_s *= descale
        b_s = modify_scores(b_s, scores, aux, numbers, at, i_b, i_h, o_m, o_n, lo, hi, Sq, Sk, MODE, IS_EDGE, True)
        b_m, b_l, b_p, b_alpha = online_step(b_m, b_l, b_s, scores.factor, MODE.natural, IS_EDGE or MODE.has_tiles)
        if MODE.has_dropout:
            # Only what meets v is dropped; the sums are those of all probabilities.
            b_p = tl.where(kept(scores.p_seed, scores.threshold, at, i_b, i_h, o_m, o_n), b_p, 0.0)
        # [N, Dv]
        b_v = load_rows(p_v, stride_v, i_n, Sk, BLOCK_N, MODE.dv, MODE.block_dv, IS_EDGE)
        if MODE.has_descale:
            # Every e4m3 number is one of bf16 too; the probabilities are not worth three bits.
            b_v = b_v.to(tl.bfloat16)
        # [M, Dv]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=MODE.precision)
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=["origin_q", "origin_k", "origin_h", "origin_b", "lo", "hi", "Sq", "Sk", "total_q"])
def attention_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_origin,
    p_out,
    p_lse,
    strides_q,
    strides_k,
    strides_v,
    strides_out,
    scores,
    aux,
    numbers,
    origin_q,
    origin_k,
    origin_h,
    origin_b,
    lo,
    hi,
    H,
    GROUP,
    Sq,
    Sk,
    total_q,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: block_m queries of one head. Grid: cdiv(Sq, block_m) * B * H, the blocks of a head side by side.

    Packed (MODE.has_lengths): Sq and Sk are those of the longest sequence, and lse is [H, total_q].
    """
    blocks = tl.cdiv(Sq, BLOCK_M)
    i_block = tl.program_id(0) % blocks
    i_bh = tl.program_id(0) // blocks
    if MODE.has_right:
        # Under a causal mask the last blocks see most keys; starting them first evens out the end of the grid.
        i_block = blocks - 1 - i_block
    i_m = i_block * BLOCK_M
    i_b = i_bh // H
    i_h = i_bh % H
    first_q, first_k, Sq, Sk, lo, hi, origin_q = sequence(scores, i_b, Sq, Sk, lo, hi, origin_q, MODE)
    i_row = i_bh.to(tl.int64) * Sq
    if MODE.has_lengths:
        if i_m >= Sq:
            return
        i_row = tl.cast(i_h, tl.int64) * total_q + first_q
    p_q = at_row(at_head(p_q, strides_q[0], strides_q[1], i_b, i_h), strides_q[2], first_q, MODE)
    p_k = at_row(at_head(p_k, strides_k[0], strides_k[1], i_b, i_h // GROUP), strides_k[2], first_k, MODE)
    p_v = at_row(at_head(p_v, strides_v[0], strides_v[1], i_b, i_h // GROUP), strides_v[2], first_k, MODE)
    p_out = at_row(at_head(p_out, strides_out[0], strides_out[1], i_b, i_h), strides_out[2], first_q, MODE)

    lo, hi = window_bounds(lo, hi, p_origin, Sq, Sk, MODE.has_origin)
    at = origins(origin_q, origin_k, origin_h, origin_b, p_origin, MODE.has_origin)
    start, full_start, full_end, end = key_range(i_m, lo, hi, Sq, Sk, MODE, BLOCK_M, BLOCK_N)
    descale_qk = 1.0
    descale_v = 1.0
    if MODE.has_descale:
        descale_qk, descale_v = descale_of(scores.p_descale, i_b, i_h, H, GROUP)
    # [M, D]
    b_q = load_rows(p_q, strides_q[2], i_m, Sq, BLOCK_M, MODE.d, MODE.block_d, True)
    # [M]
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    # [M, Dv]
    BLOCK_DV: tl.constexpr = MODE.block_dv
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for PART in tl.static_range(3):
        i_from, i_to = range_part(start, full_start, full_end, end, PART)
        if PART > 0 or MODE.has_left:
            b_acc, b_m, b_l = _visit_keys(
                b_acc,
                b_m,
                b_l,
                b_q,
                p_k,
                p_v,
                strides_k[2],
                strides_v[2],
                scores,
                tiles_of(scores, i_b, i_h, i_block, MODE),
                aux,
                numbers,
                at,
                descale_qk,
                i_b,
                i_h,
                i_m,
                i_from,
                i_to,
                lo,
                hi,
                Sq,
                Sk,
                MODE,
                BLOCK_M,
                BLOCK_N,
                IS_EDGE=PART != 1,
            )
    # [M, Dv], [M]
    b_out, b_lse = finish(b_acc, b_m, b_l, scores.p_sinks, i_h, MODE.natural, MODE.has_sinks)
    if MODE.has_dropout:
        b_out *= scores.keep_scale
    if MODE.has_descale:
        b_out *= descale_v
    store_rows(p_out, b_out, strides_out[2], i_m, Sq, BLOCK_M, MODE.dv, MODE.block_dv)
    o_m = i_m + tl.arange(0, BLOCK_M)
    tl.store(p_lse + i_row + o_m, b_lse, mask=o_m < Sq)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: attention.Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp on the GPU that holds the tensors (or in Triton's interpreter).

    Args:
        q: [B, H, Sq, D], fp32, fp16, bf16 or fp8 e4m3; D and Dv from 16 to 256.
        k: [B, Hkv, Sk, D], H a multiple of Hkv.
        v: [B, Hkv, Sk, Dv].
        options: everything else. Packed tensors have B = 1; mask and bias are then for the batch of their sequences and
            the longest lengths.

    Returns:
        out [B, H, Sq, Dv] in q's dtype (bf16 for fp8) and order of dimensions in memory, and lse [B, H, Sq], natural
        log, fp32.

    q, k or v whose last stride is not 1 is copied; nothing else is.

    Raises:
        ValueError: a dtype or head dimension that these kernels do not have.
    """
    call = prepare(q, k, v, options)
    out = empty_laid_out_like(q, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if options.packed is not None:
        # Rows that belong to no sequence are padding.
        out.zero_()
        lse.fill_(float("-inf"))
    mode = call.mode
    tile = tiles.choose_forward(call.target, q.dtype, mode.block_d, mode.block_dv, *mode.tile_dims)
    launch(
        attention_forward_kernel,
        (triton.cdiv(call.seq_q, tile.block_m) * call.batch * call.heads,),
        call.q,
        call.k,
        call.v,
        call.origin,
        out,
        lse,
        *(call.strides(x) for x in (call.q, call.k, call.v, out)),
        with_tiles(call.scores, options.mask, tile.block_m, tile.block_n, along_keys=True),
        call.aux,
        call.numbers,
        *call.origins,
        call.lo,
        call.hi,
        call.heads,
        call.group,
        call.seq_q,
        call.seq_k,
        q.shape[2],
        MODE=call.mode,
        **tile.launch_arguments(),
    )
    return out, lse
