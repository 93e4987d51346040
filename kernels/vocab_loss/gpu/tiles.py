"""Tile sizes of the loss's kernels: one table, and the choice between its entries.

No number here was measured on a GPU. Each was found as those of the linear layer (matmul/gpu/tiles.py), by compiling
ahead of time: the largest of some tiles in use for such products that spills no register
(tests/kernels/vocab_loss/test_aot.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ...matmul.gpu.tiles import DTYPES, Tile
from ...runtime.launch import TARGETS, Target

OPS = ("forward", "dz")
# "capped": with a softcap, whose tanh takes registers. "unaligned": features that are not a multiple of 16, or a weight
# whose rows are not, so that elements are moved one by one.
FORMS = ("plain", "capped", "unaligned")
_TILES: dict[tuple[str, str, int], Tile] = {
    ("forward", "plain", 2): Tile(128, 128, 64, 8),
    ("forward", "capped", 2): Tile(128, 128, 64, 8),
    ("forward", "unaligned", 2): Tile(128, 64, 32, 8),
    ("dz", "plain", 2): Tile(128, 128, 64, 8),
    ("dz", "capped", 2): Tile(128, 64, 64, 8),
    ("dz", "unaligned", 2): Tile(64, 64, 32, 8),
    ("forward", "plain", 4): Tile(128, 64, 32, 8),
    ("forward", "capped", 4): Tile(128, 64, 32, 8),
    ("forward", "unaligned", 4): Tile(128, 64, 16, 8),
    ("dz", "plain", 4): Tile(64, 128, 32, 8),
    ("dz", "capped", 4): Tile(64, 128, 32, 8),
    ("dz", "unaligned", 4): Tile(64, 64, 32, 8),
}
# Of these targets the forward's aligned tiles, by target and the size of an element, are half as deep.
_SHALLOW = (("sm_80", 4), ("sm_100", 2))
_INTERPRETER = Tile(64, 64, 64)
# About eight programs for each multiprocessor of the GPUs meant, so that few of them idle while the last ones run.
_ENOUGH_PROGRAMS = 1024


def form(is_capped: bool, is_aligned: bool) -> str:
    """Return one of :data:`FORMS`."""
    return "unaligned" if not is_aligned else "capped" if is_capped else "plain"


def choose(op: str, target: Target, dtype: torch.dtype, form: str) -> Tile:
    """Return the tile of ``op`` (rows, columns of the vocabulary, depth of features)."""
    if target.vendor == "interpreter":
        return _INTERPRETER
    tile = _TILES[op, form, dtype.itemsize]
    if op == "forward" and form != "unaligned" and (target.name, dtype.itemsize) in _SHALLOW:
        tile = replace(tile, depth=tile.depth // 2)
    return replace(tile, num_stages=2) if target.vendor == "hip" else tile


def tiles_of_a_program(tile: Tile, N: int, V: int) -> int:
    """Return how many tiles of columns a program of the forward goes through, by sizes alone."""
    tiles = -(-V // tile.cols)
    parts = min(tiles, max(1, _ENOUGH_PROGRAMS // -(-N // tile.rows)))
    return -(-tiles // parts)


def launch_arguments(tile: Tile) -> dict[str, Any]:
    """Return the keyword arguments of a launch of either kernel."""
    blocks = {"BLOCK_N": tile.rows, "BLOCK_V": tile.cols, "BLOCK_E": tile.depth, "GROUP": tile.group}
    return {**blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}


def shipped(targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")) -> Iterator[tuple[Any, ...]]:
    """Yield every (op, target, dtype, form, tile) that :func:`choose` may answer: what a test is to compile."""
    for name, op, dtype, form_ in itertools.product(targets, OPS, DTYPES, FORMS):
        yield op, name, dtype, form_, choose(op, TARGETS[name], dtype, form_)
