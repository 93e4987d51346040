"""Tile sizes of the linear layer's kernels: one table, one validity predicate, the choice between its entries.

No number here was measured on a GPU. Each was found by compiling ahead of time for sm_80, sm_90, sm_100 and gfx942 and
taking the largest tile in use for such kernels that spills no register, fits shared memory and keeps the tensor cores'
instructions asynchronous (tests/kernels/matmul/test_aot.py).

Operands and results whose row strides Triton does not know to be multiples of 16 elements (a vocabulary of 50257) are
read and written element by element: nothing is copied asynchronously, each element has an address of its own, and large
tiles spill kilobytes. They have entries of their own.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...runtime.launch import TARGETS, Target

OPS = ("forward", "dgrad", "wgrad")
# How many factors a backward kernel multiplies dy by: none, one slope, two (gated); for forward how many slopes it may
# store. "gated" has two weights.
FORMS = ("plain", "sloped", "gated")
SIZES = ("large", "small", "skinny", "unaligned", "unaligned skinny")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The kernels' block of (rows of the result, its columns, the summed dimension). M counts tokens, N out, K in features.
_AXES = {
    "forward": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "dgrad": ("BLOCK_M", "BLOCK_K", "BLOCK_N"),
    "wgrad": ("BLOCK_N", "BLOCK_K", "BLOCK_M"),
}


@dataclass(frozen=True)
class Tile:
    """One program's part of the result, rows x cols, summed in steps of depth.

    ``group`` rows of tiles are worked on together, so that they share columns in the L2 cache.
    """

    rows: int
    cols: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8

    def launch_arguments(self, op: str) -> dict[str, Any]:
        """The keyword arguments of a launch of ``op``'s kernel."""
        blocks = dict(zip(_AXES[op], (self.rows, self.cols, self.depth), strict=True))
        options = {"GROUP": self.group, "num_warps": self.num_warps, "num_stages": self.num_stages}
        # wgrad sums products over lanes for the bias: as in attention's tiles.RowTile, the two are not fused.
        return {**blocks, **options, "enable_fp_fusion": op != "wgrad"}


# Large results, 16-bit and 32-bit operands. Two accumulators (gated forward and wgrad), and the factors on their way to
# the tensor cores, each take registers of the accumulator.
_LARGE: dict[tuple[str, str, int], Tile] = {
    ("forward", "plain", 2): Tile(128, 256, 64, 8),
    ("forward", "sloped", 2): Tile(128, 128, 64, 8),
    ("forward", "gated", 2): Tile(128, 64, 64, 8),
    ("dgrad", "plain", 2): Tile(128, 256, 64, 8),
    ("dgrad", "sloped", 2): Tile(128, 128, 64, 8),
    ("dgrad", "gated", 2): Tile(128, 128, 64, 8),
    ("wgrad", "plain", 2): Tile(128, 256, 64, 8),
    ("wgrad", "sloped", 2): Tile(128, 128, 64, 8),
    ("wgrad", "gated", 2): Tile(64, 64, 64, 4),
    ("forward", "plain", 4): Tile(128, 128, 32, 8),
    ("forward", "sloped", 4): Tile(128, 64, 32, 8),
    ("forward", "gated", 4): Tile(64, 64, 32, 8),
    ("dgrad", "plain", 4): Tile(128, 128, 32, 8),
    ("dgrad", "sloped", 4): Tile(128, 64, 32, 8),
    ("dgrad", "gated", 4): Tile(128, 64, 32, 8),
    ("wgrad", "plain", 4): Tile(128, 64, 32, 8),
    ("wgrad", "sloped", 4): Tile(128, 64, 32, 8),
    ("wgrad", "gated", 4): Tile(64, 64, 32, 8),
}
# Results with too few large tiles to occupy a GPU. fp32 takes 8 warps: three tf32 products need the split operands'
# registers besides.
_SMALL = {2: Tile(64, 64, 64, 4), 4: Tile(64, 64, 32, 8)}
# For sm_90: in the tiles above, ptxas serialises these kernels' matrix instructions (its remark C7515). fp16 has a case
# of its own because its slope may be fp32 (ops.slope_dtype).
_SMALL_SM_90: dict[tuple[str, str, torch.dtype], Tile] = {
    ("dgrad", "sloped", torch.float16): Tile(64, 128, 64, 4),
    ("dgrad", "sloped", torch.bfloat16): Tile(64, 128, 64, 4),
    ("dgrad", "gated", torch.float16): Tile(64, 128, 64, 4),
    ("dgrad", "gated", torch.bfloat16): Tile(64, 128, 64, 4),
    ("wgrad", "sloped", torch.float16): Tile(64, 32, 64, 4),
}
# A few tokens (generation): bound by reading the weights, so that the tile is deep and not high.
_SKINNY = {2: Tile(16, 64, 128, 4), 4: Tile(16, 64, 32, 4)}
# Of the tiles with about as many bytes in flight, those with which this kernel spills nothing on any target.
_SKINNY_DGRAD = {2: Tile(16, 64, 64, 4, 4), 4: Tile(16, 32, 64, 4)}
# Rows that are moved element by element, whichever of N and K is odd: of the tiles in use the largest that spills
# nothing on any target, but for those of NVIDIA's that the next table names.
_UNALIGNED: dict[tuple[str, str, int], Tile] = {
    ("forward", "plain", 2): Tile(128, 64, 32, 8),
    ("forward", "sloped", 2): Tile(128, 64, 32, 8),
    ("forward", "gated", 2): Tile(64, 64, 32, 8),
    ("dgrad", "plain", 2): Tile(128, 128, 32, 8),
    ("dgrad", "sloped", 2): Tile(128, 64, 32, 8),
    ("dgrad", "gated", 2): Tile(64, 64, 32, 8),
    ("wgrad", "plain", 2): Tile(128, 64, 32, 8),
    ("wgrad", "sloped", 2): Tile(128, 64, 32, 8),
    ("wgrad", "gated", 2): Tile(64, 64, 32, 8),
    ("forward", "plain", 4): Tile(128, 64, 32, 8),
    ("forward", "sloped", 4): Tile(64, 64, 32, 8),
    ("forward", "gated", 4): Tile(64, 64, 32, 8),
    ("dgrad", "plain", 4): Tile(128, 64, 32, 8),
    ("dgrad", "sloped", 4): Tile(128, 64, 32, 8),
    ("dgrad", "gated", 4): Tile(64, 64, 32, 8),
    ("wgrad", "plain", 4): Tile(128, 64, 32, 8),
    ("wgrad", "sloped", 4): Tile(64, 64, 32, 8),
    ("wgrad", "gated", 4): Tile(64, 64, 32, 8),
}
# For NVIDIA's targets without asynchronous tensor cores.
_UNALIGNED_SM_80: dict[tuple[str, str, int], Tile] = {
    ("forward", "sloped", 2): Tile(64, 64, 32, 8),
    ("wgrad", "sloped", 2): Tile(64, 64, 32, 8),
    ("forward", "gated", 4): Tile(64, 32, 32, 8),
    ("dgrad", "gated", 4): Tile(64, 64, 16, 8),
    ("wgrad", "sloped", 4): Tile(64, 64, 16, 8),
    ("wgrad", "gated", 4): Tile(64, 64, 16, 8),
}
# A few tokens of them, where the aligned ones' tile spills.
_UNALIGNED_SKINNY: dict[tuple[str, str, int], Tile] = {
    ("forward", "plain", 2): Tile(16, 64, 64, 4),
    ("forward", "sloped", 2): Tile(16, 64, 64, 4),
    ("forward", "gated", 2): Tile(16, 32, 64, 4),
    ("dgrad", "gated", 4): Tile(16, 32, 16, 2),
}
_INTERPRETER = Tile(128, 128, 64)
_held: contextvars.ContextVar[dict[str, Tile] | None] = contextvars.ContextVar("fusemesh_linear_tiles", default=None)


@contextlib.contextmanager
def holding(tiles: dict[str, Tile]) -> Iterator[None]:
    """Within the block, in this thread, an op takes its tile in ``tiles``, or enters its choice there."""
    token = _held.set(tiles)
    try:
        yield
    finally:
        _held.reset(token)


ALIGNMENT = 16  # elements; Triton's own: of a number it knows at most that it is a multiple of 16
_SKINNY_ROWS = 32
# About one tile for each multiprocessor of the GPUs meant (108 on A100 to 304 on MI300X).
_ENOUGH_TILES = 128


def form(is_sloped: bool, is_gated: bool) -> str:
    """One of :data:`FORMS`."""
    return "gated" if is_gated else "sloped" if is_sloped else "plain"


def get(op: str, target: Target, dtype: torch.dtype, form: str, size: str) -> Tile:
    """The table's entry for a target and a size of :data:`SIZES`."""
    if target.vendor == "interpreter":
        return _INTERPRETER
    itemsize = dtype.itemsize
    if size == "large":
        tile = _LARGE[op, form, itemsize]
    elif "skinny" in size:
        tile = (_SKINNY_DGRAD if op == "dgrad" else _SKINNY)[itemsize]
        if size == "unaligned skinny":
            tile = _UNALIGNED_SKINNY.get((op, form, itemsize), tile)
    elif size == "unaligned":
        tile = _UNALIGNED[op, form, itemsize]
        if target.vendor == "cuda" and not _has_asynchronous_tensor_cores(target):
            tile = _UNALIGNED_SM_80.get((op, form, itemsize), tile)
    else:
        tile = _SMALL[itemsize]
        if target.name == "sm_90":
            tile = _SMALL_SM_90.get((op, form, dtype), tile)
    if size in ("large", "small") and not _has_asynchronous_tensor_cores(target):
        # Operands pass through registers on their way to the tensor cores, so that a deep step would need too many.
        tile = replace(tile, depth=tile.depth // 2)
    if target.vendor == "hip":
        tile = replace(tile, num_stages=2)
        if op == "dgrad" and "skinny" in size:
            # A deeper one spills scalar registers, which hold the masks of its loads.
            tile = replace(tile, depth=min(tile.depth, 32))
    return tile


def choose(
    op: str, target: Target, dtype: torch.dtype, shape: tuple[int, int, int], form: str, is_aligned: bool = True
) -> Tile:
    """The tile for ``op`` of :data:`OPS` on ``shape`` (M tokens, N out features, K in features).

    ``is_aligned``: the rows of all operands and results start on multiples of :data:`ALIGNMENT` elements.
    """
    held = _held.get()
    if held is None:
        return _choose(op, target, dtype, shape, form, is_aligned)
    if op not in held:
        held[op] = _choose(op, target, dtype, shape, form, is_aligned)
    return held[op]


def _choose(
    op: str, target: Target, dtype: torch.dtype, shape: tuple[int, int, int], form: str, is_aligned: bool
) -> Tile:
    M, N, K = shape
    if op != "wgrad" and M <= _SKINNY_ROWS:
        return get(op, target, dtype, form, "skinny" if is_aligned else "unaligned skinny")
    if not is_aligned:
        return get(op, target, dtype, form, "unaligned")
    rows, cols = {"forward": (M, N), "dgrad": (M, K), "wgrad": (N, K)}[op]
    large = get(op, target, dtype, form, "large")
    if -(-rows // large.rows) * -(-cols // large.cols) >= _ENOUGH_TILES:
        return large
    return get(op, target, dtype, form, "small")


def shipped(targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")) -> Iterator[tuple[Any, ...]]:
    """Every (op, target, dtype, form, size, tile) that :func:`choose` may answer: what is to be compiled in a test."""
    for name, op, dtype, form_, size in itertools.product(targets, OPS, DTYPES, FORMS, SIZES):
        if op != "wgrad" or "skinny" not in size:
            yield op, TARGETS[name], dtype, form_, size, get(op, TARGETS[name], dtype, form_, size)


def is_valid(tile: Tile, op: str, target: Target, dtype: torch.dtype, form: str) -> bool:
    """Return whether a tile can work: sizes the compiler takes, accumulators in registers, operands in memory.

    The one statement of these limits, for the table's tests and for whoever tries tiles on a GPU. Necessary for code
    without spills, not sufficient: that only the compiled code shows.
    """
    sizes = (tile.rows, tile.cols, tile.depth)
    if any(size < 16 or size & (size - 1) for size in sizes) or tile.num_warps not in (1, 2, 4, 8, 16):
        return False
    if tile.group < 1 or tile.num_stages < 1:
        return False
    if target.vendor == "interpreter":
        return True
    threads = tile.num_warps * (64 if target.vendor == "hip" else 32)
    accumulators = 2 if form == "gated" and op != "dgrad" else 1
    # Of a thread's 255 registers half hold accumulators, a quarter where slopes need theirs.
    if accumulators * tile.rows * tile.cols > threads * (128 if form == "plain" else 64):
        return False
    return shared_memory(tile, op, target, dtype, form) <= target.shared_memory


def shared_memory(tile: Tile, op: str, target: Target, dtype: torch.dtype, form: str) -> int:
    """An upper bound of the bytes of shared memory, by what Triton allocates for these loops."""
    row_operands = 1 if op == "forward" else 1 + FORMS.index(form)
    col_operands = 2 if form == "gated" and op != "wgrad" else 1
    row_block, col_block = tile.rows * tile.depth * dtype.itemsize, tile.cols * tile.depth * dtype.itemsize
    ahead = max(tile.num_stages - 1, 1)
    # Where the tensor cores read shared memory themselves, the block in use needs a buffer beside those being filled.
    # Blocks that a slope multiplies first do not, but the product may be laid down once more.
    direct = tile.num_stages if _has_asynchronous_tensor_cores(target) else ahead
    if row_operands == 1:
        rows = row_block * direct
    else:
        rows = row_block * (row_operands * ahead + row_operands - 1)
        if form == "sloped" and dtype == torch.float16:
            # The slope may be kept in fp32 (ops.slope_dtype), twice as wide as dy.
            rows += row_block * ahead
    # 1 KiB for barriers.
    total = rows + col_operands * col_block * direct + 1024
    if op == "wgrad":
        # The bias gradient is summed, and dz transposed, through some more.
        total += 7168
    # The results change their layout in the same memory once the loop is done with it.
    return max(total, tile.rows * tile.cols * dtype.itemsize)


def _has_asynchronous_tensor_cores(target: Target) -> bool:
    """Hopper's wgmma and data-centre Blackwell's tcgen05, which read shared memory themselves."""
    return target.vendor == "cuda" and 90 <= int(target.arch) < 120
