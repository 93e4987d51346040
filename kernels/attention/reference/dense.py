"""Attention in plain PyTorch: the definition of right. Every other backend is compared with this file.

With s = mods(scale * q k^T) + bias where the query may see the key and -inf elsewhere, and d the elements that dropout
keeps, divided by 1 - dropout_p (Dao et al., "FlashAttention", arXiv:2205.14135, and "FlashAttention-2",
arXiv:2307.08691, without the tiling):

    lse = log sum_k exp(s)          all = log(exp(lse) + exp(sink))          p = exp(s - all)          out = (p * d) v

    dv = (p * d)^T do     dp = d * do v^T     delta = rowsum(do * out)     ds = p * (dp - delta) + dlse * exp(s - lse)
    dbias = ds, summed to bias     dsink = -exp(sink - all) * delta, summed to sinks
    dx = ds through the mods       dq = scale * dx k       dk = scale * dx^T q

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

from ..call.score_mods import split
from ..call.spec import AttentionSpec, out_dtype
from . import philox

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
    aux: tuple[torch.Tensor, ...] = (),
    sinks: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp, differentiable (any number of times) in q, k, v, bias and sinks.

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D], H a multiple of Hkv: query head h uses key head h // (H / Hkv).
        v: [B, Hkv, Sk, Dv].
        mask: bool, True = attend, 4-D, each dim 1 or that of [B, H, Sq, Sk]; or None.
        bias: added to the scores, 4-D, each dim 1 or that of [B, H, Sq, Sk]; or None.
        origin: int64 [4] = origins of q, k, head and batch, added to those of ``spec``; or None.
        spec: scale, window, origins, score mods and dropout.
        aux: the tensors of the score mods.
        sinks: [H], a logit of each head that joins the denominator; or None.
        seed: int64, one element, of dropout; or None.
        descale: fp32 [B, Hkv, 3], by which fp8's q, k and v are multiplied; or None.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and lse [B, H, Sq], natural log, fp32 (fp64 for fp64 inputs), without the sink.
    """
    groups = _groups(q, k)
    result = out_dtype(q.dtype)
    if descale is not None:
        for_q, for_k, for_v = descale[..., None, None].unbind(2)
        q, k, v = q.float() * _repeat_heads(for_q, groups), k.float() * for_k, v.float() * for_v
    dtype = _compute_dtype(q)
    s = scores(q, k, mask=mask, bias=bias, origin=origin, spec=spec, aux=aux)
    # Rows without a key are all -inf, and exp(-inf - -inf) is NaN: they are computed as rows of zeros and then erased,
    # which also erases whatever gradient comes in for them.
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    # Not exp(s - lse): the lse of scores around -1e9 has no room for the logarithm of the number of keys.
    p = torch.softmax(s, -1).masked_fill(empty, 0.0)
    if sinks is not None:
        p = p * torch.exp(lse - _with_sinks(lse, sinks))
    kept = _kept(s, origin, spec, seed)
    if kept is not None:
        p = p.masked_fill(~kept, 0.0) / (1 - spec.dropout_p)
    out = p @ _repeat_heads(v.to(dtype), groups)
    return out.to(result), lse.masked_fill(empty, -math.inf).squeeze(-1)


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
    aux: tuple[torch.Tensor, ...] = (),
    sinks: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    descale: None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of :func:`forward`, by the formulas above; itself differentiable in all its tensors.

    ``out`` and ``lse`` are taken as given: those of a softmax over more keys than ``k`` holds (a ring of shards) give
    these keys' part of the gradients, except that dsinks is whole.

    Args:
        do: gradient of out, [B, H, Sq, Dv].
        out, lse: what :func:`forward` returned.
        dlse: gradient of lse, [B, H, Sq], or None.
        bias_grad: whether dbias is wanted.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v; dbias in bias's, or None where not asked for; dsinks in sinks',
        or None without.
    """
    groups = _groups(q, k)
    dtype = _compute_dtype(q)
    products = _products(q, k, spec)
    s = _finish(products, mask, bias, origin, spec, aux)
    do, qc, lse = do.to(dtype), q.to(dtype), lse.to(dtype).unsqueeze(-1)
    kc, vc = _repeat_heads(k.to(dtype), groups), _repeat_heads(v.to(dtype), groups)
    # What comes in for a row without a key is dropped, whatever it is.
    empty = lse == -math.inf
    p = _probabilities(s, lse, sinks)
    delta = (do * out.to(dtype)).sum(-1, keepdim=True).masked_fill(empty, 0.0)
    dp = do @ vc.transpose(-1, -2)
    kept = _kept(s, origin, spec, seed)
    p_kept = p
    if kept is not None:
        p_kept, dp = (x.masked_fill(~kept, 0.0) / (1 - spec.dropout_p) for x in (p, dp))
    ds = p * (dp - delta)
    if dlse is not None:
        ds = ds + _probabilities(s, lse, None) * dlse.to(dtype).unsqueeze(-1).masked_fill(empty, 0.0)
    dx = _through_mods(ds, products, q, origin, spec, aux)
    dq = spec.scale * (dx @ kc)
    dk = _sum_heads(spec.scale * (dx.transpose(-1, -2) @ qc), groups)
    dv = _sum_heads(p_kept.transpose(-1, -2) @ do, groups)
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if bias_grad and bias is not None else None
    dsinks = None
    if sinks is not None:
        whole = _with_sinks(lse.masked_fill(empty, 0.0), sinks)
        share = torch.exp(sinks.to(dtype)[:, None, None] - whole).masked_fill(empty, 0.0)
        dsinks = -(share * delta).sum((0, 2, 3)).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dsinks


@_in_own_precision
def weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    aux: tuple[torch.Tensor, ...] = (),
    sinks: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    descale: None = None,
) -> torch.Tensor:
    """What multiplies the values, p * d [B, H, Sq, Sk] in lse's dtype, from the lse that any backend's forward gave.

    Differentiable in q, k, lse, bias and sinks. A row that sees no key is one of zeros.
    """
    s = scores(q, k, mask=mask, bias=bias, origin=origin, spec=spec, aux=aux)
    p = _probabilities(s, lse.unsqueeze(-1), sinks)
    kept = _kept(s, origin, spec, seed)
    return p if kept is None else p.masked_fill(~kept, 0.0) / (1 - spec.dropout_p)


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


def scores(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    aux: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """What the softmax sees, [B, H, Sq, Sk]: mods(scale * q k^T) + bias, -inf where the query does not see the key."""
    return _finish(_products(q, k, spec), mask, bias, origin, spec, aux)


def _products(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """scale * q k^T, [B, H, Sq, Sk]."""
    dtype = _compute_dtype(q)
    return spec.scale * (q.to(dtype) @ _repeat_heads(k.to(dtype), _groups(q, k)).transpose(-1, -2))


def _finish(
    products: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    aux: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """The scores of the products, in the contract's order."""
    s = _mods(products, origin, spec, aux)
    if bias is not None:
        s = s + bias.to(s.dtype)
    seen = None
    if spec.window_left is not None or spec.window_right is not None:
        seen = visible(s.shape[2], s.shape[3], origin, spec, s.device)
    if mask is not None:
        seen = mask if seen is None else mask & seen
    return s if seen is None else s.masked_fill(~seen, -math.inf)


def _mods(
    s: torch.Tensor, origin: torch.Tensor | None, spec: AttentionSpec, aux: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The scores after the call's score mods."""
    at = positions(s.shape, origin, spec, s.device) if spec.mods else ()
    for mod, tensors, numbers in split(spec.mods, aux, spec.params):
        params = dict(zip(mod.param_names, numbers, strict=True))
        # Tensors of another dtype, positions among them, are not to change that of the scores.
        s = mod.torch_forward(s, *at, *tensors, **params).to(s.dtype)
    return s


def _through_mods(
    ds: torch.Tensor,
    products: torch.Tensor,
    q: torch.Tensor,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    aux: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """The gradient of scale * q k^T from that of the scores after the mods, by autograd through the mods alone."""
    if not spec.mods:
        return ds
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = products if create_graph and products.requires_grad else products.detach().requires_grad_()
        (dx,) = torch.autograd.grad(_mods(x, origin, spec, aux), x, ds, create_graph=create_graph)
    return dx


def positions(
    shape: torch.Size, origin: torch.Tensor | None, spec: AttentionSpec, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of batch, head, query and key in the whole: int64 [B,1,1,1], [1,H,1,1], [1,1,Sq,1], [1,1,1,Sk]."""
    starts = (spec.origin_batch, spec.origin_head, spec.origin_q, spec.origin_k)
    order = (3, 2, 0, 1)  # of origin's elements
    found = []
    for dim, (size, start) in enumerate(zip(shape, starts, strict=True)):
        index = torch.arange(size, device=device) + start
        if origin is not None:
            index = index + origin[order[dim]]
        found.append(index.view([-1 if i == dim else 1 for i in range(4)]))
    i_b, i_h, i_q, i_k = found
    return i_b, i_h, i_q, i_k


def _kept(
    s: torch.Tensor, origin: torch.Tensor | None, spec: AttentionSpec, seed: torch.Tensor | None
) -> torch.Tensor | None:
    """Which probabilities dropout keeps, bool [B, H, Sq, Sk]; None without dropout."""
    if spec.dropout_p == 0:
        return None
    assert seed is not None
    return philox.keep(seed, *positions(s.shape, origin, spec, s.device), spec.dropout_p)


def _probabilities(s: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """exp(s - log(exp(lse) + exp(sink))) for lse [B, H, Sq, 1]; zeros where a row has no key."""
    # Such a row has scores and an lse of -inf: with one of +inf, exp gives zeros and no NaN, and so do gradients.
    empty = lse == -math.inf
    whole = _with_sinks(lse.masked_fill(empty, 0.0), sinks)
    return torch.exp(s - whole.masked_fill(empty, math.inf))


def _with_sinks(lse: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """log(exp(lse) + exp(sink)), [B, H, Sq, 1]."""
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, None])


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
