"""Inputs of a call drawn from its name, the list of all calls, and gradients of outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "cpu", "triton", "auto")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8 = torch.float8_e4m3fn
LETTERS = "bhmn"  # the dimensions of the scores: batch, query head, query, key

Tensors = dict[str, Tensor]


class Draw:
    """The inputs of one call, from its own generator: they depend on its name alone, not on order or backend."""

    def __init__(self, name: str) -> None:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        self._generator = torch.Generator().manual_seed(seed)
        # What draws from torch's own generator (dropout without a seed, initial weights) is to repeat as well.
        torch.manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
        """Return normal numbers of standard deviation ``size``."""
        return (size * torch.randn(shape, generator=self._generator, dtype=torch.float64)).to(dtype)

    def leaf(self, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
        """Return the same as :meth:`normal`, with a gradient."""
        return self.normal(*shape, dtype=dtype, size=size).requires_grad_()

    def bools(self, *shape: int, share: float = 0.7) -> Tensor:
        """Return bools that are True with probability ``share``."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float64) < share

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return whole numbers from 0 to ``high`` - 1."""
        return torch.randint(high, shape, generator=self._generator)

    def order(self, count: int) -> Tensor:
        """Return the numbers from 0 to ``count`` - 1 in any order."""
        return torch.randperm(count, generator=self._generator)


@dataclass(frozen=True)
class ListedCall:
    """A function that computes one call by a backend, and the backends that are asked."""

    run: Callable[[Draw, str], Tensors]
    backends: tuple[str, ...] = BACKENDS


CALLS: dict[str, ListedCall] = {}


def add(name: str, run: Callable[[Draw, str], Tensors], backends: tuple[str, ...] = BACKENDS) -> None:
    """Put a call into the list."""
    assert name not in CALLS, name
    CALLS[name] = ListedCall(run, backends)


def with_gradients(draw: Draw, outputs: Tensors, leaves: Tensors) -> Tensors:
    """Return the outputs and, of a drawn gradient of each, the gradients of the leaves that require one and get one."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    given = [draw.normal(*y.shape, dtype=y.dtype) for y in outputs.values()]
    found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), given, allow_unused=True)
    return {**outputs, **{f"d{name}": g for name, g in zip(wanted, found, strict=True) if g is not None}}


def with_second_gradients(draw: Draw, outputs: Tensors, leaves: Tensors) -> Tensors:
    """Return the outputs, the gradients of the leaves, and those of a drawn sum of these gradients."""
    given = {name: draw.leaf(*y.shape, dtype=y.dtype) for name, y in outputs.items()}
    first = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(given.values()), create_graph=True)
    weights = [draw.normal(*g.shape, dtype=g.dtype) for g in first]
    inputs = {**leaves, **{f"d{name}": x for name, x in given.items()}}
    second = torch.autograd.grad(first, list(inputs.values()), weights)
    result = {**outputs, **{f"d{name}": g for name, g in zip(leaves, first, strict=True)}}
    return {**result, **{f"dd{name}": g for name, g in zip(inputs, second, strict=True)}}
