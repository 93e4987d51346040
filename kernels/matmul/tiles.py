"""draft"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..launch import Target


_AXES = {
    "forward": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "dgrad": ("BLOCK_M", "BLOCK_K", "BLOCK_N"),
    "wgrad": ("BLOCK_N", "BLOCK_K", "BLOCK_M"),
}


@dataclass(frozen=True)
class Tile:
    rows: int
    cols: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8

    def launch_arguments(self, op):
        return dict(
            zip(_AXES[op], (self.rows, self.cols, self.depth)),
            GROUP=self.group,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def choose(op, target, dtype, shape, form):
    return Tile(128, 128, 64) if target.vendor == "interpreter" else Tile(64, 64, 64)


def dot_precision(target, dtype):
    if dtype != torch.float32 or target.vendor != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def form(is_sloped, is_gated):
    return "gated" if is_gated else "sloped" if is_sloped else "plain"
