"""Gradient of an attention bias that varies along queries and keys, in Triton: see backward.py.

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
from .device.loads import at_head, load_row_values, load_rows
from .device.masks import key_range
from .device.place import first_row, first_row_value, place_of
from .device.scores import modify_scores
from .device.shown import is_shown, tiles_of
from .device.softmax import probabilities
from .inputs import GpuCall
from .mode import RowValues


@triton.jit
def _term(
    views,
    values,
    i_values,
    scores,
    softmax,
    mod_inputs,
    place,
    GROUP,
    i_m,
    i_n,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """ds of one tile of one batch and head, [M, N]; ``views``: q, k, v and do first."""
    q, k, v, do = views[0:4], views[4:8], views[8:12], views[12:16]
    # [M, 1], [1, N]
    o_m = (i_m + tl.arange(0, BLOCK_M))[:, None]
    o_n = (i_n + tl.arange(0, BLOCK_N))[None, :]
    q_rows = (first_row(q, place, place.i_h, place.first_q, MODE), q[3])
    do_rows = (first_row(do, place, place.i_h, place.first_q, MODE), do[3])
    k_rows = (first_row(k, place, place.i_h // GROUP, place.first_k, MODE), k[3])
    v_rows = (first_row(v, place, place.i_h // GROUP, place.first_k, MODE), v[3])
    b_before, b_after, b_delta = load_row_values(values, i_values, i_m, MODE, BLOCK_M)
    # [M, D], [N, D], [M, N]
    b_q = load_rows(q_rows, i_m, place.Sq, BLOCK_M, MODE.d, MODE.block_d, True)
    b_k = load_rows(k_rows, i_n, place.Sk, BLOCK_N, MODE.d, MODE.block_d, True)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=MODE.precision)
    b_s = modify_scores(b_s, scores, mod_inputs, place, o_m, o_n, MODE, True, True)
    b_p = probabilities(b_s, b_before[:, None], b_after[:, None], softmax.factor, MODE)
    # [M, Dv], [N, Dv], [M, N]
    b_do = load_rows(do_rows, i_m, place.Sq, BLOCK_M, MODE.dv, MODE.block_dv, True)
    b_v = load_rows(v_rows, i_n, place.Sk, BLOCK_N, MODE.dv, MODE.block_dv, True)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=MODE.precision)
    if MODE.has_dropout:
        b_dp = tl.where(kept(softmax, place, o_m, o_n), b_dp * softmax.keep_scale, 0.0)
    return b_p * (b_dp - b_delta[:, None])


@triton.jit(do_not_specialize=["origin_q", "origin_k", "origin_h", "origin_b", "lo", "hi", "Sq", "Sk"])
def attention_dbias_kernel(
    views,
    values,
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
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a tile of a bias gradient [Bb, HEADS, Sq, Sk], summed over SUM_B batches and SUM_H heads.

    ``views``: q, k, v, do and dbias, each with its strides of batches, heads and rows; ``heads``: H, GROUP, HEADS,
    SUM_B and SUM_H.
    Grid: cdiv(Sk, BLOCK_N) * cdiv(Sq, BLOCK_M) * Bb * HEADS.
    """
    dbias = views[16:20]
    H, GROUP, HEADS, SUM_B, SUM_H = heads
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
    if not MODE.has_lengths:
        # All batches and heads have the same window.
        first = place_of(positions, 0, 0, Sq, Sk, lo, hi, origin_q, origin_k, origin_h, origin_b, MODE)
        start, _, _, end = key_range(i_m, first, MODE, BLOCK_M, BLOCK_N)
        terms = tl.where((i_n >= start) & (i_n < end), terms, 0)
    # [M, N]
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_term in tl.range(0, terms):
        i_b = i_bias_b * SUM_B + i_term // SUM_H
        i_h = i_bias_h * SUM_H + i_term % SUM_H
        place = place_of(positions, i_b, i_h, Sq, Sk, lo, hi, origin_q, origin_k, origin_h, origin_b, MODE)
        visible = True
        if MODE.has_lengths:
            start, _, _, end = key_range(i_m, place, MODE, BLOCK_M, BLOCK_N)
            visible = (i_m < place.Sq) & (i_n >= start) & (i_n < end)
        if MODE.mask_dims is not None:
            p_tiles = tiles_of(shown, place, i_m // BLOCK_M, MODE)
            visible = is_shown(p_tiles, i_n, place.Sk, MODE, BLOCK_N) & visible
        if visible:
            i_values = first_row_value(place, H, MODE)
            b_dbias += _term(
                views,
                values,
                i_values,
                scores,
                softmax,
                mod_inputs,
                place,
                GROUP,
                i_m,
                i_n,
                MODE,
                BLOCK_M,
                BLOCK_N,
            )
    p_tile = at_head(dbias[0], dbias[1], dbias[2], i_bias_b, i_bias_h)
    p_tile += o_m.to(tl.int64)[:, None] * dbias[3] + o_n[None, :]
    m_tile = (o_m < Sq)[:, None] & (o_n < Sk)[None, :]
    tl.store(p_tile, b_dbias.to(dbias[0].dtype.element_ty), mask=m_tile)


def bias_gradient(call: GpuCall, do: torch.Tensor, values: RowValues, bias: torch.Tensor) -> torch.Tensor:
    """ds summed to the shape of ``bias``, which is that of the scores in its last two dimensions; in bias's dtype.

    Args:
        call: the call whose backward this is.
        do: gradient of out, unit last stride.
        values: what ``attention_delta_kernel`` wrote.
        bias: that of the call.
    """
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    tile = tiles.choose_dbias(call.target, call.q.dtype, call.mode.block_d, call.mode.block_dv)
    batches, heads = bias.shape[:2]
    sums = (heads, call.batch // max(batches, 1), call.heads // max(heads, 1))
    launch(
        attention_dbias_kernel,
        (triton.cdiv(call.seq_k, tile.block_n) * triton.cdiv(call.seq_q, tile.block_m) * batches * heads,),
        (*call.views(call.q, call.k, call.v, do), dbias, *dbias.stride()[:3]),
        values,
        *call.arguments(tile, *sums, along_keys=True),
        MODE=call.mode,
        **tile.launch_arguments(),
    )
    return dbias
