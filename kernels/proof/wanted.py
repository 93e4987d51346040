"""The right results of attention's trials, of batches, packed sequences and fp8, by the reference in fp64."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.call.options import Call
from ..attention.call.spec import FP8, out_dtype
from ..attention.reference import varlen
from ..testing import attention as expectations
from .trial import Wanted


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    do: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    bias_grad: bool = False,
) -> dict[str, Wanted]:
    """Return the right results by name, of the forward or, given ``do``, of both directions."""
    if q.dtype == FP8:
        q, k, v, call = _widened(q, k, v, call)
    if call.packed is None:
        want = expectations.expected(q, k, v, call, do=do, dlse=dlse, bias_grad=bias_grad)
        return {name: Wanted(want.exact[name], want.eager[name], want.absolute.get(name)) for name in want.exact}
    like = {"out": q.new_empty(*q.shape[:2], v.shape[2]), "lse": q.new_empty(q.shape[1], q.shape[0])}
    if do is not None:
        like |= {"dq": q, "dk": k, "dv": v}
        like |= {"dsinks": call.sinks} if call.sinks is not None else {}
        like |= {"dbias": call.bias} if bias_grad and call.bias is not None else {}
    packed = {name: PackedWanted(name, x) for name, x in like.items()}
    for one in varlen.sequences(q, k, call):
        if one.rows.stop == one.rows.start or one.keys.stop == one.keys.start:
            continue
        own: list[Any] = [
            None if x is None else x[rows].transpose(0, 1).unsqueeze(0)
            for x, rows in ((q, one.rows), (k, one.keys), (v, one.keys), (do, one.rows))
        ]
        q_b, k_b, v_b, do_b = own
        own_dlse = None if dlse is None else dlse[:, one.rows].unsqueeze(0)
        want = expectations.expected(q_b, k_b, v_b, one.call, do=do_b, dlse=own_dlse, bias_grad=bias_grad)
        for of_name in packed.values():
            of_name.add(want, one)
    return {name: x.wanted() for name, x in packed.items()}


class PackedWanted:
    """The right values of a result of packed sequences, to which each sequence adds its own."""

    def __init__(self, name: str, like: torch.Tensor) -> None:
        self.name = name
        nothing = -torch.inf if name == "lse" else 0.0
        self.dtype = torch.float32 if name == "lse" else like.dtype
        self.untouched = torch.ones(like.shape, dtype=torch.bool, device=like.device)
        self.sums = [torch.full(like.shape, nothing, dtype=torch.float64, device=like.device) for _ in range(3)]

    def add(self, want: expectations.Expected, one: Any) -> None:
        """Add the part of one sequence."""
        kinds = (want.exact, want.eager, want.absolute)
        for total, kind in zip(self.sums, kinds, strict=True):
            if self.name not in kind:
                continue
            value = kind[self.name]
            rows = one.keys if self.name in ("dk", "dv") else one.rows
            if self.name == "lse":
                total[:, rows] = value[0].double()
                self.untouched[:, rows] = False
            elif self.name in ("dbias", "dsinks"):
                part = total
                if self.name == "dbias":
                    part = total[one.index : one.index + 1] if total.shape[0] > 1 else total
                    part = part[:, :, : value.shape[2], : value.shape[3]]
                part += value
            else:
                total[rows] = value[0].transpose(0, 1).double()
                self.untouched[rows] = False

    def wanted(self) -> Wanted:
        """Return what all sequences together give."""
        exact, eager, absolute = self.sums
        return Wanted(
            exact,
            eager.to(self.dtype),
            absolute if self.name.startswith("d") else None,
            None if self.name in ("dbias", "dsinks") else self.untouched,
        )


def _widened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[Any, ...]:
    """Return fp8 inputs times their factors, in bf16, which holds them exactly, and the call without factors."""
    dtype = out_dtype(q.dtype)
    if call.descale is None:
        return q.to(dtype), k.to(dtype), v.to(dtype), call
    wide = []
    for x, factor in zip((q, k, v), call.descale.unbind(-1), strict=True):
        of_heads = factor.repeat_interleave(x.shape[1] // factor.shape[1], 1)
        wide.append((x.float() * of_heads[:, :, None, None]).to(dtype))
    return (*wide, call.replace(descale=None))
