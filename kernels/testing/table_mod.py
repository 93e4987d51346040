"""A score mod as a user would register one: it reads a table by distance, depends on head and batch, and multiplies.

Apart from the score mods that FuseMesh brings, so that it is compiled into the kernels from outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..attention.call import score_mods

TABLE = 97  # elements of the table: distances are taken modulo this


@triton.jit
def _table_mod(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    b_index = (((i_q - i_k) % 97) + 97) % 97
    return b_s + numbers[0] * tl.load(aux[0] + b_index) * (1.0 + 0.1 * (i_h + 2 * i_b)) * b_s


@triton.jit
def _table_mod_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    b_index = (((i_q - i_k) % 97) + 97) % 97
    return b_ds * (1.0 + numbers[0] * tl.load(aux[0] + b_index) * (1.0 + 0.1 * (i_h + 2 * i_b)))


def _table_mod_torch(
    s: torch.Tensor,
    i_b: torch.Tensor,
    i_h: torch.Tensor,
    i_q: torch.Tensor,
    i_k: torch.Tensor,
    table: torch.Tensor,
    *,
    weight: float,
) -> torch.Tensor:
    return s + weight * table.to(s.dtype)[(i_q - i_k) % TABLE] * (1.0 + 0.1 * (i_h + 2 * i_b)) * s


TABLE_MOD = score_mods.register_score_mod(
    score_mods.ScoreMod("table of distances", _table_mod, _table_mod_backward, _table_mod_torch, 1, 1)
)
