"""The ``torch`` backend: F.scaled_dot_product_attention, on PyTorch's own tape, where its semantics suffice."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..call.spec import FP8, AttentionSpec
from ..reference import dense as reference

# PyTorch's kernel itself, which F.scaled_dot_product_attention is a name for: fusemesh.accelerate() gives that name to
# a function that may end up here.
_scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention


def why_not(
    q: torch.Tensor, bias: torch.Tensor | None, sinks: torch.Tensor | None, spec: AttentionSpec, needs_lse: bool
) -> str | None:
    """Which argument F.scaled_dot_product_attention cannot express, or None if it can do this call."""
    if q.dtype == FP8:
        return "fp8"
    if needs_lse:
        return "the log-sum-exp (return_lse)"
    if spec.window_left is not None or spec.window_right not in (None, 0):
        return "window"
    if spec.mods:
        return f"score mods {spec.mods}"
    if sinks is not None:
        return "sinks"
    if spec.dropout_p > 0:
        return "dropout by seed (dropout_p)"
    if bias is not None and bias.dtype != q.dtype and q.device.type != "cpu":
        return f"bias of {bias.dtype} beside q of {q.dtype}"
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention by PyTorch's kernel, out [B, H, Sq, Dv]; arguments as in :func:`reference.forward`.

    Causal masks that are neither aligned to the first nor to the last key, or that meet a mask or a bias, are handed to
    PyTorch as a boolean tensor [Sq, Sk], because its ``is_causal`` knows no other case.
    """
    gqa = False
    if q.shape[1] != k.shape[1]:  # a branch: under torch.compile the comparison is a symbol, and SDPA takes a bool
        gqa = True
    with reference.without_autocast(q.device.type):
        seen, is_causal = _positions(q, k, mask, bias, origin, spec)
        # masked_fill rather than a second addition: adding -inf to a bias of -inf or inf would be no mask.
        attn_mask = seen if bias is None else bias if seen is None else bias.masked_fill(~seen, -math.inf)
        out = _scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=spec.scale, enable_gqa=gqa)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    if needs_grad and not torch.compiler.is_compiling():
        differentiable: torch.Tensor = _SecondDerivative.apply(out, q, k, v, mask, bias, origin, spec)
        return differentiable
    return out


def _positions(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
) -> tuple[torch.Tensor | None, bool]:
    """What goes to SDPA as a boolean mask, and its is_causal."""
    if spec.window_right is None:
        return mask, False
    if mask is None and bias is None and origin is None and spec.origin_q == spec.origin_k:
        return None, True
    seen = reference.visible(q.shape[2], k.shape[2], origin, spec, q.device)
    return seen if mask is None else mask & seen, False


class _SecondDerivative(torch.autograd.Function):
    """The identity on SDPA's output, there for the backward of the backward, which PyTorch's kernels do not have.

    An ordinary backward passes through to SDPA's own. One that is itself recorded (create_graph=True) bypasses it: the
    gradients are computed by the reference, which can be differentiated again.
    """

    @staticmethod
    def forward(out: torch.Tensor, *inputs: Any) -> torch.Tensor:
        # detach, not the tensor itself: autograd would make that a view, which users could not change in place.
        return out.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *tensors, spec = inputs[1:]
        ctx.save_for_backward(*tensors)
        ctx.spec = spec

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return do, None, None, None, None, None, None, None
        q, k, v, mask, bias, origin = ctx.saved_tensors
        # Views, because q, k and v may be one tensor, and each has its own part of that tensor's gradient.
        tensors: list[Any] = [None if x is None else x.view_as(x) for x in (q, k, v, bias)]
        needed = [ctx.needs_input_grad[i] for i in (1, 2, 3, 5)]
        wanted = [x for x, need in zip(tensors, needed, strict=True) if need]
        vq, vk, vv, vbias = tensors
        out, _ = reference.forward(vq, vk, vv, mask=mask, bias=vbias, origin=origin, spec=ctx.spec)
        found = iter(torch.autograd.grad(out, wanted, do, create_graph=True))
        dq, dk, dv, dbias = (next(found) if need else None for need in needed)
        return None, dq, dk, dv, None, dbias, None, None
