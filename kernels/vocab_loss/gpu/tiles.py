"""Tile sizes of the loss's kernels: one table, and the choice between its entries.

No number here was measured on a GPU. Each was found as those of the linear layer (matmul/gpu/tiles.py), by compiling
ahead of time: the largest tile in use for such products that spills no register and fits shared memory
(tests/kernels/vocab_loss/test_aot.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...matmul.gpu.tiles import Tile
from ...runtime.launch import Target

OPS = ("forward", "dz")
# By the size of an element and whether rows can be moved 16 bytes at a time.
_TILES = {
    (2, True): Tile(128, 128, 64, 8),
    (2, False): Tile(64, 64, 32, 4),
    (4, True): Tile(64, 128, 32, 8),
    (4, False): Tile(64, 64, 32, 8),
}
_INTERPRETER = Tile(64, 64, 64)
# About eight programs for each multiprocessor of the GPUs meant: the last ones to run leave few of them idle.
_ENOUGH_PROGRAMS = 1024


def choose(target: Target, dtype: torch.dtype, is_aligned: bool) -> Tile:
    """Return the tile (rows, columns of the vocabulary, depth of features) of both kernels."""
    if target.vendor == "interpreter":
        return _INTERPRETER
    tile = _TILES[dtype.itemsize, is_aligned]
    return replace(tile, num_stages=2) if target.vendor == "hip" else tile


def tiles_of_a_program(tile: Tile, N: int, V: int) -> int:
    """Return how many tiles of columns a program of the forward goes through; from sizes alone, so that bits are."""
    tiles = -(-V // tile.cols)
    parts = min(tiles, max(1, _ENOUGH_PROGRAMS // -(-N // tile.rows)))
    return -(-tiles // parts)


def launch_arguments(tile: Tile) -> dict[str, Any]:
    """Return the keyword arguments of a launch of either kernel."""
    blocks = {"BLOCK_N": tile.rows, "BLOCK_V": tile.cols, "BLOCK_E": tile.depth, "GROUP": tile.group}
    return {**blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
