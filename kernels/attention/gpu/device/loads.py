"""Tiles of global memory, as small jit functions that every attention kernel shares.

Rows are addressed with 64-bit offsets, so tensors of more than 2^31 elements work, and masked only where a tile may
reach over an edge. Head dimensions that are no power of two are padded in registers: nothing is copied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....runtime.fences import fence_copies

# The largest block of queries of a backward kernel; the others divide it.
ROW_PADDING: tl.constexpr = tl.constexpr(128)


@triton.jit
def at_head(p_tensor, stride_b, stride_h, i_b, i_h):
    """``p_tensor`` moved to element [0, 0] of batch ``i_b`` and head ``i_h``."""
    return p_tensor + tl.cast(i_b, tl.int64) * stride_b + tl.cast(i_h, tl.int64) * stride_h


@triton.jit
def load_rows(
    rows, i_start, length, BLOCK_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_EDGE: tl.constexpr
):
    """Rows [i_start, i_start + BLOCK_ROWS) of a [length, D] matrix with unit last stride, [BLOCK_ROWS, BLOCK_D].

    ``rows``: pointer to the first one, and their stride. Columns beyond D are 0; so are rows beyond the last one where
    IS_EDGE, and elsewhere there must be none.
    """
    o_r = tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_ROWS, BLOCK_D]; the first sum is one scalar a tile, the second does not change from tile to tile
    p_tile = (rows[0] + tl.cast(i_start, tl.int64) * rows[1]) + (o_r.to(tl.int64)[:, None] * rows[1] + o_d[None, :])
    if IS_EDGE:
        m_tile = (o_r < length - i_start)[:, None]
        if D != BLOCK_D:
            m_tile &= (o_d < D)[None, :]
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    elif D != BLOCK_D:
        b_tile = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    fence_copies()
    return b_tile


@triton.jit
def store_rows(rows, b_tile, i_start, length, BLOCK_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [BLOCK_ROWS, BLOCK_D] to the rows from ``i_start`` on of a [length, D] matrix, rounded to its dtype."""
    o_r = tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_ROWS, BLOCK_D]
    p_tile = (rows[0] + tl.cast(i_start, tl.int64) * rows[1]) + (o_r.to(tl.int64)[:, None] * rows[1] + o_d[None, :])
    m_tile = (o_r < length - i_start)[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, b_tile.to(rows[0].dtype.element_ty), mask=m_tile)


@triton.jit
def padded(Sq):
    """Length of a row of the backward's values per query: whole blocks, so that their loads need no mask."""
    return tl.cdiv(Sq, ROW_PADDING) * ROW_PADDING


@triton.jit
def load_row_values(values, i_first, i_m, MODE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the queries from ``i_m`` on, [BLOCK_M] each: what to subtract before the factor and after it, and delta.

    ``values``: ``RowValues`` (mode.py), of which those of the head begin at ``i_first``. The first of the three is
    anything unless ``MODE.is_wide``. Beyond the last query stand those of a row without key, up to :func:`padded`.
    """
    o_m = tl.arange(0, BLOCK_M)
    i_m = tl.cast(i_m, tl.int64)
    # The block's start goes into the pointer first: what is left are constants of each thread.
    b_after = tl.load(values.p_after + i_first + i_m + o_m)
    b_delta = tl.load(values.p_delta + i_first + i_m + o_m)
    b_before = b_after
    if MODE.is_wide:
        b_before = tl.load(values.p_before + i_first + i_m + o_m)
    return b_before, b_after, b_delta


@triton.jit
def load_tile(p_tile, stride_m, stride_n, o_m, o_n, place, DIMS: tl.constexpr, IS_EDGE: tl.constexpr):
    """The part of a mask or bias that belongs to queries ``o_m`` and keys ``o_n`` (blocks that broadcast).

    DIMS: along which of the two it varies: 1 for queries plus 2 for keys. The result has size 1 along the other, so a
    mask over keys alone costs BLOCK_N loads a tile, not BLOCK_M * BLOCK_N. Beyond the tensors, which is allowed where
    IS_EDGE, the values are 0.
    """
    o_m64 = o_m.to(tl.int64)
    o_n64 = o_n.to(tl.int64)
    if DIMS == 3:
        p_tile += o_m64 * stride_m + o_n64 * stride_n
        m_tile = (o_m < place.Sq) & (o_n < place.Sk)
    elif DIMS == 1:
        p_tile += o_m64 * stride_m
        m_tile = o_m < place.Sq
    elif DIMS == 2:
        p_tile += o_n64 * stride_n
        m_tile = o_n < place.Sk
    else:
        p_tile += 0 * o_m64
        m_tile = o_m < place.Sq
    if IS_EDGE:
        b_tile = tl.load(p_tile, mask=m_tile, other=0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile
