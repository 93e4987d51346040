"""LinearCase: one linear layer, from which benchmarks and the tuner build the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ...matmul import reference
from ...matmul.api import fused_linear
from ...testing import budget
from . import common
from .common import ALL_DTYPES, DIRECTIONS, Inputs, Tensors

_SHAPE = ("dtype", "rows", "in_features", "out_features", "activation", "gated")


@dataclass(frozen=True)
class LinearCase:
    """A linear layer: x [rows, in_features], w [out_features, in_features], with bias and activation, or gated.

    It counts 2 * M * N * K FLOPs for each of its products.
    """

    dtype: str
    rows: int
    in_features: int
    out_features: int
    activation: str | None = None
    gated: bool = False
    has_bias: bool = True
    columns: bool = False  # x and the weights have their first dimension contiguous
    op = "linear"
    result = "y"
    upstream = "dy"
    directions = DIRECTIONS
    counted = ("linear_forward", "linear_backward")

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The dtype, the shape, and every feature."""
        shape = [self.dtype, f"M{self.rows} K{self.in_features} N{self.out_features}"]
        kind = ["gated"] * self.gated + [self.activation or "plain"]
        return " ".join(shape + kind + common.features_name(self, _SHAPE))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of all tensors."""
        return ALL_DTYPES[self.dtype]

    def flops(self, direction: str) -> float:
        """Return 2 M N K for each product: one forward (gated two), twice as many backward."""
        forward = 2 * self.rows * self.in_features * self.out_features * (2 if self.gated else 1)
        return forward if direction == "forward" else 2 * forward

    def bytes_moved(self, direction: str) -> float:
        """Return the fewest bytes: forward x, weights and y once; backward dy, x, weights, dx and their gradients."""
        x, y = self.rows * self.in_features, self.rows * self.out_features
        w = self.in_features * self.out_features * (2 if self.gated else 1)
        return (x + w + y if direction == "forward" else 2 * x + 2 * w + y) * self.torch_dtype.itemsize

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Return x, w, bias, w_up where gated, and dy; weights of variance 1 / K, so that y is of x's size."""
        w = (self.out_features, self.in_features)
        shapes: dict[str, tuple[int, ...]] = {"x": (self.rows, self.in_features), "w": w}
        if self.has_bias:
            shapes["bias"] = w[:1]
        if self.gated:
            shapes["w_up"] = w
        shapes["dy"] = (self.rows, self.out_features)
        generator = torch.Generator(device).manual_seed(seed)
        x: Inputs = {}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, device=device).to(self.torch_dtype)
            if name in ("w", "w_up"):
                value = value * self.in_features**-0.5
            x[name] = value.t().contiguous().t() if self.columns and value.dim() == 2 else value
        return x

    def leaves(self, x: Inputs) -> tuple[str, ...]:
        """Return the names of the inputs that have a gradient."""
        return tuple(name for name in x if name != "dy")

    def run(self, x: Inputs, backend: str) -> torch.Tensor:
        """Return what the public function returns."""
        return fused_linear(
            x["x"],
            x["w"],
            x.get("bias"),
            activation=self.activation,
            w_up=x.get("w_up"),
            backend=backend,
        )

    def eager_call(self, x: Inputs) -> torch.Tensor:
        """Return the layer as PyTorch's own functions compute it."""
        act: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
            None: lambda z: z,
            "gelu": F.gelu,
            "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
            "silu": F.silu,
            "relu2": lambda z: F.relu(z).square(),
        }
        tensor, w, w_up = x["x"], x["w"], x.get("w_up")
        assert tensor is not None and w is not None
        y = act[self.activation](F.linear(tensor, w, x.get("bias")))
        return y if w_up is None else y * F.linear(tensor, w_up)

    def compute(self, x: Inputs, backend: str) -> Tensors:
        """Return y and every gradient, through the public function, on one tape."""
        return self._on_one_tape(x, lambda tape: self.run(tape, backend), DIRECTIONS)

    def _on_one_tape(self, x: Inputs, call: Callable[[Inputs], torch.Tensor], directions: Any) -> Tensors:
        leaves = self.leaves(x) if "backward" in directions else ()
        tape = {**x, **{name: x[name].detach().requires_grad_() for name in leaves}}
        y = call(tape)
        results = {"y": y.detach()}
        if leaves:
            gradients = torch.autograd.grad(y, [tape[name] for name in leaves], x["dy"])
            results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return results

    def expected(self, x: Inputs, direction: str = "backward") -> tuple[Tensors, Tensors]:
        """Return (exact in fp64, eager in the tested dtype): y, and for the backward the gradients."""

        def exact(x: Inputs) -> torch.Tensor:
            return reference.linear(
                x["x"],
                x["w"],
                x.get("bias"),
                activation=self.activation,
                w_up=x.get("w_up"),
            )

        doubled: Inputs = {name: value.double() for name, value in x.items() if value is not None}
        return self._on_one_tape(doubled, exact, (direction,)), self._on_one_tape(x, self.eager_call, (direction,))

    expected_at_ends = expected

    def check(self, outputs: dict[str, Any], want: Any) -> list[budget.Budget]:
        """Return how far ``outputs`` are off what :meth:`expected` returned.

        Raises:
            AssertionError: one of them is outside the error budget.
        """
        exact, eager = want
        return [budget.check(name, value, exact[name], eager[name]) for name, value in outputs.items()]

    def eager(self, want: tuple[Tensors, Tensors]) -> Tensors:
        """Return eager PyTorch's values in the shapes of the results."""
        return dict(want[1])
