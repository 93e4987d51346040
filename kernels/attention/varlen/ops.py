"""The torch.library ops of packed attention: schema, fake kernels, autograd. Torch only; ops.py is the pattern.

What follows the tensors of a call in every schema: the window and the other numbers of its spec, as ops.py writes them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from ... import backends
from ..call.packed import Packed, as_batch, as_packed
from ..call.spec import empty_laid_out_like
from ..dense.ops import NUMBERS, no_gradients, second_gradients, spec_of
from ..dense.ops import numbers_of as numbers_of

_CALL = (
    "Tensor cu_q, Tensor cu_k, Tensor? mask, Tensor? bias, Tensor[] aux, Tensor? sinks, Tensor? seed,"
    f" SymInt max_q, SymInt max_k, bool is_bottom_right, {NUMBERS}"
)
FORWARD_SCHEMA = f"(Tensor q, Tensor k, Tensor v, {_CALL}, str backend) -> (Tensor out, Tensor lse)"
# dbias is a tensor of shape [0] unless bias_grad, and so is dsinks without sinks.
BACKWARD_SCHEMA = (
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, {_CALL}, bool bias_grad,"
    " str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
_TENSORS = 7  # cu_q to seed
_NUMBERS = 13  # max_q to dropout_p


def _call(values: Sequence[Any]) -> tuple[Packed, dict[str, Any]]:
    """The values from cu_q to dropout_p as backends take them."""
    cu_q, cu_k, mask, bias, aux, sinks, seed, max_q, max_k, is_bottom_right, *numbers = values
    options = {"mask": mask, "bias": bias, "aux": tuple(aux), "sinks": sinks, "seed": seed}
    return Packed(cu_q, cu_k, max_q, max_k, is_bottom_right), {**options, "spec": spec_of(*numbers)}


def _module(backend: str, *, is_backward: bool) -> Any:
    """The module whose ``forward`` or ``backward`` runs on packed tensors."""
    names = {"reference": "..reference.varlen", "triton": "..gpu.varlen", "cpu": "..engine.varlen"}
    if backend not in names:
        raise ValueError(f"backend: the packed ops expected one of {tuple(names)}, received {backend!r}")
    return importlib.import_module(names[backend], __package__)


def _empty_like(x: torch.Tensor, last: int) -> torch.Tensor:
    """Uninitialised [total, H, last] with the dimensions of ``x`` in the same order in memory."""
    return as_packed(empty_laid_out_like(as_batch(x), last))


def _laid_out_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` in the layout that the fake kernels promise; a copy for backends that do not write it themselves."""
    promised = _empty_like(like, x.shape[-1])
    return x if x.stride() == promised.stride() else promised.copy_(x)


def _forward_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    backend = rest[-1]
    module = _module(backend, is_backward=False)
    backends.count("attention_varlen_forward", backend)
    packed, options = _call(rest[:-1])
    out, lse = module.forward(q, k, v, packed, **options)
    return _laid_out_like(out, q), lse.contiguous()


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_like(q, v.shape[-1]), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _backward_op(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    bias_grad, backend = rest[-2:]
    module = _module(backend, is_backward=True)
    backends.count("attention_varlen_backward", backend)
    packed, options = _call(rest[:-2])
    dq, dk, dv, dbias, dsinks = module.backward(do, q, k, v, out, lse, dlse, packed, **options, bias_grad=bias_grad)
    dbias = q.new_empty(0) if dbias is None else dbias.contiguous()
    dsinks = q.new_empty(0) if dsinks is None else dsinks.contiguous()
    return _laid_out_like(dq, q), _laid_out_like(dk, k), _laid_out_like(dv, v), dbias, dsinks


def _backward_fake(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    bias, sinks, bias_grad = rest[3], rest[5], rest[-2]
    dbias = bias.new_empty(bias.shape) if bias_grad and bias is not None else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    dq, dk, dv = (_empty_like(x, x.shape[-1]) for x in (q, k, v))
    return dq, dk, dv, dbias, dsinks


attention_varlen_forward = torch.library.custom_op(
    "fusemesh::attention_varlen_forward", _forward_op, mutates_args=(), schema=FORWARD_SCHEMA
)
attention_varlen_forward.register_fake(_forward_fake)
attention_varlen_backward = torch.library.custom_op(
    "fusemesh::attention_varlen_backward", _backward_op, mutates_args=(), schema=BACKWARD_SCHEMA
)
attention_varlen_backward.register_fake(_backward_fake)


def _save(ctx: Any, values: Sequence[Any], *tensors: torch.Tensor | None) -> None:
    """Keep a call's values from cu_q to dropout_p, and ``tensors``."""
    # The gradient of an output that the loss does not use is then None, not a tensor of zeros.
    ctx.set_materialize_grads(False)
    cu_q, cu_k, mask, bias, aux, sinks, seed = values[:_TENSORS]
    ctx.save_for_backward(*tensors, cu_q, cu_k, mask, bias, sinks, seed, *aux)
    ctx.count = len(tensors)
    ctx.numbers = values[_TENSORS:]


def _saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """What :func:`_save` kept: the tensors, and the call's values."""
    saved = ctx.saved_tensors
    cu_q, cu_k, mask, bias, sinks, seed, *aux = saved[ctx.count :]
    return list(saved[: ctx.count]), [cu_q, cu_k, mask, bias, aux, sinks, seed, *ctx.numbers]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    q, k, v, *values, ctx.backend = inputs
    _save(ctx, values, q, k, v, *output)


def _backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    (q, k, v, out, lse), values = _saved(ctx)
    cu_q, bias, aux, sinks, max_q = values[0], values[3], values[4], values[5], values[7]
    tail = (*no_gradients(ctx.numbers), None)
    none_of_aux = [None] * len(aux)
    if do is None and dlse is None:
        return (None,) * 7 + (none_of_aux, None, None) + tail
    if do is None:
        do = torch.zeros_like(out)
    bias_grad = ctx.needs_input_grad[6]
    # Beside a sink such a bias does change the output.
    is_shift = bias_grad and bias.shape[3] == 1 and sinks is None
    dq, dk, dv, dbias, dsinks = torch.ops.fusemesh.attention_varlen_backward(
        do, q, k, v, out, lse, dlse, *values, bias_grad and not is_shift, ctx.backend
    )
    if is_shift:
        dbias = _gradient_of_row_shifts(bias, lse, dlse, cu_q, max_q)
    dbias = dbias if bias_grad else None
    dsinks = dsinks if ctx.needs_input_grad[8] else None
    return dq, dk, dv, None, None, None, dbias, none_of_aux, dsinks, None, *tail


def _gradient_of_row_shifts(
    bias: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None, cu_q: torch.Tensor, max_q: int
) -> torch.Tensor:
    """The gradient of a bias that is the same for all keys: it moves lse by as much and leaves out as it is.

    Exactly so, where a sum of ds over all keys would be the rounding of ``out``.
    """
    if dlse is None:
        return torch.zeros_like(bias)
    # [H, total_q + 1]: the last is what positions beyond the end of a sequence take.
    rows = torch.nn.functional.pad(torch.where(lse == -math.inf, 0.0, dlse), (0, 1))
    at = cu_q[:-1, None].long() + torch.arange(max_q, device=cu_q.device)
    at = torch.where(at < cu_q[1:, None], at, lse.shape[1])
    # [B, H, max_q, 1]
    by_position = rows[:, at].transpose(0, 1).unsqueeze(3)
    return by_position.sum_to_size(bias.shape).to(bias.dtype)


attention_varlen_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    do, q, k, v, _, _, dlse, *values, ctx.bias_grad, _ = inputs
    _save(ctx, values, do, q, k, v, dlse)


def _double_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    """Second derivatives by the reference's formulas, with their memory of Sq * Sk a sequence.

    out and lse are functions of q, k, v, bias and sinks here, so no gradient goes to those that were passed in.
    """
    from ..reference import varlen as reference

    (do, q, k, v, dlse), values = _saved(ctx)
    packed, options = _call(values)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because q, k and v may be one tensor, and each has its own part of that tensor's gradient.
        names = ("do", "q", "k", "v", "dlse", "bias", "sinks")
        originals = (do, q, k, v, dlse, options["bias"], options["sinks"])
        tensors = {n: None if x is None else x.view_as(x) for n, x in zip(names, originals, strict=True)}
        options |= {"bias": tensors["bias"], "sinks": tensors["sinks"]}
        x: Any = tensors
        out, lse = reference.forward(x["q"], x["k"], x["v"], packed, **options)
        first = reference.backward(
            x["do"], x["q"], x["k"], x["v"], out, lse, x["dlse"], packed, bias_grad=ctx.bias_grad, **options
        )
    found = second_gradients(first, grads, tensors, create_graph)
    gradients = [found.get(name) for name in ("do", "q", "k", "v")]
    of_call = (None, None, None, found.get("bias"), [None] * len(values[4]), found.get("sinks"), None)
    return *gradients, None, None, found.get("dlse"), *of_call, *no_gradients(ctx.numbers), None, None


attention_varlen_backward.register_autograd(_double_backward, setup_context=_save_for_double_backward)
