"""The head's product and the cross entropy in one, by PyTorch's operations: no more than a chunk of the logits at once.

A chunk is some columns of the vocabulary, for all rows, so that a column's gradient is one product and is rounded once.
Exponentials and sums are in fp32, or fp64 for fp64, and so are logits but bf16's on a CPU, which has no other fast
product. Shapes: N rows, E features, V columns of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# Bytes of a chunk's logits. Of 1024 rows on two cores 4 MiB took twice as long, 256 MiB no less.
CHUNK_BYTES = 2**26
_LEAST_COLUMNS = 64


class Head(NamedTuple):
    """How logits come from h: softcap * tanh(scale * (h weight^T + bias) / softcap), without a softcap its argument."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


class Sums(NamedTuple):
    """Of each row, [N]: the largest logit, the sum of exp(logit - largest), and the target's logit, 0 elsewhere."""

    largest: torch.Tensor
    total: torch.Tensor
    own: torch.Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(h: torch.Tensor, head: Head, local: torch.Tensor) -> Sums:
    """Return the sums of rows h [N, E] over this rank's columns.

    Args:
        local: int64 [N], the target's column; below 0 or from V on: another rank's.
    """
    N, V = len(h), len(head.weight)
    largest = h.new_full((N,), float("-inf"), dtype=wide(h.dtype))
    total, own = torch.zeros_like(largest), torch.zeros_like(largest)
    for columns, z, _ in _logits(h, head, slopes=False):
        more = torch.maximum(largest, z.amax(1))
        own += _picked(z, local - columns.start)
        total = total * torch.exp(largest - more) + z.sub_(more.unsqueeze(1)).exp_().sum(1)
        largest = more
    assert V > 0 or not total.any()
    return Sums(largest, total, own)


def backward(
    dloss: torch.Tensor,
    h: torch.Tensor,
    head: Head,
    local: torch.Tensor,
    largest: torch.Tensor,
    log_total: torch.Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of h, weight and bias that are wanted; that of h is this rank's term of a sum over ranks.

    Args:
        dloss: [N]. largest, log_total: [N], of all ranks' columns; the probability is exp(z - largest - log_total).
    """
    h_wanted, weight_wanted, bias_wanted = wanted
    weight, acc = head.weight, wide(h.dtype)
    dh = torch.zeros_like(h, dtype=acc) if h_wanted else None
    dweight = torch.empty_like(weight) if weight_wanted else None
    dbias = None if not bias_wanted or head.bias is None else torch.empty_like(head.bias)
    rows = torch.arange(len(h), device=h.device)
    for columns, z, slope in _logits(h, head, slopes=True):
        # softmax - onehot, in place of the logits
        dz = z.sub_(largest.unsqueeze(1)).sub_(log_total.unsqueeze(1)).exp_()
        at = local - columns.start
        here = (at >= 0) & (at < dz.shape[1])
        dz.index_put_((rows, at.clamp(0, dz.shape[1] - 1)), -here.to(acc), accumulate=True)
        dz.mul_((dloss * head.scale).unsqueeze(1))
        if slope is not None:
            dz.mul_(slope)
        if dbias is not None:
            dbias[columns] = dz.sum(0)
        if dweight is not None:
            dweight[columns] = _product(dz.t(), h)
        if dh is not None:
            dh += _product(dz, weight[columns])
    return None if dh is None else dh.to(h.dtype), dweight, dbias


def _logits(h: torch.Tensor, head: Head, *, slopes: bool) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Yield columns, their logits [N, columns], which the receiver may change, and the softcap's slope there."""
    acc = wide(h.dtype)
    step = max(_LEAST_COLUMNS, CHUNK_BYTES // max(1, len(h) * acc.itemsize) // _LEAST_COLUMNS * _LEAST_COLUMNS)
    for start in range(0, len(head.weight), step):
        columns = slice(start, min(start + step, len(head.weight)))
        z = _product(h, head.weight[columns].t())
        if head.bias is not None:
            z += head.bias[columns]
        if head.scale != 1:
            z *= head.scale
        slope = None
        if head.softcap is not None:
            z.div_(head.softcap).tanh_()
            slope = 1 - z * z if slopes else None
            z *= head.softcap
        yield columns, z, slope


def _picked(z: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return the logits in columns ``at``, 0 where these are others."""
    picked = z.gather(1, at.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return torch.where((at >= 0) & (at < z.shape[1]), picked, 0.0)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b in fp32, fp64 for fp64. 16-bit factors stay so; a CPU rounds the product of bf16 to it, too."""
    acc = wide(b.dtype)
    if b.device.type == "cuda" and b.dtype != acc:
        mm: Any = torch.mm
        return mm(a.to(b.dtype), b, out_dtype=acc)
    factor = b.dtype if b.dtype == torch.bfloat16 else acc
    # Autocast would choose another.
    with torch.autocast(b.device.type, enabled=False):
        return (a.to(factor) @ b.to(factor)).to(acc)
