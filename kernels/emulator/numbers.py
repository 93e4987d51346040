"""Types of PTX as numpy types, floating-point formats that numpy lacks, and arithmetic that rounds once."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from .ptx import number

TYPES: dict[str, Any] = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f16": np.float16,
    "bf16": np.uint16,
    "pred": np.bool_,
}
FILES: dict[int, Any] = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)  # the one that fp32 instructions return


class Format(NamedTuple):
    """A floating-point format; `smallest` is the exponent of its smallest normal number."""

    bits: int
    mantissa: int
    smallest: int
    largest: float
    has_infinity: bool
    nan: int


FORMATS = {
    "f64": Format(64, 52, -1022, float(np.finfo(np.float64).max), True, 0x7FF8000000000000),
    "f32": Format(32, 23, -126, float(np.finfo(np.float32).max), True, 0x7FFFFFFF),
    "tf32": Format(32, 10, -126, (2 - 2.0**-10) * 2.0**127, True, 0x7FFFFFFF),
    "bf16": Format(16, 7, -126, (2 - 2.0**-7) * 2.0**127, True, 0x7FFF),
    "f16": Format(16, 10, -14, 65504.0, True, 0x7FFF),
    "e5m2": Format(8, 2, -14, 57344.0, True, 0x7F),
    "e4m3": Format(8, 3, -6, 448.0, False, 0x7F),
}


def _nearest_away(x: np.ndarray) -> np.ndarray:
    whole = np.trunc(x)
    return np.where(np.abs(x - whole) >= 0.5, whole + np.copysign(1.0, x), whole)


# How a number between two neighbours is rounded, for whole numbers as neighbours.
ROUND: dict[str, Any] = {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil, "rna": _nearest_away}


def rounded(x: Any, kind: str, rounding: str = "rn", *, satfinite: bool = False) -> np.ndarray:
    """Return fp64 numbers rounded once to a format, still as fp64; beyond its range as the rounding says.

    Args:
        x: numbers, exact or rounded to odd (see :func:`sum_to_odd`).
        kind: a key of FORMATS.
        rounding: a key of ROUND.
        satfinite: what is beyond the range, infinity included, becomes the largest number.
    """
    form = FORMATS[kind]
    x = np.asarray(x, np.float64)
    _, exponent = np.frexp(x)
    step = np.maximum(exponent - 1, form.smallest) - form.mantissa
    y = np.copysign(np.ldexp(ROUND[rounding](np.ldexp(x, -step)), step), x)
    beyond = np.abs(y) > form.largest
    if beyond.any():
        if satfinite:
            over: Any = form.largest
        elif rounding in ("rn", "rna"):
            over = np.inf if form.has_infinity else np.nan
        else:
            away = {"rz": False, "rp": y > 0, "rm": y < 0}[rounding]
            over = np.where(np.isinf(x) | away, np.inf, form.largest)
        y = np.where(beyond, np.copysign(over, y), y)
    return y


def encode(x: Any, kind: str) -> np.ndarray:
    """Return the bits of fp64 numbers that a format can hold; NaN is the format's own."""
    form = FORMATS[kind]
    x = np.asarray(x, np.float64)
    if kind == "f64":
        bits = x.view(np.uint64)
    elif kind in ("f32", "tf32", "bf16"):
        bits = np.asarray(x.astype(np.float32)).view(np.uint32)
        if kind == "bf16":
            bits = (bits >> np.uint32(16)).astype(np.uint16)
    elif kind == "f16":
        bits = np.asarray(x.astype(np.float16)).view(np.uint16)
    elif kind == "e5m2":
        bits = (np.asarray(x.astype(np.float16)).view(np.uint16) >> np.uint16(8)).astype(np.uint8)
    else:
        size = np.abs(np.where(np.isnan(x), 0, x))
        _, exponent = np.frexp(size)
        exponent = np.where(size == 0, form.smallest, np.maximum(exponent - 1, form.smallest))
        units = np.ldexp(size, form.mantissa - exponent).astype(np.int64)  # the mantissa with its leading one
        field = (exponent - form.smallest) << form.mantissa
        bits = (field + units + (np.signbit(x) << 7)).astype(np.uint8)
    return np.where(np.isnan(x), np.array(form.nan, bits.dtype), bits)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return the fp64 numbers that bits of a format stand for."""
    if kind == "bf16":
        return bf16_to_f32(bits).astype(np.float64)
    if kind in ("e4m3", "e5m2"):
        return _BYTES[kind][bits]
    types = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}
    return np.asarray(bits).view(types[kind]).astype(np.float64)


def _bytes_of_e4m3() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size)


_BYTES = {
    "e4m3": _bytes_of_e4m3(),
    "e5m2": (np.arange(256, dtype=np.uint16) << np.uint16(8)).view(np.float16).astype(np.float64),
}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Return bf16 numbers, given by their bits, as fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of fp32 numbers rounded to bf16, to nearest even."""
    b = x.view(np.uint32)
    out = ((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = x != x
    return np.where(nan, np.uint16(0x7FFF), out) if np.count_nonzero(nan) else out


def flush(x: np.ndarray) -> np.ndarray:
    """Return fp32 numbers with subnormal ones as zeros of the same sign."""
    small = np.abs(x) < np.float32(2.0**-126)
    if np.count_nonzero(small):
        x = np.where(small, np.copysign(np.float32(0), x), x)
    return x


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return fp64 a + b rounded to odd: an inexact sum's last bit is 1, so that it can be rounded again, once."""
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    fix = (lost != 0) & np.isfinite(total) & ((np.asarray(total).view(np.int64) & 1) == 0)
    if np.count_nonzero(fix):
        total = np.where(fix, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
    return total


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return fp32 a * b + c, rounded once to nearest even."""
    product = a.astype(np.float64) * b
    total = product + c
    # Rounding the fp64 sum once more is wrong only where the first rounding made a tie of it.
    tie = (np.asarray(total).view(np.uint64) & np.uint64(0x0FFFFFFF)) == 0
    if np.count_nonzero(tie):
        total = sum_to_odd(product, np.asarray(c, np.float64))
    return total.astype(np.float32)


def tf32(bits: np.ndarray) -> np.ndarray:
    """Return what a tensor core reads of fp32 numbers: their upper 19 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def pairs(kind: str, regs: np.ndarray) -> np.ndarray:
    """Return 16-bit pairs in uint32 [..., T] as fp64 [..., T, 2]."""
    h = np.ascontiguousarray(regs).view(np.uint16).reshape(*regs.shape, 2)
    return (bf16_to_f32(h) if kind == "bf16" else h.view(np.float16)).astype(np.float64)


def constant(text: str, type_: str) -> Any:
    """Return a number as PTX writes it: 12, 0x1F, 0f3F800000, 0d3FF0000000000000."""
    if text[:2] in ("0f", "0F"):
        value = np.array(int(text[2:], 16), np.uint32).view(np.float32)
        return value.astype(TYPES[type_]) if type_[0] == "f" else value.view(TYPES[type_])
    if text[:2] in ("0d", "0D"):
        (value,) = struct.unpack(">d", bytes.fromhex(text[2:]))
        return np.array(value, np.float64).astype(TYPES[type_])
    v = number(text)
    if type_ == "pred":
        return bool(v)
    bits = np.dtype(TYPES[type_]).itemsize * 8
    return np.array(v & ((1 << bits) - 1), FILES[max(bits, 16)] if bits > 8 else np.uint8).view(TYPES[type_])
