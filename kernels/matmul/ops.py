"""The torch.library ops of the linear layer: schema, fake kernels, autograd. Torch only.

An op's implementation loads its backend on the first call, so that importing this module needs no Triton.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, op_rules
from ..backend_record import AUTO, Request, implementation, needs_gradient
from . import formulas

# slope = dy/dz and slope_up = dy/du are what backward needs of the pre-activations z = x w^T + bias and u = x w_up^T.
# An output that was not asked for is a tensor of shape [0].
FORWARD_SCHEMA = (
    "(Tensor x, Tensor w, Tensor? bias, Tensor? w_up, str? activation, bool save_slope, bool save_slope_up,"
    " str backend) -> (Tensor y, Tensor slope, Tensor slope_up)"
)
# dz = dy * slope (dy without an activation) and du = dy * slope_up; dx = dz w + du w_up, dw = dz^T x, dbias = sum of dz
# over the rows, dw_up = du^T x. Only the tensors that the gradients asked for need are read.
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? x, Tensor? w, Tensor? w_up, Tensor? slope, Tensor? slope_up,"
    " bool x_grad, bool w_grad, bool bias_grad, bool w_up_grad, str backend)"
    " -> (Tensor dx, Tensor dw, Tensor dbias, Tensor dw_up)"
)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    w_up: torch.Tensor | None,
    activation: str | None,
    backend: str,
) -> torch.Tensor:
    """The differentiable op: y of shape [..., N], keeping for backward only what the gradients asked for need."""
    save_slope = activation is not None and needs_gradient(x, w, bias)
    save_slope_up = w_up is not None and needs_gradient(x, w_up)
    return linear_forward(x, w, bias, w_up, activation, save_slope, save_slope_up, backend)[0]


def slope_dtype(dtype: torch.dtype, activation: str | None, is_gated: bool) -> torch.dtype:
    """The dtype in which slope is kept: that of x, except where slopes are bounded by about 1 and x is of 16 bits.

    Eager PyTorch rounds z, which moves a slope little where the activation is nearly straight, and computes the slope
    from it in fp32; a slope that is itself rounded to the dtype of x is further from the truth. Kept one step finer
    (fp16 for bf16, which takes the same memory and rounds 8 times finer; fp32 for fp16, which has no finer type of 16
    bits) it is nearer than eager's. relu2's slope is exactly twice the rounded z, and a gated one is a product of which
    eager rounds both factors: these are no worse in the dtype of x, and bounded by nothing that fp16 could hold.
    """
    if is_gated or activation not in ("gelu", "gelu_tanh", "silu"):
        return dtype
    return {torch.bfloat16: torch.float16, torch.float16: torch.float32}.get(dtype, dtype)


def _kernels(backend: str) -> Any:
    """The module of a backend whose linear layers are kernels with a backward of their own."""
    module = implementation(backend, "linear")
    if not hasattr(module, "backward"):
        remedy = "call fused_linear, which differentiates it by itself"
        raise ValueError(f"backend: expected one whose linear layer is a kernel, received {backend!r}; {remedy}")
    return module


def _forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    w_up: torch.Tensor | None,
    activation: str | None,
    save_slope: bool,
    save_slope_up: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flags: dict[str, Any] = {
        "save_slope": save_slope,
        "save_slope_up": save_slope_up,
        "slope_dtype": slope_dtype(x.dtype, activation, w_up is not None),
    }
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    if backend in ("triton", AUTO):
        from ..proof import calls

        found = calls.linear_forward(x, w, bias, w_up, activation, flags, backend == "triton")
        backend = "triton"
        if found is None:
            request = Request("linear", x.device, x.dtype, layer=(x, w, bias, w_up, activation), transforms=())
            backend = backends.instead_of("triton", request).name
            found = formulas.forward(x, w, bias, w_up, activation=activation, **flags)
    else:
        found = _kernels(backend).forward(x, w, bias, w_up, activation=activation, **flags)
    backends.count("linear_forward", backend)
    return found


def _forward_fake(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    w_up: torch.Tensor | None,
    activation: str | None,
    save_slope: bool,
    save_slope_up: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], w.shape[0])
    slope = x.new_empty(shape if save_slope else (0,), dtype=slope_dtype(x.dtype, activation, w_up is not None))
    return x.new_empty(shape), slope, x.new_empty(shape if save_slope_up else (0,))


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    w_up: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_up: torch.Tensor | None,
    x_grad: bool,
    w_grad: bool,
    bias_grad: bool,
    w_up_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (dy, x, w, w_up, slope, slope_up)
    flags: dict[str, Any] = {"x_grad": x_grad, "w_grad": w_grad, "bias_grad": bias_grad, "w_up_grad": w_up_grad}
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None
    if backend in ("triton", AUTO):
        from ..proof import calls

        found = calls.linear_backward(tensors, flags, backend == "triton")
        backend = "triton"
        if found is None:
            backend = "torch"
            found = formulas.backward(*tensors, **flags)
    else:
        found = _kernels(backend).backward(*tensors, **flags)
    backends.count("linear_backward", backend)
    return found


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    w_up: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_up: torch.Tensor | None,
    x_grad: bool,
    w_grad: bool,
    bias_grad: bool,
    w_up_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    N = dy.shape[-1]
    dx: tuple[int, ...] = (0,)
    dw: tuple[int, ...] = (0,)
    dw_up: tuple[int, ...] = (0,)
    if x_grad:
        assert w is not None
        dx = (*dy.shape[:-1], w.shape[1])
    if w_grad or w_up_grad:
        assert x is not None
        dw = (N, x.shape[-1]) if w_grad else dw
        dw_up = (N, x.shape[-1]) if w_up_grad else dw_up
    dbias = (N,) if bias_grad else (0,)
    return dy.new_empty(dx), dy.new_empty(dw), dy.new_empty(dbias), dy.new_empty(dw_up)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, w, bias, w_up, activation, save_slope, save_slope_up, backend = inputs
    x_grad, w_grad, _, w_up_grad = ctx.needs_input_grad[:4]
    # A second derivative goes through the slopes, which are functions of everything.
    keeps_all = backend == AUTO and activation is not None
    ctx.save_for_backward(
        x if w_grad or w_up_grad or keeps_all else None,
        w if x_grad or keeps_all else None,
        w_up if x_grad or keeps_all else None,
        output[1] if save_slope else None,
        output[2] if save_slope_up else None,
        bias if backend == AUTO else None,
    )
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.is_gated, ctx.backend = activation, w_up is not None, backend


def _gradients(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    nothing = (None,) * 4
    if dy is None:
        return nothing + nothing
    x, w, w_up, slope, slope_up, bias = ctx.saved_tensors
    x_grad, w_grad, bias_grad, w_up_grad = wanted = ctx.needs_input_grad[:4]
    if (ctx.activation is not None and slope is None and (x_grad or w_grad or bias_grad)) or (
        ctx.is_gated and slope_up is None and (x_grad or w_up_grad)
    ):
        raise RuntimeError(
            "fusemesh::linear_forward ran without save_slope or save_slope_up, which the gradients asked for need; "
            "call fused_linear, which sets them"
        )
    gradients: tuple[Any, ...]
    if ctx.backend == AUTO and torch.is_grad_enabled():
        flags = {"activation": ctx.activation, "wanted": wanted}
        gradients = formulas.differentiable_backward(dy, x, w, bias, w_up, **flags)
    else:
        gradients = linear_backward(dy, x, w, w_up, slope, slope_up, x_grad, w_grad, bias_grad, w_up_grad, ctx.backend)
    return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), *nothing)


def _backward_twice(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
    raise RuntimeError(
        "fused_linear: second derivatives are not implemented on the Triton backend (the gradient of "
        "fusemesh::linear_backward was asked for); use backend='reference' or backend='torch' for them"
    )


op_rules.define("linear_forward", FORWARD_SCHEMA, _forward, _forward_fake)
op_rules.define("linear_backward", BACKWARD_SCHEMA, _backward, _backward_fake)
linear_forward = torch.ops.fusemesh.linear_forward.default
linear_backward = torch.ops.fusemesh.linear_backward.default
torch.library.register_autograd(
    "fusemesh::linear_forward", _gradients, setup_context=_setup_context, lib=op_rules.LIBRARY
)
torch.library.register_autograd("fusemesh::linear_backward", _backward_twice, lib=op_rules.LIBRARY)
