"""Attention in plain PyTorch: the definition of right. Every other backend is compared with this file.

With s = mods(scale * q k^T) + bias where the query may see the key and -inf elsewhere, and d the elements that dropout
keeps, divided by 1 - dropout_p (Dao et al., "FlashAttention", arXiv:2205.14135, and "FlashAttention-2",
arXiv:2307.08691, without the tiling):

    lse = log sum_k exp(s)          all = log(exp(lse) + exp(sink))          p = exp(s - all)          out = (p * d) v

    dv = (p * d)^T do     dp = d * do v^T     delta = rowsum(do * (out + out_rest))
    ds = p * (dp - delta) + dlse * exp(s - lse)
    dbias = ds, summed to bias     dsink = -exp(sink - all) * delta, summed to sinks
    dx = ds through the mods       dq = scale * dx k       dk = scale * dx^T q

A row that sees no key has lse = -inf, out = 0 and no gradient. Half precision is computed in fp32, fp64 in fp64.
It holds the whole matrix of scores, so its memory grows with Sq * Sk; that is the price of being readable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from ... import compat
from ...autocast import autocast_dtype
from ..call.options import Call
from ..call.score_mods import split
from ..call.spec import out_dtype
from ..call.tensors import rest_of
from . import philox

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(kind: str) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast on devices of ``kind`` is off; it would make half precision of fp32 matmuls."""
    if autocast_dtype(kind) is not None:
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


class Gradients(NamedTuple):
    """The gradients of attention; None where there is no such input or its gradient was not asked for."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dbias: torch.Tensor | None
    dsinks: torch.Tensor | None
    daux: tuple[torch.Tensor, ...] | None = None


@_in_own_precision
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, *, keep_rest: bool = False
) -> tuple[torch.Tensor, ...]:
    """Attention and its log-sum-exp, differentiable (any number of times) in q, k, v and the tensors of the call.

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D], H a multiple of Hkv: query head h uses key head h // (H / Hkv).
        v: [B, Hkv, Sk, Dv].
        call: everything else.
        keep_rest: also return what rounding took from out.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and lse [B, H, Sq], natural log, fp32 (fp64 for fp64 inputs), without the sink;
        with ``keep_rest`` also the rest of out, in its shape and dtype.
    """
    groups = _groups(q, k)
    result = out_dtype(q.dtype)
    if call.descale is not None:
        for_q, for_k, for_v = call.descale[..., None, None].unbind(2)
        q, k, v = q.float() * _repeat_heads(for_q, groups), k.float() * for_k, v.float() * for_v
    dtype = _compute_dtype(q)
    s = scores(q, k, call)
    # Rows without a key are all -inf, and exp(-inf - -inf) is NaN: they are computed as rows of zeros and then erased,
    # which also erases whatever gradient comes in for them.
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    # Not exp(s - lse): the lse of scores around -1e9 has no room for the logarithm of the number of keys.
    p = torch.softmax(s, -1).masked_fill(empty, 0.0)
    if call.sinks is not None:
        p = p * torch.exp(lse - _with_sinks(lse, call.sinks))
    kept = kept_by_dropout(s.shape, call, s.device)
    if kept is not None:
        p = p.masked_fill(~kept, 0.0) / (1 - call.spec.dropout_p)
    exact = p @ _repeat_heads(v.to(dtype), groups)
    out = exact.to(result)
    rest = (rest_of(exact, out),) if keep_rest else ()
    return out, lse.masked_fill(empty, -math.inf).squeeze(-1), *rest


@_in_own_precision
def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    call: Call,
    *,
    bias_grad: bool,
    aux_grad: bool = False,
    out_rest: torch.Tensor | None = None,
) -> Gradients:
    """The gradients of :func:`forward`, by the formulas above; itself differentiable in all its tensors.

    ``out`` and ``lse`` are taken as given: those of a softmax over more keys than ``k`` holds (a ring of shards) give
    these keys' part of the gradients, except that dsinks is whole.

    Args:
        do: gradient of out, [B, H, Sq, Dv].
        q, k, v, call: as :func:`forward` takes them.
        out, lse: the results of :func:`forward`.
        dlse: gradient of lse, [B, H, Sq], or None.
        bias_grad: whether dbias is wanted.
        aux_grad: whether the gradients of the score mods' tensors are wanted.
        out_rest: what rounding took from out, or None.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v; dbias in bias's; dsinks in sinks', None without; daux in those
        of ``call.aux``.
    """
    groups = _groups(q, k)
    dtype = _compute_dtype(q)
    products = _products(q, k, call)
    s = _finish(products, call)
    do, qc, lse = do.to(dtype), q.to(dtype), lse.to(dtype).unsqueeze(-1)
    kc, vc = _repeat_heads(k.to(dtype), groups), _repeat_heads(v.to(dtype), groups)
    # What comes in for a row without a key is dropped, whatever it is.
    empty = lse == -math.inf
    p = _probabilities(s, lse, call.sinks)
    whole_out = out.to(dtype) if out_rest is None else out.to(dtype) + out_rest.to(dtype)
    delta = (do * whole_out).sum(-1, keepdim=True).masked_fill(empty, 0.0)
    dp = do @ vc.transpose(-1, -2)
    kept = kept_by_dropout(s.shape, call, s.device)
    p_kept = p
    if kept is not None:
        p_kept, dp = (x.masked_fill(~kept, 0.0) / (1 - call.spec.dropout_p) for x in (p, dp))
    ds = p * (dp - delta)
    if dlse is not None:
        ds = ds + _probabilities(s, lse, None) * dlse.to(dtype).unsqueeze(-1).masked_fill(empty, 0.0)
    dx, daux = through_mods(ds, products, call, aux_grad)
    dq = call.spec.scale * (dx @ kc)
    dk = _sum_heads(call.spec.scale * (dx.transpose(-1, -2) @ qc), groups)
    dv = _sum_heads(p_kept.transpose(-1, -2) @ do, groups)
    dbias = None
    if bias_grad and call.bias is not None:
        dbias = ds.sum_to_size(call.bias.shape).to(call.bias.dtype)
    dsinks = None
    if call.sinks is not None:
        whole = _with_sinks(lse.masked_fill(empty, 0.0), call.sinks)
        share = torch.exp(call.sinks.to(dtype)[:, None, None] - whole).masked_fill(empty, 0.0)
        dsinks = -(share * delta).sum((0, 2, 3)).to(call.sinks.dtype)
    return Gradients(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dsinks, daux)


@_in_own_precision
def weights(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: Call) -> torch.Tensor:
    """Return what multiplies the values, p * d [B, H, Sq, Sk] in lse's dtype, from the lse of any backend's forward.

    Differentiable in q, k, lse, bias and sinks. A row that sees no key is one of zeros.
    """
    p, kept = _weights(q, k, lse, call)
    return p if kept is None else p.masked_fill(~kept, 0.0) / (1 - call.spec.dropout_p)


@_in_own_precision
def signed_weights(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: Call) -> torch.Tensor:
    """Return p [B, H, Sq, Sk] in lse's dtype, before dropout, with a minus sign where dropout drops it.

    Differentiable as :func:`weights` is. A dropped zero is -0.0, which is not below 0.
    """
    p, kept = _weights(q, k, lse, call)
    return p if kept is None else torch.where(kept, p, -p)


def _weights(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """p, and which elements of it dropout keeps."""
    s = scores(q, k, call)
    return _probabilities(s, lse.unsqueeze(-1), call.sinks), kept_by_dropout(s.shape, call, s.device)


def visible(sq: int, sk: int, call: Call, device: torch.device) -> torch.Tensor:
    """Return which keys a query sees by position alone, bool [Sq, Sk], or [B, 1, Sq, Sk] for an origin of each batch.

    Query i stands at origin_q + i and key j at origin_k + j; they see each other iff
    -window_left <= position of the key - position of the query <= window_right, None leaving a side open.
    """
    _, _, i_q, i_k = positions((1, 1, sq, sk), call, device)
    ahead = i_k - i_q
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if call.spec.window_left is not None:
        seen = seen & (ahead >= -call.spec.window_left)
    if call.spec.window_right is not None:
        seen = seen & (ahead <= call.spec.window_right)
    return seen if call.origin is not None and call.origin.dim() == 2 else seen[0, 0]


def scores(q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
    """Return the softmax's input, [B, H, Sq, Sk]: mods(scale * q k^T) + bias, -inf where a query does not see a key."""
    return _finish(_products(q, k, call), call)


def _products(q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
    """scale * q k^T, [B, H, Sq, Sk]."""
    dtype = _compute_dtype(q)
    return call.spec.scale * (q.to(dtype) @ _repeat_heads(k.to(dtype), _groups(q, k)).transpose(-1, -2))


def _finish(products: torch.Tensor, call: Call) -> torch.Tensor:
    """The scores of the products, in the contract's order."""
    s = apply_mods(products, call, call.aux)
    if call.bias is not None:
        s = s + call.bias.to(s.dtype)
    seen = None
    if call.spec.window_left is not None or call.spec.window_right is not None:
        seen = visible(s.shape[2], s.shape[3], call, s.device)
    if call.mask is not None:
        seen = call.mask if seen is None else call.mask & seen
    return s if seen is None else s.masked_fill(~seen, -math.inf)


def apply_mods(s: torch.Tensor, call: Call, aux: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the scores after the call's score mods, whose tensors are ``aux``."""
    at = positions(s.shape, call, s.device) if call.spec.mods else ()
    for mod, tensors, numbers in split(call.spec.mods, aux, call.spec.params):
        params = dict(zip(mod.param_names, numbers, strict=True))
        # Tensors of another dtype, positions among them, are not to change that of the scores.
        s = mod.torch_forward(s, *at, *tensors, **params).to(s.dtype)
    return s


def through_mods(
    ds: torch.Tensor, products: torch.Tensor, call: Call, aux_grad: bool = False
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Return the gradient of scale * q k^T from that of the scores after the mods, by autograd through the mods alone.

    The second result holds the gradients of ``call.aux`` if ``aux_grad``, else it is None; zeros for integer tensors.
    """
    if not call.spec.mods:
        return ds, () if aux_grad else None
    if compat.transforms():
        return _through_mods_by_vjp(ds, products, call, aux_grad)
    create_graph = torch.is_grad_enabled()
    with compat.recording(), torch.enable_grad():
        x = products if create_graph and products.requires_grad else products.detach().requires_grad_()
        aux = call.aux
        if aux_grad:
            aux = tuple(a if create_graph and a.requires_grad else _leaf(a) for a in aux)
        wanted = [a for a in aux if a.requires_grad] if aux_grad else []
        found = torch.autograd.grad(
            apply_mods(x, call, aux), [x, *wanted], ds, create_graph=create_graph, allow_unused=aux_grad
        )
    if not aux_grad:
        return found[0], None
    gradients = iter(found[1:])
    daux = tuple(next(gradients) if a.requires_grad else None for a in aux)
    dx = torch.zeros_like(products) if found[0] is None else found[0]
    return dx, tuple(torch.zeros_like(a) if g is None else g for a, g in zip(aux, daux, strict=True))


def _through_mods_by_vjp(
    ds: torch.Tensor, products: torch.Tensor, call: Call, aux_grad: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """:func:`through_mods` under a transform of torch.func, where a tensor cannot be told to require a gradient."""
    at = [i for i, x in enumerate(call.aux) if aux_grad and x.is_floating_point()]

    def mods(x: torch.Tensor, *floats: torch.Tensor) -> torch.Tensor:
        aux = list(call.aux)
        for i, value in zip(at, floats, strict=True):
            aux[i] = value
        return apply_mods(x, call, tuple(aux))

    backward = torch.func.vjp(mods, products, *(call.aux[i] for i in at))[1]
    dx, *found = backward(ds)
    if not aux_grad:
        return dx, None
    daux = [torch.zeros_like(x) for x in call.aux]
    for i, gradient in zip(at, found, strict=True):
        daux[i] = gradient
    return dx, tuple(daux)


def _leaf(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a leaf with a gradient, if its dtype can have one."""
    return x.detach().requires_grad_(x.is_floating_point())


def positions(
    shape: tuple[int, ...], call: Call, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return positions in the whole of b, h, q and k: int64 [B,1,1,1], [1,H,1,1], [1,1,Sq,1], [1,1,1,Sk].

    Where the call has an origin for each batch, [4, B], those of q and k are [B,1,Sq,1] and [B,1,1,Sk].
    """
    spec = call.spec
    starts = (spec.origin_batch, spec.origin_head, spec.origin_q, spec.origin_k)
    order = (3, 2, 0, 1)  # of origin's elements
    found = []
    for dim, (size, start) in enumerate(zip(shape, starts, strict=True)):
        index = torch.arange(size, device=device) + start
        index = index.view([-1 if i == dim else 1 for i in range(4)])
        found.append(index if call.origin is None else index + call.origin[order[dim]].view(-1, 1, 1, 1))
    i_b, i_h, i_q, i_k = found
    return i_b, i_h, i_q, i_k


def kept_by_dropout(shape: torch.Size, call: Call, device: torch.device) -> torch.Tensor | None:
    """Return which probabilities of [B, H, Sq, Sk] dropout keeps, as bools; None without dropout."""
    if call.spec.dropout_p == 0:
        return None
    assert call.seed is not None
    return philox.keep(call.seed, *positions(shape, call, device), call.spec.dropout_p)


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
    """Return the number of query heads that share a key head."""
    return q.shape[1] // max(k.shape[1], 1)


def _repeat_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, Hkv, S, D] -> [B, H, S, D]: every key head once for each of its query heads."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sum_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H, S, D] -> [B, Hkv, S, D]: the transpose of :func:`_repeat_heads`."""
    return x if groups == 1 else x.unflatten(1, (x.shape[1] // groups, groups)).sum(2)


def batch_entry(call: Call, index: int) -> Call:
    """Return the call of batch entry ``index`` alone: its part of mask, bias and of mods whose tensors are by batch."""
    aux: list[torch.Tensor] = []
    for mod, tensors, _ in split(call.spec.mods, call.aux, call.spec.params):
        # ALiBi's slopes [B, H] are the call's, not the whole's, and so they are those of one entry here.
        aux += [x[index : index + 1] for x in tensors] if mod.local_heads else tensors
    mask, bias = (
        x if x is None or x.shape[0] == 1 else x[index : index + 1]  # a dim of size 1 broadcasts
        for x in (call.mask, call.bias)
    )
    spec = dataclasses.replace(call.spec, origin_batch=call.spec.origin_batch + index)
    return call.replace(mask=mask, bias=bias, aux=tuple(aux), spec=spec)
