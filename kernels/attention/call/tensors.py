"""Dtypes and memory layouts of the tensors of attention: autocast, strides, outputs."""

from __future__ import annotations

from typing import Any

import torch

from ... import compat
from ...autocast import autocast_dtype
from ...backend_record import Backend, needs_gradient
from .options import Call
from .spec import out_dtype


def autocast(*inputs: Any) -> tuple[Any, ...]:
    """Return the inputs in the dtypes that autocast gives F.scaled_dot_product_attention's; others as they are."""

    def cast(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point or x.dtype == torch.float64:
            return x
        dtype = autocast_dtype(x.device.type)
        return x if dtype is None else x.to(dtype)

    return tuple(cast(x) for x in inputs)


def has_values(x: torch.Tensor) -> bool:
    """Return whether ``x`` has elements to read: not on meta, of fake tensors, in a traced graph, or mapped by vmap."""
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return not (compat.transforms() and compat.is_mapped(x))


def unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last stride is 1, else a contiguous copy, which autograd sees."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def has_rest(dtype: torch.dtype) -> bool:
    """Return whether attention on q of ``dtype`` rounds an output that has gradients to 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def rest_is_needed(record: Backend, q: torch.Tensor, k: torch.Tensor, call: Call) -> bool:
    """Return whether a forward op is to keep what rounding takes from its output, because a backward will read it.

    An exported program keeps none: most are for inference, and which one is not known while it is traced.
    """
    if not record.keeps_rest or not has_rest(q.dtype) or torch.compiler.is_exporting():
        return False
    return needs_gradient(q, k, *call.differentiable)


def rest_of(exact: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return what rounding took from ``exact`` to make ``out`` of it, in out's dtype; no gradient goes through it.

    The backward's delta = rowsum(do * out) cancels against other sums of the same products. Of out and its rest it has
    16 bits at least, from bf16, where out alone has 8.
    """
    return (exact.detach() - out.detach().to(exact.dtype)).to(out.dtype)


def empty_laid_out_like(tensor: torch.Tensor, last: int) -> torch.Tensor:
    """Uninitialised [B, H, S, last] with the dimensions of ``tensor`` [B, H, S, D] in the same order in memory.

    In the dtype :func:`out_dtype` of the tensor's.

    Every backend returns outputs and gradients in this layout, so that heads that came out of one projection, [B, S, H,
    D] in memory, go back into the next one without a copy. Without gaps, whatever the strides of ``tensor``.
    """
    B, H, S, _ = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((B, S, H, last), dtype=out_dtype(tensor.dtype)).transpose(1, 2)
    return tensor.new_empty((B, H, S, last), dtype=out_dtype(tensor.dtype))
