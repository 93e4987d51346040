"""The tiles of attention's kernels but decode's, one table; tiles.py says how they were found, and chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tile:
    """The part of the scores that a program works on at a time: block_m queries by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def launch_arguments(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# For each family of targets, size of an element and op: a pair of tiles for each class of HEAD_DIMS. The first is for
# calls that read no block of a mask or bias beside each tile of scores, the second for calls that do, which takes
# registers. "forward and rest" stands where the forward needs others while what rounding takes is written as well.
Pair = tuple[Tile, Tile]
TABLE: dict[tuple[str, int, str], tuple[Pair, Pair, Pair]] = {
    ("sm_80", 2, "forward"): (
        (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2)),
        (Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
        (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ),
    ("sm_80", 2, "dkdv"): (
        (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)),
        (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        (Tile(32, 64, 8, 2), Tile(16, 32, 8, 2)),
    ),
    ("sm_80", 2, "dq"): (
        (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
        (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        (Tile(64, 64, 8, 1), Tile(64, 32, 8, 2)),
    ),
    ("sm_80", 2, "dbias"): (
        (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    ),
    ("sm_80", 4, "forward"): (
        (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
        (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        (Tile(32, 32, 8, 1), Tile(16, 32, 4, 1)),
    ),
    ("sm_80", 4, "dkdv"): (
        (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    ("sm_80", 4, "dq"): (
        (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    ("sm_80", 4, "dbias"): (
        (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ),
    ("sm_90", 2, "forward"): (
        (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2)),
        (Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
        (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    ),
    ("sm_90", 2, "dkdv"): (
        (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)),
        (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        (Tile(32, 64, 8, 2), Tile(16, 64, 8, 2)),
    ),
    ("sm_90", 2, "dq"): (
        (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        (Tile(128, 32, 8, 1), Tile(64, 32, 8, 2)),
    ),
    ("sm_90", 2, "dbias"): (
        (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
    ),
    ("sm_90", 4, "forward"): (
        (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        (Tile(128, 32, 8, 2), Tile(128, 32, 8, 1)),
        (Tile(32, 32, 8, 1), Tile(16, 32, 4, 1)),
    ),
    ("sm_90", 4, "dkdv"): (
        (Tile(32, 64, 8, 2), Tile(32, 32, 4, 1)),
        (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    ("sm_90", 4, "dq"): (
        (Tile(64, 64, 8, 2), Tile(64, 32, 4, 2)),
        (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    ("sm_90", 4, "dbias"): (
        (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
        (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ),
    ("sm_100", 2, "forward"): (
        (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
        (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    ),
    ("sm_100", 2, "forward and rest"): (
        (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
        (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ),
    ("sm_100", 2, "dkdv"): (
        (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        (Tile(64, 128, 8, 2), Tile(32, 64, 8, 2)),
        (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ),
    ("sm_100", 2, "dq"): (
        (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (Tile(128, 64, 8, 1), Tile(128, 32, 8, 1)),
    ),
    ("sm_100", 2, "dbias"): (
        (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
    ),
    ("sm_100", 4, "forward"): (
        (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        (Tile(32, 32, 8, 1), Tile(16, 32, 4, 1)),
    ),
    ("sm_100", 4, "dkdv"): (
        (Tile(32, 64, 8, 2), Tile(32, 32, 4, 1)),
        (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    ("sm_100", 4, "dq"): (
        (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ),
    ("sm_100", 4, "dbias"): (
        (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ),
    ("gfx942", 2, "forward"): (
        (Tile(128, 64, 4, 2), Tile(128, 64, 4, 1)),
        (Tile(128, 64, 4, 2), Tile(128, 64, 4, 1)),
        (Tile(128, 32, 4, 1), Tile(128, 32, 4, 1)),
    ),
    ("gfx942", 2, "dkdv"): (
        (Tile(64, 128, 4, 1), Tile(64, 128, 4, 1)),
        (Tile(32, 128, 4, 1), Tile(32, 128, 4, 1)),
        (Tile(16, 64, 4, 1), Tile(16, 64, 4, 1)),
    ),
    ("gfx942", 2, "dq"): (
        (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1)),
        (Tile(128, 32, 4, 1), Tile(128, 32, 4, 1)),
        (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    ),
    ("gfx942", 2, "dbias"): (
        (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    ),
    ("gfx942", 4, "forward"): (
        (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    ),
    ("gfx942", 4, "dkdv"): (
        (Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
        (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    ),
    ("gfx942", 4, "dq"): (
        (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
    ),
    ("gfx942", 4, "dbias"): (
        (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    ),
}
