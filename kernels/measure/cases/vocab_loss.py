"""VocabLossCase: one head with its cross entropy, from which tests and benchmarks build the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ...testing import budget
from ...vocab_loss.linear import fused_linear_cross_entropy
from . import common
from .common import ALL_DTYPES, DIRECTIONS, Inputs, Tensors

_SHAPE = ("dtype", "rows", "features", "columns")


@dataclass(frozen=True)
class VocabLossCase:
    """The loss of rows [rows, features] by a head [columns, features]; with a bias, a scale and a softcap.

    It counts 2 N V E FLOPs for each of its three products, and none for logits that are computed again.
    """

    dtype: str
    rows: int
    features: int
    columns: int
    has_bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    ignored: int = 0  # rows
    transposed: bool = False  # the weight's columns are contiguous
    op = "vocab_loss"
    result = "loss"
    upstream = "dloss"
    directions = DIRECTIONS
    counted = ("vocab_loss_forward", "vocab_loss_backward")

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The dtype, the shape, and every feature."""
        shape = [self.dtype, f"N{self.rows} E{self.features} V{self.columns}"]
        return " ".join(shape + common.features_name(self, _SHAPE))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of h and the head."""
        return ALL_DTYPES[self.dtype]

    def flops(self, direction: str) -> float:
        """Return 2 N V E for each product: one forward, two backward."""
        forward = 2 * (self.rows - self.ignored) * self.columns * self.features
        return forward if direction == "forward" else 2 * forward

    def bytes_moved(self, direction: str) -> float:
        """Return the fewest bytes: h and the weight once; in the backward their gradients, too."""
        sizes = (self.rows + self.columns) * self.features * self.torch_dtype.itemsize
        return sizes if direction == "forward" else 2 * sizes

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Return h, the head, targets and dloss; weights are such that logits have variance 4, without a scale."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        h, weight = normal(self.rows, self.features), 2 * self.features**-0.5 * normal(self.columns, self.features)
        x: Inputs = {"h": h.to(self.torch_dtype), "weight": weight.to(self.torch_dtype)}
        if self.transposed:
            x["weight"] = x["weight"].t().contiguous().t()
        if self.has_bias:
            x["bias"] = normal(self.columns).to(self.torch_dtype)
        targets = torch.randint(0, self.columns, (self.rows,), generator=generator, device=device)
        targets[: self.ignored] = -100
        return {**x, "targets": targets, "dloss": normal(self.rows)}

    def leaves(self, x: Inputs) -> tuple[str, ...]:
        """Return the names of the inputs that have a gradient."""
        return tuple(name for name in x if name not in ("targets", "dloss"))

    def run(self, x: Inputs, backend: str) -> torch.Tensor:
        """Return what the public function returns."""
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "backend": backend}
        return fused_linear_cross_entropy(x["h"], x["weight"], x["targets"], x.get("bias"), **options)

    def eager_call(self, x: Inputs) -> torch.Tensor:
        """Return the loss as PyTorch's own functions compute it: logits in the dtype of h, what follows in fp32."""
        z = self._logits(x)
        return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), x["targets"], reduction="none")

    def _logits(self, x: Inputs) -> torch.Tensor:
        z = F.linear(x["h"], x["weight"], x.get("bias"))
        z = z if self.scale == 1 else self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def _absolute(self, x: Inputs) -> Tensors:
        """Return the gradients computed with the absolute values of all factors."""
        z = self._logits(x)
        p, counts = torch.softmax(z, -1), (x["targets"] >= 0)[:, None]
        dz = (p + F.one_hot(x["targets"].clamp(min=0), self.columns)) * (abs(self.scale) * x["dloss"].abs()[:, None])
        dz = dz * counts * (1.0 if self.softcap is None else 1 - (z / self.softcap) ** 2)
        return {"dh": dz @ x["weight"].abs(), "dweight": dz.t() @ x["h"].abs(), "dbias": dz.sum(0)}

    def compute(self, x: Inputs, backend: str) -> Tensors:
        """Return the loss and every gradient, through the public function, on one tape."""
        return self._on_one_tape(x, lambda tape: self.run(tape, backend), DIRECTIONS)

    def _on_one_tape(self, x: Inputs, call: Callable[[Inputs], torch.Tensor], directions: Any) -> Tensors:
        leaves = self.leaves(x) if "backward" in directions else ()
        tape = {**x, **{name: x[name].detach().requires_grad_() for name in leaves}}
        loss = call(tape)
        results = {"loss": loss.detach()}
        if leaves:
            gradients = torch.autograd.grad(loss, [tape[name] for name in leaves], x["dloss"].to(loss.dtype))
            results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return results

    def expected(self, x: Inputs, direction: str = "backward") -> tuple[Tensors, Tensors, Tensors]:
        """Return (exact in fp64, eager in the tested dtype, by absolute values): the loss, and for the backward the
        gradients, which alone are computed with absolute values.
        """
        doubled = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
        exact = self._on_one_tape(doubled, self.eager_call, (direction,))
        return exact, self._on_one_tape(x, self.eager_call, (direction,)), self._absolute(doubled)

    expected_at_ends = expected

    def check(self, outputs: dict[str, Any], want: Any) -> list[budget.Budget]:
        """Return how far ``outputs`` are off what :meth:`expected` returned.

        Raises:
            AssertionError: one of them is outside the error budget.
        """
        exact, eager, absolute = want
        return [
            budget.check(name, value, exact[name], eager[name], absolute=absolute.get(name))
            for name, value in outputs.items()
        ]

    def eager(self, want: tuple[Tensors, Tensors, Tensors]) -> Tensors:
        """Return eager PyTorch's values in the shapes of the results."""
        return dict(want[1])
