"""Trials of the loss's kernels: small heads of the same specialisation, with the tiles of a given one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..matmul.gpu.tiles import Tile
from ..vocab_loss import chunked
from ..vocab_loss.chunked import Head, Sums
from ..vocab_loss.gpu import loss
from . import small
from .trial import Results, Trial, Wanted, compare

WRITTEN = {
    "vocab_loss_forward_kernel": ("largest", "loss", "own"),
    "vocab_loss_dz_kernel": ("dh", "dweight", "dbias"),
}
GRADIENTS = ("dh", "dweight", "dbias")
_TILES_OF_A_PROGRAM = 2


def eager_logits(h: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the softcap's slope as PyTorch's functions give them in the dtype of h, then widened."""
    z = head.scale * torch.nn.functional.linear(h, head.weight, head.bias)
    slope = torch.ones_like(z)
    if head.softcap is not None:
        t = torch.tanh(z / head.softcap)
        z, slope = head.softcap * t, 1 - t * t
    acc = chunked.wide(h.dtype)
    return z.to(acc), slope.to(acc)


def eager_forward(h: torch.Tensor, head: Head, local: torch.Tensor) -> Sums:
    """Return the sums by logits in the dtype of h."""
    z, _ = eager_logits(h, head)
    largest = z.amax(1)
    return Sums(largest, torch.exp(z - largest[:, None]).sum(1), (z * _onehot(local, z)).sum(1))


def formula_backward(
    rows: torch.Tensor, h: torch.Tensor, head: Head, local: torch.Tensor, absolute: bool = False
) -> dict[str, torch.Tensor]:
    """Return all gradients in the dtype of h, logits and their gradient being rounded to it.

    Args:
        absolute: of the absolute values of all factors.
    """
    z, slope = eager_logits(h, head)
    p, onehot = torch.exp(z - rows[1, :, None] - rows[2, :, None]), _onehot(local, z)
    dloss, weight = rows[0, :, None] * head.scale, head.weight
    dz = (p + onehot if absolute else p - onehot) * slope * (dloss.abs() if absolute else dloss)
    dz = dz.to(h.dtype)
    if absolute:
        h, weight = h.abs(), weight.abs()
    return {"dh": dz @ weight, "dweight": dz.t() @ h, "dbias": dz.sum(0)}


def _onehot(local: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (torch.arange(z.shape[1], device=z.device) == local[:, None]).to(z.dtype)


def _loss(sums: Sums) -> torch.Tensor:
    return torch.log(sums.total) - (sums.own - sums.largest)


@dataclass(frozen=True)
class Forward:
    """A forward that is to be proven."""

    h: torch.Tensor
    head: Head
    local: torch.Tensor

    def compute(self) -> Sums:
        """Return what the op returns, computed by Triton's kernel."""
        return loss.forward(self.h, self.head, self.local)

    def trials(self) -> Iterator[Trial]:
        """Yield small calls: of numbers whose products and sums fp32 holds, then of any."""
        tile = loss.tile_of("forward", self.h, self.head)
        for seed, sizes in enumerate(_sizes(tile, self.h)):
            yield self._trial(tile, *_small(self.h, self.head, self.local, sizes, seed, exact=seed == 0), seed == 0)

    def _trial(self, tile: Tile, h: torch.Tensor, head: Head, local: torch.Tensor, is_exact: bool) -> Trial:
        def run() -> Results:
            found = loss.forward(h, head, local, tile=tile, num_tiles=_TILES_OF_A_PROGRAM)
            return {"largest": found.largest, "own": found.own, "loss": _loss(found)}

        def check(found: Results) -> list[Any]:
            exact = chunked.forward(h.double(), _as(head, torch.float64), local)
            # Of numbers whose products are exact, the logits are, too.
            narrow = h.float() if is_exact else h
            eager = eager_forward(narrow, _as(head, narrow.dtype), local)
            wanted = {name: Wanted(getattr(exact, name), getattr(eager, name)) for name in ("largest", "own")}
            return compare(found, {**wanted, "loss": Wanted(_loss(exact), _loss(eager))})

        return Trial(run, check, WRITTEN)


@dataclass(frozen=True)
class Backward:
    """A backward that is to be proven."""

    rows: torch.Tensor
    h: torch.Tensor
    head: Head
    local: torch.Tensor
    wanted: tuple[bool, bool, bool]

    def compute(self) -> Any:
        """Return what the op returns, computed by Triton's kernel and PyTorch's products."""
        return loss.backward(self.rows, self.h, self.head, self.local, self.wanted)

    def trials(self) -> Iterator[Trial]:
        """Yield small calls."""
        tile = loss.tile_of("dz", self.h, self.head)
        for seed, sizes in enumerate(_sizes(tile, self.h)):
            h, head, local = _small(self.h, self.head, self.local, sizes, seed, exact=False)
            sums = chunked.forward(h.double(), _as(head, torch.float64), local)
            generator = torch.Generator(h.device).manual_seed(seed)
            dloss = torch.randn(len(h), generator=generator, device=h.device)
            values = torch.stack([dloss, sums.largest.float(), sums.total.log().float()])
            yield self._trial(tile, small.Maker(h.device).contiguous(self.rows, values), h, head, local)

    def _trial(self, tile: Tile, rows: torch.Tensor, h: torch.Tensor, head: Head, local: torch.Tensor) -> Trial:
        # Several chunks, and tiles that end with one.
        width = (tile.cols // 64 + 1) * 64

        def run() -> Results:
            found = loss.backward(rows, h, head, local, self.wanted, tile=tile, width=width)
            return dict(zip(GRADIENTS, found, strict=True))

        def check(found: Results) -> list[Any]:
            exact, absolute = (
                formula_backward(rows.double(), h.double(), _as(head, torch.float64), local, absolute)
                for absolute in (False, True)
            )
            eager = formula_backward(rows, h, head, local)
            asked = [name for name, want in zip(GRADIENTS, self.wanted, strict=True) if want]
            return compare(found, {name: Wanted(exact[name], eager[name], absolute[name]) for name in asked})

        return Trial(run, check, WRITTEN)


def _as(head: Head, dtype: torch.dtype) -> Head:
    return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def _sizes(tile: Tile, h: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield N, V and E: ragged tiles, several programs, and as many steps of a loop as fill its pipeline, and more."""
    for more in (0, 1):
        features = small.like(h.shape[1], tile.depth * (tile.num_stages + more) + 9)
        yield tile.rows + 17, (_TILES_OF_A_PROGRAM + more) * tile.cols + 17, features


def _small(
    h: torch.Tensor, head: Head, local: torch.Tensor, sizes: tuple[int, int, int], seed: int, exact: bool
) -> tuple[torch.Tensor, Head, torch.Tensor]:
    """Return h, head and targets of these sizes, some targets being of other ranks; ``exact``: of few binary digits."""
    n, v, e = sizes
    maker = small.Maker(h.device, seed)
    h, weight = maker.normal(h, (n, e)), maker.normal(head.weight, (v, e), 1.0 if exact else e**-0.5)
    bias = None if head.bias is None else maker.normal(head.bias, (v,))
    if exact:
        # Halves, and thirty-seconds: 3 + 4 digits behind the point, of sums far below 2^17.
        for x, digits in ((h, 2), (weight, 32), (bias, 32)):
            if x is not None:
                x.copy_((x * (digits if x is h else digits / 4)).round().clamp(-digits, digits) / digits)
    targets = torch.randint(-9, v + 9, (n,), generator=maker.generator, device=h.device)
    return h, head._replace(weight=weight, bias=bias), maker.holding(local, targets)
