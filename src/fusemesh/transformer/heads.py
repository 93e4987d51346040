"""What an encoder's output is read by: one class for a text, or one span of it.

Shapes: B batch, S sequence, E hidden size, C classes. Both give logits for a vocabulary-parallel loss: split over tp by
class, and under sequence parallel by position.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import Partial, Placement, Replicate

from fusemesh.hybrid.tensor.modules import ColumnParallelLinear, TensorParallelModule
from fusemesh.kernels.matmul import parallel


class ClassHead(nn.Module):
    """Logits [B, 1, C / tp] of a text's class: a linear layer on the mean of its tokens.

    Args:
        hidden_size, num_classes: E and C.
        backend: of the linear layer.
    """

    def __init__(self, hidden_size: int, num_classes: int, backend: str) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(hidden_size, num_classes, bias=True, enter=False, backend=backend)

    def forward(self, h: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """h [B, S, E], or [B, S / tp, E] under sequence parallel; seen: bool [B, S], True for a text's tokens."""
        mean = _mean(h, seen, self.linear)
        # [B, 1, E], equal on every rank, into the ranks' different classes
        return self.linear(parallel.copy_to_group(mean.unsqueeze(1), self.linear.group))


class SpanHead(TensorParallelModule):
    """Logits [B, 2, S] of where a span starts and ends; [B, 2, S / tp] under sequence parallel. -inf: not a place.

    The mean of the question's tokens, through a matrix each, is what starts and ends are compared with, by a product
    (pointer networks, Vinyals et al., 2015). Every rank of tp holds the whole weight [2 E, E]. With sequence parallel a
    rank scores its own positions, so its gradient is one term of a sum; otherwise every rank computes the whole.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * hidden_size, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        return {"weight": (Replicate(), Partial() if self.sequence_parallel else Replicate())}

    def forward(self, h: torch.Tensor, allowed: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """h [B, S, E], or [B, S / tp, E]; bool [B, S]: where a span may start and end, and which tokens ask for it."""
        weight = self.local("weight")
        assert weight is not None
        asked = _mean(h, question, self)
        if self.sequence_parallel:
            # Each rank compares other positions with it.
            asked = parallel.copy_to_group(asked, self.group)
        # [B, 2, E]
        wanted = (asked @ weight.t()).view(len(h), 2, -1) / math.sqrt(h.shape[-1])
        return (wanted @ h.transpose(1, 2)).masked_fill(~_own(allowed, self).unsqueeze(1), float("-inf"))


def _own(where: torch.Tensor, module: TensorParallelModule) -> torch.Tensor:
    """This rank's part of bool [B, S]."""
    if module.sequence_parallel and module.group is not None:
        return parallel.own_part(where, module.group, 1)
    return where


def _mean(h: torch.Tensor, where: torch.Tensor, module: TensorParallelModule) -> torch.Tensor:
    """The mean [B, E], equal on every rank, of h over the tokens of bool [B, S]."""
    total = torch.einsum("bse,bs->be", h, _own(where, module).to(h.dtype))
    if module.sequence_parallel:
        total = parallel.reduce_from_group(total, module.group)
    return total / where.sum(1, keepdim=True).clamp(min=1)
