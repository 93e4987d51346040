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

from ... import backends
from ..call.spec import AttentionSpec, empty_laid_out_like

_TENSORS = "Tensor? mask, Tensor? bias, Tensor? origin, Tensor[] aux, Tensor? sinks, Tensor? seed"
NUMBERS = (
    "float scale, SymInt window_left, SymInt window_right, SymInt origin_q, SymInt origin_k, SymInt origin_head,"
    " SymInt origin_batch, str[] mods, float[] params, float dropout_p"
)
FORWARD_SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, {_TENSORS}, {NUMBERS}, str backend, Tensor? descale) -> (Tensor out, Tensor lse)"
)
# dbias is a tensor of shape [0] unless bias_grad, and so is dsinks without sinks.
BACKWARD_SCHEMA = (
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"
    f" {_TENSORS}, {NUMBERS}, bool bias_grad, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
# How many arguments carry the spec.
_SPEC = 10

# backend -> modules of its forward and backward
_MODULES = {
    "reference": ("..reference.dense", "..reference.dense"),
    "triton": ("..gpu.forward", "..gpu.backward"),
    "cpu": ("..engine.dense", "..engine.dense"),
}


def _module(backend: str, *, is_backward: bool) -> Any:
    if backend not in _MODULES:
        raise ValueError(f"backend: the attention ops expected one of {tuple(_MODULES)}, received {backend!r}")
    return importlib.import_module(_MODULES[backend][is_backward], __package__)


def numbers_of(spec: AttentionSpec) -> tuple[Any, ...]:
    """The spec as the plain values that a custom op carries."""
    left = -1 if spec.window_left is None else spec.window_left
    right = -1 if spec.window_right is None else spec.window_right
    origins = (spec.origin_q, spec.origin_k, spec.origin_head, spec.origin_batch)
    return spec.scale, left, right, *origins, list(spec.mods), list(spec.params), spec.dropout_p


def spec_of(
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    origin_head: int,
    origin_batch: int,
    mods: Sequence[str],
    params: Sequence[float],
    dropout_p: float,
) -> AttentionSpec:
    """The spec whose :func:`numbers_of` these are."""
    return AttentionSpec(
        scale,
        None if window_left < 0 else window_left,
        None if window_right < 0 else window_right,
        origin_q,
        origin_k,
        origin_head,
        origin_batch,
        tuple(mods),
        tuple(params),
        dropout_p,
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
    aux: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    origin_head: int,
    origin_batch: int,
    mods: Sequence[str],
    params: Sequence[float],
    dropout_p: float,
    backend: str,
    descale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp; see :func:`fusemesh.kernels.attention.reference.dense.forward`."""
    module = _module(backend, is_backward=False)
    backends.count("attention_forward", backend)
    at = (origin_q, origin_k, origin_head, origin_batch)
    spec = spec_of(scale, window_left, window_right, *at, mods, params, dropout_p)
    options = {"mask": mask, "bias": bias, "origin": origin, "aux": tuple(aux), "sinks": sinks, "seed": seed}
    out, lse = module.forward(q, k, v, **options, descale=descale, spec=spec)
    return _laid_out_like(out, q), lse.contiguous()


@attention_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    aux: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    origin_head: int,
    origin_batch: int,
    mods: Sequence[str],
    params: Sequence[float],
    dropout_p: float,
    backend: str,
    descale: torch.Tensor | None,
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
    aux: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    origin_head: int,
    origin_batch: int,
    mods: Sequence[str],
    params: Sequence[float],
    dropout_p: float,
    bias_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of attention; see :func:`fusemesh.kernels.attention.reference.dense.backward`."""
    module = _module(backend, is_backward=True)
    backends.count("attention_backward", backend)
    at = (origin_q, origin_k, origin_head, origin_batch)
    spec = spec_of(scale, window_left, window_right, *at, mods, params, dropout_p)
    options = {"mask": mask, "bias": bias, "origin": origin, "aux": tuple(aux), "sinks": sinks, "seed": seed}
    dq, dk, dv, dbias, dsinks = module.backward(do, q, k, v, out, lse, dlse, **options, spec=spec, bias_grad=bias_grad)
    dbias = q.new_empty(0) if dbias is None else dbias.contiguous()
    dsinks = q.new_empty(0) if dsinks is None else dsinks.contiguous()
    return _laid_out_like(dq, q), _laid_out_like(dk, k), _laid_out_like(dv, v), dbias, dsinks


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
    aux: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    origin_q: int,
    origin_k: int,
    origin_head: int,
    origin_batch: int,
    mods: Sequence[str],
    params: Sequence[float],
    dropout_p: float,
    bias_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias = bias.new_empty(bias.shape) if bias_grad and bias is not None else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    dq, dk, dv = (empty_laid_out_like(x, x.shape[-1]) for x in (q, k, v))
    return dq, dk, dv, dbias, dsinks


def no_gradients(values: Sequence[Any]) -> tuple[Any, ...]:
    """The gradients of values that have none; autograd takes an empty list for one of tensors, and wants it back."""
    return tuple([] if isinstance(value, (list, tuple)) and not value else None for value in values)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    # The gradient of an output that the loss does not use is then None, not a tensor of zeros.
    ctx.set_materialize_grads(False)
    q, k, v, mask, bias, origin, aux, sinks, seed = inputs[:9]
    ctx.save_for_backward(q, k, v, mask, bias, origin, sinks, seed, *output, *aux)
    ctx.numbers = inputs[9 : 9 + _SPEC]
    ctx.backend = inputs[9 + _SPEC]


def _backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, mask, bias, origin, sinks, seed, out, lse, *aux = ctx.saved_tensors
    nothing = (*no_gradients(ctx.numbers), None, None)
    none_of_aux = [None] * len(aux)
    if do is None and dlse is None:
        return (None,) * 6 + (none_of_aux, None, None, *nothing)
    if do is None:
        do = torch.zeros_like(out)
    bias_grad = ctx.needs_input_grad[4]
    # Beside a sink such a bias does change the output.
    is_shift = bias_grad and bias.shape[3] == 1 and sinks is None
    tensors = (mask, bias, origin, aux, sinks, seed)
    dq, dk, dv, dbias, dsinks = torch.ops.fusemesh.attention_backward(
        do, q, k, v, out, lse, dlse, *tensors, *ctx.numbers, bias_grad and not is_shift, ctx.backend
    )
    if is_shift:
        dbias = _gradient_of_row_shifts(bias, lse, dlse)
    dbias = dbias if bias_grad else None
    dsinks = dsinks if ctx.needs_input_grad[7] else None
    return dq, dk, dv, None, dbias, None, none_of_aux, dsinks, None, *nothing


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
    do, q, k, v, _, _, dlse, mask, bias, origin, aux, sinks, seed = inputs[:13]
    ctx.save_for_backward(do, q, k, v, dlse, mask, bias, origin, sinks, seed, *aux)
    ctx.numbers = inputs[13 : 13 + _SPEC]
    ctx.bias_grad = inputs[13 + _SPEC]


def second_gradients(
    first: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    tensors: dict[str, torch.Tensor | None],
    create_graph: bool,
) -> dict[str, torch.Tensor | None]:
    """The gradients of ``tensors``, by name, from those (``grads``) of the first derivatives ``first`` of them."""
    # A first derivative may depend on none of the tensors with gradients: dv does not on v.
    pairs = [
        (x, grad)
        for x, grad in zip(first, grads, strict=True)
        if x is not None and x.requires_grad and grad is not None
    ]
    wanted = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    if not pairs or not wanted:
        return {}
    second = torch.autograd.grad(
        [x for x, _ in pairs],
        list(wanted.values()),
        [grad for _, grad in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )
    return dict(zip(wanted, second, strict=True))


def _double_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    """Second derivatives by the reference's formulas, with their memory of Sq * Sk.

    out and lse are functions of q, k, v, bias and sinks here, so no gradient goes to those that were passed in.
    """
    from ..reference import dense as reference

    do, q, k, v, dlse, mask, bias, origin, sinks, seed, *aux = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because q, k and v may be one tensor, and each has its own part of that tensor's gradient.
        views: list[Any] = [None if x is None else x.view_as(x) for x in (do, q, k, v, dlse, bias, sinks)]
        do, q, k, v, dlse, bias, sinks = views
        names = ("do", "q", "k", "v", "dlse", "bias", "sinks")
        tensors = dict(zip(names, views, strict=True))
        options: dict[str, Any] = {"mask": mask, "bias": bias, "origin": origin, "spec": spec_of(*ctx.numbers)}
        options |= {"aux": tuple(aux), "sinks": sinks, "seed": seed}
        out, lse = reference.forward(q, k, v, **options)
        first = reference.backward(do, q, k, v, out, lse, dlse, bias_grad=ctx.bias_grad, **options)
    found = second_gradients(first, grads, tensors, create_graph)
    gradients = [found.get(name) for name in ("do", "q", "k", "v")]
    tail = (None, found.get("bias"), None, [None] * len(aux), found.get("sinks"), None)
    return *gradients, None, None, found.get("dlse"), *tail, *no_gradients(ctx.numbers), None, None


attention_backward.register_autograd(_double_backward, setup_context=_save_for_double_backward)
