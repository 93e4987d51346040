"""Tile sizes of the attention kernels: one table, one validity predicate, the choice between its entries.

No number here was measured on a GPU. Each was found by compiling ahead of time for sm_80, sm_90, sm_100 and gfx942 and
taking the largest tile in use for such kernels that fits shared memory, runs on the matrix units and spills nothing
inside its loops over tiles (``aot.Report.loop_spills``; fp32 cannot have that from head dimension 128 on, see below).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..launch import TARGETS, Target

OPS = ("forward", "dkdv", "dq", "dbias")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The table's classes of head dimension: entries hold for the larger of D and Dv, padded to a power of two, up to this.
HEAD_DIMS = (64, 128, 256)
# The longest block of queries of a backward kernel, which must divide loads.ROW_PADDING.
_LONGEST_BLOCK_M = 128
# Columns of data-centre Blackwell's tensor memory, which holds accumulators; a kernel that needs more is only a trap.
_TENSOR_MEMORY = 512


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


@dataclass(frozen=True)
class RowTile:
    """The queries that a program of the delta kernel works on."""

    block_m: int
    num_warps: int

    def launch_arguments(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        return {"BLOCK_M": self.block_m, "num_warps": self.num_warps, "enable_fp_fusion": True}


_INTERPRETER = Tile(32, 32, 4, 2)
