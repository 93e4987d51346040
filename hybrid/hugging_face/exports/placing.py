"""Parts of tensors written into their places of a file: by position, piece by piece, with little memory beside."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import torch

from .slices import Box

# Bytes that are converted, moved to the host or laid out anew at one time.
STAGING = 16 << 20


def write_box(file: int, at: int, shape: Sequence[int], box: Box, values: torch.Tensor, dtype: torch.dtype) -> int:
    """Write a part of a tensor into its place of a file, and return the number of bytes written.

    What is contiguous in the file is one write: rows in one, columns row by row.

    Args:
        file: descriptor of the file, open for writing.
        at: the byte at which the whole tensor begins.
        shape: of the whole tensor.
        box: the part.
        values: of the part, on any device, in any dtype and with any strides.
        dtype: in the file.

    Raises:
        ValueError: a finite value is too large for ``dtype``.
    """
    assert tuple(values.shape) == box.size, (values.shape, box)
    done = 0
    is_narrow = dtype.is_floating_point and _range(dtype) < _range(values.dtype)
    for where, piece in _pieces(values, box.start, tuple(shape), dtype.itemsize):
        staged = piece.to(device="cpu", dtype=dtype).contiguous()
        if is_narrow and not torch.equal(staged.isinf(), piece.isinf().cpu()):
            largest = piece[piece.isfinite()].abs().max().item()
            raise ValueError(
                f"expected values of at most {torch.finfo(dtype).max:g}, which {_name(dtype)} holds, received "
                f"{largest:g}; export in another dtype, such as bfloat16 (fusemesh merge --dtype bfloat16)"
            )
        content = staged.reshape(-1).view(torch.uint8).numpy().data
        for begin, first, length in _runs(tuple(piece.shape), where, tuple(shape), dtype.itemsize):
            write_all(file, content[first : first + length], at + begin)
        done += len(content)
    return done


def write_all(file: int, content: bytes | memoryview, at: int) -> None:
    """Write all of ``content`` at a position of a file: the system may take less at one time."""
    left = memoryview(content)
    while left:
        written = os.pwrite(file, left, at)
        left, at = left[written:], at + written


def _range(dtype: torch.dtype) -> int:
    """Return the exponent of the largest number; bf16's and fp32's are the same."""
    return math.frexp(torch.finfo(dtype).max)[1] if dtype.is_floating_point else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pieces(
    values: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Yield parts of ``values`` of at most :data:`STAGING` bytes, and the index in the whole at which each begins."""
    if values.numel() == 0:
        return
    if values.numel() * itemsize <= STAGING or values.dim() == 0:
        yield start, values
        return
    number = STAGING // (values[0].numel() * itemsize)
    if number:
        for row in range(0, values.shape[0], number):
            yield (start[0] + row, *start[1:]), values[row : row + number]
        return
    for row in range(values.shape[0]):
        for inner, piece in _pieces(values[row], start[1:], shape[1:], itemsize):
            yield (start[0] + row, *inner), piece.unsqueeze(0)


def _runs(
    size: tuple[int, ...], start: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of bytes of a part that are contiguous in the whole: (byte of the whole, of the part, length)."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    begin = sum(a * b for a, b in zip(start, strides, strict=True))
    # Behind the last dimension of which not all is there, everything is contiguous.
    inner = next((dim for dim in reversed(range(len(size))) if size[dim] != shape[dim]), 0)
    length = math.prod(size[inner:]) * itemsize
    if not any(n > 1 for n in size[:inner]):
        yield begin * itemsize, 0, length
        return
    offsets = [0]
    for dim in range(inner):
        offsets = [offset + n * strides[dim] for offset in offsets for n in range(size[dim])]
    for number, offset in enumerate(offsets):
        yield (begin + offset) * itemsize, number * length, length
