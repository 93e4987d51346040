"""Attention in plain PyTorch: the definition of right. Every other backend is compared with this file.

With s = scale * q k^T + bias where the query may see the key and -inf elsewhere (Dao et al., "FlashAttention",
arXiv:2205.14135, and "FlashAttention-2", arXiv:2307.08691, without the tiling):

    lse = log sum_k exp(s)          p = exp(s - lse)          out = p v

    dv = p^T do                     dp = do v^T               delta = rowsum(do * out) - dlse
    ds = p * (dp - delta)           dq = scale * ds k         dk = scale * ds^T q           dbias = ds, summed to bias

A row that sees no key has lse = -inf, out = 0 and no gradient. Half precision is computed in fp32, fp64 in fp64.
It holds the whole matrix of scores, so its memory grows with Sq * Sk; that is the price of being readable.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from .spec import AttentionSpec

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(kind: str) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast on devices of ``kind`` is off; it would make half precision of fp32 matmuls."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        with without_autocast(first.device.type):
            return function(*args, **kwargs)

    return wrapper


@_in_own_precision
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp, differentiable (any number of times) in q, k, v and bias.

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D], H a multiple of Hkv: query head h uses key head h // (H / Hkv).
        v: [B, Hkv, Sk, Dv].
        mask: bool, True = attend, 4-D, each dim 1 or that of [B, H, Sq, Sk]; or None.
        bias: added to the scores, 4-D, each dim 1 or that of [B, H, Sq, Sk]; or None.
        origin: int64 [2] = (origin_q, origin_k), added to those of ``spec``; or None.
        spec: scale, window and origins.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and lse [B, H, Sq], natural log, fp32 (fp64 for fp64 inputs).
    """
    groups = _groups(q, k)
    dtype = _compute_dtype(q)
    s = _scores(q, k, mask, bias, origin, spec)
    # Rows without a key are all -inf, and exp(-inf - -inf) is NaN: they are computed as rows of zeros and then erased,
    # which also erases whatever gradient comes in for them.
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    p = torch.exp(s - lse).masked_fill(empty, 0.0)
    out = p @ _repeat_heads(v.to(dtype), groups)
    return out.to(q.dtype), lse.masked_fill(empty, -math.inf).squeeze(-1)


@_in_own_precision
def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of :func:`forward`, by the formulas above; itself differentiable in all its tensors.

    ``out`` and ``lse`` are taken as given: those of a softmax over more keys than ``k`` holds (a ring of shards) give
    these keys' part of the gradients.

    Args:
        do: gradient of out, [B, H, Sq, Dv].
        out, lse: what :func:`forward` returned.
        dlse: gradient of lse, [B, H, Sq], or None.
        bias_grad: whether dbias is wanted.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v, and dbias in bias's, or None where not asked for.
    """
    groups = _groups(q, k)
    dtype = _compute_dtype(q)
    s = _scores(q, k, mask, bias, origin, spec)
    do, qc, lse = do.to(dtype), q.to(dtype), lse.to(dtype).unsqueeze(-1)
    kc, vc = _repeat_heads(k.to(dtype), groups), _repeat_heads(v.to(dtype), groups)
    # Where a row has no key, an lse of +inf makes p zero, and its delta is dropped, whatever dlse holds there.
    empty = lse == -math.inf
    p = torch.exp(s - lse.masked_fill(empty, math.inf))
    delta = (do * out.to(dtype)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(dtype).unsqueeze(-1)
    delta = delta.masked_fill(empty, 0.0)
    ds = p * (do @ vc.transpose(-1, -2) - delta)
    dq = spec.scale * (ds @ kc)
    dk = _sum_heads(spec.scale * (ds.transpose(-1, -2) @ qc), groups)
    dv = _sum_heads(p.transpose(-1, -2) @ do, groups)
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if bias_grad and bias is not None else None
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def visible(sq: int, sk: int, origin: torch.Tensor | None, spec: AttentionSpec, device: torch.device) -> torch.Tensor:
    """Which keys a query sees by position alone, bool [Sq, Sk].

    Query i stands at origin_q + i and key j at origin_k + j; they see each other iff
    -window_left <= position of the key - position of the query <= window_right, None leaving a side open.
    """
    i_q = torch.arange(sq, device=device) + spec.origin_q
    i_k = torch.arange(sk, device=device) + spec.origin_k
    if origin is not None:
        i_q, i_k = i_q + origin[0], i_k + origin[1]
    ahead = i_k[None, :] - i_q[:, None]
    seen = torch.ones((sq, sk), dtype=torch.bool, device=device)
    if spec.window_left is not None:
        seen = seen & (ahead >= -spec.window_left)
    if spec.window_right is not None:
        seen = seen & (ahead <= spec.window_right)
    return seen


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """scale * q k^T + bias, -inf where the query does not see the key; [B, H, Sq, Sk]."""
    dtype = _compute_dtype(q)
    s = spec.scale * (q.to(dtype) @ _repeat_heads(k.to(dtype), _groups(q, k)).transpose(-1, -2))
    if bias is not None:
        s = s + bias.to(dtype)
    seen = None
    if spec.window_left is not None or spec.window_right is not None:
        seen = visible(q.shape[2], k.shape[2], origin, spec, q.device)
    if mask is not None:
        seen = mask if seen is None else mask & seen
    return s if seen is None else s.masked_fill(~seen, -math.inf)


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _groups(q: torch.Tensor, k: torch.Tensor) -> int:
    """How many query heads share a key head."""
    return q.shape[1] // max(k.shape[1], 1)


def _repeat_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, Hkv, S, D] -> [B, H, S, D]: every key head once for each of its query heads."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sum_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H, S, D] -> [B, Hkv, S, D]: the transpose of :func:`_repeat_heads`."""
    return x if groups == 1 else x.unflatten(1, (x.shape[1] // groups, groups)).sum(2)
