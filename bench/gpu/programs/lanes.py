"""Instructions in which the lanes of a warp exchange values, against loops over lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce

import numpy as np

from bench.gpu.programs import THREADS, Program, exact
from bench.gpu.programs.floats import special
from bench.gpu.programs.integers import edges, signed

_N = 4 * THREADS
_RNG = np.random.default_rng(3)
_VALUES = np.resize(np.concatenate([np.array(edges(32), "u4"), _RNG.integers(0, 1 << 32, 111, dtype=np.uint32)]), _N)
_ALL = 0xFFFFFFFF
_LANE = np.arange(_N) % 32
# Member masks by lane: everyone; halves of a warp; the odd and the even lanes.
_MASKS = {
    "all": np.full(_N, _ALL, np.uint32),
    "halves": np.where(_LANE < 16, 0xFFFF, 0xFFFF0000).astype(np.uint32),
    "odd and even": np.where(_LANE % 2, 0xAAAAAAAA, 0x55555555).astype(np.uint32),
}
Lanes = Callable[[list[int], list[int], int], int]  # values and members of a warp, a lane -> its result


def _each(function: Lanes, values: np.ndarray, masks: np.ndarray, dtype: str = "u4") -> np.ndarray:
    """Return the result of every lane."""
    out = []
    for first in range(0, len(values), 32):
        warp = [int(x) for x in values[first : first + 32]]
        for lane in range(32):
            mask = int(masks[first + lane])
            members = [k for k in range(32) if mask >> k & 1]
            out.append(function(warp, members, lane))
    return np.array(out, np.uint64).astype(dtype)


def _under_masks(opcode: str, body: str, function: Lanes, values: np.ndarray = _VALUES) -> Iterator[Program]:
    """Yield a program for all lanes, by a constant, and for each kind of member masks."""
    want = _each(function, values, _MASKS["all"])
    yield Program(opcode, body.replace("MASK", "-1"), (values,), (want,))
    for name, masks in _MASKS.items():
        want = _each(function, values, masks)
        yield Program(f"{opcode} of {name}", body.replace("MASK", "%a1"), (values, masks), (want,))


def _reductions() -> Iterator[Program]:
    functions: dict[str, Callable[[int, int], int]] = {
        "add": lambda a, b: a + b,
        "min": min,
        "max": max,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
    }
    for name, function in functions.items():
        for type_ in ("b32",) if name in ("and", "or", "xor") else ("u32", "s32"):

            def over(warp: list[int], members: list[int], lane: int, f=function, t: str = type_) -> int:
                return int(reduce(f, (signed(warp[k], t) for k in members))) & _ALL

            opcode = f"redux.sync.{name}.{type_}"
            yield from _under_masks(opcode, f"{opcode} %d0, %a0, MASK;", over)


def _float_reductions() -> Iterator[Program]:
    """Yield redux of fp32, which ignores NaN unless it is asked to spread it."""
    values = np.resize(np.array(special("f32"), np.uint32), _N)
    values[::7] = np.arange(len(values[::7]), dtype=np.uint32) + 0x40000000
    # Zeros of both signs, and in half of the warps of one alone.
    zeros = _RNG.integers(0, 2, _N, dtype=np.uint32) << np.uint32(31)
    zeros[: _N // 4], zeros[_N // 4 : _N // 2] = 0, 0x80000000
    for name in ("min", "max"):
        for magnitude in ("", ".abs"):
            for nan in ("", ".NaN"):

                def over(warp: list[int], members: list[int], lane: int, n=name, m=magnitude, spread=nan) -> int:
                    numbers = [exact.read(warp[k] & (0x7FFFFFFF if m else _ALL), "f32") for k in members]
                    largest = n == "max"
                    return exact.write(
                        reduce(lambda x, y: exact.extreme(x, y, largest=largest, nan=bool(spread)), numbers), "f32"
                    )

                opcode = f"redux.sync.{name}{magnitude}{nan}.f32"
                # PTX ISA, redux.sync: "For .f32 instruction type, if the input value is 0.0 then +0.0 > -0.0."
                for title, given in ((opcode, values), (f"{opcode} of zeros", zeros)):
                    for one in _under_masks(title, f"{opcode} %d0, %a0, MASK;", over, given):
                        yield replace(one, nan="f32", least=100, target="a")


def _votes() -> Iterator[Program]:
    # Warps where all, some and none of the lanes hold.
    values = np.repeat([1, 0, 1, 0], _N // 4).astype(np.uint32)
    values[_N // 2 :] = _RNG.integers(0, 2, _N // 2)
    values[-40:-20] = 1
    tests: dict[str, Callable[[list[bool]], bool]] = {
        "all": all,
        "any": any,
        "uni": lambda x: all(x) or not any(x),
    }
    for negated in ("", "!"):
        holds = (lambda x: not x) if negated else bool
        suffix = " of a negation" if negated else ""
        for name, test in tests.items():

            def vote(warp: list[int], members: list[int], lane: int, f=test, h=holds) -> int:
                return int(f([h(warp[k]) for k in members]))

            body = f"setp.ne.u32 %p0, %a0, 0;\nvote.sync.{name}.pred %p1, {negated}%p0, MASK;\nselp.u32 %d0, 1, 0, %p1;"
            yield from _under_masks(f"vote.sync.{name}.pred{suffix}", body, vote, values)

        def ballot(warp: list[int], members: list[int], lane: int, h=holds) -> int:
            return sum(1 << k for k in members if h(warp[k]))

        body = f"setp.ne.u32 %p0, %a0, 0;\nvote.sync.ballot.b32 %d0, {negated}%p0, MASK;"
        yield from _under_masks(f"vote.sync.ballot.b32{suffix}", body, ballot, values)


def _matches() -> Iterator[Program]:
    values = _RNG.integers(0, 4, _N).astype(np.uint32)
    values[:32] = 9
    values[40:64] = 7

    def alike(warp: list[int], members: list[int], lane: int) -> int:
        return sum(1 << k for k in members if warp[k] == warp[lane])

    def everyone(warp: list[int], members: list[int], lane: int) -> int:
        return sum(1 << k for k in members) if len({warp[k] for k in members}) == 1 else 0

    yield from _under_masks("match.any.sync.b32", "match.any.sync.b32 %d0, %a0, MASK;", alike, values)
    yield from _under_masks("match.all.sync.b32", "match.all.sync.b32 %d0|%p0, %a0, MASK;", everyone, values)
    holds = "match.all.sync.b32 %r0|%p0, %a0, MASK;\nselp.u32 %d0, 1, 0, %p0;"
    yield from _under_masks(
        "match.all.sync.b32, its predicate", holds, lambda w, m, k: int(everyone(w, m, k) != 0), values
    )
    wide = "mov.b64 %l0, {%a0, %a0};\nmatch.any.sync.b64 %d0, %l0, MASK;"
    yield from _under_masks("match.any.sync.b64", wide, alike, values)
    wide = "mov.b64 %l0, {%a0, %a0};\nmatch.all.sync.b64 %d0|%p0, %l0, MASK;"
    yield from _under_masks("match.all.sync.b64", wide, everyone, values)


def _shuffles() -> Iterator[Program]:
    # Segments of 32, 16 and 8 lanes, as CUDA's __shfl takes them.
    for width in (32, 16, 8):
        for mode in ("up", "down", "bfly", "idx"):
            clamp = ((32 - width) << 8) | (0 if mode == "up" else 31)
            for b in (0, 1, 5, 8, 17, 31, 33):

                def source(lane: int, mode: str = mode, b: int = b & 31, clamp: int = clamp) -> tuple[int, bool]:
                    segment = (clamp >> 8) & 31
                    low, high = lane & segment, (lane & segment) | ((clamp & 31) & ~segment)
                    at = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
                    inside = at >= high if mode == "up" else at <= high
                    return (at if inside else lane), inside

                want = _each(lambda w, m, k, f=source: w[f(k)[0]], _VALUES, _MASKS["all"])
                inside = _each(lambda w, m, k, f=source: int(f(k)[1]), _VALUES, _MASKS["all"])
                body = f"shfl.sync.{mode}.b32 %d0|%p0, %a0, {b}, {clamp}, -1;\nselp.u32 %d1, 1, 0, %p0;"
                yield Program(f"shfl.sync.{mode}.b32 by {b} within {width}", body, (_VALUES,), (want, inside))
    lanes = _RNG.integers(0, 32, _N).astype(np.uint32)
    for name, masks in _MASKS.items():
        # A lane reads one that takes part: the member at the place that its number says.
        members = [[k for k in range(32) if int(m) >> k & 1] for m in masks]
        chosen = np.array([m[int(x) % len(m)] for m, x in zip(members, lanes, strict=True)], np.uint32)
        want = _VALUES.reshape(-1, 32)[np.arange(_N) // 32, chosen]
        body = "shfl.sync.idx.b32 %d0, %a0, %a1, 31, %a2;"
        yield Program(f"shfl.sync.idx.b32 of {name}", body, (_VALUES, chosen, masks), (want,))


def _groups() -> Iterator[Program]:
    ones = np.full(_N, _ALL, np.uint32)
    yield Program("activemask.b32", "activemask.b32 %d0;", (_VALUES,), (ones,))
    # Which lane leads is not said: one of the members, the same for all, and the only one to be told so.
    body = (
        "elect.sync %r0|%p0, -1;\nvote.sync.ballot.b32 %r1, %p0, -1;\npopc.b32 %d0, %r1;\n"
        "mov.u32 %r2, 1;\nshl.b32 %r2, %r2, %r0;\nxor.b32 %d1, %r1, %r2;"
    )
    yield Program("elect.sync", body, (_VALUES,), (ones // ones, 0 * ones), least=90)
    # Lanes that branch apart meet again at a bar.warp.sync.
    body = (
        "and.b32 %r0, %a0, 1;\nsetp.eq.u32 %p0, %r0, 0;\nmov.b32 %r1, 5;\n@%p0 bra LEFT;\nmov.b32 %r1, 9;\nLEFT:\n"
        "bar.warp.sync -1;\nredux.sync.add.u32 %d0, %r1, -1;"
    )
    want = _each(lambda w, m, k: sum(9 if x & 1 else 5 for x in w), _VALUES, _MASKS["all"])
    yield Program("bar.warp.sync after a branch", body, (_VALUES,), (want,))


def programs() -> Iterator[Program]:
    """Yield the programs of this table."""
    yield from _reductions()
    yield from _float_reductions()
    yield from _votes()
    yield from _matches()
    yield from _shuffles()
    yield from _groups()
