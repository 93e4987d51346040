"""The linear layer in plain PyTorch: the definition of right.

Only elementary operations, so that it runs in any floating dtype (fp64 included) and can be differentiated any number
of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def _gelu(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))


def _gelu_tanh(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)))


def _silu(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(z)


def _relu2(z: torch.Tensor) -> torch.Tensor:
    return torch.relu(z) ** 2


# gelu: z * Phi(z) with the normal distribution's Phi; gelu_tanh: its approximation (Hendrycks and Gimpel, 2016,
# arXiv:1606.08415). silu: z * sigmoid(z) (the same paper). relu2: relu(z)^2 (So et al., 2021, arXiv:2109.08668).
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "relu2": _relu2,
}


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    w_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(x w^T + bias)``, times ``x w_up^T`` where ``w_up`` is given.

    Args:
        x: [..., K].
        w: [N, K].
        bias: [N].
        activation: a key of :data:`ACTIVATIONS`, or None for the identity.
        w_up: [N, K].

    Returns:
        [..., N].
    """
    y = torch.matmul(x, w.t())
    if bias is not None:
        y = y + bias
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if w_up is not None:
        y = y * torch.matmul(x, w_up.t())
    return y
