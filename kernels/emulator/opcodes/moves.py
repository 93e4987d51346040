"""Moves, choices and comparisons, each thread for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..hazard import UnknownInstruction
from ..numbers import FILES, TYPES, decode, flush
from ..ptx import Instruction, Reg, Sym, Vec
from ..state import CLOCKS, Cta, Mask, Step, as_register
from . import opcode
from .integers import BITWISE, halves

_ALL = "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64"


@opcode(f"mov pred|{_ALL}")
def compile_mov(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_ = p[-1]
    if isinstance(o[0], Vec):
        return _unpack(cta, type_, o[0], o[1])
    if isinstance(o[1], Vec):
        return _pack(cta, type_, o[0], o[1])
    if isinstance(o[1], Sym) and o[1].name in CLOCKS:
        name = o[1].name
        return cta.put(o[0], type_, lambda: cta.clock(name))
    a, out = cta.src(o[1], type_), cta.row(as_register(o[0]), type_)
    return lambda mask: np.copyto(out, a) if mask is None else np.copyto(out, a, where=mask)


def _unpack(cta: Cta, type_: str, dst: Vec, source: Any) -> Step:
    """Return a step that takes a register apart, the lowest bits first; "_" drops a part."""
    n = len(dst.items)
    part = FILES[int(type_[1:]) // n]
    outs = [None if isinstance(x, Sym) else cta.row(as_register(x), f"u{int(type_[1:]) // n}") for x in dst.items]
    a = cta.src(source, type_)

    def step(mask: Mask) -> None:
        parts = np.ascontiguousarray(a).view(part).reshape(-1, n).copy()
        for k, out in enumerate(outs):
            if out is not None:
                np.copyto(out, parts[:, k], where=True if mask is None else mask)

    return step


def _pack(cta: Cta, type_: str, dst: Any, source: Vec) -> Step:
    """Return a step that puts a register together, the lowest bits first."""
    n = len(source.items)
    bits = int(type_[1:]) // n
    sources = [cta.src(x, f"u{bits}") for x in source.items]
    buffer = np.zeros((cta.T, n), FILES[bits])
    whole = buffer.view(TYPES[type_])[:, 0]

    def value() -> np.ndarray:
        for k, each in enumerate(sources):
            buffer[:, k] = each
        return whole

    return cta.put(dst, type_, value)


@opcode("cvta global|param|const u64|u32", "cvta to global|param|const u64|u32")
def compile_cvta(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Generic addresses are those of global memory, in which parameters and constants have theirs, too."""
    return compile_mov(cta, ins, ["mov", p[-1]], o)


@opcode(f"selp {_ALL}")
def compile_selp(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_ = p[-1]
    a, b, c = cta.src(o[1], type_), cta.src(o[2], type_), cta.src(o[3], "pred")
    out = cta.row(as_register(o[0]), type_)
    if isinstance(o[1], Reg) and o[1].name == as_register(o[0]).name:
        return cta.put(o[0], type_, lambda: np.where(c, a, b))

    def step(mask: Mask) -> None:
        if mask is None:
            np.copyto(out, b)
            np.copyto(out, a, where=c)
        else:
            np.copyto(out, np.where(c, a, b), where=mask)

    return step


@opcode(f"slct {_ALL} s32", f"slct ftz? {_ALL} f32")
def compile_slct(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """The first where the third is not negative (-0 is not, NaN is), else the second."""
    type_, of = p[-2:]
    a, b, c = cta.src(o[1], type_), cta.src(o[2], type_), cta.src(o[3], of)
    return cta.put(o[0], type_, lambda: np.where((flush(c) if "ftz" in p else c) >= 0, a, b))


_COMPARE: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_FLOAT_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    **{name: _COMPARE[name] for name in ("eq", "lt", "le", "gt", "ge")},
    # Without "u" a comparison with NaN is false, with it true.
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
    "ltu": lambda a, b: ~np.greater_equal(a, b),
    "leu": lambda a, b: ~np.greater(a, b),
    "gtu": lambda a, b: ~np.less_equal(a, b),
    "geu": lambda a, b: ~np.less(a, b),
}
_ORDERED, _SIX = "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan", "eq|ne|lt|le|gt|ge"
_COMPARED = (
    "eq|ne and|or|xor? b16|b32|b64",
    f"{_SIX} and|or|xor? s16|s32|s64",
    f"{_SIX}|lo|ls|hi|hs and|or|xor? u16|u32|u64",
    f"{_ORDERED} and|or|xor? ftz? f32",
    f"{_ORDERED} and|or|xor? f64|f16|bf16",
)


def _test(cta: Cta, p: list[str], of: str, operands: tuple[Any, ...]) -> Callable[[], Any]:
    """Return a function of the comparison of two operands, before it is combined with a third."""
    compare = _FLOAT_COMPARE[p[1]] if "f" in of else _COMPARE[p[1]]
    if of.removesuffix("x2") in ("f16", "bf16"):
        kind = of.removesuffix("x2")
        x, y = (halves(cta, z, "u16") if of != kind else cta.src(z, "u16") for z in operands)
        return lambda: compare(decode(x, kind), decode(y, kind))
    a, b = (cta.src(z, of) for z in operands)
    return (lambda: compare(flush(a), flush(b))) if "ftz" in p else (lambda: compare(a, b))


@opcode(*(f"setp {form}" for form in _COMPARED))
def compile_setp(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Also setp p|q: q is the opposite comparison, combined with the same third operand."""
    combine = BITWISE.get(p[2])
    results, sources = o[: ins.destinations], o[ins.destinations :]
    if len(sources) != (2 if combine is None else 3):
        raise UnknownInstruction(f"{len(o)} operands")
    test = _test(cta, p, p[-1], sources[:2])
    if combine is None and len(results) == 1 and p[-1] not in ("f16", "bf16") and "ftz" not in p:
        function = (_FLOAT_COMPARE if p[-1][0] == "f" else _COMPARE)[p[1]]
        if isinstance(function, np.ufunc):
            return cta.ufunc(function, results[0], "pred", cta.src(sources[0], p[-1]), cta.src(sources[1], p[-1]))
    third = cta.predicate(sources[2]) if combine is not None else None
    outs = [None if isinstance(x, Sym) else cta.row(as_register(x)) for x in results]

    def step(mask: Mask) -> None:
        first = test()
        values = [first, np.logical_not(first)]
        if combine is not None and third is not None:
            c = third()
            values = [combine(x, c) for x in values]
        for out, x in zip(outs, values, strict=False):
            if out is not None:
                np.copyto(out, x, where=True if mask is None else mask)

    return step


@opcode(f"setp {_ORDERED} f16x2|bf16x2")
def compile_setp_packed(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """p is of the lower numbers, q of the upper ones."""
    test = _test(cta, p, p[-1], o[2:4])
    outs = [None if isinstance(x, Sym) else cta.row(as_register(x)) for x in o[:2]]

    def step(mask: Mask) -> None:
        both = np.broadcast_to(test(), 2 * cta.T).reshape(-1, 2).copy()
        for k, out in enumerate(outs):
            if out is not None:
                np.copyto(out, both[:, k], where=True if mask is None else mask)

    return step
