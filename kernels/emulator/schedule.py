"""The order in which the threads of one CTA run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .hazard import Hazard
from .opcodes.bulk import finish
from .opcodes.mbarrier import MBarrier, land_next, land_some, wait_keys, waited_for, wakes
from .opcodes.register_pool import check_pool
from .opcodes.wgmma import pending_fault
from .ptx import Block, Imm, Instruction, Reg, meeting
from .state import WARP, Mask, Step

if TYPE_CHECKING:
    from .machine import Machine

RUNS, WAITS, SPINS, ENDED = range(4)
IN_VAIN = 1000  # questions to which the answer stays no before asking counts as waiting for ever
# What a block's end does: it returns the block at which all threads of the mask go on, or None once they differ.
Leave = Callable[[Mask], "int | None"]


class Code(NamedTuple):
    """A block as it runs."""

    body: list[tuple[Step, Instruction, frozenset[str]]]
    leave: Leave | None  # None: on to the next block
    end: Instruction | None
    meets: str | Imm | Reg | None  # who runs it together (ptx.meeting)
    synchronises: bool  # it has an access through which CTAs may hear of each other


@dataclass
class Wait:
    """Threads that sleep until ``ready()``; ``wake(their mask)`` is then called once.

    With ``give_up`` they also run on, and it is called with their mask, when nothing else can happen.
    """

    what: str
    ready: Callable[[], bool]
    wake: Callable[[np.ndarray], None]
    bar: MBarrier | None = None
    give_up: Callable[[np.ndarray], None] | None = None
    threads: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


class Threads:
    """Where each thread of a CTA is, and who may run next.

    Threads run in groups that stand at the same block. Without a seed the group that lags furthest behind runs, as a
    whole. With one, at the end of each block any group may be next, or some of its warps; the lanes of a warp that
    stand at one block stay together, which ends where they branch and begins again where they meet.
    """

    def __init__(self, cta: Machine, seed: int | None) -> None:
        self.cta = cta
        self.pc = np.zeros(cta.T, np.int32)
        self.state = np.full(cta.T, RUNS, np.int8)
        self.waits: list[Wait] = []
        self.polls: dict[int, str] = {}  # block -> on what threads spin there
        self.everyone = np.ones(cta.T, bool)
        self.in_vain = 0  # how often in a row threads only asked whether their wait is over
        self.random = None if seed is None else random.Random(seed)

    def sleep(self, mask: Mask, wait: Wait) -> None:
        """Let threads sleep, to go on at the block in ``pc``."""
        wait.threads = self.everyone.copy() if mask is None else mask.copy()
        self.state[wait.threads] = WAITS
        self.waits.append(wait)

    def wake(self) -> None:
        """Let those run on whose wait is over."""
        if not self.waits:
            return
        left = []
        for wait in self.waits:
            if wait.ready():
                self.state[wait.threads] = RUNS
                wait.wake(wait.threads)
                self.in_vain = 0
            else:
                left.append(wait)
        self.waits = left

    def give_up(self) -> bool:
        """Let those run on who only asked whether their wait is over; return whether there are any."""
        asked = [wait for wait in self.waits if wait.give_up is not None]
        self.in_vain += 1
        if self.in_vain > IN_VAIN:
            return False
        for wait in asked:
            assert wait.give_up is not None
            self.state[wait.threads] = RUNS
            wait.give_up(wait.threads)
            self.waits.remove(wait)
        return bool(asked)

    def pick(self) -> tuple[int, Mask] | None:
        """Return a block and the threads that run it next; None if nobody can."""
        runs = self.state == RUNS
        if not runs.any():
            return None
        blocks = [int(x) for x in np.unique(self.pc[runs])]
        if self.random is not None:
            self.random.shuffle(blocks)
        for at in blocks:
            group = self._met(at, runs & (self.pc == at))
            if group.any():
                if self.random is not None:
                    group = self._some(group, WARP * 4 if self.cta.blocks[at].meets == "warpgroup" else WARP)
                return at, None if group.all() else group
        return None

    def _some(self, group: np.ndarray, unit: int) -> np.ndarray:
        """Return a group, or some of its warps, or one."""
        assert self.random is not None
        warps = [int(x) for x in np.flatnonzero(group.reshape(-1, unit).any(1))]
        how = self.random.randrange(3)
        if len(warps) == 1 or how == 0:
            return group
        count = 1 if how == 1 else self.random.randrange(1, len(warps))
        chosen = np.zeros(len(group) // unit, bool)
        chosen[self.random.sample(warps, count)] = True
        return group & np.repeat(chosen, unit)

    def _met(self, at: int, group: np.ndarray) -> np.ndarray:
        """Return those of a group at a block for whom everybody has come who runs it with them."""
        meets = self.cta.blocks[at].meets
        if meets is None:
            return group
        alive = self.state != ENDED
        if isinstance(meets, str):
            unit = WARP if meets == "warp" else min(4 * WARP, self.cta.T)
            complete = (group == alive).reshape(-1, unit).all(1)
            return group & np.repeat(complete, unit)
        members = np.broadcast_to(self.cta.src(meets, "u32"), self.cta.T)
        missing = members & _bits(alive & ~group)[self.cta.warp]
        return group & (missing == 0)

    def apart(self, mask: np.ndarray) -> np.ndarray | None:
        """Return which warps run without some of their lanes, or None if none does."""
        missing = (self.state != ENDED) & ~mask
        if not missing.any():
            return None
        warps = mask.reshape(-1, WARP).any(1) & missing.reshape(-1, WARP).any(1)
        return warps if warps.any() else None

    def spins(self) -> bool:
        """Let those run again who found what they wait for unchanged; return whether there are any."""
        spinning = self.state == SPINS
        self.state[spinning] = RUNS
        return bool(spinning.any())

    def ended(self) -> bool:
        """Return whether all threads have ended."""
        return bool((self.state == ENDED).all())

    def describe(self) -> str:
        """Return who waits for what."""
        parts = [f"{self._names(wait.threads)}: {wait.what}" for wait in self.waits]
        for state in (SPINS, RUNS):
            for at in np.unique(self.pc[self.state == state]):
                group = (self.state == state) & (self.pc == at)
                parts.append(f"{self._names(group)}: {self.polls.get(int(at)) or self._meeting(int(at), group)}")
        ended = int((self.state == ENDED).sum())
        return "; ".join(parts) + (f"; {ended} threads have ended" if ended else "")

    def _meeting(self, at: int, group: np.ndarray) -> str:
        code = self.cta.blocks[at]
        first = next((x for _, x, _ in code.body if meeting(x)), code.end)
        line = "" if first is None else f" at PTX line {first.line}: {first.text[:60]}"
        return f"the others of their {code.meets if isinstance(code.meets, str) else 'mask'}{line}"

    def _names(self, threads: np.ndarray) -> str:
        """Return which warps, or lanes of one, a mask holds."""
        lanes = threads.reshape(-1, WARP)
        warps = np.flatnonzero(lanes.any(1))
        whole = lanes[warps].all()
        name = f"warp{'s' if len(warps) > 1 else ''} {', '.join(str(w) for w in warps)}"
        return name if whole else f"{name} (lanes {', '.join(str(x) for x in np.flatnonzero(lanes[warps].any(0)))})"


def _bits(mask: np.ndarray) -> np.ndarray:
    """Return the lanes of each warp as a number [W]."""
    return np.packbits(mask.reshape(-1, WARP), axis=1, bitorder="little").view("<u4")[:, 0]


def execute(cta: Machine, threads: Threads) -> Iterator[bool]:
    """Run a CTA to its end.

    Yields where another CTA may have its turn: True if all threads that can run found what they spin on unchanged.
    """
    blocks, pc, ran, flight, last = cta.blocks, threads.pc, cta.ran, cta.in_flight, len(cta.blocks)
    lockstep = threads.random is None
    steps, at, mask = 0, 0, None
    while True:
        body, leave, end, _, synchronises = blocks[at]
        ran[at] += cta.W if mask is None else int(mask.reshape(-1, WARP).any(axis=1).sum())
        cta.polled = ""
        for fn, ins, touch in body:
            cta.current = ins
            if flight.registers and touch and not flight.registers.isdisjoint(touch):
                pending_fault(cta, ins, mask)
            fn(mask)
        steps += len(body) + 1
        if steps > cta.most_steps:
            raise Hazard("hang", f"{steps} instructions and no end")
        to: int | None = at + 1
        if leave is not None:
            cta.current = end
            to = leave(mask)
        if to is not None:
            if to >= last:
                raise Hazard("hang", "runs past the end")
            if mask is None and lockstep and not synchronises:
                at = to
                continue
            pc[slice(None) if mask is None else mask] = to
        if synchronises:
            live = threads.everyone if mask is None else mask
            if cta.polled:
                threads.state[live & (threads.state == RUNS)] = SPINS
                for each in np.unique(pc[live]):
                    threads.polls[int(each)] = cta.polled
            yield False
        if flight.transfers:
            land_some(cta)
        while True:
            threads.wake()
            chosen = threads.pick()
            if chosen is not None:
                at, mask = chosen
                cta.shared.split = None if mask is None else threads.apart(mask)
                break
            if threads.ended():
                cta.stats["instructions"] += steps
                _check_end(cta)
                return
            if land_next(cta, [wait.bar for wait in threads.waits if wait.bar is not None]):
                continue
            if threads.give_up():
                continue
            if threads.spins():
                yield True
                continue
            kind = "convergence" if (threads.state == RUNS).any() else "deadlock"
            raise Hazard(kind, f"threads wait for ever, {threads.describe()}")


def _check_end(cta: Machine) -> None:
    """Finish what is asynchronous, and check that nothing is left that must not be."""
    finish(cta)
    check_pool(cta)
    left = cta.in_flight.leftovers()
    if left:
        raise Hazard("async", left)


def compile_end(cta: Machine, at: int, block: Block) -> Leave | None:
    """Return what the end of a block does, of the kinds that are no barrier."""
    end = block.end
    if end is None:
        return None
    kind = end.parts[0]
    if kind == "bra":
        return _branch(cta, at, end)
    if kind == "brx":
        return _indexed_branch(cta, at, end)
    if kind in ("ret", "exit"):
        return _return(cta, at, end)
    assert kind == "mbarrier", end.text
    return _try_wait(cta, at, end)


def _holds(cta: Machine, guard: Reg) -> Callable[[], np.ndarray]:
    row = cta.row(guard)
    return (lambda: ~row) if guard.negated else (lambda: row)


def _branch(cta: Machine, at: int, end: Instruction) -> Leave:
    target = cta.kernel.labels[end.operands[0].name]
    if end.guard is None:
        return lambda mask: target
    holds, uniform = _holds(cta, end.guard), "uni" in end.parts

    def leave(mask: Mask) -> int | None:
        taken = holds()
        active = taken if mask is None else taken[mask]
        if active.all():
            return target
        if not active.any():
            return at + 1
        if uniform:
            _check_uniform(cta, mask, taken)
        pc = cta.threads.pc
        if mask is None:
            pc[:] = at + 1
            pc[taken] = target
        else:
            pc[mask] = at + 1
            pc[mask & taken] = target
        return None

    return leave


def _check_uniform(cta: Machine, mask: Mask, goes: np.ndarray) -> None:
    """Check that the lanes of a warp that execute a branch with .uni all go the same way."""
    ways = goes.astype(np.int64)
    most = np.where(True if mask is None else mask, ways, -1).reshape(-1, WARP).max(1)
    other = (ways != np.repeat(most, WARP)) & (True if mask is None else mask)
    if other.any():
        raise Hazard("convergence", f"the lanes of warp {cta.warp[np.argmax(other)]} part at a branch with .uni")


def _indexed_branch(cta: Machine, at: int, end: Instruction) -> Leave:
    table = np.array(cta.kernel.tables[end.operands[1].name])
    index, uniform = cta.row(end.operands[0]), "uni" in end.parts
    holds = None if end.guard is None else _holds(cta, end.guard)

    def leave(mask: Mask) -> None:
        live = cta.threads.everyone if mask is None else mask
        if holds is not None:
            cta.threads.pc[live] = at + 1
            live = live & holds()
        if uniform:
            _check_uniform(cta, mask, np.where(live, index, -1))
        bad = live & (index >= len(table))
        if bad.any():
            raise Hazard("address", f"brx.idx takes target {index[bad][0]} of {len(table)}")
        cta.threads.pc[live] = table[index[live]]

    return leave


def _return(cta: Machine, at: int, end: Instruction) -> Leave:
    holds, uniform = None if end.guard is None else _holds(cta, end.guard), "uni" in end.parts

    def leave(mask: Mask) -> int | None:
        threads = cta.threads
        gone = threads.everyone if mask is None else mask
        if holds is not None:
            gone = gone & holds()
            if not gone.any():
                return at + 1
            if uniform:
                _check_uniform(cta, mask, gone)
            threads.pc[slice(None) if mask is None else mask] = at + 1
        threads.state[gone] = ENDED
        return None

    return leave


def _try_wait(cta: Machine, at: int, end: Instruction) -> Leave:
    """Return the end by which a thread sleeps until the phase of an mbarrier completes, or (test_wait) asks for it."""
    done, asks = cta.row(end.operands[0]), end.parts[1] == "test_wait"

    def leave(mask: Mask) -> int | None:
        threads = cta.threads
        live = threads.everyone if mask is None else mask
        if end.guard is not None:
            live = live & _holds(cta, end.guard)()
        keys = wait_keys(cta, end)
        done[live] = True
        threads.pc[slice(None) if mask is None else mask] = at + 1
        for key in np.unique(keys[live]):
            bar, group = waited_for(cta, int(key)), live & (keys == key)
            if not wakes(cta, int(key), np.unique(cta.warp[group])):
                threads.sleep(group, _mbarrier_wait(cta, int(key), group, bar, done if asks else None))
        return None

    return leave


def _mbarrier_wait(cta: Machine, key: int, group: np.ndarray, bar: MBarrier, answer: np.ndarray | None) -> Wait:
    warps = np.unique(cta.warp[group])

    def give_up(threads: np.ndarray) -> None:
        assert answer is not None
        answer[threads] = False

    what = f"{bar}, parity {key & 1}"
    return Wait(what, lambda: wakes(cta, key, warps), lambda _: None, bar, give_up if answer is not None else None)
