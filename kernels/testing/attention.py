"""Exact, eager and absolute-factor values of attention and its gradients, for the error budget.

``expected`` computes them once for given inputs, ``check`` compares whatever a backend returned:

    want = expected(q, k, v, do=do, bias=bias, spec=spec)
    check({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias}, want)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..attention import reference
from ..attention.spec import AttentionSpec
from . import budget


@dataclass(frozen=True)
class Expected:
    """Each maps ``out lse dq dk dv dbias`` (as far as asked for) to a tensor of the result's shape."""

    exact: dict[str, torch.Tensor]  # fp64 reference on the same inputs
    eager: dict[str, torch.Tensor]  # matmul, softmax, matmul in the tested dtype, autograd for gradients
    absolute: dict[str, torch.Tensor]  # gradients with the absolute values of all factors, fp64


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: AttentionSpec,
    do: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
    bias_grad: bool = True,
) -> Expected:
    """What a right backend returns for these inputs, and how far off plain PyTorch is.

    Args:
        q, k, v, mask, bias, origin, spec: as :func:`fusemesh.kernels.attention.reference.forward` takes them.
        do: gradient of out; None asks for the forward only.
        dlse: gradient of lse, or None.
        bias_grad: whether dbias is computed (where there is a bias and a ``do``).
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    bias = None if bias is None else bias.detach()
    bias_grad = bias_grad and bias is not None

    def double(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.double()

    inputs: dict[str, Any] = {"mask": mask, "bias": double(bias), "origin": origin, "spec": spec}
    out, lse = reference.forward(q.double(), k.double(), v.double(), **inputs)
    exact = {"out": out, "lse": lse}
    absolute: dict[str, torch.Tensor] = {}
    if do is not None:
        gradients = reference.backward(
            do.double(), q.double(), k.double(), v.double(), out, lse, double(dlse), bias_grad=bias_grad, **inputs
        )
        exact.update(_named(gradients))
        absolute = _absolute(do, q, k, v, dlse, bias_grad, inputs)
    eager = _eager(q, k, v, do, dlse, mask, bias, origin, spec, bias_grad)
    return Expected(exact, eager, absolute)


def check(actual: Mapping[str, torch.Tensor | None], want: Expected) -> list[budget.Budget]:
    """Assert that each of ``actual`` (keys out of ``out lse dq dk dv dbias``) is within its budget.

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
    names = ("dq", "dk", "dv", "dbias")
    return {name: value for name, value in zip(names, gradients, strict=True) if value is not None}


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor | None,
    dlse: torch.Tensor | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    bias_grad: bool,
) -> dict[str, torch.Tensor]:
    """The formula that anyone would write first, all of it in q's dtype."""
    groups = q.shape[1] // max(k.shape[1], 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_(bias_grad))
    with torch.enable_grad():
        lq = leaves[0]
        lk, lv = (x.repeat_interleave(groups, dim=1) for x in leaves[1:3])
        s = spec.scale * (lq @ lk.transpose(-1, -2))
        seen = reference.visible(q.shape[2], k.shape[2], origin, spec, q.device)
        seen = seen if mask is None else seen & mask
        if bias is not None:
            s = s + leaves[3].to(q.dtype)
        s = s.masked_fill(~seen, -math.inf)
        empty = (s == -math.inf).all(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        out = s.softmax(-1).masked_fill(empty, 0.0) @ lv
        lse = torch.logsumexp(s, -1, keepdim=True).masked_fill(empty, -math.inf).squeeze(-1)
    values = {"out": out.detach(), "lse": _lse_fp32(q, k, mask, bias, origin, spec)}
    if do is not None:
        wanted = [x for x in leaves if x.requires_grad]
        outputs, grads_in = [out], [do.to(out.dtype)]
        if dlse is not None:
            outputs, grads_in = [out, lse], [*grads_in, dlse.to(lse.dtype)]
        gradients = torch.autograd.grad(outputs, wanted, grads_in)
        values.update(_named((*gradients, *[None] * (4 - len(gradients)))))
    return values


def _lse_fp32(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Eager lse in fp32 of the inputs as they are: the lse keeps fp32 where q is half precision."""
    groups = q.shape[1] // max(k.shape[1], 1)
    s = spec.scale * (q.float() @ k.float().repeat_interleave(groups, dim=1).transpose(-1, -2))
    seen = reference.visible(q.shape[2], k.shape[2], origin, spec, q.device)
    seen = seen if mask is None else seen & mask
    s = (s if bias is None else s + bias.float()).masked_fill(~seen, -math.inf)
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
    inputs: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """The gradients with |.| around every factor, so that nothing cancels: how large their roundings can be."""
    spec: AttentionSpec = inputs["spec"]
    bias: torch.Tensor | None = inputs["bias"]
    groups = q.shape[1] // max(k.shape[1], 1)
    do, qa = do.double().abs(), q.double().abs()
    ka, va = (x.double().abs().repeat_interleave(groups, dim=1) for x in (k, v))
    # p is the true one: its factors are exponentials, positive already.
    ones = torch.eye(k.shape[2], dtype=torch.float64, device=k.device).expand(*k.shape[:2], -1, -1)
    p, _ = reference.forward(q.double(), k.double(), ones, **inputs)
    delta = (do * (p @ va)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta + dlse.double().abs().nan_to_num(0.0).unsqueeze(-1)
    ds = p * (do @ va.transpose(-1, -2) + delta)

    def sum_heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (k.shape[1], groups)).sum(2)

    return _named(
        (
            abs(spec.scale) * (ds @ ka),
            sum_heads(abs(spec.scale) * (ds.transpose(-1, -2) @ qa)),
            sum_heads(p.transpose(-1, -2) @ do),
            ds.sum_to_size(bias.shape) if bias_grad and bias is not None else None,
        )
    )
