"""Conversions between types."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..numbers import FILES, FORMATS, NAN, ROUND, TYPES, decode, encode, f32_to_bf16, flush, rounded, sum_to_odd
from ..ptx import Instruction, Reg
from ..state import Cta, Step, Values, as_register
from . import opcode
from .floats import saturate
from .integers import halves, put_halves

_WHOLE = "u8|u16|u32|u64|s8|s16|s32|s64"


def _source(cta: Cta, op: Any, type_: str) -> np.ndarray:
    """Return a source, which may lie in a wider register."""
    type_ = "u16" if type_ == "bf16" else type_
    return cta.low(op, type_) if isinstance(op, Reg) else cta.src(op, type_)


def _keep(cta: Cta, dst: Any, value: Values) -> Step:
    """Return a step that widens whole numbers, by the sign of theirs, to a register."""
    reg = as_register(dst)
    wide = FILES[reg.bits]
    return cta.put(reg, None, lambda: np.asarray(value()).astype(wide))


@opcode(f"cvt sat? {_WHOLE} {_WHOLE}")
def compile_whole(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    to, of = p[-2:]
    a, dtype = _source(cta, o[1], of), TYPES[to]
    if "sat" not in p:
        return _keep(cta, o[0], lambda: a.astype(dtype))
    low = max(int(np.iinfo(dtype).min), int(np.iinfo(TYPES[of]).min))
    high = min(int(np.iinfo(dtype).max), int(np.iinfo(TYPES[of]).max))
    least, most = TYPES[of](low), TYPES[of](high)
    return _keep(cta, o[0], lambda: np.clip(a, least, most).astype(dtype))


def _to_odd(a: np.ndarray) -> np.ndarray:
    """Return whole numbers in fp64, those of 64 bits rounded to odd."""
    if a.dtype.itemsize < 8:
        return a.astype(np.float64)
    lower = (a & a.dtype.type(0xFFFFFFFF)).astype(np.float64)
    return sum_to_odd((a >> a.dtype.type(32)).astype(np.float64) * 2.0**32, lower)


@opcode(f"cvt rn|rz|rm|rp f32|f64|f16|bf16 {_WHOLE}")
def compile_from_whole(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    to, of = p[-2:]
    a = _source(cta, o[1], of)
    if to == "f32" and p[1] == "rn":
        return cta.put(o[0], to, lambda: a.astype(np.float32))
    if to == "f64" and of[1:] != "64":
        return cta.put(o[0], to, lambda: a.astype(np.float64))
    if to == "f64":
        if p[1] != "rn":
            raise NotImplementedError(ins.opcode)
        return cta.put(o[0], to, lambda: a.astype(np.float64))
    value: Values = lambda: rounded(_to_odd(a), to, p[1])  # noqa: E731
    return cta.put(o[0], f"u{FORMATS[to].bits}", lambda: encode(value(), to))


@opcode(f"cvt rni|rzi|rmi|rpi {_WHOLE} f16|f64|bf16", f"cvt rni|rzi|rmi|rpi ftz? {_WHOLE} f32")
def compile_to_whole(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Clamped to the range; NaN is 0, or only the highest bit where either type has 64 bits."""
    to, of = p[-2:]
    a, bits, function = _source(cta, o[1], "u16" if of == "f16" else of), int(to[1:]), ROUND[p[1][:2]]
    info, dtype = np.iinfo(TYPES[to]), TYPES[to]
    nan = np.array(1 << (bits - 1) if of == "f64" or bits == 64 else 0, np.uint64).astype(dtype)

    def value() -> np.ndarray:
        x = function(decode(flush(a) if "ftz" in p else a, of))
        # The largest numbers of 64 bits are no fp64 numbers; the next above are out of their range.
        inside = (x > float(info.min)) & (x < float(info.max))
        whole = np.where(inside, x, 0.0).astype(dtype)
        whole = np.where(x >= float(info.max), dtype(info.max), whole)
        whole = np.where(x <= float(info.min), dtype(info.min), whole)
        return np.where(x != x, nan, whole)

    return _keep(cta, o[0], value)


@opcode("cvt rni|rzi|rmi|rpi ftz? f32 f32", "cvt rni|rzi|rmi|rpi f64 f64", "cvt rni|rzi|rmi|rpi f16 f16")
def compile_integral(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """A whole number of the same type."""
    type_, function = p[-1], ROUND[p[1][:2]]
    a = cta.src(o[1], type_)
    return cta.put(o[0], type_, lambda: function(flush(a) if "ftz" in p else a))


@opcode("cvt ftz? sat? f32 f32", "cvt sat? f32 f16|bf16", "cvt f64 f16|bf16|f32")
def compile_widen(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """No less precise a type."""
    to, of = p[-2:]
    a = _source(cta, o[1], of)
    if p == ["cvt", "f32", "bf16"]:
        return cta.put(o[0], "u32", lambda: a.astype(np.uint32) << np.uint32(16))

    def value() -> np.ndarray:
        x = decode(flush(a) if "ftz" in p and of == "f32" else a, of).astype(TYPES[to])
        return saturate(x) if "sat" in p else x

    return cta.put(o[0], to, value)


@opcode("cvt rn|rz|rm|rp ftz? sat? f32 f64", "cvt rn|rz|rm|rp ftz? sat? f16 f32", "cvt rn|rz|rm|rp f16 f64")
@opcode("cvt rn|rz relu? satfinite? f16|bf16 f32", "cvt rn? bf16 f16")
@opcode("cvt rn|rz satfinite? relu? tf32 f32", "cvt rna satfinite? tf32 f32")
def compile_narrow(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """A less precise type; of f16 to bf16 the rounding may be left out, as Triton does of numbers that both have."""
    to, of = p[-2:]
    a = cta.src(o[1], "u16" if of in ("f16", "bf16") else of)
    if p[1:] == ["rn", "bf16", "f32"]:
        return cta.put(o[0], "u16", lambda: f32_to_bf16(a))
    if p[1:] == ["rn", "f16", "f32"]:
        return cta.put(o[0], "u16", lambda: _canonical(a.astype(np.float16)))
    if p[1:] == ["rna", "tf32", "f32"]:
        bits = a.view(np.uint32)

        def nearest() -> np.ndarray:
            nan = a != a
            up = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
            return np.where(nan, NAN.view(np.uint32), up) if np.count_nonzero(nan) else up

        return cta.put(o[0], "u32", nearest)
    return cta.put(o[0], f"u{FORMATS[to].bits}", _narrowed(p, lambda: a))


def _canonical(x: np.ndarray) -> np.ndarray:
    """Return the bits of f16 numbers, with the one NaN that instructions return."""
    bits, nan = np.asarray(x).view(np.uint16), x != x
    return np.where(nan, np.uint16(0x7FFF), bits) if np.count_nonzero(nan) else bits


def _narrowed(p: list[str], source: Values) -> Values:
    """Return a function of the bits of numbers of the type p[-1], rounded to p[-2] as the modifiers say."""
    to, of = p[-2].removesuffix("x2"), p[-1].removesuffix("x2")
    rounding = p[1] if p[1] in ROUND else "rn"
    ftz, sat, relu, finite = (x in p for x in ("ftz", "sat", "relu", "satfinite"))

    def value() -> np.ndarray:
        a = source()
        x = rounded(decode(flush(a) if ftz and of == "f32" else a, of), to, rounding, satfinite=finite)
        if sat:
            x = saturate(x)
        if relu:
            x = np.where(x > 0, x, np.where(x != x, x, 0.0))
        if ftz and to == "f32":
            x = flush(x.astype(np.float32))
        return encode(x, to)

    return value


@opcode("cvt rn|rz relu? satfinite? f16x2|bf16x2 f32", "cvt rn satfinite relu? e4m3x2|e5m2x2 f32")
def compile_pack(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Two numbers into one register, the first into its upper half."""
    sources = [cta.src(x, "f32") for x in o[1:3]]
    bits = FORMATS[p[-2].removesuffix("x2")].bits
    convert = [_narrowed(p, lambda a=a: a) for a in sources]  # type: ignore[misc]
    if p[1:] == ["rn", "bf16x2", "f32"]:
        convert = [lambda a=a: f32_to_bf16(a) for a in sources]  # type: ignore[misc]
    if p[1:] == ["rn", "f16x2", "f32"]:
        convert = [lambda a=a: _canonical(a.astype(np.float16)) for a in sources]  # type: ignore[misc]
    upper, lower = convert
    wide = FILES[2 * bits]
    return cta.put(o[0], f"u{2 * bits}", lambda: (upper().astype(wide) << wide(bits)) | lower())


@opcode("cvt rn satfinite relu? e4m3x2|e5m2x2 f16x2")
def compile_pack_halves(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    both = halves(cta, o[1], "u16")
    narrow = _narrowed(p, lambda: both)
    return cta.put(o[0], "u16", lambda: np.ascontiguousarray(narrow()).view(np.uint16))


@opcode("cvt rn relu? f16x2 e4m3x2|e5m2x2")
def compile_unpack(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    kind, relu = p[-1].removesuffix("x2"), "relu" in p
    bits = np.broadcast_to(cta.src(o[1], "u16"), cta.T)
    raw = bits if bits.flags.c_contiguous else bits.copy()

    def value() -> np.ndarray:
        x = decode(raw.view(np.uint8), kind)
        return encode(np.where(x <= 0, 0.0, x) if relu else x, "f16")

    return put_halves(cta, o[0], "u16", value)


def narrow(cta: Cta, reg: Reg, type_: str) -> np.ndarray:
    """Return the low bits of a register as a type no wider than it."""
    return cta.low(reg, type_)
