"""mbarriers: barriers in shared memory that count arrivals of threads and bytes of copies.

Missing: arrivals at another CTA's mbarrier (clusters).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..hazard import Hazard, UnknownInstruction
from ..ptx import Addr, Instruction, Reg
from ..shared_memory import Shared
from ..state import Cta, Mask, Step
from ..under_way import Access
from . import opcode

MOST_ARRIVALS = (1 << 20) - 1
MOST_BYTES = (1 << 20) - 1
SIZE = 8
_SHARED = r"shared|shared::cta"


class MBarrier:
    """One mbarrier object.

    To those who look for races it is an agent whose time is its phase: a copy that completes at it writes in its name,
    so that nobody may read the data who has not waited for this phase of this mbarrier.
    """

    def __init__(self, cta: Cta, address: int, count: int, warp: int) -> None:
        flight, clocks = cta.in_flight, cta.shared.clocks
        self.address = address
        self.agent, self.earlier = flight.agents.setdefault(address, (len(flight.agents), 0))
        if self.agent >= Shared.AGENTS:
            raise UnknownInstruction(f"a CTA with more than {Shared.AGENTS} mbarriers")
        self.count = count  # arrivals that a phase expects
        self.left = count  # of them, in the current phase
        self.bytes = 0  # expected and not yet there; negative where a copy is ahead of what expects it
        self.phase = 0
        self.landed, self.seen = 0, 0  # phases in which copies completed, and which somebody waited for
        self.unseen: list[tuple[int, Access]] = []  # copies that completed, with their phase, before anyone waited
        self.open, self.known = clocks.nothing(), clocks.nothing()  # what those who arrive know, in this phase; before
        # When it was made, when made known to the async proxy by fence.mbarrier_init, and when each warp last used it.
        self.made = (warp, int(clocks.known[warp, warp]))
        self.fenced: tuple[int, int] | None = None
        self.used = np.zeros(cta.W, np.int64)

    def __str__(self) -> str:
        return f"mbarrier at shared byte {self.address - Shared.BASE}"

    def land(self) -> int:
        """Note that a copy completes now; return the time at which it does."""
        self.landed = self.phase + 1
        return self.earlier + self.phase + 1  # phases of earlier mbarriers at this address count

    def use(self, cta: Cta, warps: np.ndarray, proxy: str = "generic") -> None:
        """Check that warps know of the initialisation, and note that they use the mbarrier."""
        if not cta.check:
            return
        known, (warp, time) = cta.shared.clock, self.made
        if (known[warps, warp] < time).any():
            raise Hazard("race", f"uses the {self}, which warp {warp} initialised with no barrier between")
        if cta.strict and proxy == "async" and (known[warps, cta.shared.clocks.agents + warp] < time).any():
            by, when = self.fenced or (0, 1 << 31)
            if (known[warps, by] < when).any():
                what = "with neither fence.mbarrier_init nor fence.proxy.async after its initialisation"
                raise Hazard("proxy", f"a copy completes at the {self}, {what}")
        self.used[warps] = known[warps, warps]


@dataclass
class Transfer:
    """An asynchronous operation that completes at an mbarrier."""

    ins: Instruction
    bar: MBarrier
    known: np.ndarray  # what its issuer had done and seen

    def land(self, cta: Cta) -> None:
        """Take effect."""
        raise NotImplementedError


def mbarrier_at(cta: Cta, address: int) -> MBarrier:
    """Return the mbarrier at an address of shared memory."""
    bar = cta.in_flight.mbarriers.get(address)
    if bar is None:
        raise Hazard("mbarrier", f"none is initialised at shared byte {address - Shared.BASE}")
    return bar


def by_mbarrier(cta: Cta, address: np.ndarray, mask: Mask) -> Iterator[tuple[MBarrier, np.ndarray]]:
    """Yield each mbarrier that threads of a mask name, with those threads."""
    threads = cta.tid if mask is None else np.flatnonzero(mask)
    mine = np.broadcast_to(address, cta.T)[threads]
    for each in np.unique(mine):
        bar, group = mbarrier_at(cta, int(each)), threads[mine == each]
        bar.use(cta, np.unique(cta.warp[group]))
        yield bar, group


def expect(bar: MBarrier, count: int) -> None:
    """Add to the bytes that the current phase waits for."""
    bar.bytes += count
    if abs(bar.bytes) > MOST_BYTES:
        raise Hazard("mbarrier", f"{bar.bytes} bytes under way, more than the {bar} can count ({MOST_BYTES})")


def arrive(cta: Cta, bar: MBarrier, count: int, known: np.ndarray | None) -> None:
    """Count arrivals; ``known`` is what those who arrive had done and seen, None if they release nothing."""
    if count > bar.left:
        raise Hazard("mbarrier", f"more arrivals than the {bar} counts in a phase ({bar.count})")
    bar.left -= count
    if known is not None:
        bar.open = np.maximum(bar.open, known)
    complete(cta, bar)


def complete(cta: Cta, bar: MBarrier) -> None:
    """Begin the next phase where nothing is missing in this one."""
    if bar.left == 0 and bar.bytes == 0:
        bar.phase += 1
        bar.left = bar.count
        bar.known = np.maximum(bar.known, bar.open)
        bar.known[cta.W + bar.agent] = bar.earlier + bar.phase


def issue(cta: Cta, transfer: Transfer) -> None:
    """Start a transfer, which takes effect at once if it is to be early."""
    if cta.in_flight.late():
        cta.in_flight.transfers.append(transfer)
    else:
        transfer.land(cta)


def land_next(cta: Cta, wanted: list[MBarrier]) -> bool:
    """Let one transfer take effect, when no thread can run; return whether there is one.

    The last one first of those that somebody waits for: copies have no order among each other.
    """
    transfers = cta.in_flight.transfers
    if not transfers:
        return False
    _land(cta, max((n for n, x in enumerate(transfers) if any(x.bar is bar for bar in wanted)), default=0))
    return True


def land_some(cta: Cta) -> None:
    """Let transfers take effect by chance, where that is what the CTA's asynchrony says."""
    flight = cta.in_flight
    while flight.transfers and flight.asynchrony == "random" and flight.random.integers(4) == 0:
        _land(cta, int(flight.random.integers(len(flight.transfers))))


def _land(cta: Cta, at: int) -> None:
    transfer = cta.in_flight.transfers.pop(at)
    cta.current = transfer.ins
    transfer.land(cta)


# --- waiting: what schedule.py asks


def wait_keys(cta: Cta, ins: Instruction) -> np.ndarray:
    """Return what each thread waits for, as one number: address, whether it acquires, parity."""
    where, what = ins.operands[1:3]
    address = np.broadcast_to(cta.address(where, 32)(), cta.T).astype(np.int64)
    # A state is what `token` makes: its lowest bit is the parity of its phase.
    phase = np.broadcast_to(cta.src(what, "u32" if "parity" in ins.parts else "u64"), cta.T).astype(np.int64) & 1
    return address * 4 + (0 if "relaxed" in ins.parts else 2) + phase


def waited_for(cta: Cta, key: int) -> MBarrier:
    """Return the mbarrier of a number of :func:`wait_keys`."""
    return mbarrier_at(cta, key >> 2)


def wakes(cta: Cta, key: int, warps: np.ndarray) -> bool:
    """Return whether the phase is complete; then the warps know what those knew who completed it."""
    bar = waited_for(cta, key)
    if bar.phase & 1 == key & 1:
        return False
    bar.use(cta, warps)
    bar.seen = bar.phase
    if bar.unseen:
        for phase, access in bar.unseen:
            if phase < bar.phase:
                cta.memory.under_way.end(access)
        bar.unseen = [x for x in bar.unseen if x[0] >= bar.phase]
    if key & 2:
        cta.shared.acquire(warps, bar.known)
    return True


# --- opcodes


@opcode(f"mbarrier init {_SHARED} b64")
def compile_init(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    address, count = cta.address(o[0], 32), cta.src(o[1], "u32")

    def step(mask: Mask) -> None:
        s, flight = cta.shared, cta.in_flight
        for t in cta.tid if mask is None else np.flatnonzero(mask):
            n, at = int(np.broadcast_to(count, cta.T)[t]), int(np.broadcast_to(address(), cta.T)[t])
            if not 1 <= n <= MOST_ARRIVALS:
                raise Hazard("mbarrier", f"an mbarrier of {n} arrivals")
            if at in flight.mbarriers:
                raise Hazard("mbarrier", f"the {flight.mbarriers[at]} is initialised again, with no inval between")
            s.index(np.array([at]), SIZE, np.array([t]))
            words, warp = np.array([at, at + 4]) >> 2, cta.warp[t : t + 1]
            s.write(words, warp, None)
            s.wrote(words, warp)
            flight.mbarriers[at] = MBarrier(cta, at, n, int(warp[0]))
            s.objects[words] = True
            s.has_objects = True

    return step


@opcode(f"mbarrier inval {_SHARED} b64")
def compile_inval(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    address = cta.address(o[0], 32)

    def step(mask: Mask) -> None:
        s, flight = cta.shared, cta.in_flight
        for bar, threads in by_mbarrier(cta, address(), mask):
            warp = cta.warp[threads[:1]]
            if bar.bytes or any(x.bar is bar for x in flight.transfers):
                raise Hazard("mbarrier", f"the {bar} is invalidated while a copy to it is under way")
            late = np.flatnonzero(bar.used > s.clock[warp[0], : cta.W])
            if cta.check and len(late):
                raise Hazard("race", f"the {bar} is invalidated with no barrier since its use by warp {late[0]}")
            words = np.array([bar.address, bar.address + 4]) >> 2
            s.objects[words] = False
            s.has_objects = bool(s.objects.any())
            s.wrote(words, warp)
            flight.agents[bar.address] = (bar.agent, bar.earlier + bar.phase + 1)
            del flight.mbarriers[bar.address]

    return step


@opcode("fence mbarrier_init release cluster")
def compile_init_fence(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    def step(mask: Mask) -> None:
        clock = cta.shared.clock
        for warp in np.unique(cta.warp if mask is None else cta.warp[mask]):
            for bar in cta.in_flight.mbarriers.values():
                if bar.made[0] == warp:
                    bar.fenced = (int(warp), int(clock[warp, warp]))
            clock[warp, warp] += 1

    return step


def token(bar: MBarrier) -> int:
    """Return the opaque state of an mbarrier before an arrival: its phase's parity, and the arrivals it lacks."""
    return (bar.left << 1) | (bar.phase & 1)


_ARRIVE = r"mbarrier arrive|arrive_drop"
_ORDER = r"((release|relaxed)\.(cta|cluster))?"


@opcode(
    f"{_ARRIVE} {_ORDER} {_SHARED} b64",
    f"{_ARRIVE} expect_tx {_ORDER} {_SHARED} b64",
    f"{_ARRIVE} noComplete {_ORDER} {_SHARED} b64",
)
def compile_arrive(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    state, where = (o[0], o[1:]) if not isinstance(o[0], Addr) else (None, o)
    out = cta.row(state, "u64") if isinstance(state, Reg) else None
    address = cta.address(where[0], 32)
    count = cta.src(where[1], "u32") if len(where) > 1 else np.array(1, np.uint32)
    expects, drops, keeps_phase = "expect_tx" in p, p[1] == "arrive_drop", "noComplete" in p

    def step(mask: Mask) -> None:
        for bar, threads in by_mbarrier(cta, address(), mask):
            known = None if "relaxed" in p else cta.shared.release(np.unique(cta.warp[threads]))
            for t, n in zip(threads, np.broadcast_to(count, cta.T)[threads].tolist(), strict=True):
                phase, arrivals = bar.phase, 1 if expects else n
                if expects:
                    expect(bar, n)
                if out is not None:
                    out[t] = token(bar)
                if drops:
                    bar.count -= arrivals
                arrive(cta, bar, arrivals, known)
                if keeps_phase and bar.phase != phase:
                    raise Hazard("mbarrier", f"an arrival with .noComplete completes a phase of the {bar}")

    return step


@opcode(rf"mbarrier expect_tx|complete_tx (relaxed\.(cta|cluster))? {_SHARED} b64")
def compile_tx(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    address, count, completes = cta.address(o[0], 32), cta.src(o[1], "u32"), p[1] == "complete_tx"

    def step(mask: Mask) -> None:
        for bar, threads in by_mbarrier(cta, address(), mask):
            total = int(np.broadcast_to(count, cta.T)[threads].sum(dtype=np.int64))
            expect(bar, -total if completes else total)
            if completes:
                complete(cta, bar)

    return step


@opcode("mbarrier pending_count b64")
def compile_pending_count(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    state = cta.src(o[1], "u64")
    return cta.put(o[0], "u32", lambda: (np.broadcast_to(state, cta.T) >> np.uint64(1)).astype(np.uint32))
