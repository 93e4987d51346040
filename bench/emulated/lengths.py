"""Lengths at which a kernel's loops run no, one, two ... times, to one time more than is copied ahead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fusemesh.kernels.attention.gpu import decode_tiles, tiles
from fusemesh.kernels.matmul.gpu import tiles as linear_tiles
from fusemesh.kernels.measure.cases.common import ALL_DTYPES
from fusemesh.kernels.runtime.launch import TARGETS
from fusemesh.kernels.vocab_loss.gpu import tiles as loss_tiles


def around(block: int, stages: int) -> list[int]:
    """Return lengths of 0 to stages + 1 whole blocks, each with and without an incomplete one behind them."""
    whole = [block * i for i in range(1, stages + 2)]
    return sorted({1, block - 1, *whole, *(length + 1 for length in whole)})


def of_attention(target: str, dtype: str, d: int, has_tiles: bool, ops: Iterable[str]) -> list[int]:
    """Return the lengths for the loops of ``ops``: over queries in dkdv, else over keys."""
    found: set[int] = set()
    for op in ops:
        tile = tiles.get(op, TARGETS[target], ALL_DTYPES[dtype], d, d, has_tiles)
        found |= set(around(tile.block_m if op == "dkdv" else tile.block_n, tile.num_stages))
    return sorted(found)


def tile_of_attention(target: str, op: str, dtype: str, d: int) -> tuple[int, int]:
    """Return the queries and the keys of a tile."""
    tile = tiles.get(op, TARGETS[target], ALL_DTYPES[dtype], d, d, False)
    return tile.block_m, tile.block_n


def beyond_a_tile(target: str, dtype: str, d: int) -> int:
    """Return a length beyond every tile of the kernels of these head dimensions."""
    chosen = [tiles.get(op, TARGETS[target], ALL_DTYPES[dtype], d, d, has) for op in tiles.OPS for has in (False, True)]
    return max(max(tile.block_m, tile.block_n) for tile in chosen) + 13


def of_decode(target: str, dtype: str, d: int, dv: int, latent: bool, rows: int) -> tuple[int, ...]:
    """Return the lengths of caches, one without a key among them."""
    tile = decode_tiles.choose(TARGETS[target], ALL_DTYPES[dtype], d, dv, latent, rows, 1, 1).tile
    return (0, *around(tile.block_n, tile.num_stages))


def of_linear(target: str, dtype: str, features: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Return shapes (M, N, K) of small results whose three loops run 0 to stages + 1 whole times and the rest.

    N and K stay multiples of 16, so that rows are aligned.
    """
    form = linear_tiles.form("activation" in features, "gated" in features)
    depth, most = {}, 0
    for op in linear_tiles.OPS:
        tile = linear_tiles.get(op, TARGETS[target], ALL_DTYPES[dtype], form, "small")
        depth[op], most = tile.depth, max(most, tile.num_stages + 2)
    found = []
    for i in range(most):
        ends = {"forward": i * depth["forward"], "dgrad": i * depth["dgrad"], "wgrad": i * depth["wgrad"]}
        # More than 32 rows, for fewer have tiles of their own.
        found.append((max(ends["wgrad"] + 1, 33), ends["dgrad"] + 16, ends["forward"] + 16))
        if i:
            found.append((max(ends["wgrad"], 33), ends["dgrad"], ends["forward"]))
    return found


def of_loss(target: str, dtype: str) -> list[int]:
    """Return numbers of features, multiples of 16, with which both kernels' loops run 1 to stages + 1 times."""
    found: set[int] = set()
    for op in loss_tiles.OPS:
        tile = loss_tiles.choose(op, TARGETS[target], ALL_DTYPES[dtype], loss_tiles.form(False, True))
        found |= {-(-length // 16) * 16 for length in around(tile.depth, tile.num_stages)}
    return sorted(found)
