"""Packed: where the sequences of a packed call lie (torch only)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import or_transpose, wrong

# As in errors.py, of packed tensors.
TRANSPOSE = "heads stand second, [total, H, D]: where they stand first, pass x.transpose(0, 1)"


@dataclass(frozen=True)
class Packed:
    """Sequence b owns the queries ``cu_q[b]`` to ``cu_q[b + 1]`` and the keys ``cu_k[b]`` to ``cu_k[b + 1]``.

    Positions count within a sequence. Rows that belong to no sequence are padding: results there are 0, lse -inf.
    """

    cu_q: torch.Tensor  # [B + 1], int32 or int64
    cu_k: torch.Tensor
    max_q: int  # no sequence has more queries, or keys: the size of grids, masks and biases
    max_k: int
    is_bottom_right: bool  # the last query of each sequence stands at its last key, else the first at its first

    @property
    def batch(self) -> int:
        """Return the number of sequences."""
        return self.cu_q.shape[0] - 1


def as_batch(x: torch.Tensor) -> torch.Tensor:
    """A packed tensor [total, H, D] as [1, H, total, D], what kernels take; a view."""
    return x.transpose(0, 1).unsqueeze(0)


def as_packed(x: torch.Tensor) -> torch.Tensor:
    """[1, H, total, D] as [total, H, D]: the inverse of :func:`as_batch`."""
    return x.squeeze(0).transpose(0, 1)


Function = Callable[..., Any]


def by_batch(forward: Function, backward: Function) -> tuple[Function, Function]:
    """Return the forward and backward of packed tensors, from those that take them as one batch [1, H, total, D]."""

    def packed_forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Any, *, keep_rest: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Attention of each sequence; arguments and results are those of the reference."""
        options = {"keep_rest": True} if keep_rest else {}
        out, lse, *rest = forward(as_batch(q), as_batch(k), as_batch(v), call, **options)
        return as_packed(out), lse.squeeze(0), *(as_packed(x) for x in rest)

    def packed_backward(*tensors: Any, bias_grad: bool, out_rest: torch.Tensor | None = None) -> tuple[Any, ...]:
        """The gradients; arguments and results are those of the reference."""
        do, q, k, v, out, lse, dlse, call = tensors
        # Kernels find a sequence's rows in these by total_q alone.
        rows = [None if x is None else x.contiguous().unsqueeze(0) for x in (lse, dlse)]
        inputs = [as_batch(x) for x in (do, q, k, v, out)]
        options = {} if out_rest is None else {"out_rest": as_batch(out_rest)}
        dq, dk, dv, *others = backward(*inputs, *rows, call, bias_grad=bias_grad, **options)
        return as_packed(dq), as_packed(dk), as_packed(dv), *others

    return packed_forward, packed_backward


def check_contents(packed: Packed, total_q: int, total_k: int) -> tuple[list[int], list[int]]:
    """cu_seqlens_q and cu_seqlens_k as lists; waits for the device.

    Raises:
        ValueError: they do not lie within the tensors, or a length is above max_seqlen.
    """
    found = []
    for side, cu, most, total in (
        ("q", packed.cu_q, packed.max_q, total_q),
        ("k", packed.cu_k, packed.max_k, total_k),
    ):
        numbers: list[int] = cu.tolist()
        name = f"cu_seqlens_{side}"
        if numbers[0] < 0 or numbers[-1] > total or any(b < a for a, b in itertools.pairwise(numbers)):
            expected = f"numbers that never fall, from 0 to {total}, the rows of {side}"
            remedy = "sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]"
            raise wrong(name, expected, numbers, or_transpose(remedy, numbers[-1] > total, TRANSPOSE))
        longest = max((b - a for a, b in itertools.pairwise(numbers)), default=0)
        if longest > most:
            remedy = "pass the longest length or any larger number"
            raise wrong(f"max_seqlen_{side}", f"at least {longest}, the longest of {name}", most, remedy)
        found.append(numbers)
    return found[0], found[1]
