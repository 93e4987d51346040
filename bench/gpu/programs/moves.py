"""Moves, choices, comparisons and special registers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.gpu.programs import THREADS, Program, every, exact
from bench.gpu.programs.floats import special
from bench.gpu.programs.integers import edges, signed

_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
_COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
_INDEX = np.arange(4 * THREADS, dtype=np.uint32)  # of threads in four CTAs


def _compare(name: str, a: float, b: float) -> bool:
    """Return a comparison of floating-point numbers: of NaN false, or true where the name ends in "u"."""
    unordered = a != a or b != b
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if len(name) == 3:
        return unordered or _ORDER[name[:2]](a, b)
    return not unordered and _ORDER[name](a, b)


def _setp(type_: str, names: dict[str, Callable[[Any, Any], bool]], kind: str) -> Iterator[Program]:
    bits = 64 if type_.endswith("64") else 32 if type_.endswith("32") else 16
    dtype = f"u{bits // 8}"
    values = special(kind) if kind else edges(bits)
    a, b = every(values, values, dtype=dtype)
    if kind:
        x, y = ([exact.value(exact.read(int(v), kind)) for v in column] for column in (a, b))
    else:
        x, y = ([signed(int(v), type_.replace("b", "u")) for v in column] for column in (a, b))
    least = 90 if kind == "bf16" else 80
    for name, test in names.items():
        want = np.array([test(p, q) for p, q in zip(x, y, strict=True)])
        body = f"setp.{name}.{type_} %p0, %a0, %a1;\nselp.u32 %d0, 1, 0, %p0;"
        yield Program(f"setp.{name}.{type_}", body, (a, b), (want.astype(np.uint32),), least=least)


def _comparisons() -> Iterator[Program]:
    for bits in (16, 32, 64):
        yield from _setp(f"b{bits}", {n: _ORDER[n] for n in ("eq", "ne")}, "")
        yield from _setp(f"u{bits}", {**_ORDER, **_UNSIGNED}, "")
        yield from _setp(f"s{bits}", _ORDER, "")
    names = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
    for kind in ("f32", "f16", "bf16", "f64"):
        tests = {n: (lambda a, b, n=n: _compare(n, a, b)) for n in names}
        yield from _setp(kind, tests, kind)
    a, b = every(edges(32)[:8], edges(32)[4:12], dtype="u4")
    c = np.resize(np.array([0, 1, 1], np.uint32), len(a))
    less = a.view(np.int32) < b.view(np.int32)
    for name, combine in _COMBINE.items():
        for negated in ("", "!"):
            third = (c == 0) if negated else (c != 0)
            want = combine(less, third), combine(~less, third)
            body = (
                f"setp.ne.u32 %p2, %a2, 0;\nsetp.lt.{name}.s32 %p0|%p1, %a0, %a1, {negated}%p2;\n"
                "selp.u32 %d0, 1, 0, %p0;\nselp.u32 %d1, 1, 0, %p1;"
            )
            outputs = tuple(w.astype(np.uint32) for w in want)
            yield Program(f"setp.lt.{name}.s32 p|q{' of a negation' * bool(negated)}", body, (a, b, c), outputs)
    x, y = every(special("f32"), special("f32"), dtype="u4")
    tiny = exact.each(
        lambda p, q: int(_compare("gt", exact.value(exact.flushed(p)), exact.value(exact.flushed(q)))),
        *(x, y),
        formats=("f32", "f32"),
    )
    yield Program("setp.gt.ftz.f32", "setp.gt.ftz.f32 %p0, %a0, %a1;\nselp.u32 %d0, 1, 0, %p0;", (x, y), (tiny,))
    yield from _combined()
    for kind in ("f16", "bf16"):
        for name in names:
            yield _packed_comparison(name, kind)


def _combined() -> Iterator[Program]:
    """Yield comparisons combined with a predicate, of the types that are no signed numbers."""
    for type_, kind in (("u32", ""), ("b32", ""), ("f32", "f32"), ("f64", "f64"), ("f16", "f16")):
        bits = int(type_[1:])
        values = special(kind) if kind else edges(bits)
        a, b = every(values, values, dtype=f"u{bits // 8}")
        c = np.resize(np.array([0, 1, 1], np.uint32), len(a))
        if kind:
            rows = [[exact.value(exact.read(int(v), kind)) for v in row] for row in zip(a, b, strict=True)]
            same = np.array([_compare("eq", *row) for row in rows])
        else:
            same = a == b
        for name, combine in _COMBINE.items():
            body = f"setp.ne.u32 %p2, %a2, 0;\nsetp.eq.{name}.{type_} %p0, %a0, %a1, %p2;\nselp.u32 %d0, 1, 0, %p0;"
            yield Program(f"setp.eq.{name}.{type_}", body, (a, b, c), (combine(same, c != 0).astype(np.uint32),))
            with_predicates = (
                "setp.ne.u32 %p2, %a2, 0;\nsetp.eq.u32 %p1, %a0, %a1;\n"
                f"{name}.pred %p0, %p1, %p2;\nselp.u32 %d0, 1, 0, %p0;"
            )
            if type_ == "u32":
                yield Program(f"{name}.pred", with_predicates, (a, b, c), (combine(same, c != 0).astype(np.uint32),))


def _packed_comparison(name: str, kind: str) -> Program:
    x, y = every(special(kind), special(kind), dtype="u2")
    a, b = (v.astype(np.uint32) | (np.roll(v, 5).astype(np.uint32) << np.uint32(16)) for v in (x, y))
    rows = ((exact.value(exact.read(int(v), kind)) for v in row) for row in zip(x, y, strict=True))
    lower = np.array([_compare(name, *row) for row in rows])
    want = (lower.astype(np.uint32), np.roll(lower, 5).astype(np.uint32))
    body = f"setp.{name}.{kind}x2 %p0|%p1, %a0, %a1;\nselp.u32 %d0, 1, 0, %p0;\nselp.u32 %d1, 1, 0, %p1;"
    return Program(f"setp.{name}.{kind}x2", body, (a, b), want, least=90 if kind == "bf16" else 80)


def _choices() -> Iterator[Program]:
    a, b = every(edges(32), edges(32), dtype="u4")
    want = np.where(a.view(np.int32) < b.view(np.int32), a, b)
    head = "setp.lt.s32 %p0, %a0, %a1;\n"
    yield from _typed_choices()
    yield Program("selp.b32 of a comparison", f"{head}selp.b32 %d0, %a0, %a1, %p0;", (a, b), (want,))
    yield Program("selp.f32 onto its first", f"{head}mov.b32 %d0, %a0;\nselp.f32 %d0, %d0, %a1, %p0;", (a, b), (want,))
    yield Program("selp.u32 onto its second", f"{head}mov.b32 %d0, %a1;\nselp.u32 %d0, %a0, %d0, %p0;", (a, b), (want,))
    guarded = f"{head}mov.b32 %d0, %a1;\nnot.pred %p1, %p0;\n@!%p1 mov.b32 %d0, %a0;"
    yield Program("a guard that is negated", guarded, (a, b), (want,))
    c = np.resize(np.array(special("f32"), np.uint32), len(a))
    flushed = [exact.value(exact.flushed(exact.read(int(x), "f32"))) for x in c]
    chosen = np.where(np.array([x >= 0 for x in flushed]), a, b)
    yield Program("slct.ftz.f32.f32", "slct.ftz.f32.f32 %d0, %a0, %a1, %a2;", (a, b, c), (chosen,))


def _typed_choices() -> Iterator[Program]:
    """Yield mov, selp and slct of every type."""
    for type_ in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
        bits = int(type_[1:])
        a, b = every(edges(bits), edges(bits), dtype=f"u{bits // 8}")
        c = np.resize(np.array(edges(32), np.uint32), len(a))
        yield Program(f"mov.{type_}", f"mov.{type_} %d0, %a0;", (a,), (a,))
        body = f"setp.ne.u32 %p0, %a2, 0;\nselp.{type_} %d0, %a0, %a1, %p0;"
        yield Program(f"selp.{type_}", body, (a, b, c), (np.where(c != 0, a, b),))
        for of in ("s32", "f32"):
            numbers = np.resize(np.array(special("f32"), np.uint32), len(a)) if of == "f32" else c
            holds = [
                exact.value(exact.read(int(x), "f32")) >= 0 if of == "f32" else signed(int(x), of) >= 0 for x in numbers
            ]
            name = f"slct.{type_}.{of}"
            yield Program(name, f"{name} %d0, %a0, %a1, %a2;", (a, b, numbers), (np.where(holds, a, b),))


def _moves() -> Iterator[Program]:
    """Yield moves of parts, of constants, and through scopes."""
    (a,) = every(edges(32), dtype="u4")
    ones = np.full_like(a, 0x3F800000)
    yield Program("mov.f32 of a constant", "mov.f32 %d0, 0f3F800000;", (a,), (ones,))
    yield Program("mov.pred", "mov.pred %p0, -1;\nselp.b32 %d0, %a0, 0, %p0;", (a,), (a,))
    low, high = (a & np.uint32(0xFFFF)).astype(np.uint16), (a >> np.uint32(16)).astype(np.uint16)
    yield Program("mov.b32 to a pair", "mov.b32 {%d0, %d1}, %a0;", (a,), (low, high))
    yield Program("mov.b32 to its upper half", "mov.b32 {_, %d0}, %a0;", (a,), (high,))
    yield Program("mov.b32 from a pair", "mov.b32 %d0, {%a0, %a1};", (low, high), (a,))
    swapped = "mov.b32 {%h0, %h1}, %a0;\nmov.b32 %d0, {%h1, %h0};"
    yield Program("mov.b32 of halves exchanged", swapped, (a,), ((a << np.uint32(16)) | (a >> np.uint32(16)),))
    b = np.roll(a, 3)
    wide = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    yield Program("mov.b64 from a pair", "mov.b64 %d0, {%a0, %a1};", (a, b), (wide,))
    yield Program("mov.b64 to a pair", "mov.b64 {%d0, %d1}, %a0;", (wide,), (a, b))
    quarters = tuple((wide >> np.uint64(16 * k)).astype(np.uint16) for k in range(4))
    yield Program("mov.b64 to four", "mov.b64 {%d0, %d1, %d2, %d3}, %a0;", (wide,), quarters)
    yield Program("mov.b64 from four", "mov.b64 %d0, {%a0, %a1, %a2, %a3};", quarters, (wide,))
    scoped = "{\n.reg .b32 %r0;\nadd.u32 %r0, %a0, 1;\n{\n.reg .b32 %r0;\nmov.b32 %r0, 7;\n}\nsub.u32 %d0, %r0, 1;\n}"
    yield Program("registers of inner scopes", scoped, (a,), (a,))


def _special_registers() -> Iterator[Program]:
    lane = _INDEX % 32
    one = np.uint32(1)
    known = {
        "%tid.x": _INDEX % THREADS,
        "%tid.y": 0 * _INDEX,
        "%ntid.x": 0 * _INDEX + THREADS,
        "%ntid.z": 0 * _INDEX + 1,
        "%ctaid.x": _INDEX // THREADS,
        "%ctaid.y": 0 * _INDEX,
        "%nctaid.x": 0 * _INDEX + len(_INDEX) // THREADS,
        "%nctaid.z": 0 * _INDEX + 1,
        "%laneid": lane,
        "%lanemask_eq": one << lane,
        "%lanemask_lt": (one << lane) - one,
        "%lanemask_le": ((one << lane) - one) | (one << lane),
        "%lanemask_ge": ~((one << lane) - one),
        "%lanemask_gt": ~(((one << lane) - one) | (one << lane)),
    }
    for name, want in known.items():
        yield Program(f"mov.u32 of {name}", f"mov.u32 %d0, {name};", (_INDEX,), (want.astype(np.uint32),))
    later = "mov.u64 %l0, %clock64;\nmov.u64 %l1, %clock64;\nsetp.gt.u64 %p0, %l1, %l0;\nselp.u32 %d0, 1, 0, %p0;"
    yield Program("mov.u64 of %clock64", later, (_INDEX,), (0 * _INDEX + 1,))


def programs() -> Iterator[Program]:
    """Yield the programs of this table."""
    yield from _comparisons()
    yield from _choices()
    yield from _moves()
    yield from _special_registers()
