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
        shift = finite_shift(more)
        total = total * torch.exp(largest - shift) + z.sub_(shift.unsqueeze(1)).exp_().sum(1)
        largest = more
    assert V > 0 or not total.any()
    return Sums(largest, total, own)


def finite_shift(largest: torch.Tensor) -> torch.Tensor:
    """Return what logits are relative to: the largest, or 0 where all are -inf (a bias that hides columns)."""
    return largest.masked_fill(largest == float("-inf"), 0.0)


class Gradients:
    """The gradients of h, weight and bias that are wanted, None the others, to which the columns add theirs."""

    def __init__(self, h: torch.Tensor, head: Head, wanted: tuple[bool, bool, bool]) -> None:
        self.h, self.head = h, head
        h_wanted, weight_wanted, bias_wanted = wanted
        self.dh = h.new_zeros(h.shape, dtype=wide(h.dtype)) if h_wanted else None
        self.dweight = torch.empty_like(head.weight) if weight_wanted else None
        self.dbias = torch.empty_like(head.bias) if bias_wanted and head.bias is not None else None

    def add(self, columns: slice, dz: torch.Tensor, sums: torch.Tensor | None) -> None:
        """Take in the gradient dz [N, columns] of logits; ``sums`` of it over rows, where the bias needs them."""
        if self.dbias is not None:
            assert sums is not None
            self.dbias[columns] = sums
        if self.dweight is not None:
            self.dweight[columns] = product(dz.t(), self.h)
        if self.dh is not None:
            self.dh += product(dz, self.head.weight[columns])

    def found(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the three in the dtype of h."""
        return None if self.dh is None else self.dh.to(self.h.dtype), self.dweight, self.dbias


def backward(
    rows: torch.Tensor, h: torch.Tensor, head: Head, local: torch.Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of h, weight and bias that are wanted; that of h is this rank's term of a sum over ranks.

    Args:
        rows: [3, N], of each row dloss, and of all ranks' columns the largest logit and log(total); the probability is
            exp(z - largest - log_total).
    """
    dloss, largest, log_total = rows
    gradients = Gradients(h, head, wanted)
    index = torch.arange(len(h), device=h.device)
    for columns, z, slope in _logits(h, head, slopes=True):
        # softmax - onehot, in place of the logits
        dz = z.sub_(largest.unsqueeze(1)).sub_(log_total.unsqueeze(1)).exp_()
        at = local - columns.start
        here = (at >= 0) & (at < dz.shape[1])
        dz.index_put_((index, at.clamp(0, dz.shape[1] - 1)), -here.to(dz.dtype), accumulate=True)
        dz.mul_((dloss * head.scale).unsqueeze(1))
        if slope is not None:
            dz.mul_(slope)
        gradients.add(columns, dz, None if gradients.dbias is None else dz.sum(0))
    return gradients.found()


def columns_of_a_chunk(N: int, itemsize: int) -> int:
    """Return how many columns of N rows take :data:`CHUNK_BYTES`, a multiple of 64."""
    return max(_LEAST_COLUMNS, CHUNK_BYTES // max(1, N * itemsize) // _LEAST_COLUMNS * _LEAST_COLUMNS)


def _logits(h: torch.Tensor, head: Head, *, slopes: bool) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Yield columns, their logits [N, columns], which the receiver may change, and the softcap's slope there."""
    step = columns_of_a_chunk(len(h), wide(h.dtype).itemsize)
    for start in range(0, len(head.weight), step):
        columns = slice(start, min(start + step, len(head.weight)))
        z = product(h, head.weight[columns].t())
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


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b in fp32, fp64 for fp64. 16-bit factors stay so; a CPU rounds the product of bf16 to it, too."""
    acc = wide(b.dtype)
    if b.device.type == "cuda" and b.dtype != acc:
        mm: Any = torch.mm
        return mm(a.to(b.dtype), b, out_dtype=acc)
    factor = b.dtype if b.dtype == torch.bfloat16 else acc
    # Autocast would choose another.
    with torch.autocast(b.device.type, enabled=False):
        return (a.to(factor) @ b.to(factor)).to(acc)
