"""The tiles in which a boolean mask shows anything, so that the kernels' loops visit only these.

Before a pass over the scores a kernel of its own reads the mask once, and writes for each block of the pass (queries,
or keys for dk and dv) the list of the tiles along the other axis that hold a True:

    before  n + 1 numbers: how many of the tiles before each one are in the list, and of all
    list    their indices, rising

Two look-ups in ``before`` turn a range of tiles (masks.py) into a range of the list, whatever cuts the range. Memory:
8 bytes a tile for the mask's own batches and heads, which is under a hundredth of the mask itself. A mask that is the
same along the other axis needs no list: a block sees all tiles or none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime.launch import launch
from .device.loads import at_head
from .mode import Scores

# A program reads this many bytes of the mask at a time.
_STEP = 16384


class Shown(NamedTuple):
    """The lists of visible tiles of a pass, for each of its blocks (device/shown.py)."""

    p_tiles: torch.Tensor | None = None
    stride_b: int = 0
    stride_h: int = 0
    stride_block: int = 0
    half: int = 0  # from ``before`` to ``list``


@triton.jit(do_not_specialize=["rows", "columns"])
def attention_mask_tiles_kernel(
    p_mask,
    p_tiles,
    stride_b,
    stride_h,
    stride_row,
    stride_column,
    stride_tiles,
    H,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program: ``before`` and ``list`` of BLOCK_ROWS rows. Grid: cdiv(rows, BLOCK_ROWS) * B * H of the mask.

    TILES: how many tiles are read at a time.
    """
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    i_bh = tl.program_id(0) // blocks
    p_mask = at_head(p_mask, stride_b, stride_h, i_bh // H, i_bh % H)
    p_before = p_tiles + tl.cast(tl.program_id(0), tl.int64) * stride_tiles
    p_list = p_before + stride_tiles // 2
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    # [R, 1]
    o_r = (tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    count = tl.cast(0, tl.int32)
    for i_tile in tl.range(0, tiles, TILES):
        # [1, C]
        o_c = (i_tile * BLOCK_COLUMNS + tl.arange(0, TILES * BLOCK_COLUMNS))[None, :]
        p_tile = p_mask + o_r.to(tl.int64) * stride_row + o_c.to(tl.int64) * stride_column
        # [R, C], [T, C / T], [T]
        b_mask = tl.load(p_tile, mask=(o_r < rows) & (o_c < columns), other=0)
        b_seen = tl.reshape(tl.max(b_mask.to(tl.int32), 0), [TILES, BLOCK_COLUMNS])
        b_seen = (tl.max(b_seen, 1) != 0).to(tl.int32)
        b_before = count + tl.cumsum(b_seen, 0) - b_seen
        o_t = i_tile + tl.arange(0, TILES)
        tl.store(p_before + o_t, b_before, mask=o_t < tiles)
        tl.store(p_list + b_before, o_t, mask=b_seen != 0)
        count += tl.sum(b_seen, 0)
    tl.store(p_before + tiles, count)


def shown_tiles(scores: Scores, block_m: int, block_n: int, *, along_keys: bool) -> Shown:
    """The lists of the call's mask for a pass with tiles of block_m queries by block_n keys; empty without a mask.

    Args:
        scores: those of the call, with its mask of bytes [B, H, Sq, Sk], any of them 1, any strides.
        along_keys: the pass goes over keys for each block of queries; else the other way round.
    """
    mask = scores.p_mask
    if mask is None:
        return Shown()
    strides = scores.mask_strides
    size = [1 if stride == 0 else n for n, stride in zip(mask.shape, strides, strict=True)]
    row, column = (2, 3) if along_keys else (3, 2)
    block_rows, block_columns = (block_m, block_n) if along_keys else (block_n, block_m)
    # Where the mask is the same along an axis, one element stands for all.
    block_rows, block_columns = (
        1 if strides[row] == 0 else block_rows,
        1 if strides[column] == 0 else block_columns,
    )
    blocks = triton.cdiv(size[row], block_rows)
    # Multiples of 16, both of them, so that kernels are not compiled anew for other lengths.
    half = triton.cdiv(triton.cdiv(size[column], block_columns) + 1, 16) * 16
    stride = 2 * half
    tiles = torch.empty(size[0] * size[1] * blocks, stride, dtype=torch.int32, device=mask.device)
    launch(
        attention_mask_tiles_kernel,
        (len(tiles),),
        mask,
        tiles,
        *strides[:2],
        strides[row],
        strides[column],
        stride,
        size[1],
        size[row],
        size[column],
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        TILES=max(1, _STEP // (block_rows * block_columns)) if block_columns > 1 else 1,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return Shown(
        tiles,
        stride * blocks * size[1] if size[0] > 1 else 0,
        stride * blocks if size[1] > 1 else 0,
        stride if blocks > 1 else 0,
        half,
    )
