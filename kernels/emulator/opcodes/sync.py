"""Fences, and barriers of the threads of a warp or of a CTA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..hazard import Hazard
from ..ptx import Block, Imm, Instruction, number
from ..state import WARP, Cta, Mask, Step
from . import opcode
from .warp import partners

if TYPE_CHECKING:
    from ..machine import Machine
    from ..schedule import Leave

BARRIERS = 16


@opcode("fence proxy async shared::cta|shared::cluster?")
@opcode("fence proxy tensormap::generic acquire|release cta|cluster|gpu|sys")
@opcode("fence acq_rel|sc gpu|sys", "membar gl|sys")
def compile_fence(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    if "tensormap::generic" in p:
        return lambda mask: None
    if "proxy" in p:

        def between_proxies(mask: Mask) -> None:
            if mask is None:
                cta.shared.fence(np.arange(cta.W), True)
                return
            lanes = mask.reshape(-1, WARP)
            for whole in (True, False):
                warps = np.flatnonzero(lanes.any(1) & (lanes.all(1) == whole))
                if len(warps):
                    cta.shared.fence(warps, whole)

        return between_proxies

    def of_threads(mask: Mask) -> None:
        cta.shared.clocks.fence_threads(np.unique(cta.warp if mask is None else cta.warp[mask]), cta.memory.cta)

    return of_threads


@opcode("bar warp sync", "barrier warp sync")
def compile_warp_barrier(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    check = partners(cta, o[0])

    def together(mask: Mask) -> None:
        check(mask)
        warps = np.arange(cta.W) if mask is None else np.unique(cta.warp[mask])
        cta.shared.clocks.known[warps, warps] += 1

    return together


@opcode("nanosleep u32", "griddepcontrol wait|launch_dependents")
def compile_nothing(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    return lambda mask: None


@opcode("trap", "brkpt")
def compile_trap(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    def trap(mask: Mask) -> None:
        raise Hazard("trap", f"{cta.T if mask is None else int(mask.sum())} threads reach a trap")

    return trap


@dataclass
class Barrier:
    """A barrier of the CTA at which threads have arrived and others are missing."""

    number: int
    expected: int
    arrived: np.ndarray  # [T]
    known: np.ndarray
    all_threads: bool  # no count was given
    lines: set[int] = field(default_factory=set)
    done: bool = False
    counted: int = 0  # of those who arrived by barrier.red, whose predicate holds

    def total(self, ended: np.ndarray) -> int:
        """Return how many threads have arrived, where nobody waits for those that have ``ended``.

        A warp arrives without them, and a barrier of all threads needs no warp whose threads have all ended.
        """
        there = self.arrived | ended
        if not self.all_threads:
            there &= np.repeat(self.arrived.reshape(-1, WARP).any(1), WARP)
        return int(there.sum())


def compile_barrier(cta: Machine, at: int, block: Block) -> Leave:
    """Return the end of a block at which threads arrive at a barrier of the CTA, and wait for the others or not."""
    end = block.end
    assert end is not None
    p = [x for x in end.parts if x != "cta"]
    reduces = p[1] == "red"
    operands = end.operands[1:] if reduces else end.operands
    if end.guard is not None:
        raise NotImplementedError(end.text)
    which = cta.src(operands[0], "u32")
    has_count = len(operands) > (2 if reduces else 1)
    count = cta.src(operands[1], "u32") if has_count else np.array(cta.T, np.uint32)
    if p[1] == "arrive" and not has_count:
        raise NotImplementedError(f"{end.text}: the number of threads is missing")
    all_of_it = (
        p[1] == "sync"
        and isinstance(operands[0], Imm)
        and (not has_count or (isinstance(operands[1], Imm) and number(operands[1].text) == cta.T))
    )
    holds = cta.row(operands[-1]) if reduces else None

    def leave(mask: Mask) -> int | None:
        if all_of_it and mask is None and not cta.barriers:
            cta.shared.barrier()
            return at + 1
        threads = cta.threads
        live = threads.everyone if mask is None else mask
        threads.pc[live] = at + 1
        numbers, counts = np.broadcast_to(which, cta.T), np.broadcast_to(count, cta.T)
        for each in np.unique(numbers[live]):
            group = live & (numbers == each)
            bar = _arrive(cta, end, int(each), np.unique(counts[group]), group, not has_count)
            if holds is not None:
                bar.counted += int((holds[group] ^ operands[-1].negated).sum())
            if p[1] != "arrive":
                threads.sleep(group, _wait(cta, bar, end if reduces else None))
            if bar.done:
                del cta.barriers[bar.number]
        return None

    return leave


def _arrive(
    cta: Machine, end: Instruction, which: int, counts: np.ndarray, group: np.ndarray, all_threads: bool
) -> Barrier:
    """Count a group of threads at a barrier."""
    expected = int(counts[0])
    if which >= BARRIERS:
        raise Hazard("barrier", f"barrier {which}: a CTA has {BARRIERS}")
    if len(counts) > 1 or expected % WARP or not 0 < expected <= cta.T:
        raise Hazard("barrier", f"barrier {which} of {', '.join(map(str, counts))} threads in a CTA of {cta.T}")
    bar = cta.barriers.get(which)
    if bar is None:
        nothing = cta.shared.clocks.nothing()
        bar = cta.barriers[which] = Barrier(which, expected, np.zeros(cta.T, bool), nothing, all_threads)
    if bar.expected != expected:
        raise Hazard("barrier", f"barrier {which} is asked for {expected} threads while others ask for {bar.expected}")
    again = bar.arrived & group
    if again.any():
        raise Hazard("barrier", f"warp {cta.warp[np.argmax(again)]} arrives at barrier {which} for a second time")
    bar.arrived |= group
    bar.lines.add(end.line)
    bar.known = np.maximum(bar.known, cta.shared.release(np.unique(cta.warp[group])))
    total = bar.total(cta.ended())
    if total > expected:
        raise Hazard("barrier", f"{total} threads arrive at barrier {which} of {expected}")
    bar.done = total == expected
    if bar.done and which == 0 and expected == cta.T and len(bar.lines) > 1:
        lines = ", ".join(map(str, sorted(bar.lines)))
        raise Hazard("barrier", f"threads arrive at barrier 0 by different instructions, PTX lines {lines}")
    return bar


def _wait(cta: Machine, bar: Barrier, reduction: Instruction | None) -> Any:
    from ..schedule import Wait

    def ready() -> bool:
        if not bar.done and bar.total(cta.ended()) == bar.expected:  # the last ones it waited for have ended
            bar.done = True
            del cta.barriers[bar.number]
        return bar.done

    def wake(threads: np.ndarray) -> None:
        cta.shared.acquire(np.unique(cta.warp[threads]), bar.known)
        if reduction is not None:
            out, how = cta.row(reduction.operands[0]), next(x for x in reduction.parts if x in ("popc", "and", "or"))
            out[threads] = {"popc": bar.counted, "and": bar.counted == bar.arrived.sum(), "or": bar.counted > 0}[how]

    missing = f"barrier {bar.number} of {bar.expected} threads"
    return Wait(missing, ready, wake)
