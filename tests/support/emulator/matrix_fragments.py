"""Numbers of the formats that matrix instructions multiply, and where the ISA draws them in a fragment."""

from fractions import Fraction

import numpy as np

FORMATS = {"bf16": (8, 7), "f16": (5, 10), "tf32": (8, 10), "e4m3": (4, 3), "e5m2": (5, 2)}
BITS = {"bf16": 16, "f16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


def value(kind: str, code: int) -> Fraction:
    """A finite number of a format, from its sign, exponent and fraction."""
    if kind in ("s8", "u8"):
        return Fraction(code - 256 if kind == "s8" and code > 127 else code)
    exponent_bits, fraction_bits = FORMATS[kind]
    if kind == "tf32":
        code >>= 13
    sign = -1 if code >> (exponent_bits + fraction_bits) & 1 else 1
    exponent = code >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = Fraction(code & ((1 << fraction_bits) - 1), 1 << fraction_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    scale = Fraction(2) ** ((exponent or 1) - bias)
    return sign * scale * (fraction + (1 if exponent else 0))


def codes(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random codes of numbers near 1, subnormal ones and zeros among them where their products stay exact in fp64."""
    if kind in ("s8", "u8"):
        return rng.integers(0, 256, count).astype(np.uint32)
    exponent_bits, fraction_bits = {"bf16": (8, 7), "f16": (5, 10), "tf32": (8, 23), "e4m3": (4, 3), "e5m2": (5, 2)}[
        kind
    ]
    bias = (1 << (exponent_bits - 1)) - 1
    low, high = {"e4m3": (0, 15), "e5m2": (0, 31)}.get(kind, (bias - 4, bias + 4))
    if kind == "e5m2":
        low, high = 6, 22
    exponent = rng.integers(low, high, count)
    code = rng.integers(0, 2, count) << exponent_bits | exponent
    return (code << fraction_bits | rng.integers(0, 1 << fraction_bits, count)).astype(np.uint32)


def words(kind: str, elements: np.ndarray) -> np.ndarray:
    """Elements [..., n] packed into words, the first lowest."""
    per = 32 // BITS[kind]
    shifted = elements.reshape(*elements.shape[:-1], -1, per).astype(np.uint64) << (np.arange(per) * BITS[kind]).astype(
        np.uint64
    )
    return shifted.sum(-1).astype(np.uint32)


def place_a(kind: str, k: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element ``i`` of a lane's A, by the ISA's formulas for m16n8k<k>."""
    group, t = lane >> 2, lane % 4
    if kind in ("bf16", "f16"):
        row = group if i < 2 or 4 <= i < 6 else group + 8
        return row, t * 2 + (i & 1) + (8 if i >= 4 else 0)
    if kind == "tf32":
        return (group if i in (0, 2) else group + 8), t + (4 if i >= 2 else 0)
    if k == 16:
        return (group if i < 4 else group + 8), t * 4 + (i & 3)
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, t * 4 + (i & 3) + (16 if i >= 8 else 0)
