"""Which keys a query sees by position, as small jit functions that every attention kernel shares.

Query row i and key j see each other iff ``i + lo <= j <= i + hi``, where ``lo = origin_q - origin_k - window_left`` and
``hi = origin_q - origin_k + window_right``; HAS_LEFT and HAS_RIGHT say which of the two bounds exist (causal is a right
bound without a left one). Everything else follows from these two numbers: which tiles a program visits at all, which of
those need no mask, and the mask of the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_bounds(lo, hi, p_origin, Sq, Sk, HAS_ORIGIN: tl.constexpr):
    """``lo`` and ``hi`` with the origins that are on the device added, as int32.

    Clamping to [-Sq, Sk] changes no answer, since 0 <= i < Sq and 0 <= j < Sk, and keeps the sums below in 32 bits
    whatever the origins are.
    """
    lo = tl.cast(lo, tl.int64)
    hi = tl.cast(hi, tl.int64)
    if HAS_ORIGIN:
        shift = tl.load(p_origin) - tl.load(p_origin + 1)
        lo += shift
        hi += shift
    lowest = -tl.cast(Sq, tl.int64)
    highest = tl.cast(Sk, tl.int64)
    lo = tl.minimum(tl.maximum(lo, lowest), highest).to(tl.int32)
    hi = tl.minimum(tl.maximum(hi, lowest), highest).to(tl.int32)
    return lo, hi


@triton.jit
def origins(origin_q, origin_k, origin_h, origin_b, p_origin, HAS_ORIGIN: tl.constexpr):
    """Where element 0 of queries, keys, heads and batches stands in the whole: four int32 scalars.

    ``p_origin`` adds int64 [q, k, head, batch] from the device. Positions count modulo 2^32 here.
    """
    q = tl.cast(origin_q, tl.int64)
    k = tl.cast(origin_k, tl.int64)
    h = tl.cast(origin_h, tl.int64)
    b = tl.cast(origin_b, tl.int64)
    if HAS_ORIGIN:
        q += tl.load(p_origin)
        k += tl.load(p_origin + 1)
        h += tl.load(p_origin + 2)
        b += tl.load(p_origin + 3)
    return q.to(tl.int32), k.to(tl.int32), h.to(tl.int32), b.to(tl.int32)


@triton.jit
def tile_range(
    i_start,
    lo,
    hi,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
):
    """The column tiles that the rows [i_start, i_start + BLOCK_ROWS) see: ``start, full_start, full_end, end``.

    Tiles in [start, min(full_start, end)) and [full_end, end) have entries that are not seen or lie beyond the last
    column; tiles in [full_start, full_end) have none and need no mask. The three ranges are disjoint, each starts at a
    multiple of BLOCK_COLUMNS, and any of them may be empty.
    WHOLE_ROWS, WHOLE_COLUMNS: rows, or columns, beyond the last one disqualify a tile from the middle. A kernel that
    reads a tile of a mask or bias needs both; otherwise it does where such entries would change its result.
    """
    last = tl.minimum(i_start + BLOCK_ROWS, rows) - 1
    first = tl.cast(0, tl.int32)
    full_start = tl.cast(0, tl.int32)
    end = tl.cast(columns, tl.int32)
    full_end = end
    if WHOLE_COLUMNS:
        full_end = columns // BLOCK_COLUMNS * BLOCK_COLUMNS
    if HAS_LEFT:
        first = tl.maximum(i_start + lo, 0)
        full_start = (tl.maximum(last + lo, 0) + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS * BLOCK_COLUMNS
    if HAS_RIGHT:
        end = tl.maximum(tl.minimum(columns, last + hi + 1), 0)
        full_end = tl.minimum(full_end, tl.maximum(i_start + hi + 1, 0) // BLOCK_COLUMNS * BLOCK_COLUMNS)
    if HAS_LEFT:
        # Rounded down to a tile, a first column beyond the last one would look as if it were seen.
        end = tl.where(first < end, end, 0)
    start = first // BLOCK_COLUMNS * BLOCK_COLUMNS
    if WHOLE_ROWS:
        full_end = tl.where(i_start + BLOCK_ROWS > rows, 0, full_end)
    # A window narrower than a tile has no middle; the third range must not repeat tiles of the first.
    full_end = tl.maximum(full_end, full_start)
    return start, full_start, full_end, end


@triton.jit
def range_part(start, full_start, full_end, end, PART: tl.constexpr):
    """First tile and bound of one of the three ranges of :func:`tile_range`; 1 is the one that needs no mask."""
    if PART == 0:
        i_from = start
        i_to = tl.minimum(full_start, end)
    elif PART == 1:
        i_from = full_start
        i_to = full_end
    else:
        i_from = full_end
        i_to = end
    return i_from, i_to


@triton.jit
def key_range(i_m, lo, hi, Sq, Sk, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """:func:`tile_range` of the keys that a block of queries sees."""
    return tile_range(i_m, lo, hi, Sq, Sk, BLOCK_M, BLOCK_N, MODE.has_left, MODE.has_right, MODE.has_tiles, True)


@triton.jit
def query_range(i_n, lo, hi, Sq, Sk, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """:func:`tile_range` of the queries that see a block of keys: j - hi <= i <= j - lo.

    Queries beyond the last one give nothing, because their probabilities are 0 (:func:`loads.load_row_values`).
    """
    return tile_range(
        i_n, -hi, -lo, Sk, Sq, BLOCK_N, BLOCK_M, MODE.has_right, MODE.has_left, MODE.has_tiles, MODE.has_tiles
    )


@triton.jit
def hide(b_s, o_m, o_n, lo, hi, Sk, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_END: tl.constexpr):
    """Scores ``b_s`` with -inf where query ``o_m`` does not see key ``o_n``; the two are blocks that broadcast.

    HAS_END: also hide what lies beyond the last key.
    """
    if HAS_END:
        b_s = tl.where(o_n < Sk, b_s, float("-inf"))
    if HAS_LEFT:
        b_s = tl.where(o_n >= o_m + lo, b_s, float("-inf"))
    if HAS_RIGHT:
        b_s = tl.where(o_n <= o_m + hi, b_s, float("-inf"))
    return b_s
