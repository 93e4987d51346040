"""The results of the linear layer's ops by PyTorch's functions: what an op returns where no kernel of ours computes it.

Products of factors are made in fp32 at least and rounded once, as the kernels do; matrices are multiplied by PyTorch.
"""

from __future__ import annotations

import torch

from .. import compat
from .reference import ACTIVATIONS

Tensors = tuple[torch.Tensor, ...]


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    w_up: torch.Tensor | None,
    *,
    activation: str | None,
    save_slope: bool,
    save_slope_up: bool,
    slope_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, slope and slope_up, those not asked for of shape [0]; arguments are the op's."""
    z = torch.nn.functional.linear(x, w, bias)
    if activation is None:
        return z, x.new_empty(0, dtype=slope_dtype), x.new_empty(0)
    wide = torch.promote_types(x.dtype, torch.float32)
    with compat.recording(), torch.enable_grad():
        z_wide = z.detach().to(wide).requires_grad_()
        act = ACTIVATIONS[activation](z_wide)
        (slope,) = torch.autograd.grad(act, z_wide, torch.ones_like(act))
    y = act.detach().to(x.dtype)
    slope_up = y if save_slope_up else x.new_empty(0)
    if w_up is not None:
        u = torch.nn.functional.linear(x, w_up)
        y, slope = y * u, slope * u
    return y, slope.to(slope_dtype) if save_slope else x.new_empty(0, dtype=slope_dtype), slope_up


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    w_up: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_up: torch.Tensor | None,
    *,
    x_grad: bool,
    w_grad: bool,
    bias_grad: bool,
    w_up_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dx, dw, dbias and dw_up, those not asked for of shape [0]; arguments are the op's."""
    wide = torch.promote_types(dy.dtype, torch.float32)

    def times(factor: torch.Tensor | None) -> torch.Tensor:
        return dy if factor is None else (dy.to(wide) * factor.to(wide)).to(dy.dtype)

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, tensor.shape[-1])

    dx = dw = dbias = dw_up = None
    if x_grad:
        assert w is not None
        dx = times(slope) @ w
        if w_up is not None:
            dx = dx + times(slope_up) @ w_up
    if w_grad:
        assert x is not None
        dw = rows(times(slope)).t() @ rows(x)
    if bias_grad:
        dbias = rows(times(slope)).to(wide).sum(0).to(dy.dtype)
    if w_up_grad:
        assert x is not None
        dw_up = rows(times(slope_up)).t() @ rows(x)
    found = [dy.new_empty(0) if g is None else g for g in (dx, dw, dbias, dw_up)]
    return found[0], found[1], found[2], found[3]
