"""Where a program's scores stand: in which batch entry and head, between which lengths, at which positions.

Packed sequences (``MODE.has_lengths``) have lengths and first rows of their own. Their grids are sized by the longest
sequence, as if all were that long; programs beyond the end of theirs return at once. Kernels of calls that are not
packed hold no trace of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import ROW_PADDING, at_head, padded


class Place(NamedTuple):
    """One batch entry and query head, as device functions take it. Flat: triton 3.6 loses constants of nested tuples.

    Query row i and key j within the sequence see each other iff ``i + lo <= j <= i + hi`` (masks.py). They stand at the
    positions ``i + origin_q`` and ``j + origin_k`` of the whole, and the place at its head ``i_h + origin_h`` and batch
    ``i_b + origin_b``.
    """

    i_b: Any
    i_h: Any  # a scalar, or a block that broadcasts against the scores
    Sq: Any
    Sk: Any
    lo: Any
    hi: Any
    origin_q: Any
    origin_k: Any
    origin_h: Any
    origin_b: Any
    first_q: Any  # rows of the sequence's first query and key, int64: 0 unless packed
    first_k: Any


@triton.jit
def place_of(positions, i_b, i_h, Sq, Sk, lo, hi, origin_q, origin_k, origin_h, origin_b, MODE: tl.constexpr):
    """The :class:`Place` of batch entry ``i_b`` and head ``i_h``, everything in it int32 but the first rows.

    Args:
        positions: ``Positions`` (mode.py): what the device adds to the numbers that follow.
        Sq, Sk: lengths; packed, those of the longest sequence. A sequence's own are at most these, so that nothing is
            read beyond a mask or bias whatever cu_seqlens holds.
        lo, hi: the window, of any integer type. It is clamped to [-Sq, Sk], which changes no answer, since 0 <= i < Sq
            and 0 <= j < Sk, and keeps sums of positions in 32 bits.
        origin_q, origin_k, origin_h, origin_b: where the first element stands in the whole, counted modulo 2^32.
    """
    first_q = tl.cast(0, tl.int64)
    first_k = tl.cast(0, tl.int64)
    if MODE.has_lengths:
        first_q = tl.load(positions.p_cu_q + i_b).to(tl.int64)
        first_k = tl.load(positions.p_cu_k + i_b).to(tl.int64)
        Sq = tl.minimum(tl.load(positions.p_cu_q + i_b + 1).to(tl.int64) - first_q, Sq).to(tl.int32)
        Sk = tl.minimum(tl.load(positions.p_cu_k + i_b + 1).to(tl.int64) - first_k, Sk).to(tl.int32)
        if MODE.is_bottom_right:
            shift = Sk.to(tl.int64) - Sq
            lo = lo + shift
            hi = hi + shift
            origin_q = origin_q + shift
    lo = tl.cast(lo, tl.int64)
    hi = tl.cast(hi, tl.int64)
    q = tl.cast(origin_q, tl.int64)
    k = tl.cast(origin_k, tl.int64)
    h = tl.cast(origin_h, tl.int64)
    b = tl.cast(origin_b, tl.int64)
    if MODE.has_origin:
        p_origin = positions.p_origin
        shift = tl.load(p_origin) - tl.load(p_origin + 1)
        lo += shift
        hi += shift
        q += tl.load(p_origin)
        k += tl.load(p_origin + 1)
        h += tl.load(p_origin + 2)
        b += tl.load(p_origin + 3)
    lowest = -tl.cast(Sq, tl.int64)
    highest = tl.cast(Sk, tl.int64)
    lo = tl.minimum(tl.maximum(lo, lowest), highest).to(tl.int32)
    hi = tl.minimum(tl.maximum(hi, lowest), highest).to(tl.int32)
    q, k, h, b = q.to(tl.int32), k.to(tl.int32), h.to(tl.int32), b.to(tl.int32)
    return Place(i_b, i_h, Sq, Sk, lo, hi, q, k, h, b, first_q, first_k)


@triton.jit
def with_head(place, i_h):
    """The place of another head of the same batch entry."""
    return Place(
        place.i_b,
        i_h,
        place.Sq,
        place.Sk,
        place.lo,
        place.hi,
        place.origin_q,
        place.origin_k,
        place.origin_h,
        place.origin_b,
        place.first_q,
        place.first_k,
    )


@triton.jit
def first_row(view, place, i_h, first, MODE: tl.constexpr):
    """Pointer to row ``first`` of head ``i_h`` in the place's batch entry, of packed sequences; else to row 0.

    ``view``: a tensor's pointer and its strides of batches, heads and rows.
    """
    p_rows = at_head(view[0], view[1], view[2], place.i_b, i_h)
    if MODE.has_lengths:
        p_rows += first * view[3]
    return p_rows


@triton.jit
def packed_row_value(i_b, i_h, H, Sq, first_q):
    """Index of the backward's first value per query (``load_row_values``) of head ``i_h`` of a packed sequence.

    Each sequence has room for whole blocks of queries for each head: because a block is added for each sequence before
    it, the block that holds its first row, counted through, is never within the room of the one before.
    """
    return (first_q // ROW_PADDING + i_b) * ROW_PADDING * H + i_h * padded(Sq)


@triton.jit
def first_row_value(place, H, MODE: tl.constexpr):
    """Index of the first value per query of the place's head, packed or not."""
    if MODE.has_lengths:
        i_first = packed_row_value(place.i_b, place.i_h, H, place.Sq, place.first_q)
    else:
        i_first = tl.cast(place.i_b * H + place.i_h, tl.int64) * padded(place.Sq)
    return i_first
