"""Attention forward in Triton: one program a block of queries, online softmax over the keys it sees.

Source: Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 1. The loop over keys runs in three parts, so that tiles
inside the window pay for no mask (masks.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.launch import launch
from ..call.options import Call
from ..call.tensors import empty_laid_out_like
from . import tiles
from .device.dropout import kept
from .device.loads import load_rows, store_rows
from .device.masks import key_range, range_part
from .device.place import first_row, place_of
from .device.scores import descale_of, modify_scores
from .device.shown import shown_range, shown_tile, tiles_of
from .device.softmax import finish, online_step
from .inputs import describe_call


@triton.jit
def _visit_keys(
    sums,
    b_q,
    k,
    v,
    scores,
    softmax,
    shown,
    mod_inputs,
    place,
    descale,
    i_m,
    ranges,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    """Take the key tiles of one of the ``ranges`` into the accumulators; ``k`` and ``v`` are rows (loads.py)."""
    b_acc, b_m, b_l = sums
    IS_EDGE: tl.constexpr = PART != 1
    # [M, 1]
    o_m = (i_m + tl.arange(0, BLOCK_M))[:, None]
    STEP: tl.constexpr = 1 if MODE.mask_code & 2 else BLOCK_N
    p_tiles = tiles_of(shown, place, i_m // BLOCK_M, MODE)
    i_from, i_to = range_part(ranges, PART)
    i_from, i_to = shown_range(p_tiles, i_from, i_to, place.Sk, MODE, 2, BLOCK_N)
    for i_loop in tl.range(i_from, i_to, STEP):
        i_n = shown_tile(p_tiles, i_loop, shown, MODE, 2, BLOCK_N)
        # [1, N]
        o_n = (i_n + tl.arange(0, BLOCK_N))[None, :]
        # [N, D]
        b_k = load_rows(k, i_n, place.Sk, BLOCK_N, MODE.d, MODE.block_d, IS_EDGE)
        # [M, N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=MODE.precision)
        if MODE.has_descale:
            b_s *= descale
        b_s = modify_scores(b_s, scores, mod_inputs, place, o_m, o_n, MODE, IS_EDGE, True)
        b_m, b_l, b_p, b_alpha = online_step(b_m, b_l, b_s, softmax.factor, MODE, IS_EDGE or MODE.has_tiles)
        if MODE.has_dropout:
            # Only what meets v is dropped; the sums are those of all probabilities.
            b_p = tl.where(kept(softmax, place, o_m, o_n), b_p, 0.0)
        # [N, Dv]
        b_v = load_rows(v, i_n, place.Sk, BLOCK_N, MODE.dv, MODE.block_dv, IS_EDGE)
        if MODE.has_descale:
            # Every e4m3 number is one of bf16 too; the probabilities are not worth three bits.
            b_v = b_v.to(tl.bfloat16)
        # [M, Dv]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=MODE.precision)
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=["origin_q", "origin_k", "origin_h", "origin_b", "lo", "hi", "Sq", "Sk", "total_q"])
def attention_forward_kernel(
    views,
    p_lse,
    scores,
    softmax,
    shown,
    positions,
    mod_inputs,
    heads,
    origin_q,
    origin_k,
    origin_h,
    origin_b,
    lo,
    hi,
    Sq,
    Sk,
    total_q,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: block_m queries of one head. Grid: cdiv(Sq, block_m) * B * H, the blocks of a head side by side.

    ``views``: q, k, v and out, each with its strides of batches, heads and rows, and the pointer of what rounding takes
    from out, laid out as out is, None if that is not kept; ``heads``: H and GROUP.
    Packed (MODE.has_lengths): Sq and Sk are those of the longest sequence, and lse is [H, total_q].
    """
    q, k, v, out, p_rest = views[0:4], views[4:8], views[8:12], views[12:16], views[16]
    H, GROUP = heads
    blocks = tl.cdiv(Sq, BLOCK_M)
    i_block = tl.program_id(0) % blocks
    i_bh = tl.program_id(0) // blocks
    if MODE.has_right:
        # Under a causal mask the last blocks see most keys; starting them first evens out the end of the grid.
        i_block = blocks - 1 - i_block
    i_m = i_block * BLOCK_M
    i_b = i_bh // H
    i_h = i_bh % H
    place = place_of(positions, i_b, i_h, Sq, Sk, lo, hi, origin_q, origin_k, origin_h, origin_b, MODE)
    i_row = i_bh.to(tl.int64) * Sq
    if MODE.has_lengths:
        if i_m >= place.Sq:
            return
        i_row = tl.cast(i_h, tl.int64) * total_q + place.first_q
    q_rows = (first_row(q, place, i_h, place.first_q, MODE), q[3])
    k_rows = (first_row(k, place, i_h // GROUP, place.first_k, MODE), k[3])
    v_rows = (first_row(v, place, i_h // GROUP, place.first_k, MODE), v[3])
    out_rows = (first_row(out, place, i_h, place.first_q, MODE), out[3])

    ranges = key_range(i_m, place, MODE, BLOCK_M, BLOCK_N)
    descale_qk = 1.0
    descale_v = 1.0
    if MODE.has_descale:
        descale_qk, descale_v = descale_of(scores.p_descale, i_b, i_h, H, GROUP)
    # [M, D]
    b_q = load_rows(q_rows, i_m, place.Sq, BLOCK_M, MODE.d, MODE.block_d, True)
    # [M]
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    # [M, Dv]
    BLOCK_DV: tl.constexpr = MODE.block_dv
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for PART in tl.static_range(3):
        if PART > 0 or MODE.has_left:
            b_acc, b_m, b_l = _visit_keys(
                (b_acc, b_m, b_l),
                b_q,
                k_rows,
                v_rows,
                scores,
                softmax,
                shown,
                mod_inputs,
                place,
                descale_qk,
                i_m,
                ranges,
                MODE,
                BLOCK_M,
                BLOCK_N,
                PART,
            )
    # [M, Dv], [M]
    b_out, b_lse = finish(b_acc, b_m, b_l, softmax.p_sinks, i_h, MODE)
    if MODE.has_dropout:
        b_out *= softmax.keep_scale
    if MODE.has_descale:
        b_out *= descale_v
    if p_rest is not None:
        # Before out, which needs fewer registers.
        rest_rows = (first_row((p_rest, out[1], out[2], out[3]), place, i_h, place.first_q, MODE), out[3])
        b_rest = b_out - b_out.to(out[0].dtype.element_ty).to(tl.float32)
        store_rows(rest_rows, b_rest, i_m, place.Sq, BLOCK_M, MODE.dv, MODE.block_dv)
    store_rows(out_rows, b_out, i_m, place.Sq, BLOCK_M, MODE.dv, MODE.block_dv)
    o_m = i_m + tl.arange(0, BLOCK_M)
    tl.store(p_lse + i_row + o_m, b_lse, mask=o_m < place.Sq)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, *, keep_rest: bool = False
) -> tuple[torch.Tensor, ...]:
    """Attention and its log-sum-exp on the GPU that holds the tensors (or in Triton's interpreter).

    Args:
        q: [B, H, Sq, D], fp32, fp16, bf16 or fp8 e4m3; D and Dv from 16 to 256.
        k: [B, Hkv, Sk, D], H a multiple of Hkv.
        v: [B, Hkv, Sk, Dv].
        call: everything else. Packed tensors have B = 1; mask and bias are then for the batch of their sequences and
            the longest lengths.
        keep_rest: also return what rounding took from out, in as much memory; for fp16 and bf16.

    Returns:
        out [B, H, Sq, Dv] in q's dtype (bf16 for fp8) and order of dimensions in memory, and lse [B, H, Sq], natural
        log, fp32; with ``keep_rest`` also the rest of out, laid out as out is.

    q, k or v whose last stride is not 1 is copied; nothing else is.

    Raises:
        ValueError: the call is beyond the limits of these kernels (backend.py).
    """
    gpu = describe_call(q, k, v, call)
    out = empty_laid_out_like(q, v.shape[-1])
    rest = empty_laid_out_like(q, v.shape[-1]) if keep_rest else None
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if call.packed is not None:
        # Rows that belong to no sequence are padding.
        out.zero_()
        if rest is not None:
            rest.zero_()
        lse.fill_(float("-inf"))
    mode = gpu.mode
    tile = tiles.choose_forward(gpu.target, q.dtype, mode.block_d, mode.block_dv, *mode.tile_dims, keep_rest=keep_rest)
    launch(
        attention_forward_kernel,
        (triton.cdiv(gpu.seq_q, tile.block_m) * gpu.batch * gpu.heads,),
        (*gpu.views(gpu.q, gpu.k, gpu.v, out), rest),
        lse,
        *gpu.arguments(tile, along_keys=True),
        q.shape[2],
        MODE=gpu.mode,
        **tile.launch_arguments(),
    )
    return (out, lse) if rest is None else (out, lse, rest)
