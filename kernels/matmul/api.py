"""fused_linear: the contract, the checks, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch

from .. import compat
from ..autocast import autocast_dtype
from ..backend_record import Request, implementation, needs_gradient
from ..backends import choose, count
from . import ops, reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fused_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    w_up: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A linear layer with its activation, ``y = act(x w^T + bias)``, gated by ``x w_up^T`` where ``w_up`` is given.

    With z = x w^T + bias and u = x w_up^T, and with ``*`` elementwise:

    - forward: ``y = act(z)``, gated ``y = act(z) * u`` (Shazeer, 2020, arXiv:2002.05202; the bias belongs to the gate)
    - gradients of the pre-activations: ``dz = dy * act'(z)``, gated ``dz = dy * u * act'(z)``, ``du = dy * act(z)``
    - dgrad: ``dx = dz w + du w_up``
    - wgrad: ``dw = dz^T x``, ``dw_up = du^T x``, ``dbias = sum of dz over the rows``

    The gate and the up projection are two weights, not one of [2N, K]: each is sharded by its own rows, and a kernel
    reads both.

    Args:
        x: [..., K]; fp32, fp16 or bf16, and fp64 on the backends ``reference`` and ``torch``. Any strides. Leading
            dimensions are merged without a copy where their strides allow it.
        w: [N, K], in the dtype and on the device of ``x``. Any strides.
        bias: [N] or None.
        activation: None, ``"gelu"`` (exact, by erf), ``"gelu_tanh"``, ``"silu"`` or ``"relu2"`` (relu squared).
        w_up: [N, K] or None. Needs an activation: without one the two factors are alike, so that there is no gate, and
            the call is far more often a forgotten ``activation=`` than a wish for a bilinear product.
        backend: ``"reference"`` (elementary PyTorch operations), ``"torch"`` (F.linear and PyTorch's activations),
            ``"triton"`` (one kernel forward, two backward), or ``"auto"``. ``"cpu"``, so that one name serves a whole
            model on CPU tensors, is ``"torch"``: the C++ engine is of attention alone.

    Returns:
        [..., N] in the dtype of ``x``, contiguous on the Triton backend.

    Accumulation is in fp32 (fp64 for fp64). Same inputs, same bits, forward and backward. For backward the Triton
    backend keeps, only where a gradient needs them, the slopes ``dy/dz`` (given an activation) and ``dy/du`` (gated),
    which forward has at hand: backward's matmuls multiply by them as they read dy, where from z they would evaluate the
    activation again for every column of tiles. They are kept in the dtype of ``x``, but for gelu, gelu_tanh and silu
    without a gate ``dy/dz`` in fp16 where ``x`` is bf16, and in fp32 where it is fp16: there a slope in the dtype of
    ``x`` would make gradients less exact than eager PyTorch's. ``x`` is kept only if a weight requires a gradient, the
    weights only if ``x`` does.
    Under autocast the tensors are cast to autocast's dtype first, as F.linear does.
    Second derivatives: on ``reference`` and ``torch``, and under ``auto`` by the reference's formula, for which it
    keeps ``x`` and the weights wherever there is an activation; ``triton`` by name refuses them (RuntimeError).

    Calls are counted (:func:`fusemesh.kernels.backends.call_counts`) as ``("linear_forward", backend)``, and as
    ``("linear_backward", "triton")``; on the other two backends backward is PyTorch's own and is not counted.

    Raises:
        ValueError: an argument is wrong, with its name, what was expected and received; or the backend asked for by
            name cannot run here.
    """
    _check_tensors(x, w, bias, w_up)
    x, w, bias, w_up = _autocast(x, w, bias, w_up)
    _check(x, w, bias, activation, w_up)
    transforms = compat.transforms()
    needs_grad = bool(transforms) and needs_gradient(x, w, bias, w_up)
    layer = (x, w, bias, w_up, activation)
    request = Request("linear", x.device, x.dtype, needs_grad=needs_grad, layer=layer, transforms=transforms)
    record = choose(backend, request)
    if "linear" not in record.differentiable:
        return ops.linear(x, w, bias, w_up, activation, record.name)
    count("linear_forward", record.name)
    result: torch.Tensor = implementation(record.name, "linear").linear(x, w, bias, activation=activation, w_up=w_up)
    return result


def _check_tensors(x: object, w: object, bias: object, w_up: object) -> None:
    for name, value, optional in (("x", x, ""), ("w", w, ""), ("bias", bias, " or None"), ("w_up", w_up, " or None")):
        if not isinstance(value, torch.Tensor) and not (optional and value is None):
            raise ValueError(
                f"{name}: expected a torch.Tensor{optional}, received {type(value).__name__}. Pass a tensor"
            )


def _autocast(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors as F.linear sees them: in autocast's dtype where autocast is on (it leaves fp64 and integers)."""
    assert tensors[0] is not None
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return list(tensors)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def _check(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, activation: str | None, w_up: torch.Tensor | None
) -> None:
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ValueError(
            f"activation: expected None or one of {ACTIVATIONS}, received {activation!r}. Pass a name of that list, or "
            "None and apply your own function to the result"
        )
    if w_up is not None and activation is None:
        raise ValueError(
            "w_up: expected an activation for the gate, received activation=None. Pass activation='silu' (SwiGLU) or "
            "another; for a plain product of two linear layers call fused_linear twice"
        )
    if x.dtype not in DTYPES:
        raise ValueError(
            f"x: expected dtype float32, float16, bfloat16 or float64, received {x.dtype}. Cast it with x.to(...)"
        )
    if x.dim() < 1:
        raise ValueError("x: expected [..., K] with at least 1 dimension, received a scalar. Pass x.reshape(1)")
    if w.dim() != 2:
        raise ValueError(f"w: expected [N, K] with 2 dimensions, received shape {tuple(w.shape)}. Reshape it to [N, K]")
    if x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"w: expected [N, K] with K = x.shape[-1] = {x.shape[-1]}, received shape {tuple(w.shape)}. Pass the "
            "weight as torch.nn.Linear stores it, out features first (a [K, N] weight: w.t())"
        )
    if w_up is not None and w_up.shape != w.shape:
        raise ValueError(
            f"w_up: expected the shape of w, {tuple(w.shape)}, received shape {tuple(w_up.shape)}. Gate and up "
            "projection have the same in and out features"
        )
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(
            f"bias: expected [N] with N = w.shape[0] = {w.shape[0]}, received shape {tuple(bias.shape)}. Pass one "
            "value for each out feature"
        )
    for name, tensor in (("w", w), ("bias", bias), ("w_up", w_up)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(
                f"{name}: expected the dtype of x, {x.dtype}, received {tensor.dtype}. Cast one with .to(...), or call "
                "under torch.autocast"
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{name}: expected the device of x, {x.device}, received {tensor.device}. Move it with .to({x.device})"
            )
