"""Tiles and split counts of decode: one table, one validity predicate, the choice.

No number here was measured on a GPU. Tiles were found by compiling ahead of time for sm_80, sm_90, sm_100 and gfx942:
the largest block of keys that leaves room for a second program on a multiprocessor (16-bit, head dims up to 256), or
fits at all, with its copies in flight, and spills next to nothing inside the loop. fp32 keys of 576 spill whatever the
tile: three tf32 products for each of fp32 need the halves of q in registers.

Decode reads each key once and is bound by memory, so what counts is that enough programs read at the same time. The
number of splits brings the grid to about two programs for each of the target's multiprocessors.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...runtime.launch import Target
from .tiles import Tile, _family

APPEND_ROWS = 8  # new keys of a program of the append kernel
COMBINED = 4096  # elements of the splits' outputs that a program of the combine kernel loads at a time

# Multiprocessors of each target's largest product; by target and not by device, so that one architecture gives one
# answer to the bit.
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304}
OTHER_PROCESSORS = 128
PROGRAMS_A_PROCESSOR = 2
KEYS_A_SPLIT = 256  # fewer are not worth the combine kernel's reading and writing

# The table's classes of head dimension: an entry holds for the larger of D and Dv up to this; the last is latent
# attention's, 576 and 512.
HEAD_DIMS = (64, 128, 256, 576)
ROWS = (16, 32, 64)  # and of query rows that share a key head
_Row = tuple[Tile, Tile, Tile]
# For each family of targets and size of an element: the tiles of each class of rows, for each class of head dimension.
_TABLE: dict[tuple[str, int], tuple[_Row, _Row, _Row, _Row]] = {
    ("sm_80", 2): (
        (Tile(16, 128, 4, 3), Tile(32, 128, 4, 3), Tile(64, 64, 4, 3)),
        (Tile(16, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 8, 2)),
        (Tile(16, 32, 4, 3), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
        (Tile(16, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
    ),
    ("sm_80", 4): (
        (Tile(16, 64, 8, 3), Tile(32, 64, 8, 3), Tile(64, 32, 4, 2)),
        (Tile(16, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
        (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
    ),
    ("sm_90", 2): (
        (Tile(16, 128, 4, 3), Tile(32, 128, 4, 3), Tile(64, 128, 4, 3)),
        (Tile(16, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (Tile(16, 32, 4, 3), Tile(32, 32, 4, 3), Tile(64, 32, 4, 2)),
        (Tile(16, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),
    ),
    ("sm_90", 4): (
        (Tile(16, 64, 8, 3), Tile(32, 64, 8, 3), Tile(64, 64, 4, 3)),
        (Tile(16, 64, 8, 3), Tile(32, 64, 8, 3), Tile(32, 64, 8, 3)),
        (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
        (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
    ),
    ("sm_100", 2): (
        (Tile(16, 128, 4, 3), Tile(32, 128, 4, 3), Tile(64, 64, 4, 3)),
        (Tile(16, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (Tile(16, 32, 4, 3), Tile(32, 32, 4, 3), Tile(64, 32, 8, 2)),
        (Tile(16, 64, 8, 2), Tile(32, 32, 8, 3), Tile(32, 32, 8, 3)),
    ),
    ("sm_100", 4): (
        (Tile(16, 64, 8, 3), Tile(32, 64, 8, 3), Tile(32, 64, 8, 3)),
        (Tile(16, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
        (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
    ),
    ("gfx942", 2): (
        (Tile(16, 128, 4, 2), Tile(32, 128, 4, 2), Tile(64, 128, 4, 2)),
        (Tile(16, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2)),
        (Tile(16, 32, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 4, 2)),
        (Tile(16, 32, 8, 2), Tile(32, 16, 8, 2), Tile(32, 16, 8, 2)),
    ),
    ("gfx942", 4): (
        (Tile(16, 64, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1)),
        (Tile(16, 32, 4, 1), Tile(32, 32, 4, 1), Tile(64, 32, 4, 1)),
        (Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(64, 16, 4, 1)),
        (Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    ),
}


@dataclass(frozen=True)
class SplitPlan:
    """The tile of a call and the number of splits of its keys."""

    tile: Tile
    splits: int


_forced_tile: Tile | None = None
_forced_splits: int | None = None


@contextlib.contextmanager
def force(tile: Tile | None = None, splits: int | None = None) -> Iterator[None]:
    """Within the block every call takes this tile and this number of splits, as far as they are given."""
    global _forced_tile, _forced_splits
    before = _forced_tile, _forced_splits
    _forced_tile, _forced_splits = tile, splits
    try:
        yield
    finally:
        _forced_tile, _forced_splits = before


_held: contextvars.ContextVar[SplitPlan | None] = contextvars.ContextVar("fusemesh_decode_plan", default=None)


@contextlib.contextmanager
def holding(plan: SplitPlan) -> Iterator[None]:
    """Within the block, in this thread, every call takes this plan."""
    token = _held.set(plan)
    try:
        yield
    finally:
        _held.reset(token)


def padded(columns: int) -> int:
    """Columns of a block in registers: a power of two, of at least the 16 that matrix units take."""
    return max(16, 1 << (columns - 1).bit_length())


def blocks(d: int, dv: int, latent: bool) -> tuple[int, int]:
    """Return the numbers of a key's columns in the first block and in the second one (0: there is none).

    Latent: the first block is what the values are. Otherwise a key of up to 256 is one block, and a longer one is cut
    at a power of two, because 576 would be 1024 in registers.
    """
    if latent:
        first = dv
    else:
        first = d if d <= 256 else 1 << (d.bit_length() - 1)
    return first, d - first


@functools.cache
def _fitting(target: Target, dtype: torch.dtype, d: int, dv: int, latent: bool, rows: int) -> Tile:
    """The table's entry, or where it does not fit the best of the smaller tiles that do.

    Entries are for each family's largest GPU and for D = Dv, or 576 and 512 in the latent case.
    """
    entry = get(target, dtype, d, dv, rows)
    if is_valid(entry, target, dtype, d, dv, latent):
        return entry
    best, worth = Tile(16, 16, 4, 1), (0, 0, 0)
    for m, n, stages in itertools.product((64, 32, 16), (128, 64, 32, 16), (3, 2, 1)):
        tile = Tile(m, n, entry.num_warps, stages)
        if m > entry.block_m or n > entry.block_n or stages > entry.num_stages:
            continue
        # Work a step, a pipelined step counting double; then rows, each of which reads the keys once.
        this = (m * n * min(stages, 2), m, stages)
        if this > worth and is_valid(tile, target, dtype, d, dv, latent):
            best, worth = tile, this
    # If not even the smallest is valid, the launch itself will say what is missing.
    return best


def fits(target: Target, dtype: torch.dtype, d: int, dv: int, latent: bool, rows: int) -> bool:
    """Return whether the target has a tile for these head dims and query rows."""
    return is_valid(_fitting(target, dtype, d, dv, latent, rows), target, dtype, d, dv, latent)


def get(target: Target, dtype: torch.dtype, d: int, dv: int, rows: int) -> Tile:
    """The table's entry for query rows that share a key head and a head dim, the larger of D and Dv."""
    i_rows = 0 if rows <= 16 else 1 if rows <= 32 else 2
    if target.vendor == "interpreter":
        return Tile(ROWS[i_rows], 32, 4, 2)
    head_dim = next((i for i, limit in enumerate(HEAD_DIMS) if max(d, dv) <= limit), len(HEAD_DIMS) - 1)
    return _TABLE[_family(target), dtype.itemsize][head_dim][i_rows]


def is_valid(tile: Tile, target: Target, dtype: torch.dtype, d: int, dv: int, latent: bool) -> bool:
    """Return whether a tile can work: sizes the compiler takes, accumulators in registers, operands in memory."""
    m, n = tile.block_m, tile.block_n
    if any(size < 16 or size & (size - 1) for size in (m, n)) or tile.num_stages < 1:
        return False
    if target.vendor == "interpreter":
        return True
    threads = tile.num_warps * (64 if target.vendor == "hip" else 32)
    if m * (padded(dv) + n) > threads * 192:
        return False
    # Data-centre Blackwell multiplies blocks of 64 rows in tensor memory, 512 columns; a kernel that needs more traps.
    # The halves of fp32 that tf32x3 multiplies lie there as well.
    if _family(target) == "sm_100" and m >= 64:
        if dtype == torch.float32 and max(d, dv) > 64:
            return False
        if padded(dv) + n > 384:
            return False
    return shared_memory(tile, target, dtype, d, dv, latent) <= target.shared_memory


def shared_memory(tile: Tile, target: Target, dtype: torch.dtype, d: int, dv: int, latent: bool) -> int:
    """An upper bound of the bytes of shared memory, by what Triton allocates for this loop."""
    m, n, size = tile.block_m, tile.block_n, dtype.itemsize
    first, rest = blocks(d, dv, latent)
    key = padded(first) + (padded(rest) if rest else 0)
    moved = n * (key if latent else key + padded(dv)) * size
    ahead = tile.num_stages - 1
    # A mask of bytes and a bias of up to 4 are copied ahead like other operands.
    scores = 5 * m * n * max(ahead, 1)
    if target.vendor == "hip":
        # Operands that no loop copies ahead pass through the same memory one after the other; so do scores.
        return max(max(m, n) * max(key, padded(dv)) * size, moved * ahead) + 4 * m * n
    # Where the tensor cores read shared memory themselves, the block in use needs a buffer beside those being filled.
    direct = m >= 64 and _family(target) in ("sm_90", "sm_100")
    buffers = tile.num_stages if direct else max(ahead, 1)
    # Three tf32 products for one of fp32: high and low halves of what is kept lie side by side.
    kept = m * key * size * (2 if dtype == torch.float32 else 1)
    return kept + moved * buffers + scores + 2 * m * n * size + 1024


def choose(
    target: Target, dtype: torch.dtype, d: int, dv: int, latent: bool, rows: int, sequences: int, capacity: int
) -> SplitPlan:
    """The tile and the number of splits; by shapes alone.

    Args:
        target: where it will run.
        dtype: of q and the caches.
        d, dv, latent: head dims, and whether the values are columns of the keys.
        rows: query rows that share a key head, GROUP * Sq.
        sequences: B * Hkv.
        capacity: slots of a sequence.
    """
    held = _held.get()
    if held is not None:
        return held
    tile = _forced_tile or _fitting(target, dtype, d, dv, latent, rows)
    return SplitPlan(tile, _forced_splits or splits_of(target, tile, rows, sequences, capacity))


def splits_of(target: Target, tile: Tile, rows: int, sequences: int, capacity: int) -> int:
    """About PROGRAMS_A_PROCESSOR programs for each multiprocessor, of at least KEYS_A_SPLIT slots each."""
    programs = sequences * -(-rows // tile.block_m)
    wanted = PROGRAMS_A_PROCESSOR * PROCESSORS.get(target.name, OTHER_PROCESSORS) // max(programs, 1)
    return max(1, min(wanted, capacity // KEYS_A_SPLIT))
