"""Trials of the linear layer's kernels: small layers of the same specialisation, with the tiles of a given one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..matmul import formulas
from ..matmul.gpu import linear, tiles
from ..runtime import launch
from . import small
from .trial import Results, Trial, Wanted, compare

WRITTEN = {
    "linear_forward_kernel": ("y", "slope", "slope_up"),
    "linear_dgrad_kernel": ("dx",),
    "linear_wgrad_kernel": ("dw", "dbias", "dw_up"),
}


@dataclass(frozen=True)
class Forward:
    """A forward that is to be proven."""

    x: torch.Tensor
    w: torch.Tensor
    bias: torch.Tensor | None
    w_up: torch.Tensor | None
    activation: str | None
    flags: dict[str, Any]  # save_slope, save_slope_up, slope_dtype

    def compute(self) -> Any:
        """Return what the op returns, computed by Triton's kernel."""
        return linear.forward(self.x, self.w, self.bias, self.w_up, activation=self.activation, **self.flags)

    def trials(self) -> Iterator[Trial]:
        """Yield small calls."""
        chosen = _tiles_of(self)
        N, K = self.w.shape
        for seed, (m, n, k) in enumerate(_sizes(chosen, N, K)):
            maker = small.Maker(self.x.device, seed)
            x = maker.normal(linear._rows(self.x), (m, k))
            w, w_up = (None if t is None else maker.normal(t, (n, k), k**-0.5) for t in (self.w, self.w_up))
            assert w is not None
            bias = None if self.bias is None else maker.normal(self.bias, (n,))
            yield self._trial(chosen, x, w, bias, w_up)

    def _trial(
        self,
        chosen: dict[str, tiles.Tile],
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        w_up: torch.Tensor | None,
    ) -> Trial:
        def run() -> Results:
            with tiles.holding(chosen):
                found = linear.forward(x, w, bias, w_up, activation=self.activation, **self.flags)
            return dict(zip(("y", "slope", "slope_up"), found, strict=True))

        def check(found: Results) -> list[Any]:
            wide = [None if t is None else t.double() for t in (x, w, bias, w_up)]
            exact = formulas.forward(*wide, activation=self.activation, **{**self.flags, "slope_dtype": torch.float64})  # type: ignore[arg-type]
            eager = formulas.forward(x, w, bias, w_up, activation=self.activation, **self.flags)
            asked = [True, self.flags["save_slope"], self.flags["save_slope_up"]]
            names = [name for name, is_asked in zip(("y", "slope", "slope_up"), asked, strict=True) if is_asked]
            values = zip(("y", "slope", "slope_up"), exact, eager, strict=True)
            return compare(found, {name: Wanted(a, b) for name, a, b in values if name in names})

        return Trial(run, check, WRITTEN)


@dataclass(frozen=True)
class Backward:
    """A backward that is to be proven."""

    dy: torch.Tensor
    x: torch.Tensor | None
    w: torch.Tensor | None
    w_up: torch.Tensor | None
    slope: torch.Tensor | None
    slope_up: torch.Tensor | None
    flags: dict[str, Any]  # x_grad, w_grad, bias_grad, w_up_grad

    def compute(self) -> Any:
        """Return what the op returns, computed by Triton's kernels."""
        return linear.backward(self.dy, self.x, self.w, self.w_up, self.slope, self.slope_up, **self.flags)

    def trials(self) -> Iterator[Trial]:
        """Yield small calls."""
        chosen = _tiles_of(self)
        N = self.dy.shape[-1]
        K = self.w.shape[1] if self.w is not None else 1 if self.x is None else self.x.shape[-1]
        for seed, (m, n, k) in enumerate(_sizes(chosen, N, K)):
            maker = small.Maker(self.dy.device, seed)
            dy, slope, slope_up = (
                None if t is None else maker.normal(linear._rows(t), (m, n))
                for t in (self.dy, self.slope, self.slope_up)
            )
            x = None if self.x is None else maker.normal(linear._rows(self.x), (m, k))
            w, w_up = (None if t is None else maker.normal(t, (n, k), n**-0.5) for t in (self.w, self.w_up))
            assert dy is not None
            yield self._trial(chosen, (dy, x, w, w_up, slope, slope_up))

    def _trial(self, chosen: dict[str, tiles.Tile], tensors: tuple[Any, ...]) -> Trial:
        names = ("dx", "dw", "dbias", "dw_up")

        def run() -> Results:
            with tiles.holding(chosen):
                return dict(zip(names, linear.backward(*tensors, **self.flags), strict=True))

        def check(found: Results) -> list[Any]:
            wide: list[Any] = [None if t is None else t.double() for t in tensors]
            exact, eager = formulas.backward(*wide, **self.flags), formulas.backward(*tensors, **self.flags)
            sizes: list[Any] = [None if t is None else t.abs() for t in wide]
            absolute = formulas.backward(*sizes, **self.flags)
            values = zip(names, self.flags.values(), exact, eager, absolute, strict=True)
            return compare(found, {name: Wanted(a, b, c) for name, is_asked, a, b, c in values if is_asked})

        return Trial(run, check, WRITTEN)


def _tiles_of(real: Forward | Backward) -> dict[str, tiles.Tile]:
    """Return the tiles that the call's launchers choose."""
    chosen: dict[str, tiles.Tile] = {}
    with tiles.holding(chosen), launch.Observed(prepares_only=True):
        real.compute()
    return chosen


def _sizes(chosen: dict[str, tiles.Tile], N: int, K: int) -> Iterator[tuple[int, int, int]]:
    """Yield M, N and K of the trials: ragged tiles, and as many steps of each loop as fill its pipeline, and more."""
    # Which of M, N and K are rows, cols and depth of each kernel.
    axes = {"forward": (0, 1, 2), "dgrad": (0, 2, 1), "wgrad": (1, 2, 0)}
    for more in (0, 1):
        least = [5, 5, 5]
        for op, tile in chosen.items():
            rows, cols, depth = axes[op]
            sizes = {rows: tile.rows + 17, cols: tile.cols + 17, depth: tile.depth * (tile.num_stages + more) + 9}
            for axis, size in sizes.items():
                least[axis] = max(least[axis], size)
        yield least[0], small.like(N, least[1]), small.like(K, least[2])
