"""How attention becomes torch.library ops: one definition for batches, packed sequences and decode. Torch only.

An op's implementation loads its backend on the first call, so that importing this module needs no Triton. The arguments
that carry a call follow from its dataclass (call/op_fields.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import backends, op_rules
from ..backend_record import AUTO, AUTO_AGAIN, implementation, records
from .call.op_fields import OpFields
from .call.options import Call
from .call.packed import as_batch, as_packed
from .call.tensors import empty_laid_out_like, has_rest

PROVEN = ("triton", AUTO, AUTO_AGAIN)  # what an op is given where Triton's kernels are proven before their first result


def register_attention(operation: str, fields: OpFields, reference: Callable[[], Any]) -> None:
    """Define ``fusemesh::{operation}_forward`` and ``_backward``, and the gradients of both.

    Args:
        operation: a key of :attr:`Backend.implementations`.
        fields: how the ops carry their :class:`Call`.
        reference: returns the module of the reference, whose formulas are the second derivatives.
    """
    ops = _AttentionOps(operation, fields, reference)
    # out_rest is what rounding took from out, laid out as out, and of shape [0] where it is not kept.
    op_rules.define(
        f"{operation}_forward",
        f"(Tensor q, Tensor k, Tensor v, {fields.schema}, str backend, *, bool keep_rest=False)"
        " -> (Tensor out, Tensor lse, Tensor out_rest)",
        ops.forward,
        ops.forward_fake,
    )
    # dbias is a tensor of shape [0] unless bias_grad, and so is dsinks without sinks; daux is empty unless aux_grad.
    op_rules.define(
        f"{operation}_backward",
        "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, Tensor? out_rest,"
        f" {fields.schema}, bool bias_grad, bool aux_grad, str backend)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks, Tensor[] daux)",
        ops.backward,
        ops.backward_fake,
    )
    for name, backward, setup_context in (
        ("forward", ops.gradients, ops.save_for_gradients),
        ("backward", ops.second_gradients, ops.save_for_second_gradients),
    ):
        op = f"fusemesh::{operation}_{name}"
        torch.library.register_autograd(op, backward, setup_context=setup_context, lib=op_rules.LIBRARY)


def _empty_like(x: torch.Tensor, last: int) -> torch.Tensor:
    """Uninitialised [..., last] with the dimensions of ``x``, batched or packed, in the same order in memory."""
    return empty_laid_out_like(x, last) if x.dim() == 4 else as_packed(empty_laid_out_like(as_batch(x), last))


def laid_out_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in the layout that the fakes promise; a copy for backends that do not write it themselves."""
    promised = _empty_like(like, x.shape[-1])
    return x if x.stride() == promised.stride() else promised.copy_(x)


def lse_like(q: torch.Tensor) -> torch.Tensor:
    """Return uninitialised memory for the log-sum-exp of q: [B, H, Sq], of packed q [H, total_q]; fp32, or fp64."""
    shape = q.shape[:3] if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _contiguous_or_empty(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if x is None else x.contiguous()


class _AttentionOps:
    """The functions of one pair of ops."""

    def __init__(self, operation: str, fields: OpFields, reference: Callable[[], Any]) -> None:
        self.operation, self.fields, self.reference = operation, fields, reference

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any, keep_rest: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        *values, backend = others
        call, name = self.fields.unpack(values), f"{self.operation}_forward"
        keep_rest = keep_rest and has_rest(q.dtype)
        if backend in PROVEN:
            from ..proof import calls

            found = calls.attention_forward(self.operation, (q, k, v), call, values, keep_rest, backend == "triton")
            backend = "triton"
            if found is None:
                from . import other

                backend, found = other.forward(self.operation, q, k, v, call, keep_rest)
        else:
            options = {"keep_rest": True} if keep_rest and records()[backend].keeps_rest else {}
            found = implementation(backend, self.operation).forward(q, k, v, call, **options)
        backends.count(name, backend)
        out, lse, *rest = found
        out = laid_out_like(out, q)
        if not keep_rest:
            return out, lse.contiguous(), q.new_empty(0)
        # Of a backend that has none it is 0: the gradients are then those of the rounded output.
        return out, lse.contiguous(), laid_out_like(rest[0], q) if rest else torch.zeros_like(out)

    def forward_fake(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any, keep_rest: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rest = _empty_like(q, v.shape[-1]) if keep_rest and has_rest(q.dtype) else q.new_empty(0)
        return _empty_like(q, v.shape[-1]), lse_like(q), rest

    def backward(self, *arguments: Any) -> tuple[Any, ...]:
        do, q, k, v, out, lse, dlse, out_rest, *values, bias_grad, aux_grad, backend = arguments
        call, name = self.fields.unpack(values), f"{self.operation}_backward"
        tensors = (do, q, k, v, out, lse, dlse)
        if backend in PROVEN:
            from ..proof import calls

            found = calls.attention_backward(
                self.operation, (*tensors, out_rest), call, bias_grad, values, backend == "triton"
            )
            recomputes, backend = backend == AUTO_AGAIN, "triton"
            if found is None:
                from . import other

                backend, found = other.backward(self.operation, (*tensors, out_rest), call, bias_grad, recomputes)
        else:
            options = {"bias_grad": bias_grad, "aux_grad": True} if aux_grad else {"bias_grad": bias_grad}
            if out_rest is not None and records()[backend].keeps_rest:
                options["out_rest"] = out_rest
            found = implementation(backend, self.operation).backward(*tensors, call, **options)
        backends.count(name, backend)
        dq, dk, dv = (laid_out_like(x, like) for x, like in zip(found[:3], (q, k, v), strict=True))
        dbias, dsinks = (_contiguous_or_empty(x, q) for x in found[3:5])
        return dq, dk, dv, dbias, dsinks, [x.contiguous() for x in found[5]] if aux_grad else []

    def backward_fake(self, *arguments: Any) -> tuple[Any, ...]:
        _, q, k, v, _, _, _, _, *values, bias_grad, aux_grad, _ = arguments
        call = self.fields.unpack(values)
        dbias = call.bias.new_empty(call.bias.shape) if bias_grad and call.bias is not None else q.new_empty(0)
        dsinks = q.new_empty(0) if call.sinks is None else call.sinks.new_empty(call.sinks.shape)
        daux = [x.new_empty(x.shape) for x in call.aux] if aux_grad else []
        return *(_empty_like(x, x.shape[-1]) for x in (q, k, v)), dbias, dsinks, daux

    def save_for_gradients(
        self, ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Sequence[torch.Tensor]
    ) -> None:
        q, k, v, *values, ctx.backend = inputs
        out, lse, rest = output
        ctx.mark_non_differentiable(rest)
        self._save(
            ctx, (q, k, v, out, lse, rest if keyword_only_inputs["keep_rest"] and has_rest(q.dtype) else None), values
        )

    def gradients(self, ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        """The gradients of the forward op's arguments."""
        (q, k, v, out, lse, out_rest), values = self._saved(ctx)
        if do is None and dlse is None:
            return None, None, None, *self.fields.gradients({}, values), None
        call = self.fields.unpack(values)
        if do is None:
            do = torch.zeros_like(out)
        needs = self.fields.by_name(ctx.needs_input_grad[3:-1])
        # Beside a sink such a bias does change the output.
        is_shift = needs["bias"] and call.bias.shape[3] == 1 and call.sinks is None
        aux_grad = any(needs["aux"])
        backward = getattr(torch.ops.fusemesh, f"{self.operation}_backward")
        flags = (needs["bias"] and not is_shift, aux_grad, AUTO_AGAIN if ctx.backend == AUTO else ctx.backend)
        dq, dk, dv, dbias, dsinks, daux = backward(do, q, k, v, out, lse, dlse, out_rest, *values, *flags)
        if is_shift:
            dbias = _gradient_of_row_shifts(call, lse, dlse)
        found = {"bias": dbias if needs["bias"] else None, "sinks": dsinks if needs["sinks"] else None}
        if aux_grad:
            found["aux"] = [x if need else None for x, need in zip(daux, needs["aux"], strict=True)]
        return dq, dk, dv, *self.fields.gradients(found, values), None

    def save_for_second_gradients(self, ctx: Any, inputs: tuple[Any, ...], output: Sequence[Any]) -> None:
        do, q, k, v, _, _, dlse, _, *values, ctx.bias_grad, ctx.aux_grad, _ = inputs
        self._save(ctx, (do, q, k, v, dlse), values)

    def second_gradients(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The gradients of the backward op's arguments by the reference's formulas, with their memory of Sq * Sk.

        out and lse are functions of q, k, v, bias and sinks here, so no gradient goes to those that were passed in;
        what rounding takes from out is a constant.
        """
        originals, values = self._saved(ctx)
        call = self.fields.unpack(values)
        reference = self.reference()
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, because q, k and v may be one tensor, and each has its own part of that tensor's gradient.
            named = dict(zip(("do", "q", "k", "v", "dlse"), originals, strict=True))
            named |= {"bias": call.bias, "sinks": call.sinks}
            tensors: dict[str, Any] = {name: None if x is None else x.view_as(x) for name, x in named.items()}
            aux = tuple(x.view_as(x) for x in call.aux) if ctx.aux_grad else call.aux
            call = call.replace(bias=tensors["bias"], sinks=tensors["sinks"], aux=aux)
            do, q, k, v, dlse = (tensors[name] for name in ("do", "q", "k", "v", "dlse"))
            out, lse, *rest = reference.forward(q, k, v, call, keep_rest=has_rest(q.dtype))
            flags = {"bias_grad": ctx.bias_grad, "aux_grad": ctx.aux_grad, "out_rest": rest[0] if rest else None}
            first = reference.backward(do, q, k, v, out, lse, dlse, call, **flags)
        *of_first, of_aux = grads
        daux = first.daux or ()
        of_first = [*of_first, *(of_aux or [None] * len(daux))]
        if ctx.aux_grad:
            tensors |= {f"aux {i}": x for i, x in enumerate(aux)}
        found = _gradients_of_gradients([*first[:5], *daux], of_first, tensors, create_graph)
        if ctx.aux_grad:
            found["aux"] = [found.get(f"aux {i}") for i in range(len(aux))]
        of_call = self.fields.gradients(found, values)
        return (
            *(found.get(name) for name in ("do", "q", "k", "v")),
            None,
            None,
            found.get("dlse"),
            None,
            *of_call,
            *[None] * 3,
        )

    def _save(self, ctx: Any, tensors: Sequence[torch.Tensor | None], values: Sequence[Any]) -> None:
        """Keep ``tensors`` and the values of the call for the backward."""
        # The gradient of an output that the loss does not use is then None, not a tensor of zeros.
        ctx.set_materialize_grads(False)
        held, ctx.others = self.fields.split(values)
        ctx.save_for_backward(*tensors, *held)
        ctx.count = len(tensors)

    def _saved(self, ctx: Any) -> tuple[list[Any], list[Any]]:
        """The tensors and the values that :meth:`_save` kept."""
        saved = ctx.saved_tensors
        return list(saved[: ctx.count]), self.fields.joined(saved[ctx.count :], ctx.others)


def _gradients_of_gradients(
    first: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    tensors: dict[str, torch.Tensor | None],
    create_graph: bool,
) -> dict[str, Any]:
    """Return the gradients of ``tensors``, by name, from ``grads``, those of the first derivatives ``first``."""
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


def _gradient_of_row_shifts(call: Call, lse: torch.Tensor, dlse: torch.Tensor | None) -> torch.Tensor:
    """Return the gradient of a bias that is the same for all keys: it moves lse by as much and leaves out as it is.

    Exactly so, where a sum of ds over all keys would be the rounding of ``out``. Only for the softmax over all keys: of
    a shard's keys the sum is what is wanted, and ``attention_backward`` gives that.
    """
    bias, packed = call.bias, call.packed
    assert bias is not None
    if dlse is None:
        return torch.zeros_like(bias)
    rows = torch.where(lse == -math.inf, 0.0, dlse)
    if packed is not None:
        # [H, total_q + 1]: the last is what positions beyond the end of a sequence take.
        rows = torch.nn.functional.pad(rows, (0, 1))
        at = packed.cu_q[:-1, None].long() + torch.arange(packed.max_q, device=bias.device)
        at = torch.where(at < packed.cu_q[1:, None], at, lse.shape[1])
        # [B, H, max_q]
        rows = rows[:, at].transpose(0, 1)
    return rows.unsqueeze(3).sum_to_size(bias.shape).to(bias.dtype)
