"""The torch.library ops of attention: schema, fake kernels, autograd. Torch only.

An op's implementation loads its backend on the first call, so that importing this module needs no Triton. Specs travel
as the plain numbers of :class:`AttentionSpec`, an open side of the window as -1.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import backends
from .spec import AttentionSpec, empty_laid_out_like

_NUMBERS = "float scale, SymInt window_left, SymInt window_right, SymInt origin_q, SymInt origin_k"
FORWARD_SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? origin, {_NUMBERS}, str backend)"
    " -> (Tensor out, Tensor lse)"
)
# dbias is a tensor of shape [0] unless bias_grad.
BACKWARD_SCHEMA = (
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"
    f" Tensor? mask, Tensor? bias, Tensor? origin, {_NUMBERS}, bool bias_grad, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)

# backend -> modules of its forward and backward
_MODULES = {
    "reference": (".reference", ".reference"),
    "triton": (".triton_forward", ".triton_backward"),
    "cpu": (".cpu", None),
}


def _module(backend: str, *, is_backward: bool) -> Any:
    if backend not in _MODULES:
        raise ValueError(f"backend: the attention ops expected one of {tuple(_MODULES)}, received {backend!r}")
    name = _MODULES[backend][is_backward]
    if name is None:
        raise ValueError(
            f"backend: {backend!r} computes no gradients; call it under torch.no_grad() or use backend='reference'"
        )
    return importlib.import_module(name, __package__)


def _spec(scale: float, window_left: int, window_right: int, origin_q: int, origin_k: int) -> AttentionSpec:
    return AttentionSpec(
        scale=scale,
        window_left=None if window_left < 0 else window_left,
        window_right=None if window_right < 0 else window_right,
        origin_q=origin_q,
        origin_k=origin_k,
    )


def _laid_out_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` in the layout that the fake kernels promise; a copy for backends that do not write it themselves."""
    promised = empty_laid_out_like(like, x.shape[-1])
    return x if x.stride() == promised.stride() else promised.copy_(x)


@torch.library.custom_op("fusemesh::attention_forward", mutates_args=(), schema=FORWARD_SCHEMA)
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp; see :func:`fusemesh.kernels.attention.reference.forward`."""
    module = _module(backend, is_backward=False)
    backends.count("attention_forward", backend)
    spec = _spec(scale, window_left, window_right, origin_q, origin_k)
    out, lse = module.forward(q, k, v, mask=mask, bias=bias, origin=origin, spec=spec)
    return _laid_out_like(out, q), lse.contiguous()


@attention_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_laid_out_like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op("fusemesh::attention_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    bias_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of attention; see :func:`fusemesh.kernels.attention.reference.backward`."""
    module = _module(backend, is_backward=True)
    backends.count("attention_backward", backend)
    spec = _spec(scale, window_left, window_right, origin_q, origin_k)
    dq, dk, dv, dbias = module.backward(
        do, q, k, v, out, lse, dlse, mask=mask, bias=bias, origin=origin, spec=spec, bias_grad=bias_grad
    )
    dbias = q.new_empty(0) if dbias is None else dbias.contiguous()
    return _laid_out_like(dq, q), _laid_out_like(dk, k), _laid_out_like(dv, v), dbias


@attention_backward.register_fake
def _(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    bias_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias = bias.new_empty(bias.shape) if bias_grad and bias is not None else q.new_empty(0)
    dq, dk, dv = (empty_laid_out_like(x, x.shape[-1]) for x in (q, k, v))
    return dq, dk, dv, dbias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    # The gradient of an output that the loss does not use is then None, not a tensor of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.numbers = inputs[6:11]
    ctx.backend = inputs[11]


def _backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, mask, bias, origin, out, lse = ctx.saved_tensors
    if do is None and dlse is None:
        return (None,) * 12
    if do is None:
        do = torch.zeros_like(out)
    bias_grad = ctx.needs_input_grad[4]
    is_constant_over_keys = bias_grad and bias.shape[3] == 1
    dq, dk, dv, dbias = torch.ops.fusemesh.attention_backward(
        do,
        q,
        k,
        v,
        out,
        lse,
        dlse,
        mask,
        bias,
        origin,
        *ctx.numbers,
        bias_grad and not is_constant_over_keys,
        ctx.backend,
    )
    if is_constant_over_keys:
        dbias = _gradient_of_row_shifts(bias, lse, dlse)
    return dq, dk, dv, None, dbias if bias_grad else None, *(None,) * 7


def _gradient_of_row_shifts(bias: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None) -> torch.Tensor:
    """The gradient of a bias that is the same for all keys: it moves lse by as much and leaves out as it is.

    Exactly so, where a sum of ds over all keys would be the rounding of ``out``. Only for the softmax over all keys: of
    a shard's keys the sum is what is wanted, and ``attention_backward`` gives that.
    """
    if dlse is None:
        return torch.zeros_like(bias)
    rows = torch.where(lse == -math.inf, 0.0, dlse)
    return rows.unsqueeze(3).sum_to_size(bias.shape).to(bias.dtype)


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    do, q, k, v, _, _, dlse, mask, bias, origin = inputs[:10]
    ctx.save_for_backward(do, q, k, v, dlse, mask, bias, origin)
    ctx.numbers = inputs[10:15]
    ctx.bias_grad = inputs[15]


def _double_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    """Second derivatives by the reference's formulas, with their memory of Sq * Sk.

    out and lse are functions of q, k, v and bias here, so no gradient goes to those that were passed in.
    """
    from . import reference

    do, q, k, v, dlse, mask, bias, origin = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because q, k and v may be one tensor, and each has its own part of that tensor's gradient.
        views: list[Any] = [None if x is None else x.view_as(x) for x in (do, q, k, v, dlse, bias)]
        do, q, k, v, dlse, bias = views
        names = ("do", "q", "k", "v", "dlse", "bias")
        tensors = dict(zip(names, views, strict=True))
        options: dict[str, Any] = {"mask": mask, "bias": bias, "origin": origin, "spec": _spec(*ctx.numbers)}
        out, lse = reference.forward(q, k, v, **options)
        first = reference.backward(do, q, k, v, out, lse, dlse, bias_grad=ctx.bias_grad, **options)
    pairs = [(x, grad) for x, grad in zip(first, grads, strict=True) if x is not None and grad is not None]
    wanted = [name for name, x in tensors.items() if x is not None and x.requires_grad]
    found: dict[str, torch.Tensor | None] = {}
    if pairs and wanted:
        second = torch.autograd.grad(
            [x for x, _ in pairs],
            [tensors[name] for name in wanted],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        found = dict(zip(wanted, second, strict=True))
    gradients = [found.get(name) for name in ("do", "q", "k", "v")]
    return *gradients, None, None, found.get("dlse"), None, found.get("bias"), None, *(None,) * 7


attention_backward.register_autograd(_double_backward, setup_context=_save_for_double_backward)
