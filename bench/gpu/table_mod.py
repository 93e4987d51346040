"""A score mod as a user would register one: a table by distance, scaled by head, that multiplies the score.

Apart from the score mods that FuseMesh brings, so that what a GPU runs here is compiled into the kernels from outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

import fusemesh

TABLE = 61  # distances are taken modulo this


@triton.jit
def scaled_by_table(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    """s * (1 + weight * table[distance] / (1 + h))."""
    b_row = (((i_q - i_k) % 61) + 61) % 61
    return b_s * (1.0 + numbers[0] * tl.load(aux[0] + b_row) / (1.0 + i_h))


@triton.jit
def scaled_by_table_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    """ds * (1 + weight * table[distance] / (1 + h))."""
    b_row = (((i_q - i_k) % 61) + 61) % 61
    return b_ds * (1.0 + numbers[0] * tl.load(aux[0] + b_row) / (1.0 + i_h))


def _plain(
    s: torch.Tensor,
    i_b: torch.Tensor,
    i_h: torch.Tensor,
    i_q: torch.Tensor,
    i_k: torch.Tensor,
    table: torch.Tensor,
    *,
    weight: float,
) -> torch.Tensor:
    return s * (1.0 + weight * table.to(s.dtype)[(i_q - i_k) % TABLE] / (1.0 + i_h))


TABLE_MOD = fusemesh.register_score_mod(
    fusemesh.ScoreMod(
        "table of the benchmarks", scaled_by_table, scaled_by_table_backward, _plain, num_aux=1, num_params=1
    )
)
