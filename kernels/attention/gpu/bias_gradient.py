"""Gradient of an attention bias that varies along queries and keys, in Triton: see triton_backward.py.

Its own pass over the scores, because a bias that is broadcast over batches or heads sums their gradients, and the sum
belongs in one program to be the same on every run, without a Sq x Sk buffer for each head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.launch import launch
from . import tiles
from .device.dropout import kept
from .device.loads import at_head, load_row_values, load_rows, padded
from .device.masks import key_range, origins, window_bounds
from .device.packed import at_row, row_values, sequence
from .device.scores import modify_scores
from .device.softmax import probabilities
from .inputs import Call
from .mask_tiles import is_shown, tiles_of, with_tiles


@triton.jit
def _term(
    p_q,
    p_k,
    p_v,
    p_do,
    p_shift,
    p_delta,
    strides_q,
    strides_k,
    strides_v,
    strides_do,
    scores,
    aux,
    numbers,
    at,
    i_b,
    i_h,
    i_m,
    i_n,
    i_row,
    first_q,
    first_k,
    lo,
    hi,
    GROUP,
    Sq,
    Sk,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """ds of one tile of one batch and head, [M, N]."""
    # [M], [N]
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_n = i_n + tl.arange(0, BLOCK_N)
    p_q_head = at_row(at_head(p_q, strides_q[0], strides_q[1], i_b, i_h), strides_q[2], first_q, MODE)
    p_do_head = at_row(at_head(p_do, strides_do[0], strides_do[1], i_b, i_h), strides_do[2], first_q, MODE)
    p_k_head = at_row(at_head(p_k, strides_k[0], strides_k[1], i_b, i_h // GROUP), strides_k[2], first_k, MODE)
    p_v_head = at_row(at_head(p_v, strides_v[0], strides_v[1], i_b, i_h // GROUP), strides_v[2], first_k, MODE)
    b_shift, b_delta = load_row_values(p_shift + i_row, p_delta + i_row, i_m, BLOCK_M)
    # [M, D], [N, D], [M, N]
    b_q = load_rows(p_q_head, strides_q[2], i_m, Sq, BLOCK_M, MODE.d, MODE.block_d, True)
    b_k = load_rows(p_k_head, strides_k[2], i_n, Sk, BLOCK_N, MODE.d, MODE.block_d, True)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=MODE.precision)
    b_s = modify_scores(
        b_s, scores, aux, numbers, at, i_b, i_h, o_m[:, None], o_n[None, :], lo, hi, Sq, Sk, MODE, True, True
    )
    b_p = probabilities(b_s, b_shift[:, None], scores.factor, MODE.natural)
    # [M, Dv], [N, Dv], [M, N]
    b_do = load_rows(p_do_head, strides_do[2], i_m, Sq, BLOCK_M, MODE.dv, MODE.block_dv, True)
    b_v = load_rows(p_v_head, strides_v[2], i_n, Sk, BLOCK_N, MODE.dv, MODE.block_dv, True)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=MODE.precision)
    if MODE.has_dropout:
        b_keep = kept(scores.p_seed, scores.threshold, at, i_b, i_h, o_m[:, None], o_n[None, :])
        b_dp = tl.where(b_keep, b_dp * scores.keep_scale, 0.0)
    return b_p * (b_dp - b_delta[:, None])


@triton.jit(do_not_specialize=["origin_q", "origin_k", "origin_h", "origin_b", "lo", "hi", "Sq", "Sk"])
def attention_dbias_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_shift,
    p_delta,
    p_origin,
    p_dbias,
    strides_q,
    strides_k,
    strides_v,
    strides_do,
    strides_dbias,
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
    HEADS,
    SUM_B,
    SUM_H,
    Sq,
    Sk,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a tile of a bias gradient [Bb, HEADS, Sq, Sk], summed over SUM_B batches and SUM_H heads.

    Grid: cdiv(Sk, BLOCK_N) * cdiv(Sq, BLOCK_M) * Bb * HEADS.
    """
    blocks_n = tl.cdiv(Sk, BLOCK_N)
    blocks_m = tl.cdiv(Sq, BLOCK_M)
    i_n = tl.program_id(0) % blocks_n * BLOCK_N
    i_m = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    i_bh = tl.program_id(0) // blocks_n // blocks_m
    i_bias_b = i_bh // HEADS
    i_bias_h = i_bh % HEADS
    # [M], [N]
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_n = i_n + tl.arange(0, BLOCK_N)
    terms = SUM_B * SUM_H
    at = origins(origin_q, origin_k, origin_h, origin_b, p_origin, MODE.has_origin)
    if not MODE.has_lengths:
        lo, hi = window_bounds(lo, hi, p_origin, Sq, Sk, MODE.has_origin)
        start, _, _, end = key_range(i_m, lo, hi, Sq, Sk, MODE, BLOCK_M, BLOCK_N)
        terms = tl.where((i_n >= start) & (i_n < end), terms, 0)
    # [M, N]
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_term in tl.range(0, terms):
        i_b = i_bias_b * SUM_B + i_term // SUM_H
        i_h = i_bias_h * SUM_H + i_term % SUM_H
        first_q, first_k, n_q, n_k, own_lo, own_hi, own_q = sequence(scores, i_b, Sq, Sk, lo, hi, origin_q, MODE)
        i_row = tl.cast(i_b * H + i_h, tl.int64) * padded(Sq)
        own_at = at
        visible = True
        if MODE.has_lengths:
            i_row = row_values(i_b, i_h, H, n_q, first_q)
            own_lo, own_hi = window_bounds(own_lo, own_hi, p_origin, n_q, n_k, MODE.has_origin)
            own_at = origins(own_q, origin_k, origin_h, origin_b, p_origin, MODE.has_origin)
            start, _, _, end = key_range(i_m, own_lo, own_hi, n_q, n_k, MODE, BLOCK_M, BLOCK_N)
            visible = (i_m < n_q) & (i_n >= start) & (i_n < end)
        if MODE.mask_dims is not None:
            p_tiles = tiles_of(scores, i_b, i_h, i_m // BLOCK_M, MODE)
            visible = is_shown(p_tiles, i_n, n_k, MODE, BLOCK_N) & visible
        if visible:
            b_dbias += _term(
                p_q,
                p_k,
                p_v,
                p_do,
                p_shift,
                p_delta,
                strides_q,
                strides_k,
                strides_v,
                strides_do,
                scores,
                aux,
                numbers,
                own_at,
                i_b,
                i_h,
                i_m,
                i_n,
                i_row,
                first_q,
                first_k,
                own_lo,
                own_hi,
                GROUP,
                n_q,
                n_k,
                MODE,
                BLOCK_M,
                BLOCK_N,
            )
    p_tile = at_head(p_dbias, strides_dbias[0], strides_dbias[1], i_bias_b, i_bias_h)
    p_tile += o_m.to(tl.int64)[:, None] * strides_dbias[2] + o_n[None, :]
    m_tile = (o_m < Sq)[:, None] & (o_n < Sk)[None, :]
    tl.store(p_tile, b_dbias.to(p_dbias.dtype.element_ty), mask=m_tile)


def bias_gradient(
    call: Call,
    do: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """ds summed to the shape of ``bias``, which is that of the scores in its last two dimensions; in bias's dtype.

    Args:
        call: the call whose backward this is.
        do: gradient of out, unit last stride.
        shift, delta: what ``attention_delta_kernel`` wrote.
    """
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    tile = tiles.choose_dbias(call.target, call.q.dtype, call.mode.block_d, call.mode.block_dv)
    batches, heads = bias.shape[:2]
    launch(
        attention_dbias_kernel,
        (triton.cdiv(call.seq_k, tile.block_n) * triton.cdiv(call.seq_q, tile.block_m) * batches * heads,),
        call.q,
        call.k,
        call.v,
        do,
        shift,
        delta,
        call.origin,
        dbias,
        *(call.strides(x) for x in (call.q, call.k, call.v, do)),
        dbias.stride()[:3],
        with_tiles(call.scores, mask, tile.block_m, tile.block_n, along_keys=True),
        call.aux,
        call.numbers,
        *call.origins,
        call.lo,
        call.hi,
        call.heads,
        call.group,
        heads,
        call.batch // max(batches, 1),
        call.heads // max(heads, 1),
        call.seq_q,
        call.seq_k,
        MODE=call.mode,
        **tile.launch_arguments(),
    )
    return dbias
