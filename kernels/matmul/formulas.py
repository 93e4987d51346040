"""The results of the linear layer's ops by PyTorch's functions: what an op returns where no kernel of ours computes it.

Products of factors are made in fp32 at least and rounded once, as the kernels do; matrices are multiplied by PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import compat
from .reference import ACTIVATIONS, linear

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


def differentiable_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    bias: torch.Tensor | None,
    w_up: torch.Tensor | None,
    *,
    activation: str | None,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return dx, dw, dbias and dw_up on PyTorch's tape, so that they can be differentiated; None where not ``wanted``.

    Without an activation x or w may be None where no gradient that is wanted depends on it.
    """
    if activation is None:
        dx = dw = dbias = None
        rows = dy.reshape(-1, dy.shape[-1])
        if wanted[0]:
            assert w is not None
            dx = dy @ w
        if wanted[1]:
            assert x is not None
            dw = rows.t() @ x.reshape(-1, x.shape[-1])
        if wanted[2]:
            dbias = rows.sum(0)
        return dx, dw, dbias, None
    assert x is not None and w is not None
    # Views, because one tensor may be several arguments, and each has its own part of that tensor's gradient.
    x, w = x.view_as(x), w.view_as(w)
    bias = None if bias is None else bias.view_as(bias)
    w_up = None if w_up is None else w_up.view_as(w_up)
    y = linear(x, w, bias, activation=activation, w_up=w_up)
    inputs = [t for t, want in zip((x, w, bias, w_up), wanted, strict=True) if want and t is not None]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return tuple(next(found) if want else None for want in wanted)
