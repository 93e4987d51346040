"""The linear layer by PyTorch's own functions: backend ``torch``."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activation: str | None,
    w_up: torch.Tensor | None,
) -> torch.Tensor:
    """Return act(x w^T + bias), times x w_up^T where it is given; arguments as in :func:`reference.linear`."""
    y = F.linear(x, w, bias)
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation == "silu":
        y = F.silu(y)
    elif activation == "relu2":
        y = F.relu(y).square()
    return y if w_up is None else y * F.linear(x, w_up)
