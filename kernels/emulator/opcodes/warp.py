"""Instructions in which the lanes of a warp exchange values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..hazard import Hazard
from ..numbers import NAN
from ..ptx import Imm, Instruction, Sym, number
from ..state import WARP, Cta, Mask, Step, as_register
from . import opcode

_ALL = 0xFFFFFFFF
_LANES = np.arange(WARP)
# Who takes part: [W, lane, other] where a lane has the other as a partner; None where every warp is whole.
Partners = Any


def partners(cta: Cta, op: Any) -> Callable[[Mask], Partners]:
    """Return a function of the executing lanes and their member masks.

    A lane outside its own mask is an error, and so is one that is named, has not ended, and does not execute.
    """
    members = cta.src(op, "u32")
    is_all = isinstance(op, Imm) and number(op.text) & _ALL == _ALL

    def find(mask: Mask) -> Partners:
        if is_all and (mask is None or (np.add.reduce(mask.reshape(-1, WARP), axis=1) % WARP == 0).all()):
            return None
        lanes = np.broadcast_to(members, cta.T).reshape(-1, WARP)
        if mask is None and (lanes == _ALL).all():
            return None
        runs = np.ones((cta.W, WARP), bool) if mask is None else mask.reshape(-1, WARP)
        named = ((lanes[:, :, None] >> _LANES.astype(np.uint32)) & np.uint32(1)).astype(bool)
        outside = runs & ~named[:, _LANES, _LANES]
        if outside.any():
            warp, lane = np.argwhere(outside)[0]
            raise Hazard(
                "convergence",
                f"warp {warp}, lane {lane}: its member mask {int(lanes[warp, lane]):#x} lacks the lane itself",
            )
        gone = cta.ended().reshape(-1, WARP)
        absent = named & runs[:, :, None] & ~(runs | gone)[:, None, :]
        if absent.any():
            warp, lane, other = np.argwhere(absent)[0]
            raise Hazard(
                "convergence", f"warp {warp}: lane {lane} names lane {other}, which does not execute the instruction"
            )
        together = named & runs[:, None, :]
        unlike = together & runs[:, :, None] & (lanes[:, :, None] != lanes[:, None, :])
        if unlike.any():
            warp, lane, other = np.argwhere(unlike)[0]
            raise Hazard("convergence", f"warp {warp}: lanes {lane} and {other} have different member masks")
        return together

    return find


def put_row(cta: Cta, dst: Any, type_: str | None) -> Callable[[Mask, Any], None]:
    """Return a function that keeps values [T] for the executing threads; "_" keeps nothing."""
    if isinstance(dst, Sym):
        return lambda mask, value: None
    out = cta.row(as_register(dst), type_)

    def keep(mask: Mask, value: Any) -> None:
        np.copyto(out, value, where=True if mask is None else mask, casting="unsafe")

    return keep


def reduced(function: np.ufunc, values: np.ndarray, start: Any, who: Partners) -> np.ndarray:
    """Return for each lane [T] the reduction of values [T] over its partners; ``start`` changes no result."""
    lanes = values.reshape(-1, WARP)
    if who is None:
        return np.repeat(function.reduce(lanes, axis=1), WARP)
    return function.reduce(np.where(who, lanes[:, None, :], start), axis=2).reshape(-1)


def ballot(holds: np.ndarray, who: Partners) -> np.ndarray:
    """Return for each lane the bits of those partners where ``holds``."""
    bits = np.where(holds, np.uint32(1) << np.tile(_LANES.astype(np.uint32), len(holds) // WARP), np.uint32(0))
    return reduced(np.bitwise_or, bits, np.uint32(0), who)


@opcode("vote sync all|any|uni pred", "vote sync ballot b32")
def compile_vote(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    holds, who = cta.predicate(o[1]), partners(cta, o[2])
    keep = put_row(cta, o[0], None)

    def step(mask: Mask) -> None:
        here = who(mask)
        x = np.broadcast_to(holds(), cta.T)
        if p[2] == "ballot":
            keep(mask, ballot(x, here))
            return
        every = reduced(np.logical_and, x, True, here) if p[2] != "any" else None
        some = reduced(np.logical_or, x, False, here) if p[2] != "all" else None
        keep(mask, every if some is None else some if every is None else every | ~some)

    return step


@opcode("match any sync b32|b64", "match all sync b32|b64")
def compile_match(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """The partners with the same value; "all": all of them, or nobody."""
    a, who = cta.src(o[-2], p[-1]), partners(cta, o[-1])
    keep = put_row(cta, o[0], "u32")
    keep_predicate = put_row(cta, o[1], None) if ins.destinations == 2 else None

    def step(mask: Mask) -> None:
        here = who(mask)
        x = np.broadcast_to(a, cta.T).reshape(-1, WARP)
        same = x[:, :, None] == x[:, None, :]
        together = np.ones_like(same) if here is None else here
        bits = np.uint32(1) << _LANES.astype(np.uint32)
        if p[1] == "any":
            keep(mask, np.where(same & together, bits, np.uint32(0)).sum(2, dtype=np.uint32).reshape(-1))
            return
        every = (same | ~together).all(2)
        everyone = np.where(together, bits, np.uint32(0)).sum(2, dtype=np.uint32)
        keep(mask, np.where(every, everyone, np.uint32(0)).reshape(-1))
        if keep_predicate is not None:
            keep_predicate(mask, every.reshape(-1))

    return step


_REDUCE: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux sync add|min|max u32|s32", "redux sync and|or|xor b32")
def compile_redux(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    function, type_ = _REDUCE[p[2]], p[-1]
    a, who, keep = cta.src(o[1], type_), partners(cta, o[2]), put_row(cta, o[0], type_)
    info = np.iinfo(a.dtype)
    start = a.dtype.type({"min": info.max, "max": info.min, "and": ~a.dtype.type(0)}.get(p[2], 0))

    def step(mask: Mask) -> None:
        with np.errstate(over="ignore"):
            keep(mask, reduced(function, np.broadcast_to(a, cta.T), start, who(mask)).astype(a.dtype))

    return step


@opcode("redux sync min|max abs? NaN? f32")
def compile_float_redux(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Of the numbers among them, or with .NaN NaN where there is one; of zeros +0 is the larger."""
    a, who, keep = cta.src(o[1], "f32"), partners(cta, o[2]), put_row(cta, o[0], "f32")
    largest, spreads = p[2] == "max", "NaN" in p
    function = (np.maximum if spreads else np.fmax) if largest else (np.minimum if spreads else np.fmin)
    start = np.float32(-np.inf if largest else np.inf) if spreads else np.float32(np.nan)

    def step(mask: Mask) -> None:
        x = np.broadcast_to(np.abs(a) if "abs" in p else a, cta.T)
        here = who(mask)
        r = reduced(function, x, start, here)
        if np.count_nonzero(r == 0):
            minus = np.signbit(x)
            if largest:
                minus = reduced(np.logical_and, minus | (x != 0), True, here)
            else:
                minus = reduced(np.logical_or, minus & (x == 0), False, here)
            r = np.where(r == 0, np.where(minus, np.float32(-0.0), np.float32(0)), r)
        keep(mask, np.where(r != r, NAN, r))

    return step


@opcode("activemask b32")
def compile_activemask(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    keep = put_row(cta, o[0], "u32")
    return lambda mask: keep(mask, ballot(np.ones(cta.T, bool) if mask is None else mask, None))


@opcode("elect sync")
def compile_elect(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """The leader's lane, and who it is: the first partner here, any one by the specification."""
    who = partners(cta, o[2])
    keep, keep_predicate = put_row(cta, o[0], "u32"), put_row(cta, o[1], None)

    def step(mask: Mask) -> None:
        here = who(mask)
        leader = np.zeros(cta.T, np.int64) if here is None else here.argmax(2).reshape(-1)
        keep(mask, leader)
        keep_predicate(mask, cta.lane == leader)

    return step


def _lane_of(mode: str, lane: np.ndarray, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return from which lane shfl reads, and whether that lies within the segment."""
    b, segment, clamp = b & 31, (c >> 8) & 31, c & 31
    low = lane & segment
    high = low | (clamp & ~segment)
    if mode == "up":
        j = lane - b
        return j, j >= high
    j = {"down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
    return j, j <= high


@opcode("shfl sync up|down|bfly|idx b32")
def compile_shfl(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """A lane beyond its segment reads itself; reading a lane that takes no part is an error."""
    a, b, c, members = o[ins.destinations :]
    value, b, c = cta.src(a, "u32"), cta.src(b, "u32"), cta.src(c, "u32")
    who, keep = partners(cta, members), put_row(cta, o[0], "u32")
    keep_predicate = put_row(cta, o[1], None) if ins.destinations == 2 else None
    first = cta.warp * WARP

    def source() -> tuple[np.ndarray, np.ndarray]:
        j, inside = _lane_of(p[2], cta.lane, b.astype(np.int64), c.astype(np.int64))
        return np.where(inside, j, cta.lane), inside

    fixed = source() if b.ndim == 0 and c.ndim == 0 else None
    fixed_index = None if fixed is None else first + fixed[0]

    def step(mask: Mask) -> None:
        here = who(mask)
        j, inside = fixed if fixed is not None else source()
        index = first + j if fixed_index is None else fixed_index
        if here is not None:
            runs = np.ones(cta.T, bool) if mask is None else mask
            absent = runs & ~here[cta.warp, cta.lane, j]
            if absent.any():
                t = int(np.argmax(absent))
                raise Hazard(
                    "convergence", f"warp {t // WARP}, lane {t % WARP} reads lane {int(j[t])}, which takes no part"
                )
        keep(mask, value[index] if value.ndim else value)
        if keep_predicate is not None:
            keep_predicate(mask, inside)

    return step


def whole_warps(cta: Cta, mask: Mask) -> None:
    """Check that of each warp all lanes execute, or none."""
    cta.whole_warps(mask)
