"""Tiles of global memory, as small jit functions that every attention kernel shares.

Rows are addressed with 64-bit offsets, so tensors of more than 2^31 elements work, and masked only where a tile may
reach over an edge. Head dimensions that are no power of two are padded in registers: nothing is copied.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The largest block of queries of a backward kernel; the others divide it.
ROW_PADDING: tl.constexpr = tl.constexpr(128)


@triton.jit
def at_head(p_tensor, stride_b, stride_h, i_b, i_h):
    """``p_tensor`` moved to element [0, 0] of batch ``i_b`` and head ``i_h``."""
    return p_tensor + tl.cast(i_b, tl.int64) * stride_b + tl.cast(i_h, tl.int64) * stride_h


@triton.jit
def load_rows(
    p_rows,
    stride,
    i_start,
    rows,
    BLOCK_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """Rows [i_start, i_start + BLOCK_ROWS) of a [rows, D] matrix with unit last stride, [BLOCK_ROWS, BLOCK_D].

    Columns beyond D are 0; so are rows beyond the last one where IS_EDGE, and elsewhere there must be none.
    """
    o_r = tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_ROWS, BLOCK_D]; the first sum is one scalar a tile, the second does not change from tile to tile
    p_tile = (p_rows + tl.cast(i_start, tl.int64) * stride) + (o_r.to(tl.int64)[:, None] * stride + o_d[None, :])
    if IS_EDGE:
        m_tile = (o_r < rows - i_start)[:, None]
        if D != BLOCK_D:
            m_tile &= (o_d < D)[None, :]
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    elif D != BLOCK_D:
        b_tile = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def store_rows(p_rows, b_tile, stride, i_start, rows, BLOCK_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [BLOCK_ROWS, BLOCK_D] to the rows from ``i_start`` on of a [rows, D] matrix, rounded to its dtype."""
    o_r = tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_ROWS, BLOCK_D]
    p_tile = (p_rows + tl.cast(i_start, tl.int64) * stride) + (o_r.to(tl.int64)[:, None] * stride + o_d[None, :])
    m_tile = (o_r < rows - i_start)[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, b_tile.to(p_rows.dtype.element_ty), mask=m_tile)


@triton.jit
def padded(Sq):
    """Length of a row of the backward's values per query: whole blocks, so that their loads need no mask."""
    return tl.cdiv(Sq, ROW_PADDING) * ROW_PADDING


@triton.jit
def load_row_values(p_shift, p_delta, i_m, BLOCK_M: tl.constexpr):
    """What to subtract from scores (``shift_of_lse``) and delta of the queries from ``i_m`` on, [BLOCK_M].

    Beyond the last query stand those of a row without key, up to :func:`padded`.
    """
    o_m = tl.arange(0, BLOCK_M)
    # The block's start goes into the pointer first: what is left are constants of each thread.
    b_shift = tl.load(p_shift + tl.cast(i_m, tl.int64) + o_m)
    b_delta = tl.load(p_delta + tl.cast(i_m, tl.int64) + o_m)
    return b_shift, b_delta


@triton.jit
def load_tile(p_tile, stride_m, stride_n, o_m, o_n, Sq, Sk, DIMS: tl.constexpr, IS_EDGE: tl.constexpr):
    """The part of a mask or bias that belongs to queries ``o_m`` and keys ``o_n`` (blocks that broadcast).

    DIMS: along which of the two it varies: 1 for queries plus 2 for keys. The result has size 1 along the other, so a
    mask over keys alone costs BLOCK_N loads a tile, not BLOCK_M * BLOCK_N. Beyond the tensors, which is allowed where
    IS_EDGE, the values are 0.
    """
    o_m64 = o_m.to(tl.int64)
    o_n64 = o_n.to(tl.int64)
    if DIMS == 3:
        p_tile += o_m64 * stride_m + o_n64 * stride_n
        m_tile = (o_m < Sq) & (o_n < Sk)
    elif DIMS == 1:
        p_tile += o_m64 * stride_m
        m_tile = o_m < Sq
    elif DIMS == 2:
        p_tile += o_n64 * stride_n
        m_tile = o_n < Sk
    else:
        p_tile += 0 * o_m64
        m_tile = o_m < Sq
    if IS_EDGE:
        b_tile = tl.load(p_tile, mask=m_tile, other=0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile
