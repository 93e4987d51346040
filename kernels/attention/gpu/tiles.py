"""Tile sizes of the attention kernels: one table, one validity predicate, the choice between its entries.

No number here was measured on a GPU. Each was found by compiling ahead of time for sm_80, sm_90, sm_100 and gfx942 and
taking the largest tile in use for such kernels that fits shared memory, runs on the matrix units and spills next to
nothing inside its loops over tiles (``aot.Report.loop_spills``: under 100 bytes; addresses spilled before a loop and
read back after it do not count). fp32 cannot have that from head dimension 128 on: three tf32 products for each of fp32
need the halves of q, k, v or do in registers, and the entries are those that spill least.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...runtime.launch import TARGETS, Target
from .tile_table import TABLE, Tile

OPS = ("forward", "dkdv", "dq", "dbias")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The table's classes of head dimension: entries hold for the larger of D and Dv, padded to a power of two, up to this.
HEAD_DIMS = (64, 128, 256)
# The longest block of queries of a backward kernel, which must divide loads.ROW_PADDING.
_LONGEST_BLOCK_M = 128


@dataclass(frozen=True)
class RowTile:
    """The queries that a program of the delta kernel works on."""

    block_m: int
    num_warps: int

    def launch_arguments(self) -> dict[str, Any]:
        """The keyword arguments of a launch.

        No fusion: a thread with one product of a row would fuse it with the sum over lanes, each lane its own product,
        and the lanes that hold a row's sum would differ in its last bit.
        """
        return {"BLOCK_M": self.block_m, "num_warps": self.num_warps, "enable_fp_fusion": False}


_INTERPRETER = Tile(32, 32, 4, 2)

_forced: Tile | None = None


@contextlib.contextmanager
def force(tile: Tile) -> Iterator[None]:
    """Within the block every op takes ``tile``, in every thread (autograd runs a GPU's backward in one of its own)."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


def choose_forward(
    target: Target,
    dtype: torch.dtype,
    block_d: int,
    block_dv: int,
    *score_dims: str | None,
    keep_rest: bool = False,
) -> Tile:
    """The tile of the forward.

    Args:
        target: where it will run.
        dtype: of q, k and v.
        block_d, block_dv: D and Dv, padded to powers of two.
        score_dims: ``dims`` (scores.py) of the mask and of the bias.
        keep_rest: what rounding takes from the output is written, too.
    """
    return _choose("forward", target, dtype, block_d, block_dv, "mn" in score_dims, keep_rest)


def choose_dkdv(target: Target, dtype: torch.dtype, block_d: int, block_dv: int, *score_dims: str | None) -> Tile:
    """The tile of the pass that computes dk and dv; as :func:`choose_forward`."""
    return _choose("dkdv", target, dtype, block_d, block_dv, "mn" in score_dims)


def choose_dq(target: Target, dtype: torch.dtype, block_d: int, block_dv: int, *score_dims: str | None) -> Tile:
    """The tile of the pass that computes dq; as :func:`choose_forward`."""
    return _choose("dq", target, dtype, block_d, block_dv, "mn" in score_dims)


def choose_dbias(target: Target, dtype: torch.dtype, block_d: int, block_dv: int) -> Tile:
    """The tile of the pass that computes dbias, which reads the bias; as :func:`choose_forward`."""
    return _choose("dbias", target, dtype, block_d, block_dv, True)


def choose_delta(target: Target, block_dv: int) -> RowTile:
    """The tile of delta, a sum over two rows of memory: 32 elements of each a thread, in any dtype."""
    if target.vendor == "interpreter":
        return RowTile(64, 4)
    return RowTile(max(16, min(64, 4096 // block_dv)), 4)


def _choose(
    op: str,
    target: Target,
    dtype: torch.dtype,
    block_d: int,
    block_dv: int,
    has_tiles: bool,
    keep_rest: bool = False,
) -> Tile:
    return _forced or _fitting(op, target, dtype, block_d, block_dv, has_tiles, keep_rest)


@functools.cache
def _fitting(
    op: str, target: Target, dtype: torch.dtype, block_d: int, block_dv: int, has_tiles: bool, keep_rest: bool
) -> Tile:
    """The table's entry, or where it does not fit the best of the smaller tiles that do.

    Entries are for each family's largest GPU; others have less shared memory (99 KiB on sm_86, sm_89 and sm_120).
    """
    entry = get(op, target, dtype, block_d, block_dv, has_tiles, keep_rest)
    if is_valid(entry, op, target, dtype, block_d, block_dv, has_tiles):
        return entry
    best = Tile(16, 16, 4, 1)
    for m, n, stages in itertools.product(_up_to(entry.block_m), _up_to(entry.block_n), range(1, entry.num_stages + 1)):
        # So small a tile has no work for more than four warps.
        tile = Tile(m, n, min(entry.num_warps, 4) if m * n <= 512 else entry.num_warps, stages)
        if is_valid(tile, op, target, dtype, block_d, block_dv, has_tiles) and _worth(tile, op) > _worth(best, op):
            best = tile
    # If not even the smallest is valid, the launch itself will say what is missing.
    return best


def _up_to(size: int) -> list[int]:
    return [2**i for i in range(4, size.bit_length())]


def _worth(tile: Tile, op: str) -> tuple[int, ...]:
    """Order of preference: work a step, a pipelined step counting double; square tiles; more of what is kept."""
    m, n = tile.block_m, tile.block_n
    return (m * n * min(tile.num_stages, 2), min(m, n), n if op == "dkdv" else m, tile.num_stages)


def get(
    op: str,
    target: Target,
    dtype: torch.dtype,
    block_d: int,
    block_dv: int,
    has_tiles: bool,
    keep_rest: bool = False,
) -> Tile:
    """The table's entry; ``has_tiles``: a block of a mask or bias is read beside each tile of scores."""
    if target.vendor == "interpreter":
        return _INTERPRETER
    head_dim = next(i for i, limit in enumerate(HEAD_DIMS) if max(block_d, block_dv) <= limit)
    # fp8 takes the tiles of bf16, into which its values are turned before they meet the probabilities.
    family, size = _family(target), max(dtype.itemsize, 2)
    entries = TABLE.get((family, size, "forward and rest")) if keep_rest else None
    return (entries or TABLE[family, size, op])[head_dim][has_tiles]


def shipped(targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")) -> Iterator[tuple[Any, ...]]:
    """Every (op, target, dtype, head_dim, has_tiles, tile) of the table at D = Dv: what a test is to compile."""
    for name, op, dtype, d, has_tiles in itertools.product(targets, OPS, DTYPES, HEAD_DIMS, (False, True)):
        if has_tiles or op != "dbias":
            target = TARGETS[name]
            yield op, target, dtype, d, has_tiles, get(op, target, dtype, d, d, has_tiles)


def is_valid(
    tile: Tile, op: str, target: Target, dtype: torch.dtype, block_d: int, block_dv: int, has_tiles: bool = True
) -> bool:
    """Return whether a tile can work: sizes the compiler takes, accumulators in registers, operands in memory.

    The one statement of these limits, for the table's tests and for whoever tries tiles on a GPU. Necessary for code
    without spills, not sufficient: that only the compiled code shows.

    Args:
        op: one of :data:`OPS`.
        block_d, block_dv: D and Dv, padded to powers of two.
        has_tiles: a block of a mask or bias is read beside each tile of scores.
    """
    m, n = tile.block_m, tile.block_n
    if any(size < 16 or size & (size - 1) for size in (m, n)) or tile.num_warps not in (1, 2, 4, 8, 16):
        return False
    if tile.num_stages < 1 or (op != "forward" and m > _LONGEST_BLOCK_M):
        return False
    if target.vendor == "interpreter":
        return True
    threads = tile.num_warps * (64 if target.vendor == "hip" else 32)
    accumulators = {
        "forward": m * (block_dv + n),
        "dkdv": n * (block_d + block_dv + 2 * m),
        "dq": m * (block_d + 2 * n),
        "dbias": 3 * m * n,
    }[op]
    # Of a thread's 255 registers the rest hold addresses and operands.
    if accumulators > threads * 192:
        return False
    if _family(target) == "sm_100" and not _fits_tensor_memory(tile, op, dtype, block_d, block_dv):
        return False
    return shared_memory(tile, op, target, dtype, block_d, block_dv, has_tiles) <= target.shared_memory


def _fits_tensor_memory(tile: Tile, op: str, dtype: torch.dtype, block_d: int, block_dv: int) -> bool:
    """Return whether accumulators fit tensor memory, 512 columns on data-centre Blackwell; with more a kernel traps.

    Blocks of fewer than 64 rows are multiplied by mma.sync, which does not use that memory.
    """
    if (tile.block_n if op == "dkdv" else tile.block_m) < 64:
        return True
    if dtype == torch.float32:
        # The halves that tf32x3 multiplies lie there as well.
        return max(block_d, block_dv) <= 64
    return op != "dkdv" or block_d + block_dv + 2 * tile.block_m <= 512


def shared_memory(
    tile: Tile, op: str, target: Target, dtype: torch.dtype, block_d: int, block_dv: int, has_tiles: bool
) -> int:
    """An upper bound of the bytes of shared memory, by what Triton allocates for these loops."""
    m, n, size = tile.block_m, tile.block_n, dtype.itemsize
    both = block_d + block_dv
    # What a program keeps for all of its loop, and what each step of the loop brings.
    kept = {"forward": m * block_d, "dkdv": n * both, "dq": m * both, "dbias": 0}[op] * size
    moved = {"forward": n * both, "dkdv": m * both, "dq": n * both, "dbias": (m + n) * both}[op] * size
    ahead = tile.num_stages - 1
    # A mask of bytes and a bias of up to 4 are copied ahead like other operands.
    scores = 5 * m * n * ahead if has_tiles or op == "dbias" else 0
    if target.vendor == "hip":
        # Operands that no loop copies ahead pass through the same memory one after the other.
        return max(max(m, n) * max(block_d, block_dv) * size, 4 * m * n) + moved * ahead + scores
    # Where the tensor cores read shared memory themselves, the block in use needs a buffer beside those being filled.
    buffers = tile.num_stages if _family(target) in ("sm_90", "sm_100") else max(ahead, 1)
    if dtype == torch.float32:
        # Three tf32 products for one of fp32: high and low halves of what is kept lie side by side.
        kept *= 2
    elif tile.num_stages == 1 and op == "dkdv":
        # Not copied asynchronously, q and do are laid down once for each of their two products.
        buffers = 2
    if _family(target) == "sm_100" and op == "dkdv":
        # Tensor memory's products want one more copy of what is multiplied twice.
        buffers += 1
    # Probabilities and ds may change their layout on the way to the next product; 1 KiB for barriers and row values.
    return kept + moved * buffers + scores + 2 * m * n * size + 1024


def _family(target: Target) -> str:
    """The GPU whose entries hold for the target: Hopper's wgmma, data-centre Blackwell's tcgen05, or mma.sync."""
    if target.vendor == "hip":
        return "gfx942"
    arch = int(target.arch)
    return "sm_90" if 90 <= arch < 100 else "sm_100" if 100 <= arch < 120 else "sm_80"
