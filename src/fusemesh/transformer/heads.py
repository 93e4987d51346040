"""What an encoder's output is read by: one class for a text, or one span of it.

Shapes: B batch, S sequence, E hidden size, C classes. Both give logits for a vocabulary-parallel loss: split over tp by
class, and under sequence parallel by position.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import Partial, Placement, Replicate

from fusemesh.hybrid.tensor_parallel import ColumnParallelLinear, TensorParallelModule
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
        linear = self.linear
        own = seen
        if linear.sequence_parallel and linear.group is not None:
            own = parallel.own_part(seen, linear.group, 1)
        total = torch.einsum("bse,bs->be", h, own.to(h.dtype))
        if linear.sequence_parallel:
            total = parallel.reduce_from_group(total, linear.group)
        mean = total / seen.sum(1, keepdim=True).clamp(min=1)
        # [B, 1, E], equal on every rank, into the ranks' different classes
        return linear(parallel.copy_to_group(mean.unsqueeze(1), linear.group))


class SpanHead(TensorParallelModule):
    """Logits [B, 2, S] of where a span starts and ends; [B, 2, S / tp] under sequence parallel. -inf: not a place.

    Every rank of tp holds the whole weight [2, E]. Under sequence parallel a rank scores its own positions, so its
    gradient is one term of a sum; otherwise every rank computes the whole.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        return {"weight": (Replicate(), Partial() if self.sequence_parallel else Replicate())}

    def forward(self, h: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """h [B, S, E], or [B, S / tp, E]; allowed: bool [B, S], where a span may start and end."""
        weight = self.local("weight")
        assert weight is not None
        if self.sequence_parallel and self.group is not None:
            allowed = parallel.own_part(allowed, self.group, 1)
        logits = (h @ weight.t()).transpose(1, 2)
        return logits.masked_fill(~allowed.unsqueeze(1), float("-inf"))
