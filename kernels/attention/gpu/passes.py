"""The two passes of the attention backward over tiles of scores: dk and dv, then dq; see triton_backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .device.dropout import kept
from .device.loads import at_head, load_row_values, load_rows, padded, store_rows
from .device.masks import key_range, origins, query_range, range_part, window_bounds
from .device.packed import at_row, row_values, sequence
from .device.scores import modify_scores, score_gradient
from .device.softmax import probabilities
from .mask_tiles import shown_range, shown_tile, tiles_of


@triton.jit
def _visit_queries(
    b_dk,
    b_dv,
    b_columns,
    b_k,
    b_v,
    p_q,
    p_do,
    p_shift,
    p_delta,
    stride_q,
    stride_do,
    scores,
    p_tiles,
    aux,
    numbers,
    at,
    i_b,
    i_h,
    i_n,
    i_from,
    i_to,
    lo,
    hi,
    Sq,
    Sk,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """Add what the query tiles from ``i_from`` to ``i_to`` give to dk / scale, dv and the column sums of ds."""
    # [N, 1]; the scores are transposed here, so that they enter both products as left operand, straight from registers
    o_n = (i_n + tl.arange(0, BLOCK_N))[:, None]
    STEP: tl.constexpr = 1 if MODE.mask_code & 1 else BLOCK_M
    i_from, i_to = shown_range(p_tiles, i_from, i_to, Sq, MODE, 1, BLOCK_M)
    for i_loop in tl.range(i_from, i_to, STEP):
        i_m = shown_tile(p_tiles, i_loop, scores, MODE, 1, BLOCK_M)
        # [M]
        o_m = i_m + tl.arange(0, BLOCK_M)
        b_shift, b_delta = load_row_values(p_shift, p_delta, i_m, BLOCK_M)
        # [M, D]
        b_q = load_rows(p_q, stride_q, i_m, Sq, BLOCK_M, MODE.d, MODE.block_d, True)
        # [N, M]
        b_qk = tl.dot(b_k, tl.trans(b_q), input_precision=MODE.precision)
        b_s = modify_scores(
            b_qk, scores, aux, numbers, at, i_b, i_h, o_m[None, :], o_n, lo, hi, Sq, Sk, MODE, IS_EDGE, False
        )
        b_p = probabilities(b_s, b_shift[None, :], scores.factor, MODE.natural)
        # [M, Dv]
        b_do = load_rows(p_do, stride_do, i_m, Sq, BLOCK_M, MODE.dv, MODE.block_dv, True)
        # [N, M]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=MODE.precision)
        b_p_kept = b_p
        if MODE.has_dropout:
            b_keep = kept(scores.p_seed, scores.threshold, at, i_b, i_h, o_m[None, :], o_n)
            b_p_kept = tl.where(b_keep, b_p, 0.0)
            b_dp = tl.where(b_keep, b_dp * scores.keep_scale, 0.0)
        b_dv = tl.dot(b_p_kept.to(b_do.dtype), b_do, b_dv, input_precision=MODE.precision)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if HAS_COLUMNS:
            b_columns += tl.sum(b_ds, 1)
        b_ds = score_gradient(b_ds, b_qk, scores, aux, numbers, at, i_b, i_h, o_m[None, :], o_n, Sq, Sk, MODE, IS_EDGE)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=MODE.precision)
    return b_dk, b_dv, b_columns


@triton.jit(do_not_specialize=["origin_q", "origin_k", "origin_h", "origin_b", "lo", "hi", "Sq", "Sk"])
def attention_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_shift,
    p_delta,
    p_origin,
    p_dk,
    p_dv,
    p_columns,
    strides_q,
    strides_k,
    strides_v,
    strides_do,
    strides_dk,
    strides_dv,
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
    MODE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N keys of one key head. Grid: cdiv(Sk, BLOCK_N) * B * Hkv, the blocks of a head side by side.

    HAS_COLUMNS: also write the column sums of ds of every query head, [B, H, Sk], to ``p_columns``.
    Packed (MODE.has_lengths): Sq and Sk are those of the longest sequence.
    """
    blocks = tl.cdiv(Sk, BLOCK_N)
    i_n = tl.program_id(0) % blocks * BLOCK_N
    i_bh = tl.program_id(0) // blocks
    i_b = i_bh // (H // GROUP)
    i_hk = i_bh % (H // GROUP)
    longest = Sk
    first_q, first_k, Sq, Sk, lo, hi, origin_q = sequence(scores, i_b, Sq, Sk, lo, hi, origin_q, MODE)
    # Two conditions, because the first decides what is compiled.
    if MODE.has_lengths:  # noqa: SIM102
        if i_n >= Sk:
            return
    p_k = at_row(at_head(p_k, strides_k[0], strides_k[1], i_b, i_hk), strides_k[2], first_k, MODE)
    p_v = at_row(at_head(p_v, strides_v[0], strides_v[1], i_b, i_hk), strides_v[2], first_k, MODE)
    p_dk = at_row(at_head(p_dk, strides_dk[0], strides_dk[1], i_b, i_hk), strides_dk[2], first_k, MODE)
    p_dv = at_row(at_head(p_dv, strides_dv[0], strides_dv[1], i_b, i_hk), strides_dv[2], first_k, MODE)

    lo, hi = window_bounds(lo, hi, p_origin, Sq, Sk, MODE.has_origin)
    at = origins(origin_q, origin_k, origin_h, origin_b, p_origin, MODE.has_origin)
    start, full_start, full_end, end = query_range(i_n, lo, hi, Sq, Sk, MODE, BLOCK_M, BLOCK_N)
    # [N, D], [N, Dv]
    b_k = load_rows(p_k, strides_k[2], i_n, Sk, BLOCK_N, MODE.d, MODE.block_d, True)
    b_v = load_rows(p_v, strides_v[2], i_n, Sk, BLOCK_N, MODE.dv, MODE.block_dv, True)
    BLOCK_D: tl.constexpr = MODE.block_d
    BLOCK_DV: tl.constexpr = MODE.block_dv
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # [N]
    o_n = i_n + tl.arange(0, BLOCK_N)
    for i_group in tl.range(0, GROUP):
        i_h = i_hk * GROUP + i_group
        i_row = tl.cast(i_b * H + i_h, tl.int64)
        i_values = i_row * padded(Sq)
        if MODE.has_lengths:
            i_values = row_values(i_b, i_h, H, Sq, first_q)
        p_q_head = at_row(at_head(p_q, strides_q[0], strides_q[1], i_b, i_h), strides_q[2], first_q, MODE)
        p_do_head = at_row(at_head(p_do, strides_do[0], strides_do[1], i_b, i_h), strides_do[2], first_q, MODE)
        b_columns = tl.zeros([BLOCK_N], tl.float32)
        for PART in tl.static_range(3):
            i_from, i_to = range_part(start, full_start, full_end, end, PART)
            # Tiles that a causal mask cuts are in the first range, those that a left bound cuts in the last.
            if (PART == 0 and MODE.has_right) or PART == 1 or (PART == 2 and (MODE.has_left or MODE.has_tiles)):
                b_dk, b_dv, b_columns = _visit_queries(
                    b_dk,
                    b_dv,
                    b_columns,
                    b_k,
                    b_v,
                    p_q_head,
                    p_do_head,
                    p_shift + i_values,
                    p_delta + i_values,
                    strides_q[2],
                    strides_do[2],
                    scores,
                    tiles_of(scores, i_b, i_h, i_n // BLOCK_N, MODE),
                    aux,
                    numbers,
                    at,
                    i_b,
                    i_h,
                    i_n,
                    i_from,
                    i_to,
                    lo,
                    hi,
                    Sq,
                    Sk,
                    MODE,
                    BLOCK_M,
                    BLOCK_N,
                    HAS_COLUMNS,
                    IS_EDGE=PART != 1,
                )
        if HAS_COLUMNS:
            tl.store(p_columns + i_row * longest + o_n, b_columns, mask=o_n < Sk)
    store_rows(p_dk, b_dk * scores.scale, strides_dk[2], i_n, Sk, BLOCK_N, MODE.d, MODE.block_d)
    if MODE.has_dropout:
        b_dv *= scores.keep_scale
    store_rows(p_dv, b_dv, strides_dv[2], i_n, Sk, BLOCK_N, MODE.dv, MODE.block_dv)


@triton.jit
def _visit_keys(
    b_dq,
    b_rows,
    b_q,
    b_do,
    b_shift,
    b_delta,
    p_k,
    p_v,
    stride_k,
    stride_v,
    scores,
    p_tiles,
    aux,
    numbers,
    at,
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
    HAS_ROWS: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """Add what the key tiles from ``i_from`` to ``i_to`` give to dq / scale and the row sums of ds."""
    # [M, 1]
    o_m = (i_m + tl.arange(0, BLOCK_M))[:, None]
    STEP: tl.constexpr = 1 if MODE.mask_code & 2 else BLOCK_N
    i_from, i_to = shown_range(p_tiles, i_from, i_to, Sk, MODE, 2, BLOCK_N)
    for i_loop in tl.range(i_from, i_to, STEP):
        i_n = shown_tile(p_tiles, i_loop, scores, MODE, 2, BLOCK_N)
        # [1, N]
        o_n = (i_n + tl.arange(0, BLOCK_N))[None, :]
        # [N, D], [N, Dv]
        b_k = load_rows(p_k, stride_k, i_n, Sk, BLOCK_N, MODE.d, MODE.block_d, IS_EDGE)
        b_v = load_rows(p_v, stride_v, i_n, Sk, BLOCK_N, MODE.dv, MODE.block_dv, IS_EDGE)
        # [M, N]
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=MODE.precision)
        b_s = modify_scores(b_qk, scores, aux, numbers, at, i_b, i_h, o_m, o_n, lo, hi, Sq, Sk, MODE, IS_EDGE, True)
        b_p = probabilities(b_s, b_shift[:, None], scores.factor, MODE.natural)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=MODE.precision)
        if MODE.has_dropout:
            b_keep = kept(scores.p_seed, scores.threshold, at, i_b, i_h, o_m, o_n)
            b_dp = tl.where(b_keep, b_dp * scores.keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if HAS_ROWS:
            b_rows += tl.sum(b_ds, 1)
        b_ds = score_gradient(b_ds, b_qk, scores, aux, numbers, at, i_b, i_h, o_m, o_n, Sq, Sk, MODE, IS_EDGE)
        # [M, D]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=MODE.precision)
    return b_dq, b_rows


@triton.jit(do_not_specialize=["origin_q", "origin_k", "origin_h", "origin_b", "lo", "hi", "Sq", "Sk"])
def attention_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_shift,
    p_delta,
    p_origin,
    p_dq,
    p_rows,
    strides_q,
    strides_k,
    strides_v,
    strides_do,
    strides_dq,
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
    MODE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head. Grid: cdiv(Sq, BLOCK_M) * B * H, the blocks of a head side by side.

    HAS_ROWS: also write the row sums of ds, [B, H, Sq], to ``p_rows``.
    Packed (MODE.has_lengths): Sq and Sk are those of the longest sequence.
    """
    blocks = tl.cdiv(Sq, BLOCK_M)
    i_block = tl.program_id(0) % blocks
    i_bh = tl.program_id(0) // blocks
    if MODE.has_right:
        # As in the forward: the blocks that see most keys start first.
        i_block = blocks - 1 - i_block
    i_m = i_block * BLOCK_M
    i_b = i_bh // H
    i_h = i_bh % H
    longest = Sq
    first_q, first_k, Sq, Sk, lo, hi, origin_q = sequence(scores, i_b, Sq, Sk, lo, hi, origin_q, MODE)
    i_row = i_bh.to(tl.int64) * padded(Sq)
    if MODE.has_lengths:
        if i_m >= Sq:
            return
        i_row = row_values(i_b, i_h, H, Sq, first_q)
    p_q = at_row(at_head(p_q, strides_q[0], strides_q[1], i_b, i_h), strides_q[2], first_q, MODE)
    p_do = at_row(at_head(p_do, strides_do[0], strides_do[1], i_b, i_h), strides_do[2], first_q, MODE)
    p_k = at_row(at_head(p_k, strides_k[0], strides_k[1], i_b, i_h // GROUP), strides_k[2], first_k, MODE)
    p_v = at_row(at_head(p_v, strides_v[0], strides_v[1], i_b, i_h // GROUP), strides_v[2], first_k, MODE)
    p_dq = at_row(at_head(p_dq, strides_dq[0], strides_dq[1], i_b, i_h), strides_dq[2], first_q, MODE)

    lo, hi = window_bounds(lo, hi, p_origin, Sq, Sk, MODE.has_origin)
    at = origins(origin_q, origin_k, origin_h, origin_b, p_origin, MODE.has_origin)
    start, full_start, full_end, end = key_range(i_m, lo, hi, Sq, Sk, MODE, BLOCK_M, BLOCK_N)
    # [M, D], [M, Dv]
    b_q = load_rows(p_q, strides_q[2], i_m, Sq, BLOCK_M, MODE.d, MODE.block_d, True)
    b_do = load_rows(p_do, strides_do[2], i_m, Sq, BLOCK_M, MODE.dv, MODE.block_dv, True)
    # [M]
    o_m = i_m + tl.arange(0, BLOCK_M)
    b_shift, b_delta = load_row_values(p_shift + i_row, p_delta + i_row, i_m, BLOCK_M)
    b_rows = tl.zeros([BLOCK_M], tl.float32)
    BLOCK_D: tl.constexpr = MODE.block_d
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for PART in tl.static_range(3):
        i_from, i_to = range_part(start, full_start, full_end, end, PART)
        if PART > 0 or MODE.has_left:
            b_dq, b_rows = _visit_keys(
                b_dq,
                b_rows,
                b_q,
                b_do,
                b_shift,
                b_delta,
                p_k,
                p_v,
                strides_k[2],
                strides_v[2],
                scores,
                tiles_of(scores, i_b, i_h, i_block, MODE),
                aux,
                numbers,
                at,
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
                HAS_ROWS,
                IS_EDGE=PART != 1,
            )
    store_rows(p_dq, b_dq * scores.scale, strides_dq[2], i_m, Sq, BLOCK_M, MODE.d, MODE.block_d)
    if HAS_ROWS:
        tl.store(p_rows + i_bh.to(tl.int64) * longest + o_m, b_rows, mask=o_m < Sq)
