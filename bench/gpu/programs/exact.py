"""Floating-point arithmetic in rational numbers, rounded once: what instructions must return, bit by bit.

A second implementation, which shares nothing with the emulator's: bits become a sign and a fraction, and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np


class Float(NamedTuple):
    """A format of `exponent` and `mantissa` bits, of which the lowest `unused` bits of a register are no part."""

    exponent: int
    mantissa: int
    unused: int = 0
    has_infinity: bool = True

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa + self.unused

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def largest(self) -> Fraction:
        if self.has_infinity:
            return (2 - Fraction(1, 1 << self.mantissa)) * Fraction(2) ** self.bias
        return (2 - Fraction(2, 1 << self.mantissa)) * Fraction(2) ** (self.bias + 1)

    @property
    def nan(self) -> int:
        """The one that instructions return: all bits but the sign."""
        return (1 << (self.bits - 1)) - 1


FORMATS = {
    "f16": Float(5, 10),
    "bf16": Float(8, 7),
    "f32": Float(8, 23),
    "f64": Float(11, 52),
    "tf32": Float(8, 10, 13),
    "e5m2": Float(5, 2),
    "e4m3": Float(4, 3, has_infinity=False),
}
INF = math.inf
# A number is None, which is NaN, or its sign (1: negative) and its size, a fraction or INF.
Number = Any


def read(bits: int, name: str) -> Number:
    """Return the number that bits stand for."""
    form = FORMATS[name]
    bits >>= form.unused
    sign = bits >> (form.exponent + form.mantissa)
    field = (bits >> form.mantissa) & ((1 << form.exponent) - 1)
    mantissa = bits & ((1 << form.mantissa) - 1)
    if field == (1 << form.exponent) - 1:
        if form.has_infinity:
            return None if mantissa else (sign, INF)
        if mantissa == (1 << form.mantissa) - 1:
            return None
    if field == 0:
        return sign, Fraction(mantissa) * Fraction(2) ** (1 - form.bias - form.mantissa)
    units = mantissa + (1 << form.mantissa)
    return sign, Fraction(units) * Fraction(2) ** (field - form.bias - form.mantissa)


def _whole(x: Fraction, sign: int, mode: str) -> int:
    """Return a size rounded to a whole number: rn, rz, rm, rp or rna."""
    low = x.numerator // x.denominator
    rest = x - low
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
    elif mode == "rna":
        up = rest >= Fraction(1, 2)
    else:
        up = rest > 0 and mode == ("rm" if sign else "rp")
    return low + up


def write(number: Number, name: str, mode: str = "rn", *, satfinite: bool = False, flush: bool = False) -> int:
    """Return the bits of a number rounded to a format; ``flush`` makes zeros of subnormal results."""
    form = FORMATS[name]
    if number is None:
        return form.nan
    sign, size = number
    top = sign << (form.bits - 1)
    infinity = ((1 << form.exponent) - 1) << form.mantissa
    largest = infinity - 1 if form.has_infinity else (1 << (form.exponent + form.mantissa)) - 2
    if size == INF:
        beyond, to_infinity = True, not satfinite
    else:
        exponent = 1 - form.bias  # of the smallest normal number
        if size >= Fraction(2) ** exponent:
            exponent = size.numerator.bit_length() - size.denominator.bit_length()
            exponent -= size < Fraction(2) ** exponent
        units = _whole(size / Fraction(2) ** (exponent - form.mantissa), sign, mode)
        beyond = units * Fraction(2) ** (exponent - form.mantissa) > form.largest
        away = mode in ("rn", "rna") or mode == ("rm" if sign else "rp")
        to_infinity = away and not satfinite
    if beyond:
        if to_infinity and not form.has_infinity:
            return form.nan
        return top | ((infinity if to_infinity else largest) << form.unused)
    field = exponent + form.bias - 1  # a leading one in `units` adds the missing one
    bits = (field << form.mantissa) + units
    if flush and bits < 1 << form.mantissa:
        bits = 0
    return top | (bits << form.unused)


def flushed(number: Number, name: str = "f32") -> Number:
    """Return a number with subnormal ones as zeros of the same sign."""
    if number is not None and number[1] < Fraction(2) ** (1 - FORMATS[name].bias):
        return number[0], Fraction(0)
    return number


def neg(x: Number) -> Number:
    return None if x is None else (1 - x[0], x[1])


def mul(x: Number, y: Number) -> Number:
    if x is None or y is None or (INF in (x[1], y[1]) and 0 in (x[1], y[1])):
        return None
    size = INF if INF in (x[1], y[1]) else x[1] * y[1]
    return x[0] ^ y[0], size


def add(x: Number, y: Number, mode: str = "rn") -> Number:
    if x is None or y is None:
        return None
    if INF in (x[1], y[1]):
        if x[1] == y[1] and x[0] != y[0]:
            return None
        return x if x[1] == INF else y
    total = (-x[1] if x[0] else x[1]) + (-y[1] if y[0] else y[1])
    if total == 0:
        return (x[0] if x[0] == y[0] else int(mode == "rm")), Fraction(0)
    return int(total < 0), abs(total)


def fma(x: Number, y: Number, z: Number, mode: str = "rn") -> Number:
    return add(mul(x, y), z, mode)


def div(x: Number, y: Number) -> Number:
    if x is None or y is None or x[1] == y[1] == INF or x[1] == y[1] == 0:
        return None
    sign = x[0] ^ y[0]
    if x[1] == INF or y[1] == 0:
        return sign, INF
    return sign, Fraction(0) if y[1] == INF else x[1] / y[1]


def sqrt(x: Number) -> Number:
    """Return a root with 160 bits or more and a sticky one, which is as good as exact for any rounding."""
    if x is None or (x[0] and x[1] != 0):
        return None
    if x[1] == INF or x[1] == 0:
        return x
    scaled = x[1] * Fraction(4) ** 700
    whole = scaled.numerator // scaled.denominator
    root = math.isqrt(whole)
    exact = root * root == scaled
    return 0, (Fraction(root) if exact else Fraction(2 * root + 1, 2)) / Fraction(2) ** 700


def clamped(x: Number) -> Number:
    """Return what .sat makes of a number: from 0 to 1, NaN as 0."""
    if x is None or x[0]:
        return 0, Fraction(0)
    return 0, min(x[1], Fraction(1))


def relu(x: Number) -> Number:
    """Return what .relu makes of a number: nothing below +0, NaN as it is."""
    return x if x is None or not x[0] else (0, Fraction(0))


def extreme(x: Number, y: Number, *, largest: bool, nan: bool = False) -> Number:
    """Return the larger or the smaller one, +0 larger than -0; of one NaN the other, or NaN."""
    if x is None or y is None:
        return None if nan else (y if x is None else x)

    def order(z: Number) -> tuple[Any, int]:
        return (-z[1] if z[0] else z[1]), -z[0]

    return (max if largest else min)(x, y, key=order)


def value(x: Number) -> float:
    """Return a number as Python's float."""
    if x is None:
        return math.nan
    return math.copysign(float(x[1]), -1.0 if x[0] else 1.0)


def each(
    function: Callable[..., int], *arrays: np.ndarray, dtype: Any = None, formats: tuple[str, ...] = ()
) -> np.ndarray:
    """Return ``function`` of each thread's bits, or numbers of these formats, as an array of bits."""
    columns: list[list[Any]] = []
    for k, array in enumerate(arrays):
        column: list[Any] = [int(x) for x in array]
        columns.append([read(x, formats[k]) for x in column] if k < len(formats) else column)
    out = dtype or arrays[0].dtype
    mask = (1 << (8 * np.dtype(out).itemsize)) - 1
    return np.array([function(*row) & mask for row in zip(*columns, strict=True)], out)
