"""Poisoned memory: what a kernel forgets to write, or reads beyond its tensors, shows up as NaN.

:func:`poisoned_empty` fills fresh memory, :func:`surround` puts a tensor inside a larger buffer of NaN.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within the block fresh uninitialised memory holds NaN (integers: the largest value; bool: True).

    That goes for ``torch.empty``, ``empty_like``, ``empty_strided`` and ``Tensor.new_empty`` from anywhere, the inside
    of custom ops included, because PyTorch itself does the filling (``torch.utils.deterministic``). It does so only
    while deterministic algorithms are asked for, so these are on within the block, with a warning in place of an error
    where an operation has none.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class Surrounded:
    """A tensor that is the interior of a larger buffer; made by :func:`surround`."""

    def __init__(self, buffer: torch.Tensor, inside: tuple[slice, ...], fill: float) -> None:
        self.buffer = buffer
        self.view = buffer[inside]  # shape and values of the tensor that was surrounded
        self._inside = inside
        self._fill = fill  # what stands everywhere else

    def assert_intact(self, name: str = "tensor") -> None:
        """Raise AssertionError if anything outside the view was written since."""
        written = ~self.buffer.isnan() if math.isnan(self._fill) else self.buffer != self._fill
        written[self._inside] = False
        if written.any():
            raise AssertionError(f"{name}: {int(written.sum())} elements outside the view were written")


def surround(tensor: torch.Tensor, *, margin: int | Sequence[int] = 3, fill: float | None = None) -> Surrounded:
    """Copy ``tensor`` into the interior of a larger buffer filled with NaN.

    The view keeps shape, values and a unit last stride, and has padded strides everywhere else; a kernel that reads a
    single element beyond it computes NaN, one that writes there is found by :meth:`Surrounded.assert_intact`.

    Args:
        tensor: any shape with at least one dimension.
        margin: elements added before and after, in every dimension or one number for each.
        fill: the canary; by default NaN, the largest value for integers, True for bool.
    """
    margins = [margin] * tensor.dim() if isinstance(margin, int) else list(margin)
    if len(margins) != tensor.dim():
        raise ValueError(
            f"margin: expected one number or {tensor.dim()}, one for each dimension of tensor, received {margins}"
        )
    if fill is None:
        if tensor.dtype.is_floating_point:
            fill = float("nan")
        elif tensor.dtype == torch.bool:
            fill = True
        else:
            fill = torch.iinfo(tensor.dtype).max
    shape = [size + 2 * extra for size, extra in zip(tensor.shape, margins, strict=True)]
    inside = tuple(slice(extra, extra + size) for size, extra in zip(tensor.shape, margins, strict=True))
    buffer = torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device)
    buffer[inside] = tensor.detach()
    return Surrounded(buffer, inside, fill)
