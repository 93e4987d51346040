"""The two passes of the attention backward over tiles of scores: dk and dv, then dq; see backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .device.dropout import kept
from .device.loads import load_row_values, load_rows, store_rows
from .device.masks import key_range, query_range, range_part
from .device.place import first_row, first_row_value, place_of, with_head
from .device.scores import modify_scores, score_gradient
from .device.shown import shown_range, shown_tile, tiles_of
from .device.softmax import probabilities


@triton.jit
def _add_queries(
    sums,
    b_k,
    b_v,
    q,
    do,
    values,
    i_values,
    scores,
    softmax,
    shown,
    mod_inputs,
    place,
    i_n,
    ranges,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Add what the query tiles of one of the ``ranges`` give to dk / scale, dv and the column sums of ds.

    ``q`` and ``do`` are rows (loads.py); the head's ``values`` begin at ``i_values``.
    """
    b_dk, b_dv, b_columns = sums
    IS_EDGE: tl.constexpr = PART != 1
    # [N, 1]; the scores are transposed here, so that they enter both products as left operand, straight from registers
    o_n = (i_n + tl.arange(0, BLOCK_N))[:, None]
    STEP: tl.constexpr = 1 if MODE.mask_code & 1 else BLOCK_M
    p_tiles = tiles_of(shown, place, i_n // BLOCK_N, MODE)
    i_from, i_to = range_part(ranges, PART)
    i_from, i_to = shown_range(p_tiles, i_from, i_to, place.Sq, MODE, 1, BLOCK_M)
    for i_loop in tl.range(i_from, i_to, STEP):
        i_m = shown_tile(p_tiles, i_loop, shown, MODE, 1, BLOCK_M)
        # [1, M]
        o_m = (i_m + tl.arange(0, BLOCK_M))[None, :]
        # [M]
        b_before, b_after, b_delta = load_row_values(values, i_values, i_m, MODE, BLOCK_M)
        # [M, D]
        b_q = load_rows(q, i_m, place.Sq, BLOCK_M, MODE.d, MODE.block_d, True)
        # [N, M]
        b_qk = tl.dot(b_k, tl.trans(b_q), input_precision=MODE.precision)
        b_s = modify_scores(b_qk, scores, mod_inputs, place, o_m, o_n, MODE, IS_EDGE, False)
        b_p = probabilities(b_s, b_before[None, :], b_after[None, :], softmax.factor, MODE)
        # [M, Dv]
        b_do = load_rows(do, i_m, place.Sq, BLOCK_M, MODE.dv, MODE.block_dv, True)
        # [N, M]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=MODE.precision)
        b_p_kept = b_p
        if MODE.has_dropout:
            b_keep = kept(softmax, place, o_m, o_n)
            b_p_kept = tl.where(b_keep, b_p, 0.0)
            b_dp = tl.where(b_keep, b_dp * softmax.keep_scale, 0.0)
        b_dv = tl.dot(b_p_kept.to(b_do.dtype), b_do, b_dv, input_precision=MODE.precision)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if HAS_COLUMNS:
            b_columns += tl.sum(b_ds, 1)
        b_ds = score_gradient(b_ds, b_qk, scores, mod_inputs, place, o_m, o_n, MODE, IS_EDGE)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=MODE.precision)
    return b_dk, b_dv, b_columns


@triton.jit(do_not_specialize=["origin_q", "origin_k", "origin_h", "origin_b", "lo", "hi", "Sq", "Sk"])
def attention_dkdv_kernel(
    views,
    values,
    p_columns,
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
    """One program: BLOCK_N keys of one key head. Grid: cdiv(Sk, BLOCK_N) * B * Hkv, the blocks of a head side by side.

    ``views``: q, k, v, do, dk and dv, each with its strides of batches, heads and rows; ``heads``: H and GROUP.
    With ``p_columns`` also the column sums of ds of every query head, [B, H, Sk], are written.
    Packed (MODE.has_lengths): Sq and Sk are those of the longest sequence.
    """
    q, k, v, do, dk, dv = views[0:4], views[4:8], views[8:12], views[12:16], views[16:20], views[20:24]
    H, GROUP = heads
    HAS_COLUMNS: tl.constexpr = p_columns is not None
    blocks = tl.cdiv(Sk, BLOCK_N)
    i_n = tl.program_id(0) % blocks * BLOCK_N
    i_bh = tl.program_id(0) // blocks
    i_b = i_bh // (H // GROUP)
    i_hk = i_bh % (H // GROUP)
    of_keys = place_of(positions, i_b, i_hk, Sq, Sk, lo, hi, origin_q, origin_k, origin_h, origin_b, MODE)
    # Two conditions, because the first decides what is compiled.
    if MODE.has_lengths:  # noqa: SIM102
        if i_n >= of_keys.Sk:
            return
    k_rows = (first_row(k, of_keys, i_hk, of_keys.first_k, MODE), k[3])
    v_rows = (first_row(v, of_keys, i_hk, of_keys.first_k, MODE), v[3])
    dk_rows = (first_row(dk, of_keys, i_hk, of_keys.first_k, MODE), dk[3])
    dv_rows = (first_row(dv, of_keys, i_hk, of_keys.first_k, MODE), dv[3])

    ranges = query_range(i_n, of_keys, MODE, BLOCK_M, BLOCK_N)
    # [N, D], [N, Dv]
    b_k = load_rows(k_rows, i_n, of_keys.Sk, BLOCK_N, MODE.d, MODE.block_d, True)
    b_v = load_rows(v_rows, i_n, of_keys.Sk, BLOCK_N, MODE.dv, MODE.block_dv, True)
    BLOCK_D: tl.constexpr = MODE.block_d
    BLOCK_DV: tl.constexpr = MODE.block_dv
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # [N]
    o_n = i_n + tl.arange(0, BLOCK_N)
    for i_group in tl.range(0, GROUP):
        i_h = i_hk * GROUP + i_group
        place = with_head(of_keys, i_h)
        q_rows = (first_row(q, place, i_h, place.first_q, MODE), q[3])
        do_rows = (first_row(do, place, i_h, place.first_q, MODE), do[3])
        b_columns = tl.zeros([BLOCK_N], tl.float32)
        for PART in tl.static_range(3):
            # Tiles that a causal mask cuts are in the first range, those that a left bound cuts in the last.
            if (PART == 0 and MODE.has_right) or PART == 1 or (PART == 2 and (MODE.has_left or MODE.has_tiles)):
                b_dk, b_dv, b_columns = _add_queries(
                    (b_dk, b_dv, b_columns),
                    b_k,
                    b_v,
                    q_rows,
                    do_rows,
                    values,
                    first_row_value(place, H, MODE),
                    scores,
                    softmax,
                    shown,
                    mod_inputs,
                    place,
                    i_n,
                    ranges,
                    MODE,
                    BLOCK_M,
                    BLOCK_N,
                    HAS_COLUMNS,
                    PART,
                )
        if HAS_COLUMNS:
            p_sums = p_columns + tl.cast(i_b * H + i_h, tl.int64) * Sk
            tl.store(p_sums + o_n, b_columns, mask=o_n < of_keys.Sk)
    store_rows(dk_rows, b_dk * scores.scale, i_n, of_keys.Sk, BLOCK_N, MODE.d, MODE.block_d)
    if MODE.has_dropout:
        b_dv *= softmax.keep_scale
    store_rows(dv_rows, b_dv, i_n, of_keys.Sk, BLOCK_N, MODE.dv, MODE.block_dv)


@triton.jit
def _add_keys(
    sums,
    b_q,
    b_do,
    row_values,
    k,
    v,
    scores,
    softmax,
    shown,
    mod_inputs,
    place,
    i_m,
    ranges,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    """Add what the key tiles of one of the ``ranges`` give to dq / scale and the row sums of ds.

    ``k`` and ``v`` are rows (loads.py), ``row_values`` the three of :func:`load_row_values`.
    """
    b_dq, b_rows = sums
    b_before, b_after, b_delta = row_values
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
        # [N, D], [N, Dv]
        b_k = load_rows(k, i_n, place.Sk, BLOCK_N, MODE.d, MODE.block_d, IS_EDGE)
        b_v = load_rows(v, i_n, place.Sk, BLOCK_N, MODE.dv, MODE.block_dv, IS_EDGE)
        # [M, N]
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=MODE.precision)
        b_s = modify_scores(b_qk, scores, mod_inputs, place, o_m, o_n, MODE, IS_EDGE, True)
        b_p = probabilities(b_s, b_before[:, None], b_after[:, None], softmax.factor, MODE)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=MODE.precision)
        if MODE.has_dropout:
            b_keep = kept(softmax, place, o_m, o_n)
            b_dp = tl.where(b_keep, b_dp * softmax.keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if HAS_ROWS:
            b_rows += tl.sum(b_ds, 1)
        b_ds = score_gradient(b_ds, b_qk, scores, mod_inputs, place, o_m, o_n, MODE, IS_EDGE)
        # [M, D]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=MODE.precision)
    return b_dq, b_rows


@triton.jit(do_not_specialize=["origin_q", "origin_k", "origin_h", "origin_b", "lo", "hi", "Sq", "Sk"])
def attention_dq_kernel(
    views,
    values,
    p_rows,
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
    """One program: BLOCK_M queries of one head. Grid: cdiv(Sq, BLOCK_M) * B * H, the blocks of a head side by side.

    ``views``: q, k, v, do and dq, each with its strides of batches, heads and rows; ``heads``: H and GROUP.
    With ``p_rows`` also the row sums of ds, [B, H, Sq], are written.
    Packed (MODE.has_lengths): Sq and Sk are those of the longest sequence.
    """
    q, k, v, do, dq = views[0:4], views[4:8], views[8:12], views[12:16], views[16:20]
    H, GROUP = heads
    HAS_ROWS: tl.constexpr = p_rows is not None
    blocks = tl.cdiv(Sq, BLOCK_M)
    i_block = tl.program_id(0) % blocks
    i_bh = tl.program_id(0) // blocks
    if MODE.has_right:
        # As in the forward: the blocks that see most keys start first.
        i_block = blocks - 1 - i_block
    i_m = i_block * BLOCK_M
    i_b = i_bh // H
    i_h = i_bh % H
    place = place_of(positions, i_b, i_h, Sq, Sk, lo, hi, origin_q, origin_k, origin_h, origin_b, MODE)
    # Two conditions, because the first decides what is compiled.
    if MODE.has_lengths:  # noqa: SIM102
        if i_m >= place.Sq:
            return
    q_rows = (first_row(q, place, i_h, place.first_q, MODE), q[3])
    do_rows = (first_row(do, place, i_h, place.first_q, MODE), do[3])
    k_rows = (first_row(k, place, i_h // GROUP, place.first_k, MODE), k[3])
    v_rows = (first_row(v, place, i_h // GROUP, place.first_k, MODE), v[3])
    dq_rows = (first_row(dq, place, i_h, place.first_q, MODE), dq[3])

    ranges = key_range(i_m, place, MODE, BLOCK_M, BLOCK_N)
    # [M, D], [M, Dv]
    b_q = load_rows(q_rows, i_m, place.Sq, BLOCK_M, MODE.d, MODE.block_d, True)
    b_do = load_rows(do_rows, i_m, place.Sq, BLOCK_M, MODE.dv, MODE.block_dv, True)
    # [M]
    o_m = i_m + tl.arange(0, BLOCK_M)
    row_values = load_row_values(values, first_row_value(place, H, MODE), i_m, MODE, BLOCK_M)
    b_rows = tl.zeros([BLOCK_M], tl.float32)
    BLOCK_D: tl.constexpr = MODE.block_d
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for PART in tl.static_range(3):
        if PART > 0 or MODE.has_left:
            b_dq, b_rows = _add_keys(
                (b_dq, b_rows),
                b_q,
                b_do,
                row_values,
                k_rows,
                v_rows,
                scores,
                softmax,
                shown,
                mod_inputs,
                place,
                i_m,
                ranges,
                MODE,
                BLOCK_M,
                BLOCK_N,
                HAS_ROWS,
                PART,
            )
    store_rows(dq_rows, b_dq * scores.scale, i_m, place.Sq, BLOCK_M, MODE.d, MODE.block_d)
    if HAS_ROWS:
        tl.store(p_rows + i_bh.to(tl.int64) * Sq + o_m, b_rows, mask=o_m < place.Sq)
