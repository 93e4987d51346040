"""Packed attention in plain PyTorch: the reference, one sequence at a time.

Lengths are read on the host, which waits for the device; and so they are always checked here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..call.packed import Packed, as_batch, as_packed, check_contents
from ..call.spec import AttentionSpec
from . import dense as reference


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """One sequence of a packed call."""

    rows: slice  # of q
    keys: slice
    index: int
    packed: Packed
    spec: AttentionSpec  # its own

    def own(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """The part of a mask or bias [B, H, max_q, max_k] that belongs to it, each dim 1 or that of its scores."""
        if x is None:
            return None
        x = x if x.shape[0] == 1 else x[self.index : self.index + 1]
        # A dim of size 1 broadcasts, unless 1 is also the longest length and the sequence's is 0.
        if x.shape[2] != 1 or self.packed.max_q == 1:
            x = x[:, :, : self.rows.stop - self.rows.start]
        if x.shape[3] != 1 or self.packed.max_k == 1:
            x = x[..., : self.keys.stop - self.keys.start]
        return x

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the reference for this sequence, from those of the call."""
        own = {"mask": self.own(options["mask"]), "bias": self.own(options["bias"]), "spec": self.spec}
        aux = []
        # ALiBi's slopes [B, H] are the call's, not the whole's, and so they are those of one sequence here.
        for mod, tensors in _tensors(options["spec"], options.get("aux", ())):
            aux += [x[self.index : self.index + 1] for x in tensors] if mod.local_heads else list(tensors)
        return {**options, **own, "aux": tuple(aux), "origin": None}


def _tensors(spec: AttentionSpec, aux: tuple[torch.Tensor, ...]) -> list[tuple[Any, tuple[torch.Tensor, ...]]]:
    from ..call.score_mods import split

    return [(mod, tensors) for mod, tensors, _ in split(spec.mods, aux, spec.params)]


def _sequences(packed: Packed, q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> Iterator[_Sequence]:
    cu_q, cu_k = check_contents(packed, q.shape[0], k.shape[0])
    for b in range(packed.batch):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        ahead = keys.stop - keys.start - (rows.stop - rows.start) if packed.is_bottom_right else 0
        own = dataclasses.replace(spec, origin_q=spec.origin_q + ahead, origin_batch=spec.origin_batch + b)
        yield _Sequence(rows, keys, b, packed, own)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence, differentiable as :func:`reference.forward` is.

    Args:
        q: [total_q, H, D].
        k: [total_k, Hkv, D].
        v: [total_k, Hkv, Dv].
        packed: where the sequences lie.
        options: mask, bias, spec, aux, sinks, seed as :func:`reference.forward` takes them, for B sequences of the
            longest lengths.

    Returns:
        out [total_q, H, Dv] in q's dtype, and lse [H, total_q], fp32 (fp64 for fp64).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    at = 0

    def padding(rows: int) -> None:
        outs.append(q.new_zeros(rows, q.shape[1], v.shape[2]))
        lses.append(q.new_full((q.shape[1], rows), -math.inf, dtype=dtype))

    for own in _sequences(packed, q, k, options["spec"]):
        padding(own.rows.start - at)
        at = own.rows.stop
        parts = (as_batch(q[own.rows]), as_batch(k[own.keys]), as_batch(v[own.keys]))
        out, lse = reference.forward(*parts, **own.options(options))
        outs.append(as_packed(out))
        lses.append(lse.squeeze(0))
    if not packed.batch:
        # Without a sequence, too, the results depend on q, k and v as far as autograd is concerned.
        bare = dataclasses.replace(options["spec"], mods=(), params=())
        out, _ = reference.forward(
            *(as_batch(x[:0]) for x in (q, k, v)), **{**options, "mask": None, "bias": None, "spec": bare}, origin=None
        )
        outs.append(as_packed(out))
    padding(q.shape[0] - at)
    return torch.cat(outs), torch.cat(lses, 1)


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    packed: Packed,
    *,
    bias_grad: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of :func:`forward` by the reference's formulas, itself differentiable.

    Returns:
        dq, dk, dv, dbias and dsinks as :func:`reference.backward` returns them; rows of no sequence have gradient 0.
    """
    bias, sinks = options["bias"], options.get("sinks")
    bias_grad = bias_grad and bias is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    pieces: tuple[list[torch.Tensor], ...] = ([], [], [])
    ends = [0, 0, 0]
    dbias = None if not bias_grad else torch.zeros_like(bias, dtype=wide)
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
    for own in _sequences(packed, q, k, options["spec"]):
        at = own.rows, own.keys, own.keys
        gradients = reference.backward(
            as_batch(do[own.rows]),
            as_batch(q[own.rows]),
            as_batch(k[own.keys]),
            as_batch(v[own.keys]),
            as_batch(out[own.rows]),
            lse[None, :, own.rows],
            None if dlse is None else dlse[None, :, own.rows],
            **own.options(options),
            bias_grad=bias_grad,
        )
        for i, (x, gradient, where) in enumerate(zip((q, k, v), gradients[:3], at, strict=True)):
            pieces[i].extend((x.new_zeros(where.start - ends[i], *x.shape[1:]), as_packed(gradient)))
            ends[i] = where.stop
        if dbias is not None:
            assert gradients[3] is not None
            dbias = dbias + _placed(gradients[3].to(wide), bias.shape, own.index)
        if dsinks is not None:
            assert gradients[4] is not None
            dsinks = dsinks + gradients[4].to(wide)
    found = []
    for x, pieces_of, end in zip((q, k, v), pieces, ends, strict=True):
        found.append(torch.cat([*pieces_of, x.new_zeros(x.shape[0] - end, *x.shape[1:])]))
    return (
        found[0],
        found[1],
        found[2],
        None if dbias is None else dbias.to(bias.dtype),
        None if dsinks is None or sinks is None else dsinks.to(sinks.dtype),
    )


def _placed(part: torch.Tensor, shape: torch.Size, index: int) -> torch.Tensor:
    """The gradient of one sequence's part of a bias, in a bias of zeros."""
    before = 0 if shape[0] == 1 else index
    after = shape[0] - before - 1
    sides = (0, shape[3] - part.shape[3], 0, shape[2] - part.shape[2], 0, 0, before, after)
    return torch.nn.functional.pad(part, sides)
