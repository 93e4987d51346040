"""Score mods: a table read by position, a number for some heads, and one that only the reference can do."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import fusemesh
from bench.bits.draw import Draw, Tensors

TABLE = 97


# Triton's functions have no annotations: its compiler takes those for types of its own.
@triton.jit
def _table(b_s, i_b, i_h, i_q, i_k, aux, numbers):  # type: ignore[no-untyped-def]
    b_index = (((i_q - i_k) % 97) + 97) % 97
    return b_s + numbers[0] * tl.load(aux[0] + b_index) * (1.0 + 0.1 * (i_h + 2 * i_b)) * b_s


@triton.jit
def _table_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):  # type: ignore[no-untyped-def]
    b_index = (((i_q - i_k) % 97) + 97) % 97
    return b_ds * (1.0 + numbers[0] * tl.load(aux[0] + b_index) * (1.0 + 0.1 * (i_h + 2 * i_b)))


def _table_torch(
    s: Tensor, i_b: Tensor, i_h: Tensor, i_q: Tensor, i_k: Tensor, table: Tensor, *, weight: float
) -> Tensor:
    return s + weight * table.to(s.dtype)[(i_q - i_k) % TABLE] * (1.0 + 0.1 * (i_h + 2 * i_b)) * s


@triton.jit
def _sharper(b_s, i_b, i_h, i_q, i_k, aux, numbers):  # type: ignore[no-untyped-def]
    return b_s * tl.where(i_h % 2 == 1, numbers[0], 1.0) + numbers[1]


@triton.jit
def _sharper_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):  # type: ignore[no-untyped-def]
    return b_ds * tl.where(i_h % 2 == 1, numbers[0], 1.0)


def _sharper_torch(
    s: Tensor, i_b: Tensor, i_h: Tensor, i_q: Tensor, i_k: Tensor, *, weight: float, shift: float
) -> Tensor:
    return torch.where(i_h % 2 == 1, weight * s, s) + shift


def _learnt_torch(s: Tensor, i_b: Tensor, i_h: Tensor, i_q: Tensor, i_k: Tensor, table: Tensor) -> Tensor:
    return s * table[i_k % TABLE]


TABLE_MOD = fusemesh.register_score_mod(
    fusemesh.ScoreMod("table of equal_bits", _table, _table_backward, _table_torch, 1, 1)
)
SHARPER_MOD = fusemesh.register_score_mod(
    fusemesh.ScoreMod("sharper of equal_bits", _sharper, _sharper_backward, _sharper_torch, num_params=2)
)
LEARNT_MOD = fusemesh.register_score_mod(
    fusemesh.ScoreMod("learnt of equal_bits", None, None, _learnt_torch, 1, aux_grad=True)
)


def score_mod(draw: Draw, which: str) -> tuple[Any, Tensors]:
    """A score mod with its arguments, and those of them that have a gradient."""
    if which == "sharper":
        return SHARPER_MOD(weight=1.5, shift=-0.25), {}
    if which == "table":
        return TABLE_MOD(draw.normal(TABLE), weight=0.25), {}
    table = draw.leaf(TABLE)
    return LEARNT_MOD(table), {"table": table}
