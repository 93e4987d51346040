"""Packed: where the sequences of a packed call lie (leaf, torch only)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
        """How many sequences there are."""
        return self.cu_q.shape[0] - 1


def as_batch(x: torch.Tensor) -> torch.Tensor:
    """A packed tensor [total, H, D] as [1, H, total, D], what kernels take; a view."""
    return x.transpose(0, 1).unsqueeze(0)


def as_packed(x: torch.Tensor) -> torch.Tensor:
    """[1, H, total, D] as [total, H, D]: the inverse of :func:`as_batch`."""
    return x.squeeze(0).transpose(0, 1)
