"""Arithmetic of reductions in memory."""

from __future__ import annotations

import numpy as np

from ..hazard import UnknownInstruction
from ..numbers import bf16_to_f32, f32_to_bf16, flush

_WHOLE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_TYPES = {"f16": "<f2", "f32": "<f4", "f64": "<f8", "b32": "<u4", "b64": "<u8", "s32": "<i4", "s64": "<i8"}


def combine(operation: str, element: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return ``old`` (unsigned numbers, any split of the elements) reduced with ``new``, elements of PTX's type.

    Sums of fp32 flush subnormal numbers, as reductions in global memory do; others keep them.
    """
    if operation not in _WHOLE:
        raise UnknownInstruction(f"a reduction by {operation}")
    if element == "bf16":
        a, b = (bf16_to_f32(np.ascontiguousarray(x).view(np.uint16)) for x in (old, new))
        if operation == "add":
            return f32_to_bf16(a + b).view(new.dtype)
        return f32_to_bf16(_order(operation, a, b)).view(new.dtype)
    kind = _TYPES.get(element, "<u" + str(int(element[1:]) // 8))
    a, b = (np.ascontiguousarray(x).view(kind) for x in (old, new))
    if element[0] != "f":
        return _WHOLE[operation](a, b).view(new.dtype)
    if operation == "add":
        total = flush(flush(a) + flush(b)) if element == "f32" else a + b
    else:
        total = _order(operation, a, b)
    return np.ascontiguousarray(total).view(new.dtype)


def _order(operation: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the smaller or larger of numbers; of a NaN and a number, the number."""
    if operation not in ("min", "max"):
        raise UnknownInstruction(f"a reduction of floating point numbers by {operation}")
    return np.fmin(a, b) if operation == "min" else np.fmax(a, b)
