"""Packed attention in plain PyTorch: the reference, one sequence at a time.

Lengths are read on the host, which waits for the device; and so they are always checked here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..call.options import Call
from ..call.packed import Packed, as_batch, as_packed, check_contents
from . import dense
from .dense import Gradients


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a packed call."""

    rows: slice  # of q
    keys: slice
    index: int
    call: Call  # its own


def _own(x: torch.Tensor | None, packed: Packed, rows: int, keys: int) -> torch.Tensor | None:
    """The part of a mask or bias [1, H, max_q, max_k], each dim 1 or that of the scores, for a sequence's lengths."""
    if x is None:
        return None
    # A dim of size 1 broadcasts, unless 1 is also the longest length and the sequence's is 0.
    if x.shape[2] != 1 or packed.max_q == 1:
        x = x[:, :, :rows]
    if x.shape[3] != 1 or packed.max_k == 1:
        x = x[..., :keys]
    return x


def sequences(q: torch.Tensor, k: torch.Tensor, call: Call) -> Iterator[_Sequence]:
    """Yield the sequences of a packed call, each with its own options."""
    packed = call.packed
    assert packed is not None
    cu_q, cu_k = check_contents(packed, q.shape[0], k.shape[0])
    for b in range(packed.batch):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        lengths = rows.stop - rows.start, keys.stop - keys.start
        ahead = lengths[1] - lengths[0] if packed.is_bottom_right else 0
        entry = dense.batch_entry(call, b)
        own = entry.replace(
            spec=dataclasses.replace(entry.spec, origin_q=entry.spec.origin_q + ahead),
            mask=_own(entry.mask, packed, *lengths),
            bias=_own(entry.bias, packed, *lengths),
            packed=None,
        )
        yield _Sequence(rows, keys, b, own)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, *, keep_rest: bool = False
) -> tuple[torch.Tensor, ...]:
    """Attention of each sequence, differentiable as :func:`dense.forward` is.

    Args:
        q: [total_q, H, D].
        k: [total_k, Hkv, D].
        v: [total_k, Hkv, Dv].
        call: everything else; ``call.packed`` says where the sequences lie.
        keep_rest: also return what rounding took from out.

    Returns:
        out [total_q, H, Dv] in q's dtype, and lse [H, total_q], fp32 (fp64 for fp64); with ``keep_rest`` also the rest
        of out, in its shape and dtype.
    """
    assert call.packed is not None
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, lses, rests = [], [], []
    at = 0

    def padding(rows: int) -> None:
        outs.append(q.new_zeros(rows, q.shape[1], v.shape[2]))
        rests.append(outs[-1])
        lses.append(q.new_full((q.shape[1], rows), -math.inf, dtype=dtype))

    for own in sequences(q, k, call):
        padding(own.rows.start - at)
        at = own.rows.stop
        parts = (as_batch(q[own.rows]), as_batch(k[own.keys]), as_batch(v[own.keys]))
        out, lse, *rest = dense.forward(*parts, own.call, keep_rest=keep_rest)
        outs.append(as_packed(out))
        rests += [as_packed(x) for x in rest]
        lses.append(lse.squeeze(0))
    if not call.packed.batch:
        # Without a sequence, too, the results depend on q, k and v as far as autograd is concerned.
        spec = dataclasses.replace(call.spec, mods=(), params=())
        bare = call.replace(mask=None, bias=None, aux=(), packed=None, spec=spec)
        out, _ = dense.forward(as_batch(q[:0]), as_batch(k[:0]), as_batch(v[:0]), bare)
        outs.append(as_packed(out))
    padding(q.shape[0] - at)
    return torch.cat(outs), torch.cat(lses, 1), *((torch.cat(rests),) if keep_rest else ())


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
    """The gradients of :func:`forward` by the reference's formulas, itself differentiable.

    Returns:
        What :func:`dense.backward` returns; rows of no sequence have gradient 0.
    """
    bias, sinks = call.bias, call.sinks
    wide = torch.promote_types(q.dtype, torch.float32)
    pieces: tuple[list[torch.Tensor], ...] = ([], [], [])
    ends = [0, 0, 0]
    dbias = torch.zeros_like(bias, dtype=wide) if bias_grad and bias is not None else None
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
    daux = [torch.zeros_like(x) for x in call.aux] if aux_grad else None
    for own in sequences(q, k, call):
        at = own.rows, own.keys, own.keys
        gradients = dense.backward(
            as_batch(do[own.rows]),
            as_batch(q[own.rows]),
            as_batch(k[own.keys]),
            as_batch(v[own.keys]),
            as_batch(out[own.rows]),
            lse[None, :, own.rows],
            None if dlse is None else dlse[None, :, own.rows],
            own.call,
            bias_grad=bias_grad,
            aux_grad=aux_grad,
            out_rest=None if out_rest is None else as_batch(out_rest[own.rows]),
        )
        for i, (x, gradient, where) in enumerate(zip((q, k, v), gradients[:3], at, strict=True)):
            pieces[i].extend((x.new_zeros(where.start - ends[i], *x.shape[1:]), as_packed(gradient)))
            ends[i] = where.stop
        if dbias is not None:
            assert gradients.dbias is not None
            dbias = dbias + _placed(gradients.dbias.to(wide), dbias.shape, own.index)
        if dsinks is not None:
            assert gradients.dsinks is not None
            dsinks = dsinks + gradients.dsinks.to(wide)
        if daux is not None:
            assert gradients.daux is not None
            daux = [
                x + (part if part.shape == x.shape else _placed_rows(part, x.shape[0], own.index))
                for x, part in zip(daux, gradients.daux, strict=True)
            ]
    found = []
    for x, pieces_of, end in zip((q, k, v), pieces, ends, strict=True):
        found.append(torch.cat([*pieces_of, x.new_zeros(x.shape[0] - end, *x.shape[1:])]))
    return Gradients(
        found[0],
        found[1],
        found[2],
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        None if dsinks is None or sinks is None else dsinks.to(sinks.dtype),
        None if daux is None else tuple(daux),
    )


def _placed(part: torch.Tensor, shape: torch.Size, index: int) -> torch.Tensor:
    """The gradient of one sequence's part of a bias, in a bias of zeros."""
    before = 0 if shape[0] == 1 else index
    after = shape[0] - before - 1
    sides = (0, shape[3] - part.shape[3], 0, shape[2] - part.shape[2], 0, 0, before, after)
    return torch.nn.functional.pad(part, sides)


def _placed_rows(part: torch.Tensor, rows: int, index: int) -> torch.Tensor:
    """``part`` [1, H] as row ``index`` of zeros [rows, H]."""
    return torch.nn.functional.pad(part, (0, 0, index, rows - index - 1))
