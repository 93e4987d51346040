"""Exact, eager and absolute-factor values of attention and its gradients, for the error budget.

``expected`` computes them once for given inputs, ``check`` compares whatever a backend returned:

    want = expected(q, k, v, call, do=do)
    check({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias}, want)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..attention.call.options import Call
from ..attention.reference import dense as reference
from . import budget


@dataclass(frozen=True)
class Expected:
    """Each maps ``out lse dq dk dv dbias dsinks`` (as far as asked for) to a tensor of the result's shape."""

    exact: dict[str, torch.Tensor]  # fp64 reference on the same inputs
    eager: dict[str, torch.Tensor]  # matmul, softmax, matmul in the tested dtype, autograd for gradients
    absolute: dict[str, torch.Tensor]  # gradients with the absolute values of all factors, fp64


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    *,
    do: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    bias_grad: bool = True,
) -> Expected:
    """Return what a right backend returns for these inputs, and how far off plain PyTorch is.

    Args:
        q, k, v, call: as :func:`fusemesh.kernels.attention.reference.dense.forward` takes them.
        do: gradient of out; None asks for the forward only.
        dlse: gradient of lse, or None.
        bias_grad: whether dbias is computed (where there is a bias and a ``do``).
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    call = call.replace(**{name: _detached(getattr(call, name)) for name in ("bias", "sinks")})
    bias_grad = bias_grad and call.bias is not None
    wide = call.replace(
        bias=_double(call.bias),
        sinks=_double(call.sinks),
        aux=tuple(x.double() if x.is_floating_point() else x for x in call.aux),
    )
    out, lse = reference.forward(q.double(), k.double(), v.double(), wide)
    exact = {"out": out, "lse": lse}
    absolute: dict[str, torch.Tensor] = {}
    if do is not None:
        inputs = (do.double(), q.double(), k.double(), v.double(), out, lse, _double(dlse))
        exact.update(_named(reference.backward(*inputs, wide, bias_grad=bias_grad)[:5]))
        absolute = _absolute(do, q, k, v, dlse, bias_grad, wide)
    return Expected(exact, _eager(q, k, v, do, dlse, bias_grad, call), absolute)


def _double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()


def _detached(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


def check(actual: Mapping[str, torch.Tensor | None], want: Expected) -> list[budget.Budget]:
    """Assert that each of ``actual`` (keys out of ``out lse dq dk dv dbias dsinks``) is within its budget.

    The lse is fp32 whatever the inputs, so eager's lse, too, is computed in fp32 and the ratios are those of fp32.

    Raises:
        AssertionError: with one line for each tensor that is outside.
    """
    budgets, failures = [], []
    for name, value in actual.items():
        if name not in want.exact:
            raise ValueError(f"actual: expected keys out of {tuple(want.exact)}, received {name!r}")
        if value is None:
            failures.append(f"{name}: expected a tensor, received None")
            continue
        try:
            budgets.append(
                budget.check(
                    name,
                    value,
                    want.exact[name],
                    want.eager[name],
                    dtype=want.eager[name].dtype,
                    absolute=want.absolute.get(name),
                )
            )
        except AssertionError as error:
            failures.append(str(error))
    if failures:
        raise AssertionError("\n".join(failures))
    return budgets


def _named(gradients: tuple[torch.Tensor | None, ...]) -> dict[str, torch.Tensor]:
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    return {name: value for name, value in zip(names, gradients, strict=True) if value is not None}


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor | None,
    dlse: torch.Tensor | None,
    bias_grad: bool,
    call: Call,
) -> dict[str, torch.Tensor]:
    """The formula that anyone would write first, all of it in q's dtype."""
    bias, sinks = call.bias, call.sinks
    groups = q.shape[1] // max(k.shape[1], 1)
    lq, lk, lv = (x.clone().requires_grad_() for x in (q, k, v))
    lbias = None if bias is None else bias.clone().requires_grad_(bias_grad)
    lsinks = None if sinks is None else sinks.clone().requires_grad_()
    with torch.enable_grad():
        s = _masked_scores(lq, lk.repeat_interleave(groups, dim=1), call.replace(bias=lbias))
        empty = (s == -math.inf).all(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        if lsinks is None:
            p = s.softmax(-1)
        else:
            column = lsinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
            p = torch.cat([s, column], -1).softmax(-1)[..., :-1]
        p = p.masked_fill(empty, 0.0)
        kept = reference.kept_by_dropout(s.shape, call, s.device)
        if kept is not None:
            p = p.masked_fill(~kept, 0.0) / (1 - call.spec.dropout_p)
        out = p @ lv.repeat_interleave(groups, dim=1)
        lse = torch.logsumexp(s, -1, keepdim=True).masked_fill(empty, -math.inf).squeeze(-1)
    values = {"out": out.detach(), "lse": _lse_fp32(q, k, call)}
    if do is not None:
        leaves = {"dq": lq, "dk": lk, "dv": lv, "dbias": lbias if bias_grad else None, "dsinks": lsinks}
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        outputs, grads_in = [out], [do.to(out.dtype)]
        if dlse is not None:
            outputs, grads_in = [out, lse], [*grads_in, dlse.to(lse.dtype)]
        gradients = torch.autograd.grad(outputs, list(wanted.values()), grads_in)
        values.update(zip(wanted, gradients, strict=True))
    return values


def _masked_scores(q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
    """Scores in q's dtype, mods, bias and mask applied; k has as many heads as q."""
    s = call.spec.scale * (q @ k.transpose(-1, -2))
    s = reference.apply_mods(s, call, call.aux)
    seen = reference.visible(q.shape[2], k.shape[2], call, q.device)
    seen = seen if call.mask is None else seen & call.mask
    if call.bias is not None:
        s = s + call.bias.to(q.dtype)
    return s.masked_fill(~seen, -math.inf)


def _lse_fp32(q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
    """Eager lse in fp32 of the inputs as they are: the lse keeps fp32 where q is half precision."""
    groups = q.shape[1] // max(k.shape[1], 1)
    s = _masked_scores(q.float(), k.float().repeat_interleave(groups, dim=1), call)
    empty = (s == -math.inf).all(-1)
    lse = torch.logsumexp(s.masked_fill(empty.unsqueeze(-1), 0.0), -1)
    return lse.masked_fill(empty, -math.inf)


def _absolute(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dlse: torch.Tensor | None,
    bias_grad: bool,
    call: Call,
) -> dict[str, torch.Tensor]:
    """The gradients with |.| around every factor, so that nothing cancels: how large their roundings can be."""
    spec, bias = call.spec, call.bias
    groups = q.shape[1] // max(k.shape[1], 1)
    do, qa = do.double().abs(), q.double().abs()
    ka, va = (x.double().abs().repeat_interleave(groups, dim=1) for x in (k, v))
    # p is the true one: its factors are exponentials, positive already.
    ones = torch.eye(k.shape[2], dtype=torch.float64, device=k.device).expand(*k.shape[:2], -1, -1)
    p_kept, lse = reference.forward(q.double(), k.double(), ones, call)
    without = call.replace(spec=dataclasses.replace(spec, dropout_p=0.0))
    p, _ = reference.forward(q.double(), k.double(), ones, without)
    delta = (do * (p_kept @ va)).sum(-1, keepdim=True)
    # Elements that dropout drops have no dp, but are given one here: no more than an upper bound is meant.
    ds = p * (do @ va.transpose(-1, -2) / (1 - spec.dropout_p) + delta)
    if dlse is not None:
        softmax, _ = reference.forward(q.double(), k.double(), ones, without.replace(sinks=None))
        ds = ds + softmax * dlse.double().abs().nan_to_num(0.0).unsqueeze(-1)
    dsinks = None
    if call.sinks is not None:
        share = torch.exp(call.sinks[:, None] - lse).clamp(max=1.0).masked_fill(lse == -math.inf, 0.0)
        dsinks = (share.unsqueeze(-1) * delta).sum((0, 2, 3))
    products = spec.scale * (q.double() @ k.double().repeat_interleave(groups, dim=1).transpose(-1, -2))
    slope, _ = reference.through_mods(torch.ones_like(ds), products, call)
    dx = ds * slope.abs()

    def sum_heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (k.shape[1], groups)).sum(2)

    return _named(
        (
            abs(spec.scale) * (dx @ ka),
            sum_heads(abs(spec.scale) * (dx.transpose(-1, -2) @ qa)),
            sum_heads(p_kept.transpose(-1, -2) @ do),
            ds.sum_to_size(bias.shape) if bias_grad and bias is not None else None,
            dsinks,
        )
    )
