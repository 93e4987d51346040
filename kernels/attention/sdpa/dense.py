"""The ``torch`` backend: F.scaled_dot_product_attention, on PyTorch's own tape, where its semantics suffice."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import compat
from ...backend_record import Request
from ..call.options import Call
from ..reference import dense as reference
from .backend import TORCH


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, None]:
    """Attention by PyTorch's kernel: out [B, H, Sq, Dv], and no log-sum-exp; arguments as the reference takes them.

    Causal masks that are neither aligned to the first nor to the last key, or that meet a mask or a bias, are handed to
    PyTorch as a boolean tensor [Sq, Sk], because its ``is_causal`` knows no other case. Under a transform of torch.func
    it is PyTorch's formula, with its memory of Sq * Sk: the only one of its kernels that has every derivative.
    """
    request = Request("attention", q.device, q.dtype, (q.shape[-1], v.shape[-1]), call)
    TORCH.check(request)
    gqa = False
    if q.shape[1] != k.shape[1]:  # a branch: under torch.compile the comparison is a symbol, and SDPA takes a bool
        gqa = True
    bias = call.bias
    with reference.without_autocast(q.device.type):
        seen, is_causal = _positions(q, k, call)
        # masked_fill rather than a second addition: adding -inf to a bias of -inf or inf would be no mask.
        attn_mask = seen if bias is None else bias if seen is None else bias.masked_fill(~seen, -math.inf)
        scale = call.spec.scale
        with sdpa_kernel(SDPBackend.MATH) if request.transforms else contextlib.nullcontext():
            out = compat.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)
    if request.transforms:
        return out, None
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    if needs_grad and not torch.compiler.is_compiling():
        out = _SecondDerivative.apply(out, q, k, v, bias, call)
    return out, None


def _positions(q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor | None, bool]:
    """The boolean mask and is_causal that SDPA is called with."""
    spec = call.spec
    if spec.window_right is None:
        return call.mask, False
    if call.mask is None and call.bias is None and call.origin is None and spec.origin_q == spec.origin_k:
        return None, True
    seen = reference.visible(q.shape[2], k.shape[2], call, q.device)
    return seen if call.mask is None else call.mask & seen, False


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
        _, q, k, v, bias, call = inputs
        ctx.save_for_backward(q, k, v, bias, call.mask, call.origin)
        ctx.call = call.replace(bias=None, mask=None, origin=None)

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return do, None, None, None, None, None
        *inputs, mask, origin = ctx.saved_tensors
        # Views, because q, k and v may be one tensor, and each has its own part of that tensor's gradient.
        tensors: list[Any] = [None if x is None else x.view_as(x) for x in inputs]
        needed = ctx.needs_input_grad[1:5]
        wanted = [x for x, need in zip(tensors, needed, strict=True) if need]
        q, k, v, bias = tensors
        out, _ = reference.forward(q, k, v, ctx.call.replace(bias=bias, mask=mask, origin=origin))
        found = iter(torch.autograd.grad(out, wanted, do, create_graph=True))
        return None, *(next(found) if need else None for need in needed), None
