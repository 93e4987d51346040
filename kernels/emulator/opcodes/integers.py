"""Whole numbers and bits, each thread for itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..numbers import TYPES
from ..ptx import Imm, Instruction
from ..state import Cta, Mask, Step, Values, as_register
from . import opcode

BITWISE: dict[str, np.ufunc] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ARITHMETIC: dict[str, np.ufunc] = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
_TWICE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def halves(cta: Cta, op: Any, type_: str) -> np.ndarray:
    """Return a source of two packed numbers as [2 T], the lower first, of 16 bits each."""
    bits = cta.src(op, "u32")
    row = np.broadcast_to(bits, cta.T).copy() if bits.ndim == 0 else bits
    return row.view(TYPES[type_])


def put_halves(cta: Cta, dst: Any, type_: str, value: Values) -> Step:
    """Return a step that keeps packed numbers [2 T]."""
    out = cta.row(as_register(dst), "u32").view(TYPES[type_])

    def step(mask: Mask) -> None:
        if mask is None:
            out[...] = value()
        else:
            np.copyto(out, value(), where=np.repeat(mask, 2))

    return step


@opcode("add u16|u32|u64|s16|s32|s64", "sub u16|u32|u64|s16|s32|s64")
def compile_add(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    return cta.ufunc(_ARITHMETIC[p[0]], o[0], p[-1], cta.src(o[1], p[-1]), cta.src(o[2], p[-1]))


@opcode("add sat s32", "sub sat s32")
def compile_add_sat(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    function = _ARITHMETIC[p[0]]
    a, b = cta.src(o[1], "s32"), cta.src(o[2], "s32")
    return cta.put(o[0], "s32", lambda: np.clip(function(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1))


@opcode("add u16x2|s16x2", "min u16x2|s16x2", "max u16x2|s16x2", "min relu s16x2", "max relu s16x2")
def compile_packed(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_, function, relu = p[-1][:-2], _ARITHMETIC[p[0]], "relu" in p
    a, b = halves(cta, o[1], type_), halves(cta, o[2], type_)
    if relu:
        return put_halves(cta, o[0], type_, lambda: np.maximum(function(a, b), 0))
    return put_halves(cta, o[0], type_, lambda: function(a, b))


@opcode(
    "and pred|b16|b32|b64",
    "or pred|b16|b32|b64",
    "xor pred|b16|b32|b64",
)
def compile_bitwise(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    return cta.ufunc(BITWISE[p[0]], o[0], p[-1], cta.src(o[1], p[-1]), cta.src(o[2], p[-1]))


@opcode("not pred|b16|b32|b64")
def compile_not(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    return cta.ufunc(np.logical_not if p[-1] == "pred" else np.invert, o[0], p[-1], cta.src(o[1], p[-1]))


@opcode("cnot b16|b32|b64")
def compile_cnot(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a = cta.src(o[1], p[-1])
    return cta.put(o[0], p[-1], lambda: a == 0)


@opcode("neg s16|s32|s64", "abs s16|s32|s64")
def compile_neg(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    return cta.ufunc({"neg": np.negative, "abs": np.abs}[p[0]], o[0], p[-1], cta.src(o[1], p[-1]))


def high(a: np.ndarray, b: np.ndarray, type_: str) -> np.ndarray:
    """Return the upper half of products as wide as two of their factors."""
    dtype = TYPES[type_]
    if type_ in _TWICE:
        wide = TYPES[_TWICE[type_]]
        return ((a.astype(wide) * b.astype(wide)) >> wide(int(type_[1:]))).astype(dtype)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + (x0 * y0 >> shift)
    other = x0 * y1 + (middle & low)
    top = x1 * y1 + (middle >> shift) + (other >> shift)
    if type_ == "s64":  # a negative factor counts as 2**64 more
        top = top - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return top.astype(dtype)


def _product(cta: Cta, p: list[str], o: tuple[Any, ...]) -> tuple[str, Values]:
    """Return the type and the values of the product of mul, mad, mul24 and mad24."""
    type_, mode = p[-1], p[1]
    a, b = cta.src(o[1], type_), cta.src(o[2], type_)
    if p[0] in ("mul24", "mad24"):
        # The lower 24 bits of each; "hi" is bits 47 to 16 of the product.
        wide = np.int64 if type_ == "s32" else np.uint64
        up = wide(40)

        def product24() -> np.ndarray:
            x = np.right_shift(np.left_shift(a.astype(wide), up), up)
            y = np.right_shift(np.left_shift(b.astype(wide), up), up)
            return (x * y >> wide(16 if mode == "hi" else 0)).astype(TYPES[type_])

        return type_, product24
    if mode == "wide":
        result = _TWICE[type_]
        double = TYPES[result]
        return result, lambda: a.astype(double) * b.astype(double)
    if mode == "hi":
        return type_, lambda: high(a, b, type_)
    return type_, lambda: a * b


@opcode("mul lo|hi u16|u32|u64|s16|s32|s64", "mul wide u16|u32|s16|s32", "mul24 lo|hi u32|s32")
def compile_mul(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    if p[:2] == ["mul", "lo"]:
        return cta.ufunc(np.multiply, o[0], p[-1], cta.src(o[1], p[-1]), cta.src(o[2], p[-1]))
    type_, product = _product(cta, p, o)
    return cta.put(o[0], type_, product)


@opcode("mad lo|hi u16|u32|u64|s16|s32|s64", "mad wide u16|u32|s16|s32", "mad24 lo|hi u32|s32")
def compile_mad(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_, product = _product(cta, p, o)
    c = cta.src(o[3], type_)
    return cta.put(o[0], type_, lambda: product() + c)


@opcode("mad hi sat s32")
def compile_mad_sat(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    _, product = _product(cta, [x for x in p if x != "sat"], o)
    c = cta.src(o[3], "s32")
    return cta.put(o[0], "s32", lambda: np.clip(product().astype(np.int64) + c.astype(np.int64), -(2**31), 2**31 - 1))


@opcode("sad u16|u32|u64|s16|s32|s64")
def compile_sad(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, b, c = (cta.src(x, p[-1]) for x in o[1:4])
    return cta.put(o[0], p[-1], lambda: np.where(a < b, b - a, a - b) + c)


@opcode("div u16|u32|u64|s16|s32|s64", "rem u16|u32|u64|s16|s32|s64")
def compile_div(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Towards zero. By zero PTX says nothing; all ones, and the dividend as remainder."""
    type_ = p[-1]
    dtype = TYPES[type_]
    a, b = cta.src(o[1], type_), cta.src(o[2], type_)
    ones, one = np.array(-1).astype(dtype), dtype(1)

    def quotient() -> np.ndarray:
        zero = b == 0
        d = np.where(zero, one, b)
        q = a // d
        if type_[0] == "s":  # numpy rounds down
            q = q + ((q < 0) & (q * d != a)).astype(dtype)
        return np.where(zero, ones, q)

    def remainder() -> np.ndarray:
        zero = b == 0
        return np.where(zero, a, np.fmod(a, np.where(zero, one, b)))

    return cta.put(o[0], type_, quotient if p[0] == "div" else remainder)


@opcode("min u16|u32|u64|s16|s32|s64", "max u16|u32|u64|s16|s32|s64", "min relu s32", "max relu s32")
def compile_extreme(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    function, type_ = _ARITHMETIC[p[0]], p[-1]
    a, b = cta.src(o[1], type_), cta.src(o[2], type_)
    if "relu" in p:
        return cta.put(o[0], type_, lambda: np.maximum(function(a, b), 0))
    return cta.ufunc(function, o[0], type_, a, b)


@opcode("shl b16|b32|b64", "shr b16|b32|b64|u16|u32|u64|s16|s32|s64")
def compile_shift(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """By more than the width: all bits gone, or, of a signed number, its sign in every bit."""
    type_ = p[-1]
    bits, dtype = int(type_[1:]), TYPES[type_]
    a, n = cta.src(o[1], type_), cta.src(o[2], "u32")
    function = np.left_shift if p[0] == "shl" else np.right_shift
    if n.ndim == 0 and int(n) < bits:
        return cta.ufunc(function, o[0], type_, a, n.astype(dtype))
    if p[0] == "shr" and type_[0] == "s":
        return cta.put(o[0], type_, lambda: function(a, np.minimum(n, bits - 1).astype(dtype)))
    return cta.put(
        o[0], type_, lambda: np.where(n < bits, function(a, np.minimum(n, bits - 1).astype(dtype)), dtype(0))
    )


@opcode("shf l|r wrap|clamp b32")
def compile_funnel(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Of b above a, 32 bits: "l" the upper ones of the pair shifted left, "r" the lower ones of it shifted right."""
    a, b, c = (cta.src(x, "u32") for x in o[1:4])
    left, wrap = p[1] == "l", p[2] == "wrap"

    def value() -> np.ndarray:
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        pair = (b.astype(np.uint64) << np.uint64(32)) | a
        return (((pair << n) >> np.uint64(32)) if left else pair >> n).astype(np.uint32)

    return cta.put(o[0], "u32", value)


@opcode("bfe u32|u64|s32|s64")
def compile_bfe(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Bits above the width read as zero, or as the sign; the sign of a field is its highest bit within the width."""
    type_ = p[-1]
    bits, dtype = int(type_[1:]), TYPES[type_]
    a, position, length = cta.src(o[1], type_), cta.src(o[2], "u32"), cta.src(o[3], "u32")
    if isinstance(o[2], Imm) and isinstance(o[3], Imm):
        first, size = int(position) & 255, int(length) & 255
        if size > 0 and first + size <= bits:
            up, down = dtype(bits - first - size), dtype(bits - size)
            return cta.put(o[0], type_, lambda: np.right_shift(np.left_shift(a, up), down))

    def value() -> np.ndarray:
        first = (position & np.uint32(255)).astype(np.int64)
        size = (length & np.uint32(255)).astype(np.int64)
        moved = np.right_shift(a, np.minimum(first, bits - 1).astype(dtype))
        if type_[0] == "u":
            moved = np.where(first < bits, moved, dtype(0))
        rest = np.clip(bits - size, 0, bits - 1).astype(dtype)
        # A field that ends beyond the width has the number's own sign, which the shift to the right brought there.
        return np.where(size == 0, dtype(0), np.right_shift(np.left_shift(moved, rest), rest))

    return cta.put(o[0], type_, value)


@opcode("bfi b32|b64")
def compile_bfi(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_ = p[-1]
    bits, dtype = int(type_[1:]), TYPES[type_]
    a, b, position, length = cta.src(o[1], type_), cta.src(o[2], type_), cta.src(o[3], "u32"), cta.src(o[4], "u32")

    def value() -> np.ndarray:
        first = (position & np.uint32(255)).astype(np.int64)
        size = (length & np.uint32(255)).astype(np.int64)
        ones = np.where(size >= bits, ~dtype(0), (dtype(1) << np.minimum(size, bits - 1).astype(dtype)) - dtype(1))
        at = np.minimum(first, bits - 1).astype(dtype)
        mask = np.where(first < bits, ones << at, dtype(0))
        return (b & ~mask) | ((a << at) & mask)

    return cta.put(o[0], type_, value)


@opcode("popc b32|b64")
def compile_popc(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a = cta.src(o[1], p[-1])
    return cta.put(o[0], "u32", lambda: np.bitwise_count(a))


def highest(a: np.ndarray) -> np.ndarray:
    """Return the place of the highest bit of unsigned numbers, -1 of zero."""
    x, found = a.astype(np.uint64), np.full(np.shape(a), -1, np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        above = x >> np.uint64(step)
        some = above != 0
        found = np.where(some, found + step, found)
        x = np.where(some, above, x)
    return np.where(x != 0, found + 1, -1)


@opcode("clz b32|b64")
def compile_clz(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, bits = cta.src(o[1], p[-1]), int(p[-1][1:])
    return cta.put(o[0], "u32", lambda: (bits - 1 - highest(a)).astype(np.uint32))


@opcode("bfind shiftamt? u32|u64|s32|s64")
def compile_bfind(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """The highest bit that differs from the sign; 0xFFFFFFFF where none does."""
    type_, bits = p[-1], int(p[-1][1:])
    a = cta.src(o[1], type_)

    def value() -> np.ndarray:
        x = np.where(a < 0, ~a, a) if type_[0] == "s" else a
        at = highest(x.astype(TYPES[f"u{bits}"]))
        return np.where(at >= 0, bits - 1 - at if "shiftamt" in p else at, -1).astype(np.int32)

    return cta.put(o[0], "s32", value)


@opcode("brev b32|b64")
def compile_brev(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, size = cta.src(o[1], p[-1]), int(p[-1][1:]) // 8

    def value() -> np.ndarray:
        x = np.ascontiguousarray(np.broadcast_to(a, cta.T))
        bits = np.unpackbits(x.view(np.uint8).reshape(-1, size), axis=1, bitorder="little")
        return np.packbits(bits[:, ::-1], axis=1, bitorder="little").reshape(-1).view(x.dtype)

    return cta.put(o[0], p[-1], value)


@opcode("lop3 b32")
def compile_lop3(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, b, c = (cta.src(x, "u32") for x in o[1:4])
    table = int(cta.src(o[4], "u32"))

    def value() -> np.ndarray:
        out = np.zeros(cta.T, np.uint32)
        for k in range(8):
            if table >> k & 1:
                out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return out

    return cta.put(o[0], "u32", value)


_PERMUTE = {
    "f4e": lambda i: [i, i + 1, i + 2, i + 3],
    "b4e": lambda i: [i, (i + 7) % 8, (i + 6) % 8, (i + 5) % 8],
    "rc8": lambda i: [i] * 4,
    "ecl": lambda i: [max(i, k) for k in range(4)],
    "ecr": lambda i: [min(i, k) for k in range(4)],
    "rc16": lambda i: [2 * (i & 1), 2 * (i & 1) + 1] * 2,
}


@opcode("prmt b32", "prmt b32 f4e|b4e|rc8|ecl|ecr|rc16")
def compile_prmt(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Bytes of b above a, chosen by four bits each, whose highest repeats the byte's sign; or by a mode and c's two."""
    a, b, c = (cta.src(x, "u32") for x in o[1:4])
    modes = np.array([_PERMUTE[p[2]](i) for i in range(4)]) if len(p) > 2 else None

    def value() -> np.ndarray:
        sources = np.stack([np.broadcast_to(x, cta.T) for x in (a, b)], 1).view(np.uint8)  # [T, 8]
        if modes is not None:
            chosen = modes[np.broadcast_to(c, cta.T) & 3]
            return np.take_along_axis(sources, chosen, 1).view(np.uint32)[:, 0]
        codes = (np.broadcast_to(c, cta.T)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        picked = np.take_along_axis(sources, (codes & 7).astype(np.int64), 1)
        signs = np.where(picked & 128, np.uint8(255), np.uint8(0))
        return np.where(codes & 8, signs, picked).view(np.uint32)[:, 0]

    return cta.put(o[0], "u32", value)


@opcode("dp4a u32|s32 u32|s32", "dp2a lo|hi u32|s32 u32|s32")
def compile_dot(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """c plus products of bytes: of four pairs, or of the halves of a and two bytes of b."""
    of_a, of_b = p[-2:]
    result = "u32" if (of_a, of_b) == ("u32", "u32") else "s32"
    a, b, c = cta.src(o[1], of_a), cta.src(o[2], of_b), cta.src(o[3], result)

    def parts(x: np.ndarray, type_: str, size: str) -> np.ndarray:
        wide = np.ascontiguousarray(np.broadcast_to(x, cta.T))
        return wide.view(TYPES[type_[0] + size]).reshape(cta.T, -1).astype(np.int64)

    def value() -> np.ndarray:
        x, y = parts(a, of_a, "8" if p[0] == "dp4a" else "16"), parts(b, of_b, "8")
        if p[0] == "dp2a":
            y = y[:, :2] if p[1] == "lo" else y[:, 2:]
        return ((x * y).sum(1) + c).astype(TYPES[result])

    return cta.put(o[0], result, value)
