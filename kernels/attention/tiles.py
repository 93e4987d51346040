"""Tile tables draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..launch import Target


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def launch_arguments(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


FORCE: dict = {}


def choose_forward(target: Target, dtype: torch.dtype, block_d: int, block_dv: int) -> Tile:
    return FORCE.get("fwd", Tile(32, 32, 4, 2))


def choose_dkdv(target, dtype, block_d, block_dv):
    return FORCE.get("dkdv", Tile(32, 32, 4, 2))


def choose_dq(target, dtype, block_d, block_dv):
    return FORCE.get("dq", Tile(32, 32, 4, 2))


def choose_dbias(target, dtype, block_d, block_dv):
    return FORCE.get("dbias", Tile(32, 32, 4, 2))


@dataclass(frozen=True)
class RowTile:
    block_m: int
    num_warps: int

    def launch_arguments(self):
        return {"BLOCK_M": self.block_m, "num_warps": self.num_warps, "enable_fp_fusion": True}


def choose_delta(target, block_dv):
    return RowTile(64, 4)
