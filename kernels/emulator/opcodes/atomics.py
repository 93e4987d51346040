"""Atomic operations, reductions in memory, and the loads and stores by which warps and CTAs hear of each other.

Missing: 128 bits, generic addresses, and other CTAs' shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..clocks import merge
from ..global_memory import UNSIGNED
from ..hazard import Hazard, UnknownInstruction
from ..numbers import TYPES
from ..ptx import Instruction, Reg, Sym, Vec
from ..state import Cta, Mask, Step
from . import opcode
from .reductions import combine

_SEM = "(relaxed|acquire|release|acq_rel)?"
_SCOPE = "(cta|cluster|gpu|sys)?"
_SPACE = "(global|shared(::cta)?)"
_TYPES = "b16|b32|b64|u32|u64|s32|s64|f16|f16x2|bf16|bf16x2|f32|f64"
_OPERATION = "(and|or|xor|exch|cas|add|inc|dec|min|max)"
_ENDING = f"{_OPERATION} noftz? (L2::cache_hint)? (v2|v4|v8)? {_TYPES}"
_FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")


def within_cta(p: list[str]) -> bool:
    """Return whether the scope of an access is its CTA alone; a cluster holds no other."""
    return "cta" in p or "cluster" in p


def _told(cta: Cta, addr: np.ndarray, threads: np.ndarray, scoped: bool) -> Iterator[tuple[int, int]]:
    """Yield each warp with an address that it accesses, once; check that the scope of both sides reaches the other."""
    memory = cta.memory
    for warp, a in sorted({(int(t) // 32, int(x)) for t, x in zip(threads, addr, strict=True)}):
        other = memory.scoped.get(a)
        if scoped:
            memory.scoped[a] = cta.number
        if other is not None and other != cta.number:
            place = memory.order.place(other)
            raise Hazard(
                "race",
                f"warp {warp} and CTA {place} meet at {memory.name(a)}, where an access has .cta or .cluster scope",
            )
        yield warp, a


def _hear(cta: Cta, addr: np.ndarray, threads: np.ndarray, acquires: bool, scoped: bool) -> None:
    for warp, a in _told(cta, addr, threads, scoped):
        history = cta.memory.told.get(a)
        if history:
            cta.shared.clocks.hear(warp, cta.number, history, acquires)


def _tell(cta: Cta, addr: np.ndarray, threads: np.ndarray, releases: bool, scoped: bool, keeps: bool) -> None:
    """Release at addresses; an atomic operation ``keeps`` what was released there, a store replaces it."""
    for warp, a in _told(cta, addr, threads, scoped):
        history = dict(cta.memory.told.get(a, {})) if keeps else {}
        merge(history, cta.shared.clocks.publish(warp, cta.number, releases))
        cta.memory.told[a] = history


def _poll(cta: Cta, ins: Instruction) -> Callable[[np.ndarray, np.ndarray, np.ndarray, bool], None]:
    """Return a function that notes whether threads read again what they read last time, and changed nothing."""
    last_addr, last = np.zeros(cta.T, np.uint64), np.zeros(cta.T, np.uint64)
    seen = np.zeros(cta.T, np.int64)

    def note(addr: np.ndarray, values: np.ndarray, threads: np.ndarray, changed: bool) -> None:
        number = cta.number * 2 + 1
        same = (seen[threads] == number) & (last_addr[threads] == addr) & (last[threads] == values)
        last_addr[threads], last[threads], seen[threads] = addr, values, number
        if same.all() and not changed:
            value = values[0]
            cta.polled = f"PTX line {ins.line} finds {cta.memory.name(int(addr[0]))} = {value} ({hex(value)}) again"

    return note


def strong_load(
    cta: Cta, ins: Instruction, acquires: bool, scoped: bool, size: int, count: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the function of a load that may read what others write at the same time."""
    poll = _poll(cta, ins)

    def fetch(addr: np.ndarray, threads: np.ndarray) -> np.ndarray:
        values = cta.memory.load(addr, size, count, threads, strong=True)
        _hear(cta, addr, threads, acquires, scoped)
        poll(addr, values[:, 0].astype(np.uint64), threads, False)
        return values

    return fetch


def strong_store(
    cta: Cta, ins: Instruction, releases: bool, scoped: bool
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """Return the function of a store that others may read at the same time."""

    def put(addr: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        cta.memory.store(addr, values, threads, strong=True)
        _tell(cta, addr, threads, releases, scoped, False)

    return put


@opcode(
    f"atom {_SEM} {_SCOPE} {_SPACE} {_ENDING}",
    f"atom {_SPACE} {_SCOPE} {_SEM} {_ENDING}",
    f"atom {_SPACE} {_SEM} {_SCOPE} {_ENDING}",
    f"red {_SEM} {_SCOPE} {_SPACE} {_ENDING}",
    f"red {_SPACE} {_SCOPE} {_SEM} {_ENDING}",
    f"red {_SPACE} {_SEM} {_SCOPE} {_ENDING}",
)
def compile_atom(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    operation = next(x for x in p[1:] if x in _OPERATION.strip("()").split("|"))
    kind = p[-1]
    size = 4 if kind.endswith("x2") else np.dtype(TYPES[kind]).itemsize
    shared = "global" not in p
    returns = p[0] == "atom"
    where, values = (o[1], o[2:]) if returns else (o[0], o[1:])
    items = values[0].items if isinstance(values[0], Vec) else (values[0],)
    operands = [[_bits(cta, x, size) for x in items]]
    if operation == "cas":
        operands.append([_bits(cta, values[1], size)])
    out = o[0].items if returns and isinstance(o[0], Vec) else (o[0],)
    rows = [cta.row(x) for x in out if isinstance(x, Reg)] if returns else []
    if returns and not all(isinstance(x, (Reg, Sym)) for x in out):
        raise UnknownInstruction(f"destination {o[0]}")
    change = _change(operation, kind, shared)
    addr = cta.address(where, 32 if shared else 64)
    sem = next((x for x in p if x in ("relaxed", "acquire", "release", "acq_rel")), "relaxed")
    apply = _in_shared(cta, size, change) if shared else _in_global(cta, ins, size, change, sem, within_cta(p))
    floats = kind in _FLOATS and operation == "add"

    def step(mask: Mask) -> None:
        threads = cta.tid if mask is None else np.flatnonzero(mask)
        a = np.broadcast_to(addr(), cta.T)[threads]
        given = [np.stack([np.broadcast_to(x, cta.T)[threads] for x in each], 1) for each in operands]
        if floats:
            cta.stats["float_atomics"] += len(threads) * len(items)
        old = apply(a, given, threads)
        for k, row in enumerate(rows):
            row[threads] = old[:, k]

    return step


def _bits(cta: Cta, op: Any, size: int) -> np.ndarray:
    kind = {2: "u16", 4: "u32", 8: "u64"}[size]
    return cta.low(op, kind) if isinstance(op, Reg) and op.bits > size * 8 else cta.src(op, kind)


Change = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]


def _change(operation: str, kind: str, shared: bool) -> Change:
    """Return the function (old [n, count], operands) -> new of an operation, all as unsigned numbers."""
    element = kind.removesuffix("x2")
    if operation == "exch":
        return lambda old, given: given[0]
    if operation == "cas":
        return lambda old, given: np.where(old == given[0], given[1], old)
    if operation == "inc":
        return lambda old, given: np.where(old >= given[0], 0, old + 1).astype(old.dtype)
    if operation == "dec":
        return lambda old, given: np.where((old == 0) | (old > given[0]), given[0], old - 1).astype(old.dtype)
    if operation == "add" and kind == "f32" and shared:  # keeps subnormal numbers, unlike in global memory
        return lambda old, given: (old.view(np.float32) + given[0].view(np.float32)).view(np.uint32)
    return lambda old, given: combine(operation, element, old, given[0])


def _rounds(cta: Cta, addr: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the accesses in an order, by the seed if there is one: in each round those to different addresses."""
    left = np.arange(len(addr)) if cta.chance is None else cta.chance.permutation(len(addr))
    while len(left):
        _, first = np.unique(addr[left], return_index=True)
        yield left[first]
        left = np.delete(left, first)


def _in_global(
    cta: Cta, ins: Instruction, size: int, change: Change, sem: str, scoped: bool
) -> Callable[[np.ndarray, list[np.ndarray], np.ndarray], np.ndarray]:
    poll = _poll(cta, ins)
    acquires, releases = sem in ("acquire", "acq_rel"), sem in ("release", "acq_rel")

    def apply(addr: np.ndarray, given: list[np.ndarray], threads: np.ndarray) -> np.ndarray:
        memory, before = cta.memory, cta.memory.changes
        count = given[0].shape[1]
        old = np.empty((len(addr), count), UNSIGNED[size])
        for each in _rounds(cta, addr):
            part = [x[each] for x in given]
            old[each] = memory.update(
                addr[each],
                size,
                count,
                threads[each],
                lambda now, part=part: change(now, part),  # type: ignore[misc]
            )
        _hear(cta, addr, threads, acquires, scoped)
        _tell(cta, addr, threads, releases, scoped, True)
        poll(addr, old[:, 0].astype(np.uint64), threads, memory.changes != before)
        return old

    return apply


def _in_shared(cta: Cta, size: int, change: Change) -> Callable[[np.ndarray, list[np.ndarray], np.ndarray], np.ndarray]:
    def apply(addr: np.ndarray, given: list[np.ndarray], threads: np.ndarray) -> np.ndarray:
        s, count = cta.shared, given[0].shape[1]
        view = s.halves if size == 2 else s.words
        at = s.index(addr, size * count, threads)
        old = np.empty((len(at), count), UNSIGNED[size])
        for each in _rounds(cta, at):
            words = (at[each] >> 2)[:, None] + np.arange(max(size * count // 4, 1))
            where = words if size > 2 else (at[each] >> 1)[:, None] + np.arange(count)
            warp, who = cta.warp[threads[each]][:, None], threads[each][:, None]
            s.atomic(words, warp, who)
            now = view[where].view(UNSIGNED[size])
            old[each] = now
            view[where] = np.ascontiguousarray(change(now, [x[each] for x in given])).view(view.dtype)
            s.wrote(words, warp)
            s.was_atomic[words] = True
        return old

    return apply
