"""Whole numbers and bits, against Python's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from bench.gpu.programs import Program, every

_SMALL = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 255, 256)


def edges(bits: int) -> tuple[int, ...]:
    """Return numbers of a width at which something changes, and a few in between."""
    top, ones = 1 << (bits - 1), (1 << bits) - 1
    pattern = 0xDEADBEEF12345678 >> (64 - bits)
    half = 1 << (bits // 2)
    return (
        0,
        1,
        2,
        3,
        31,
        top - 1,
        top,
        top + 1,
        ones,
        ones - 1,
        pattern,
        pattern ^ ones,
        half - 1,
        half,
        10,
        ones - 9,
    )


def signed(x: int, type_: str) -> int:
    """Return bits as the number that a type says."""
    bits = int(type_[1:])
    return x - (1 << bits) if type_[0] == "s" and x >> (bits - 1) else x


def _unsigned(type_: str) -> str:
    return f"u{int(type_[1:]) // 8}"


def program(
    opcode: str,
    of: Callable[..., int],
    *inputs: np.ndarray,
    type_: str,
    to: str | None = None,
    fixed: Callable[..., bool] | None = None,
    least: int = 80,
) -> Program:
    """Return the program of one instruction of numbers of a type; ``of`` gets and returns Python's numbers."""
    to = to or type_
    rows = [[int(x) for x in row] for row in zip(*inputs, strict=True)]
    mask = (1 << int(to[1:])) - 1
    want = np.array([of(*(signed(x, type_) for x in row)) & mask for row in rows], _unsigned(to))
    names = ", ".join(["%d0", *(f"%a{k}" for k in range(len(inputs)))])
    where = None if fixed is None else np.array([fixed(*(signed(x, type_) for x in row)) for row in rows])
    return Program(opcode, f"{opcode} {names};", inputs, (want,), fixed=where, least=least)


def _towards_zero(a: int, b: int) -> int:
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _clamp(x: int, type_: str) -> int:
    bits = int(type_[1:])
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if type_[0] == "s" else (0, (1 << bits) - 1)
    return min(max(x, low), high)


def _arithmetic() -> Iterator[Program]:
    for type_ in ("u16", "s16", "u32", "s32", "u64", "s64"):
        bits = int(type_[1:])
        two = every(edges(bits), edges(bits), dtype=_unsigned(type_))
        three = every(edges(bits)[:8], edges(bits)[-8:], edges(bits)[4:9], dtype=_unsigned(type_))
        by_zero = {"fixed": lambda a, b: b != 0}
        overflow = lambda a, b, type_=type_: b != 0 and _clamp(_towards_zero(a, b), type_) == _towards_zero(a, b)  # noqa: E731
        yield program(f"add.{type_}", lambda a, b: a + b, *two, type_=type_)
        yield program(f"sub.{type_}", lambda a, b: a - b, *two, type_=type_)
        yield program(f"min.{type_}", min, *two, type_=type_)
        yield program(f"max.{type_}", max, *two, type_=type_)
        yield program(f"mul.lo.{type_}", lambda a, b: a * b, *two, type_=type_)
        yield program(f"mul.hi.{type_}", lambda a, b, n=bits: (a * b) >> n, *two, type_=type_)
        yield program(f"mad.lo.{type_}", lambda a, b, c: a * b + c, *three, type_=type_)
        yield program(f"mad.hi.{type_}", lambda a, b, c, n=bits: ((a * b) >> n) + c, *three, type_=type_)
        yield program(f"sad.{type_}", lambda a, b, c: abs(a - b) + c, *three, type_=type_)
        yield program(f"div.{type_}", _towards_zero, *two, type_=type_, fixed=overflow)
        yield program(f"rem.{type_}", lambda a, b: a - b * _towards_zero(a, b), *two, type_=type_, **by_zero)
        if bits < 64:
            wide = f"{type_[0]}{2 * bits}"
            yield program(f"mul.wide.{type_}", lambda a, b: a * b, *two, type_=type_, to=wide)
        if type_[0] == "s":
            one = (every(edges(bits), dtype=_unsigned(type_))[0],)
            yield program(f"neg.{type_}", lambda a: -a, *one, type_=type_)
            yield program(f"abs.{type_}", abs, *one, type_=type_)
    yield _wide("u32", "u64")
    yield _wide("s32", "s64")
    yield _wide("s16", "s32")
    yield _wide("u16", "u32")
    two = every(edges(32), edges(32), dtype="u4")
    three = every(edges(32)[:8], edges(32)[-8:], edges(32)[4:9], dtype="u4")
    yield program("add.sat.s32", lambda a, b: _clamp(a + b, "s32"), *two, type_="s32")
    yield program("sub.sat.s32", lambda a, b: _clamp(a - b, "s32"), *two, type_="s32")
    yield program("min.relu.s32", lambda a, b: max(min(a, b), 0), *two, type_="s32", least=90)
    yield program("max.relu.s32", lambda a, b: max(a, b, 0), *two, type_="s32", least=90)
    yield program("mad.hi.sat.s32", lambda a, b, c: _clamp(((a * b) >> 32) + c, "s32"), *three, type_="s32")
    for type_ in ("u32", "s32"):
        for part in ("lo", "hi"):
            product = _product24(part, type_)
            yield program(f"mul24.{part}.{type_}", product, *two, type_=type_)
            yield program(f"mad24.{part}.{type_}", lambda a, b, c, f=product: f(a, b) + c, *three, type_=type_)


def _product24(part: str, type_: str) -> Callable[[int, int], int]:
    def low(x: int) -> int:
        x &= 0xFFFFFF
        return x - (1 << 24) if type_ == "s32" and x >> 23 else x

    return lambda a, b: low(a) * low(b) >> (16 if part == "hi" else 0)


def _wide(type_: str, to: str) -> Program:
    """mad.wide: the third operand is as wide as the result."""
    a, b = every(edges(int(type_[1:])), edges(int(type_[1:])), dtype=_unsigned(type_))
    c = np.resize(np.array(edges(int(to[1:])), _unsigned(to)), len(a))
    mask = (1 << int(to[1:])) - 1
    rows = zip(a, b, c, strict=True)
    want = [(signed(int(x), type_) * signed(int(y), type_) + int(z)) & mask for x, y, z in rows]
    name = f"mad.wide.{type_}"
    return Program(name, f"{name} %d0, %a0, %a1, %a2;", (a, b, c), (np.array(want, _unsigned(to)),))


def _packed() -> Iterator[Program]:
    two = every(edges(32), edges(32), dtype="u4")

    def halves(function: Callable[[int, int], int], type_: str) -> Callable[[int, int], int]:
        def both(a: int, b: int) -> int:
            parts = [signed((x >> n) & 0xFFFF, type_) for n in (0, 16) for x in (a, b)]
            return (function(*parts[:2]) & 0xFFFF) | ((function(*parts[2:]) & 0xFFFF) << 16)

        return both

    for type_ in ("u16", "s16"):
        for name, function in {"add": lambda a, b: a + b, "min": min, "max": max}.items():
            opcode = f"{name}.{type_}x2"
            yield program(opcode, halves(function, type_), *two, type_="u32", least=90)
    yield program("min.relu.s16x2", halves(lambda a, b: max(min(a, b), 0), "s16"), *two, type_="u32", least=90)
    yield program("max.relu.s16x2", halves(lambda a, b: max(a, b, 0), "s16"), *two, type_="u32", least=90)


def _bits() -> Iterator[Program]:
    for bits in (16, 32, 64):
        type_, dtype = f"u{bits}", f"u{bits // 8}"
        one, two = every(edges(bits), dtype=dtype), every(edges(bits), edges(bits), dtype=dtype)
        yield program(f"and.b{bits}", lambda a, b: a & b, *two, type_=type_)
        yield program(f"or.b{bits}", lambda a, b: a | b, *two, type_=type_)
        yield program(f"xor.b{bits}", lambda a, b: a ^ b, *two, type_=type_)
        yield program(f"not.b{bits}", lambda a: ~a, *one, type_=type_)
        yield program(f"cnot.b{bits}", lambda a: int(a == 0), *one, type_=type_)
        values, by = every(edges(bits), _SMALL, dtype=dtype)
        shifts = (values, by.astype("u4"))
        yield program(f"shl.b{bits}", lambda a, n, w=bits: a << n if n < w else 0, *shifts, type_=type_)
        for sort in "ub":
            yield program(f"shr.{sort}{bits}", lambda a, n: a >> n, *shifts, type_=type_)
        yield program(f"shr.s{bits}", lambda a, n: a >> n, *shifts, type_=f"s{bits}")
    for bits in (32, 64):
        type_, dtype = f"u{bits}", f"u{bits // 8}"
        one = every((*edges(bits), *(1 << k for k in range(bits))), dtype=dtype)
        width = f"{{0:0{bits}b}}"
        yield program(f"popc.b{bits}", lambda a: bin(a).count("1"), *one, type_=type_, to="u32")
        yield program(f"clz.b{bits}", lambda a, w=bits: w - a.bit_length(), *one, type_=type_, to="u32")
        yield program(f"brev.b{bits}", lambda a, f=width: int(f.format(a)[::-1], 2), *one, type_=type_)
        for sign in "us":
            find = lambda a: (~a if a < 0 else a).bit_length() - 1  # noqa: E731
            yield program(f"bfind.{sign}{bits}", find, *one, type_=f"{sign}{bits}", to="u32")
            yield program(
                f"bfind.shiftamt.{sign}{bits}",
                lambda a, w=bits, f=find: -1 if f(a) < 0 else w - 1 - f(a),
                *one,
                type_=f"{sign}{bits}",
                to="u32",
            )
        yield from _fields(bits)
    yield from _bytes()


def _fields(bits: int) -> Iterator[Program]:
    """bfe and bfi, with places and lengths beyond the width; only their low 8 bits count."""
    dtype, places = f"u{bits // 8}", (0, 1, 5, 31, 32, 63, 64, 100, 255, 256, 259)
    values, first, size = every(edges(bits)[5:13], places, places, dtype=dtype)
    columns = (values, first.astype("u4"), size.astype("u4"))

    def extract(a: int, first: int, size: int, is_signed: bool) -> int:
        first, size = first & 255, size & 255
        sign = (a >> min(first + size - 1, bits - 1)) & 1 if is_signed and size else 0
        return sum(((a >> (first + i)) & 1 if i < size and first + i < bits else sign) << i for i in range(bits))

    def insert(a: int, b: int, first: int, size: int) -> int:
        first, size = first & 255, size & 255
        for i in range(size):
            if first + i < bits:
                b = b & ~(1 << (first + i)) | (((a >> i) & 1) << (first + i))
        return b

    for sign in "us":
        want = [extract(*(int(x) for x in row), sign == "s") for row in zip(*columns, strict=True)]
        name = f"bfe.{sign}{bits}"
        yield Program(name, f"{name} %d0, %a0, %a1, %a2;", columns, (np.array(want, dtype),))
    columns = (values, values[::-1].copy(), columns[1], columns[2])
    want = [insert(*(int(x) for x in row)) for row in zip(*columns, strict=True)]
    yield Program(f"bfi.b{bits}", f"bfi.b{bits} %d0, %a0, %a1, %a2, %a3;", columns, (np.array(want, dtype),))
    name = f"bfe.u{bits} of constants"
    fixed = (values >> np.array(3, dtype)) & np.array(31, dtype)
    yield Program(name, f"bfe.u{bits} %d0, %a0, 3, 5;", (values,), (fixed,))


def _prmt(a: int, b: int, codes: list[int]) -> int:
    data = [(a >> 8 * k) & 255 for k in range(4)] + [(b >> 8 * k) & 255 for k in range(4)]
    picked = [(255 if data[c & 7] & 128 else 0) if c & 8 else data[c & 7] for c in codes]
    return sum(x << 8 * k for k, x in enumerate(picked))


# By the two lowest bits of the third operand: which byte goes to the lowest place, and so on.
_MODES = {
    "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
    "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
    "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
}


def _bytes() -> Iterator[Program]:
    words = (0x80FF7F01, 0x12345678, 0xFEDCBA98, 0, 0xFFFFFFFF, 0x8000007F)
    codes = (0x3210, 0x7654, 0xFEDC, 0x0000, 0x4040, 0x8B5D, 0x1357, 0xBA98, 0xFFFF1234)
    three = every(words, words, codes, dtype="u4")
    yield program("prmt.b32", lambda a, b, c: _prmt(a, b, [(c >> 4 * k) & 15 for k in range(4)]), *three, type_="u32")
    chosen = every(words, words, (0, 1, 2, 3, 4, 0xFFFFFFFE), dtype="u4")
    for mode, rows in _MODES.items():
        yield program(f"prmt.b32.{mode}", lambda a, b, c, r=rows: _prmt(a, b, list(r[c & 3])), *chosen, type_="u32")
    for table in (0x80, 0xE8, 0x96, 0x01, 0xCA, 0xFE):
        opcode = f"lop3.b32 {table:#x}"
        want = np.zeros(len(three[0]), np.uint32)
        for bit in range(32):
            index = sum(((x >> bit) & 1) << (2 - k) for k, x in enumerate(three))
            want |= ((np.uint32(table) >> index) & 1).astype(np.uint32) << np.uint32(bit)
        yield Program(opcode, f"lop3.b32 %d0, %a0, %a1, %a2, {table:#x};", three, (want,))
    pairs = every(words, words, (0, 1, 13, 31, 32, 33, 64, 0xFFFFFFFF), dtype="u4")
    for mode in ("wrap", "clamp"):
        amount = (lambda n: n & 31) if mode == "wrap" else (lambda n: min(n, 32))
        yield program(
            f"shf.l.{mode}.b32", lambda a, b, n, f=amount: (((b << 32) | a) << f(n)) >> 32, *pairs, type_="u32"
        )
        yield program(f"shf.r.{mode}.b32", lambda a, b, n, f=amount: ((b << 32) | a) >> f(n), *pairs, type_="u32")
    for of_a in ("u", "s"):
        for of_b in ("u", "s"):

            def dot(a: int, b: int, c: int, size: int = 8, at: int = 0, x: str = of_a, y: str = of_b) -> int:
                lanes = range(32 // size)
                left = [signed((a >> size * k) & ((1 << size) - 1), f"{x}{size}") for k in lanes]
                right = [signed((b >> 8 * (k + at)) & 255, f"{y}8") for k in lanes]
                return c + sum(p * q for p, q in zip(left, right, strict=True))

            types = f"{of_a}32.{of_b}32"
            yield program(f"dp4a.{types}", dot, *three, type_="u32")
            yield program(f"dp2a.lo.{types}", lambda a, b, c, f=dot: f(a, b, c, 16, 0), *three, type_="u32")
            yield program(f"dp2a.hi.{types}", lambda a, b, c, f=dot: f(a, b, c, 16, 2), *three, type_="u32")


def programs() -> Iterator[Program]:
    """Yield the programs of this table."""
    yield from _arithmetic()
    yield from _packed()
    yield from _bits()
