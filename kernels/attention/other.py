"""Attention inside an op that chooses its backend when it runs, where Triton's kernels could not be proven.

What is taken is what ``auto`` would take without Triton. The op's results are then made from its functions: PyTorch's
kernel gives no log-sum-exp, which is computed beside it, and its backward is autograd's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from .. import backends, compat
from ..backend_record import Request, implementation
from .call.options import Call
from .reference import dense as reference

MOST_SCORES = 2**26  # of a block of queries, where the log-sum-exp alone is computed


def forward(
    operation: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, keep_rest: bool
) -> tuple[str, Any]:
    """Return the name of the backend, and out and lse by it, with out's rest if that is to be kept and it has one."""
    record = backends.instead_of("triton", _request(operation, q, k, v, call, needs_grad=False))
    options = {"keep_rest": True} if keep_rest and record.keeps_rest else {}
    out, lse, *rest = implementation(record.name, operation).forward(q, k, v, call, **options)
    return record.name, (out, log_sum_exp(q, k, call) if lse is None else lse, *rest)


def backward(
    operation: str, tensors: tuple[Any, ...], call: Call, bias_grad: bool, recomputes: bool
) -> tuple[str, tuple[Any, ...]]:
    """Return the name of the backend, and dq, dk, dv, dbias and dsinks by it.

    Args:
        tensors: do, q, k, v, out, lse, dlse, out_rest.
        recomputes: whether ``out`` and ``lse`` are of these very keys, so that the forward may be computed again.
    """
    *tensors_of_all, out_rest = tensors
    _, q, k, v, _, _, dlse = tensors_of_all
    # Without the log-sum-exp PyTorch's kernel cannot take those of others.
    needs_lse = dlse is not None or not recomputes
    record = backends.instead_of("triton", _request(operation, q, k, v, call, needs_grad=True, needs_lse=needs_lse))
    module = implementation(record.name, operation)
    if operation in record.differentiable and not hasattr(module, "backward"):
        return record.name, _by_autograd(module, tensors, call, bias_grad)
    options = {"out_rest": out_rest} if out_rest is not None and record.keeps_rest else {}
    return record.name, module.backward(*tensors_of_all, call, bias_grad=bias_grad, **options)[:5]


def _request(
    operation: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    *,
    needs_grad: bool,
    needs_lse: bool = False,
) -> Request:
    packed = call.packed
    lengths = (q.shape[2], k.shape[2]) if packed is None else (packed.max_q, packed.max_k)
    scores = (q.shape[0] if packed is None else packed.batch, q.shape[1], *lengths)
    dims = (q.shape[-1], v.shape[-1])
    return Request(operation, q.device, q.dtype, dims, call, needs_grad, needs_lse, scores=scores, transforms=())


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
    """Return lse [B, H, Sq] of a batch, a block of queries at a time, so that few scores are stored."""
    B, H, Sq, _ = q.shape
    rows = max(1, MOST_SCORES // max(B * H * k.shape[2], 1))
    # Values of one column: only the sums matter.
    v = k.new_zeros(k.shape[:3]).unsqueeze(-1)
    parts = []
    for first in range(0, Sq, rows):
        own = slice(first, first + rows)
        mask, bias = (x if x is None or x.shape[2] == 1 else x[:, :, own] for x in (call.mask, call.bias))
        spec = call.spec
        here = call.replace(mask=mask, bias=bias, spec=dataclasses.replace(spec, origin_q=spec.origin_q + first))
        parts.append(reference.forward(q[:, :, own], k, v, here)[1])
    return torch.cat(parts, 2) if parts else q.new_full((B, H, 0), -math.inf, dtype=torch.float32)


def _by_autograd(module: Any, tensors: tuple[Any, ...], call: Call, bias_grad: bool) -> tuple[Any, ...]:
    """Return the gradients of a forward that is computed again, on a tape of its own."""
    do, q, k, v, *_ = tensors
    bias_grad = bias_grad and call.bias is not None
    with compat.recording(), torch.enable_grad():
        # Views would be of the op's arguments, whose gradient is somebody else's matter.
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *([call.bias] if bias_grad else []))]
        out, _ = module.forward(*leaves[:3], call.replace(bias=leaves[3]) if bias_grad else call)
        found = torch.autograd.grad(out, leaves, do)
    return (*found[:3], found[3] if bias_grad else None, None)
