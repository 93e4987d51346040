"""Loops over the tiles that a boolean mask shows, from the lists that mask_tiles.py wrote before the pass."""

from __future__ import annotations

import triton
import triton.language as tl

from .loads import at_head


@triton.jit
def tiles_of(shown, place, i_block, MODE: tl.constexpr):
    """Pointer to what was written for block ``i_block`` of the pass; anything without a mask.

    ``shown``: ``Shown`` (mask_tiles.py).
    """
    p_before = shown.p_tiles
    if MODE.mask_dims is not None:
        p_before = at_head(p_before, shown.stride_b, shown.stride_h, place.i_b, place.i_h)
        p_before += tl.cast(i_block, tl.int64) * shown.stride_block
    return p_before


@triton.jit
def shown_range(p_before, i_from, i_to, columns, MODE: tl.constexpr, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """The loop that visits what the mask shows of the tiles that begin in [i_from, i_to): first value and end.

    The loop's step is 1 where the mask varies along ``AXIS``, which the tiles lie on (1 for queries, 2 for keys), else
    BLOCK, their size; :func:`shown_tile` turns its values into places. ``i_from`` begins a tile.
    """
    if MODE.mask_code & AXIS:
        last = tl.cdiv(columns, BLOCK)
        i_from = tl.load(p_before + tl.minimum(i_from // BLOCK, last))
        i_to = tl.load(p_before + tl.minimum(tl.cdiv(i_to, BLOCK), last))
    elif MODE.mask_dims is not None:
        i_to = tl.where(tl.load(p_before + 1) > 0, i_to, i_from)
    return i_from, i_to


@triton.jit
def shown_tile(p_before, i_loop, shown, MODE: tl.constexpr, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """First query or key of the tile that the loop is at."""
    if MODE.mask_code & AXIS:
        i_loop = tl.load(p_before + shown.half + i_loop) * BLOCK
    return i_loop


@triton.jit
def is_shown(p_before, i_n, columns, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Return whether the mask shows anything of the tile of keys that begins at ``i_n``."""
    first, end = shown_range(p_before, i_n, tl.minimum(i_n + BLOCK, columns), columns, MODE, 2, BLOCK)
    return first < end
