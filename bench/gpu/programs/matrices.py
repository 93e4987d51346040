"""mma, with operands placed by the formulas that the PTX ISA gives for each element of a fragment.

What a tensor core does below the last bit of a sum is not specified, so these programs multiply small whole numbers, of
which every sum is exact in every format; and integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from bench.gpu.programs import THREADS, Program

FORMATS = {"bf16": (8, 7), "f16": (5, 10), "tf32": (8, 10), "e4m3": (4, 3), "e5m2": (5, 2)}
BITS = {"bf16": 16, "f16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


def value(kind: str, code: int) -> Fraction:
    """Return a finite number of a format, from its sign, exponent and fraction."""
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
    """Return random codes of numbers whose products and sums are exact in fp64."""
    if kind in ("s8", "u8"):
        return rng.integers(0, 256, count).astype(np.uint32)
    exponent_bits, fraction_bits = FORMATS[kind]
    fraction_bits += 13 if kind == "tf32" else 0  # which are not read
    bias = (1 << (exponent_bits - 1)) - 1
    low, high = {"e4m3": (0, 15), "e5m2": (0, 31)}.get(kind, (bias - 4, bias + 4))
    if kind == "e5m2":
        low, high = 6, 22
    exponent = rng.integers(low, high, count)
    code = rng.integers(0, 2, count) << exponent_bits | exponent
    return (code << fraction_bits | rng.integers(0, 1 << fraction_bits, count)).astype(np.uint32)


def words(kind: str, elements: np.ndarray) -> np.ndarray:
    """Return elements [..., n] packed into words, the first lowest."""
    per = 32 // BITS[kind]
    each = elements.reshape(*elements.shape[:-1], -1, per).astype(np.uint64)
    return (each << (np.arange(per) * BITS[kind]).astype(np.uint64)).sum(-1).astype(np.uint32)


def place_a(kind: str, k: int, lane: int, i: int) -> tuple[int, int]:
    """Return the row and column of element ``i`` of a lane's A, by the ISA's formulas for m16n8k<k>."""
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


def place_b(kind: str, lane: int, i: int) -> tuple[int, int]:
    """Return the row and column of element ``i`` of a lane's B."""
    group, t = lane >> 2, lane % 4
    if kind in ("bf16", "f16"):
        return t * 2 + (i & 1) + (8 if i >= 2 else 0), group
    if kind == "tf32":
        return t + 4 * i, group
    return t * 4 + (i & 3) + (16 if i >= 4 else 0), group


def place_c(lane: int, i: int) -> tuple[int, int]:
    """Return the row and column of element ``i`` of a lane's C and D."""
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


# Shape, accumulator, A, B.
MMA = [
    ("m16n8k16", "f32", "bf16", "bf16"),
    ("m16n8k8", "f32", "bf16", "bf16"),
    ("m16n8k16", "f32", "f16", "f16"),
    ("m16n8k8", "f32", "f16", "f16"),
    ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "f16", "f16", "f16"),
    ("m16n8k8", "f32", "tf32", "tf32"),
    ("m16n8k4", "f32", "tf32", "tf32"),
    ("m16n8k32", "f32", "e4m3", "e4m3"),
    ("m16n8k32", "f32", "e4m3", "e5m2"),
    ("m16n8k32", "f32", "e5m2", "e4m3"),
    ("m16n8k32", "f16", "e5m2", "e5m2"),
    ("m16n8k32", "s32", "s8", "s8"),
    ("m16n8k32", "s32", "s8", "u8"),
    ("m16n8k16", "s32", "u8", "s8"),
    ("m16n8k16", "satfinite.s32", "u8", "u8"),
]


def small(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return random codes of whole numbers from -3 to 3, of 8-bit integers any."""
    if kind in ("s8", "u8"):
        return codes(kind, count, rng)
    number = rng.integers(-3, 4, count)
    if kind in ("e4m3", "e5m2"):
        code = {int(value(kind, c)): c for c in range(256) if c & 127 < 120 and value(kind, c).denominator == 1}
        return np.array([code[int(n)] for n in number], np.uint32)
    if kind == "f16":
        return number.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = number.astype(np.float32).view(np.uint32)
    return bits >> 16 if kind == "bf16" else bits


def _product(shape: str, d: str, a: str, b: str) -> Program:
    rng, k, lanes = np.random.default_rng(0), int(shape.split("k")[1]), 2 * THREADS
    kind = d.split(".")[-1]
    code_a = small(a, lanes * k // 2, rng).reshape(lanes, -1)
    code_b = small(b, lanes * k // 4, rng).reshape(lanes, -1)
    c = rng.integers(-9, 10, (lanes, 4)) + ((1 << 31) - 10 if "satfinite" in d else 0)
    want = np.zeros((lanes, 4), np.int64)
    for warp in range(0, lanes, 32):
        x, y = np.zeros((16, k), np.int64), np.zeros((k, 8), np.int64)
        for lane in range(32):
            for i, code in enumerate(code_a[warp + lane]):
                x[place_a(a, k, lane, i)] = int(value(a, int(code)))
            for i, code in enumerate(code_b[warp + lane]):
                y[place_b(b, lane, i)] = int(value(b, int(code)))
        product = x @ y
        for lane in range(32):
            for i in range(4):
                want[warp + lane, i] = c[warp + lane, i] + product[place_c(lane, i)]
    if "satfinite" in d:
        want = np.clip(want, -(1 << 31), (1 << 31) - 1)

    def bits(x: np.ndarray) -> np.ndarray:
        if kind == "f16":
            return np.ascontiguousarray(x.astype(np.float16)).view(np.uint32)
        return x.astype(np.float32).view(np.uint32) if kind == "f32" else x.astype(np.int64).astype(np.uint32)

    groups = [words(a, code_a), words(b, code_b), bits(c)]
    inputs, vectors = [], []
    for group in groups:
        vectors.append("{" + ", ".join(f"%a{len(inputs) + n}" for n in range(group.shape[1])) + "}")
        inputs += [np.ascontiguousarray(column) for column in group.T]
    expected = tuple(np.ascontiguousarray(column) for column in bits(want).T)
    opcode = f"mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{kind}"
    out = "{" + ", ".join(f"%d{n}" for n in range(len(expected))) + "}"
    least = 89 if a in ("e4m3", "e5m2") else 80
    return Program(opcode, f"{opcode} {out}, {', '.join(vectors)};", tuple(inputs), expected, least=least)


def programs() -> Iterator[Program]:
    """Yield a program for each shape and type."""
    for form in MMA:
        yield _product(*form)
