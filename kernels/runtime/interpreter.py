"""Repairs to Triton's interpreter (``TRITON_INTERPRET=1``), without which 16-bit and 8-bit results are wrong.

Three faults of triton 3.6 to 3.9, none of which raises an error:

- ``tl.dot`` multiplies bfloat16 operands as the raw 16-bit integers that numpy stores them in (errors near 1e9);
- casts that start from or end in bfloat16, other than from and to float32, copy or drop those raw integers;
- casts to bfloat16 truncate, and casts to fp8 round half up without carrying into the exponent, where a GPU rounds to
  nearest even.

Of the same kind, though the numbers look right: numpy's BLAS adds up the products of an element in an order that
depends on where the element stands in a tile. A matrix unit does not, and a backward that recomputes the scores of the
forward relies on getting the same ones: where scores reach 60, the difference alone is several times fp32's error
budget. Here dots are summed in one order, in steps of 8 products of fp32 or 16 of half precision, as the hardware's
instructions do.

Beside these repairs stand those that only save time (:mod:`.interpreter_speed`).

:func:`install` replaces three methods of the interpreter's builder, and what the others name.
``fusemesh.kernels.runtime.launch.launch`` installs before every interpreted launch, so callers need nothing;
:func:`disabled` takes the repairs away for the test that shows they are needed.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .. import compat
from . import interpreter_speed

# (object, attribute) -> what Triton has there; empty while nothing is installed
_originals: dict[tuple[Any, str], Any] = {}
_disabled = False


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """``values`` rounded to nearest even bfloat16, as uint16 bit patterns of the same shape. NaN stays a quiet NaN."""
    bits = np.array(values, dtype=np.float32, order="C").view(np.uint32)
    # Adding half of the last kept place, minus one when that place is even, carries exactly when rounding goes up.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    quiet_nan = (bits >> 16) | 0x40
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, quiet_nan, rounded).astype(np.uint16)


def decode_bf16(bits: np.ndarray) -> np.ndarray:
    """The float32 values that uint16 bfloat16 bit patterns stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_fp8(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """``values`` rounded to nearest even in fp8 ``dtype``, as uint8 bit patterns of the same shape.

    Values beyond the largest finite one become it, as in the GPU's ``cvt.rn.satfinite``; NaN stays NaN.
    """
    largest = torch.finfo(dtype).max
    clamped = torch.from_numpy(np.array(values, dtype=np.float32, order="C")).clamp(-largest, largest)
    return clamped.to(dtype).view(torch.uint8).numpy()


def dot_like_matrix_units(a: np.ndarray, b: np.ndarray, accumulator: np.ndarray, *, chunk: int) -> np.ndarray:
    """``a @ b + accumulator``, products exact, the sum rounded to fp32 after every ``chunk`` of them."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], chunk):
        accumulator = (accumulator + a[..., k : k + chunk] @ b[..., k : k + chunk, :]).astype(np.float32)
    return accumulator


def _replacements(parts: compat.Interpreter) -> dict[str, Callable[..., Any]]:
    """Return name of a method of the builder -> its replacement."""
    import triton.language as tl

    handle = parts.handle
    original_dot, original_cast, original_fp_to_fp = (
        getattr(parts.builder_class, name) for name in (parts.dot, parts.cast, parts.fp_to_fp)
    )
    # float8e4b15 has no torch counterpart and no GPU of today; Triton's own conversion stays.
    fp8 = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e4b8: torch.float8_e4m3fnuz,
        tl.float8e5: torch.float8_e5m2,
        tl.float8e5b16: torch.float8_e5m2fnuz,
    }

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if d.dtype.scalar == tl.float32 and all(x.dtype.scalar in (tl.bfloat16, tl.float16) for x in (a, b)):
            x, y = (decode_bf16(t.data) if t.dtype.scalar == tl.bfloat16 else t.data for t in (a, b))
            return handle(dot_like_matrix_units(x, y, d.data, chunk=16), tl.float32)
        if d.dtype.scalar == a.dtype.scalar == b.dtype.scalar == tl.float32:
            return handle(dot_like_matrix_units(a.data, b.data, d.data, chunk=8), tl.float32)
        return original_dot(self, a, b, d, *precision)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return original_cast(self, src, dst_type)
        if source == tl.bfloat16:
            src = handle(decode_bf16(src.data), tl.float32)
            return src if target == tl.float32 else original_cast(self, src, dst_type)
        if target == tl.bfloat16:
            return handle(round_to_bf16(src.data), target)
        return original_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if rounding_mode == parts.nearest_even and source not in fp8:
            values = decode_bf16(src.data) if source == tl.bfloat16 else src.data
            if target in fp8:
                return handle(round_to_fp8(values, fp8[target]), target)
            if target == tl.bfloat16:
                return handle(round_to_bf16(values), target)
        return original_fp_to_fp(self, src, dst_type, rounding_mode)

    return {parts.dot: create_dot, parts.cast: cast_impl, parts.fp_to_fp: create_fp_to_fp}


def install() -> None:
    """Repair the interpreter of this process. Does nothing if it is repaired already, or within :func:`disabled`."""
    if _originals or _disabled:
        return
    parts = compat.interpreter()
    replacements: dict[tuple[Any, str], Any] = {
        (parts.builder_class, name): function for name, function in _replacements(parts).items()
    }
    replacements.update(interpreter_speed.replacements(parts))
    for (owner, name), replacement in replacements.items():
        _originals[owner, name] = getattr(owner, name)
        setattr(owner, name, replacement)


def uninstall() -> None:
    """Give the interpreter its own functions back. Does nothing if the repairs are not installed."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within the block the interpreter is as Triton ships it, and :func:`install` does nothing."""
    global _disabled
    was_installed, was_disabled = bool(_originals), _disabled
    uninstall()
    _disabled = True
    try:
        yield
    finally:
        _disabled = was_disabled
        if was_installed:
            install()


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a kernel in the repaired interpreter.

    Raises:
        InterpreterError: Triton's, with the error that began it and the line of the kernel, or of the function that it
            called, where that was raised.
    """
    install()
    try:
        kernel[grid](*args, **kwargs)
    except Exception as error:
        first = _first(error)
        line = _source_line(error)
        if first is error or line is None:
            raise
        raise type(error)(f"{type(first).__name__}: {first}\n{line}") from first


def _first(error: BaseException) -> BaseException:
    """Return the error that began a chain; the interpreter wraps it once for each function on the way."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _source_line(error: BaseException) -> str | None:
    """Return the innermost line of a jit function in the chain of ``error``, with its file and number, or None."""
    import triton

    tools = (os.path.dirname(triton.__file__), os.path.dirname(np.__file__), os.path.dirname(__file__))
    found = None
    link: BaseException | None = error
    while link is not None:
        for frame in traceback.extract_tb(link.__traceback__):
            if not frame.filename.startswith(tools) and frame.line:
                found = frame
        link = link.__cause__
    if found is None:
        return None
    return f'  File "{found.filename}", line {found.lineno}, in {found.name}\n    {found.line}'
