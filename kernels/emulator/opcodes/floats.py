"""Floating-point arithmetic: fp32 and fp64 as numpy has it, 16-bit formats in fp64, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..numbers import NAN, TYPES, decode, encode, flush, fma, rounded, sum_to_odd
from ..ptx import Instruction
from ..state import Cta, Mask, Step, Values, as_register
from . import opcode
from .integers import halves, put_halves

_NATIVE: dict[str, np.ufunc] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def saturate(x: np.ndarray) -> np.ndarray:
    """Return numbers clamped to 0 to 1; NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def _native(cta: Cta, op: Any, type_: str, *, ftz: bool) -> Values:
    """Return a function of a source in fp32 (f32x2: [2 T]) or fp64."""
    if type_ == "f32x2":
        bits = cta.src(op, "u64")
        a = (np.broadcast_to(bits, cta.T).copy() if bits.ndim == 0 else bits).view(np.float32)
    else:
        a = cta.src(op, type_)
    return (lambda: flush(a)) if ftz else (lambda: a)


def _put_native(cta: Cta, dst: Any, type_: str, value: Values) -> Step:
    if type_ != "f32x2":
        return cta.put(dst, type_, value)
    out = cta.row(as_register(dst), "u64").view(np.float32)

    def step(mask: Mask) -> None:
        np.copyto(out, value(), where=True if mask is None else np.repeat(mask, 2))

    return step


def _finish(p: list[str], value: Values) -> Values:
    """Return a function of an fp32 result as its modifiers make it."""
    ftz, sat, relu = "ftz" in p, "sat" in p, "relu" in p
    if sat:
        return lambda: saturate(flush(value()) if ftz else value())
    if relu:
        return lambda: np.maximum(flush(value()) if ftz else value(), np.float32(0))
    return (lambda: flush(value())) if ftz else value


def _read_small(cta: Cta, op: Any, type_: str) -> Values:
    """Return a function of a source of 16 bits, or of two packed ones [2 T], in fp64."""
    kind = type_.removesuffix("x2")
    bits = halves(cta, op, "u16") if type_ != kind else cta.src(op, "u16")
    return lambda: decode(bits, kind)


def put_small(cta: Cta, dst: Any, type_: str, value: Values) -> Step:
    """Return a step that rounds fp64 numbers to a 16-bit format, [T] or packed [2 T], and keeps them."""
    kind = type_.removesuffix("x2")
    if type_ != kind:
        return put_halves(cta, dst, "u16", lambda: encode(rounded(value(), kind), kind))
    return cta.put(dst, "u16", lambda: encode(rounded(value(), kind), kind))


def _small_finish(p: list[str], value: Values) -> Values:
    if "sat" in p:
        return lambda: saturate(value())
    if "relu" in p:  # NaN stays
        return lambda: np.maximum(value(), 0.0)
    return value


@opcode("add rn? ftz? f32", "sub rn? ftz? f32", "mul rn? ftz? f32")
@opcode("add rn? ftz? sat f32", "sub rn? ftz? sat f32", "mul rn? ftz? sat f32")
@opcode("add rn? f32x2", "sub rn? f32x2", "mul rn? f32x2")
@opcode("add rn? f64", "sub rn? f64", "mul rn? f64")
def compile_native(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_, function = p[-1], _NATIVE[p[0]]
    if not {"ftz", "sat", "f32x2"} & set(p):
        return cta.ufunc(function, o[0], type_, cta.src(o[1], type_), cta.src(o[2], type_))
    a, b = (_native(cta, x, type_, ftz="ftz" in p) for x in o[1:3])
    return _put_native(cta, o[0], type_, _finish(p, lambda: function(a(), b())))


@opcode("add rn? f32 f16|bf16", "sub rn? f32 f16|bf16", "fma rn f32 f16|bf16")
def compile_mixed(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """The last operand is fp32, those before it have 16 bits."""
    factors, c = [_read_small(cta, x, p[-1]) for x in o[1:-1]], cta.src(o[-1], "f32")
    sign = -1.0 if p[0] == "sub" else 1.0
    first: Values = factors[0] if len(factors) == 1 else (lambda: factors[0]() * factors[1]())
    return cta.put(o[0], "f32", _finish(p, _directed(first, lambda: sign * c.astype(np.float64), "rn")))


def _directed(product: Values, c: Values, rounding: str) -> Values:
    """Return a function of product + c in fp32, both fp64 and exact, rounded once."""

    def value() -> np.ndarray:
        a, b = product(), c()
        total = sum_to_odd(a, b)
        if rounding == "rm":  # a sum of zero that has no sign of its own
            total = np.where((total == 0) & (np.signbit(a) | np.signbit(b)), -0.0, total)
        return rounded(total, "f32", rounding).astype(np.float32)

    return value


@opcode("add rz|rm|rp ftz? f32", "sub rz|rm|rp ftz? f32", "mul rz|rm|rp ftz? f32")
def compile_directed(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, b = (_native(cta, x, "f32", ftz="ftz" in p) for x in o[1:3])
    if p[0] == "mul":
        value: Values = lambda: rounded(a().astype(np.float64) * b(), "f32", p[1]).astype(np.float32)  # noqa: E731
    else:
        sign = -1.0 if p[0] == "sub" else 1.0
        value = _directed(lambda: a().astype(np.float64), lambda: sign * b().astype(np.float64), p[1])
    return cta.put(o[0], "f32", _finish(p, value))


@opcode("fma rn ftz? sat? f32", "fma rn f32x2")
def compile_fma(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, b, c = (_native(cta, x, p[-1], ftz="ftz" in p) for x in o[1:4])
    return _put_native(cta, o[0], p[-1], _finish(p, lambda: fma(a(), b(), c())))


@opcode("fma rz|rm|rp ftz? f32")
def compile_directed_fma(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, b, c = (_native(cta, x, "f32", ftz="ftz" in p) for x in o[1:4])
    value = _directed(lambda: a().astype(np.float64) * b(), lambda: c().astype(np.float64), p[1])
    return cta.put(o[0], "f32", _finish(p, value))


@opcode("add rn? sat? f16|f16x2", "sub rn? sat? f16|f16x2", "mul rn? sat? f16|f16x2")
@opcode("add rn? bf16|bf16x2", "sub rn? bf16|bf16x2", "mul rn? bf16|bf16x2")
def compile_small(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, b = (_read_small(cta, x, p[-1]) for x in o[1:3])
    values: dict[str, Values] = {
        "add": lambda: sum_to_odd(a(), b()),
        "sub": lambda: sum_to_odd(a(), -b()),
        "mul": lambda: a() * b(),
    }
    return put_small(cta, o[0], p[-1], _small_finish(p, values[p[0]]))


@opcode("fma rn sat f16|f16x2", "fma rn relu? f16|f16x2|bf16|bf16x2")
def compile_small_fma(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, b, c = (_read_small(cta, x, p[-1]) for x in o[1:4])
    return put_small(cta, o[0], p[-1], _small_finish(p, lambda: sum_to_odd(a() * b(), c())))


@opcode("neg ftz? f32", "neg f64|f16|f16x2|bf16|bf16x2", "abs ftz? f32", "abs f64|f16|f16x2|bf16|bf16x2")
def compile_sign(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_ = p[-1]
    if type_ in ("f32", "f64"):
        function = {"neg": np.negative, "abs": np.abs}[p[0]]
        a = cta.src(o[1], type_)
        if "ftz" in p:
            return cta.put(o[0], type_, lambda: function(flush(a)))
        return cta.ufunc(function, o[0], type_, a)
    packed = type_.endswith("x2")
    sign = {True: np.uint32(0x80008000), False: np.uint16(0x8000)}[packed]
    bits = cta.src(o[1], "u32" if packed else "u16")
    if p[0] == "neg":
        return cta.put(o[0], "u32" if packed else "u16", lambda: bits ^ sign)
    return cta.put(o[0], "u32" if packed else "u16", lambda: bits & ~sign)


def extreme(p: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return min or max: a number rather than NaN (with .NaN the other way), and of zeros +0 as the larger."""
    largest = p[0] == "max"
    if "xorsign" in p:
        sign = np.signbit(a) ^ np.signbit(b)
        a, b = np.abs(a), np.abs(b)
    if "NaN" in p:
        r = np.maximum(a, b) if largest else np.minimum(a, b)
    else:
        r = np.fmax(a, b) if largest else np.fmin(a, b)
    zeros = (a == 0) & (b == 0)
    if np.count_nonzero(zeros):
        r = np.where(zeros & (np.signbit(a) if largest else ~np.signbit(a)), b, r)
        r = np.where(zeros & (np.signbit(b) if largest else ~np.signbit(b)), a, r)
    if "xorsign" in p:
        r = np.where(sign, -r, r)
    return r


@opcode(
    "min ftz? NaN? f32",
    "max ftz? NaN? f32",
    "min NaN? xorsign abs f32",
    "max NaN? xorsign abs f32",
    "min f64",
    "max f64",
)
def compile_extreme(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Of two numbers, or three; all NaN becomes the one that instructions return."""
    type_, ftz = p[-1], "ftz" in p
    a, b, *rest = (_native(cta, x, type_, ftz=ftz) for x in o[1:])
    if len(rest) > 1 or (rest and (type_ != "f32" or "xorsign" in p)):
        raise NotImplementedError(f"{len(o)} operands")

    def value() -> np.ndarray:
        r = extreme(p, a(), b())
        for c in rest:
            r = extreme(p, r, c())
        nan = r != r
        return np.where(nan, NAN, r) if type_ == "f32" and np.count_nonzero(nan) else r

    return cta.put(o[0], type_, value)


@opcode("min NaN? f16|f16x2|bf16|bf16x2", "max NaN? f16|f16x2|bf16|bf16x2")
@opcode("min NaN? xorsign abs f16|f16x2|bf16|bf16x2", "max NaN? xorsign abs f16|f16x2|bf16|bf16x2")
def compile_small_extreme(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, b = (_read_small(cta, x, p[-1]) for x in o[1:3])
    return put_small(cta, o[0], p[-1], lambda: extreme(p, a(), b()))


@opcode("copysign f32")
def compile_copysign(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """The size of the second with the sign of the first."""
    return cta.ufunc(np.copysign, o[0], p[-1], cta.src(o[2], p[-1]), cta.src(o[1], p[-1]))


@opcode("testp finite|infinite|number|notanumber|normal|subnormal f32")
def compile_testp(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a = cta.src(o[1], p[-1])
    smallest = np.finfo(TYPES[p[-1]]).smallest_normal
    tests: dict[str, Values] = {
        "finite": lambda: np.isfinite(a),
        "infinite": lambda: np.isinf(a),
        "number": lambda: a == a,
        "notanumber": lambda: a != a,
        "normal": lambda: np.isfinite(a) & ((a == 0) | (np.abs(a) >= smallest)),  # zero counts as normal
        "subnormal": lambda: (a != 0) & (np.abs(a) < smallest),
    }
    return cta.put(o[0], None, tests[p[1]])


@opcode("div rn f32|f64", "div rn ftz f32", "div full ftz? f32", "div approx ftz? f32")
def compile_div(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_ = p[-1]
    a, b = (_native(cta, x, type_, ftz="ftz" in p) for x in o[1:3])
    if p[1] != "approx":
        return cta.put(o[0], type_, _finish(p, lambda: a() / b()))

    def value() -> np.ndarray:
        x, y = a(), b()
        large = (np.abs(y) > 2.0**126) & np.isfinite(y)  # 1 / y would be subnormal: taken for 0
        return np.where(large, x * np.copysign(np.float32(0), y), x / y)

    return cta.put(o[0], type_, _finish(p, value))


@opcode("sqrt rn f32|f64", "sqrt rn ftz f32", "sqrt approx ftz? f32", "rcp rn f32|f64", "rcp rn ftz f32")
def compile_root(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    a, one = _native(cta, o[1], p[-1], ftz="ftz" in p), TYPES[p[-1]](1)
    value: Values = (lambda: np.sqrt(a())) if p[0] == "sqrt" else (lambda: one / a())
    return cta.put(o[0], p[-1], _finish(p, value))


# Functions that a GPU approximates; here they are right to a rounding of fp32.
_APPROXIMATE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@opcode("ex2 approx ftz? f32", "lg2 approx ftz? f32", "rcp approx ftz? f32", "rsqrt approx ftz? f32")
@opcode("sin approx ftz? f32", "cos approx ftz? f32", "tanh approx f32")
def compile_approximate(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    function = _APPROXIMATE[p[0]]
    a = _native(cta, o[1], "f32", ftz="ftz" in p)
    return cta.put(o[0], "f32", _finish(p, lambda: function(a().astype(np.float64)).astype(np.float32)))


@opcode("ex2 approx f16|f16x2", "ex2 approx ftz bf16|bf16x2", "tanh approx f16|f16x2|bf16|bf16x2")
def compile_small_approximate(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    function, a, ftz = _APPROXIMATE[p[0]], _read_small(cta, o[1], p[-1]), "ftz" in p

    def value() -> np.ndarray:
        x = flush(a().astype(np.float32)).astype(np.float64) if ftz else a()
        return flush(function(x).astype(np.float32)).astype(np.float64) if ftz else function(x)

    return put_small(cta, o[0], p[-1], value)
