"""Small tensors that compile to the same kernels as given ones: strides, alignment and sizes of the same classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

ALIGNMENT = 16  # Triton knows of a number whether it is a multiple of 16 and whether it is 1; of an address likewise
LONG = 2**31  # from here on a stride is passed as 64 bits


def length_like(real: int, least: int) -> int:
    """Return the smallest number from ``least`` on with as many factors of 2 as ``real``, four at most."""
    factor = math.gcd(real, ALIGNMENT)
    found = max(least, 1)
    while math.gcd(found, ALIGNMENT) != factor:
        found += 1
    return found


def like(real: int, least: int) -> int:
    """Return :func:`length_like` of a number that is 1 only where ``real`` is."""
    return 1 if real == 1 else length_like(real, max(least, 2))


def same_class(a: int, b: int, exactly: bool) -> bool:
    """Return whether Triton compiles the same for two numbers; ``exactly``: also for their products with others."""
    factors = [math.gcd(x, ALIGNMENT) for x in (a, b)]
    return (a == 1) == (b == 1) and (factors[0] == factors[1] if exactly else (16 in factors) == (factors == [16, 16]))


def heads(H: int, Hkv: int, most: bool, exactly: bool) -> tuple[int, int]:
    """Return the smallest numbers of query and key heads of the classes of H, Hkv and their ratio.

    Args:
        H, Hkv: those of the call.
        most: whether there may be no more key heads than Hkv.
        exactly: as :func:`same_class` takes it.
    """
    group = H // Hkv
    for h in range(1, H):
        for kv in range(1, min(h, Hkv if most else h) + 1):
            pairs = ((h, H), (kv, Hkv), (h // kv, group))
            if h % kv == 0 and all(same_class(a, b, exactly) for a, b in pairs):
                return h, kv
    return H, Hkv


class Maker:
    """Makes the tensors of one small call, always the same."""

    def __init__(self, device: torch.device, seed: int = 20260) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def shaped(self, real: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return a tensor of zeros in the dtype, order of dims, classes of strides and alignment of ``real``."""
        return self._strided(real, shape)[1]

    def normal(self, real: torch.Tensor, shape: Sequence[int], size: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        """Return a tensor like :meth:`shaped` of ``size`` times normal numbers of this mean."""
        base, view = self._strided(real, shape)
        values = size * (mean + torch.randn(base.shape, generator=self.generator, device=self.device))
        base.copy_(values.to(base.dtype))
        return view

    def contiguous(self, real: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return a contiguous tensor of the dtype and alignment of ``real`` that holds ``values``."""
        return self.holding(real.flatten(), values.flatten()).view(values.shape)

    def flags(self, real: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return a tensor like :meth:`shaped` of flags, of which 7 in 10 are True."""
        base, view = self._strided(real, shape)
        base.copy_(torch.rand(base.shape, generator=self.generator, device=self.device) < 0.7)
        return view

    def holding(self, real: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return a tensor like :meth:`shaped` that holds ``values``."""
        view = self.shaped(real, values.shape)
        # Where one element of memory stands for many, any of them.
        where = tuple(slice(0, 1) if s == 0 else slice(None) for s in view.stride())
        view[where].copy_(values[where])
        return view

    def copied(self, real: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``real`` like :meth:`shaped`."""
        return self.holding(real, real.detach())

    def _strided(self, real: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        strides, extent = [0] * real.dim(), 1
        order = sorted(range(real.dim()), key=lambda dim: (real.stride(dim), -dim))
        for dim in order:
            stride = real.stride(dim)
            if shape[dim] != 1 and stride and (stride > 1 or extent > 1):
                # Of a dim of size 1 the stride may be 1 as well; here the elements would lie on top of each other.
                stride = length_like(stride, max(extent, 2))
            strides[dim] = stride
            if stride and shape[dim] > 1:
                extent = max(extent, stride * shape[dim])
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        room = 0 if 0 in shape else last + 1
        offset = real.data_ptr() % ALIGNMENT // real.itemsize
        base = torch.zeros(offset + room, dtype=real.dtype, device=self.device)
        return base, base.as_strided(tuple(shape), tuple(strides), offset)
