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
def range_part(ranges, PART: tl.constexpr):
    """First tile and bound of one of the three ranges of :func:`tile_range`; 1 is the one that needs no mask."""
    start, full_start, full_end, end = ranges
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
def key_range(i_m, place, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """:func:`tile_range` of the keys that a block of queries sees."""
    return tile_range(
        i_m,
        place.lo,
        place.hi,
        place.Sq,
        place.Sk,
        BLOCK_M,
        BLOCK_N,
        MODE.has_left,
        MODE.has_right,
        MODE.has_tiles,
        True,
    )


@triton.jit
def query_range(i_n, place, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """:func:`tile_range` of the queries that see a block of keys: j - hi <= i <= j - lo.

    Queries beyond the last one give nothing, because their probabilities are 0 (:func:`loads.load_row_values`).
    """
    return tile_range(
        i_n,
        -place.hi,
        -place.lo,
        place.Sk,
        place.Sq,
        BLOCK_N,
        BLOCK_M,
        MODE.has_right,
        MODE.has_left,
        MODE.has_tiles,
        MODE.has_tiles,
    )


@triton.jit
def hide(b_s, o_m, o_n, place, MODE: tl.constexpr, HAS_END: tl.constexpr):
    """Scores ``b_s`` with -inf where query ``o_m`` does not see key ``o_n``; the two are blocks that broadcast.

    HAS_END: also hide what lies beyond the last key.
    """
    if HAS_END:
        b_s = tl.where(o_n < place.Sk, b_s, float("-inf"))
    if MODE.has_left:
        b_s = tl.where(o_n >= o_m + place.lo, b_s, float("-inf"))
    if MODE.has_right:
        b_s = tl.where(o_n <= o_m + place.hi, b_s, float("-inf"))
    return b_s
