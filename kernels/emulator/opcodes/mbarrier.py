"""mbarriers: barriers in shared memory that count arrivals of threads and bytes of copies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..hazard import Hazard
from ..ptx import Instruction, Reg, Sym
from ..shared_memory import Shared
from . import opcode

MOST_ARRIVALS = (1 << 20) - 1
MOST_BYTES = (1 << 20) - 1


class MBarrier:
    """One mbarrier object.

    To those who look for races it is an agent whose time is its phase: a copy that completes at it writes in its name,
    so that nobody may read the data who has not waited for this phase of this mbarrier.
    """

    def __init__(self, address: int, count: int, agent: int, agents: int, earlier: int = 0) -> None:
        self.address, self.agent, self.earlier = address, agent, earlier
        self.count = count  # arrivals that a phase expects
        self.left = count  # of them, in the current phase
        self.bytes = 0  # expected and not yet there; negative where a copy is ahead of what expects it
        self.phase = 0
        self.open = np.zeros(agents, np.int32)  # what those who arrived in this phase had done and seen
        self.known = np.zeros(agents, np.int32)  # the same of all completed phases

    def __str__(self) -> str:
        return f"mbarrier at shared byte {self.address - Shared.BASE}"

    def stamp(self) -> int:
        """Return the time of a copy that completes now; phases of earlier mbarriers at this address count."""
        return self.earlier + self.phase + 1


@dataclass
class Transfer:
    """An asynchronous operation that completes at an mbarrier."""

    ins: Instruction
    bar: MBarrier
    known: np.ndarray  # what its issuer had done and seen

    def land(self, cta) -> None:
        """Take effect."""
        raise NotImplementedError


def mbarrier_at(cta, address: int) -> MBarrier:
    """Return the mbarrier at an address of shared memory."""
    bar = cta.in_flight.mbarriers.get(address)
    if bar is None:
        raise Hazard("mbarrier", f"none is initialised at shared byte {address - Shared.BASE}")
    return bar


def by_mbarrier(cta, address: np.ndarray, m) -> Iterator[tuple[MBarrier, np.ndarray]]:
    """Yield each mbarrier that threads of a mask name, with those threads."""
    threads = cta.tid if m is None else np.flatnonzero(m)
    mine = np.broadcast_to(address, cta.T)[threads]
    for each in np.unique(mine):
        yield mbarrier_at(cta, int(each)), threads[mine == each]


def expect(bar: MBarrier, count: int) -> None:
    """Add to the bytes that the current phase waits for."""
    bar.bytes += count
    if abs(bar.bytes) > MOST_BYTES:
        raise Hazard("mbarrier", f"{bar.bytes} bytes under way, more than the {bar} can count ({MOST_BYTES})")


def arrive(cta, bar: MBarrier, count: int, known: np.ndarray | None) -> None:
    """Count arrivals; ``known`` is what those who arrive had done and seen, None if they release nothing."""
    if count > bar.left:
        raise Hazard("mbarrier", f"more arrivals than the {bar} counts in a phase ({bar.count})")
    bar.left -= count
    if known is not None:
        bar.open = np.maximum(bar.open, known)
    complete(cta, bar)


def complete(cta, bar: MBarrier) -> None:
    """Begin the next phase where nothing is missing in this one."""
    if bar.left == 0 and bar.bytes == 0:
        bar.phase += 1
        bar.left = bar.count
        bar.known = np.maximum(bar.known, bar.open)
        bar.known[cta.shared.warps + bar.agent] = bar.earlier + bar.phase


def issue(cta, transfer: Transfer) -> None:
    """Start a transfer, which takes effect at once if it is to be early."""
    if cta.in_flight.late():
        cta.in_flight.transfers.append(transfer)
    else:
        transfer.land(cta)


def land_next(cta, wanted: list[MBarrier]) -> bool:
    """Let one transfer take effect, when no thread can run; return whether there is one.

    The last one first of those that somebody waits for: copies have no order among each other.
    """
    transfers = cta.in_flight.transfers
    if not transfers:
        return False
    at = max((n for n, x in enumerate(transfers) if any(x.bar is bar for bar in wanted)), default=0)
    transfer = transfers.pop(at)
    cta.current = transfer.ins
    transfer.land(cta)
    return True


# --- waiting: what schedule.py asks


def wait_keys(cta, ins: Instruction) -> np.ndarray:
    """Return what each thread waits for, as one number: address, whether it acquires, parity."""
    words = [x for x in ins.operands[1:] if not (isinstance(x, Sym) and x.name == "_")]
    address = np.broadcast_to(cta.address(words[0], 32)(), cta.T).astype(np.int64)
    if "parity" in ins.opcode:
        parity = np.broadcast_to(cta.src(words[1], "u32"), cta.T).astype(np.int64) & 1
    else:  # a state, as `token` makes it
        parity = np.broadcast_to(cta.src(words[1], "u64"), cta.T).astype(np.int64) & 1
    return address * 4 + (0 if "relaxed" in ins.opcode else 2) + parity


def waited_for(cta, key: int) -> MBarrier:
    """Return the mbarrier of a number of :func:`wait_keys`."""
    return mbarrier_at(cta, key >> 2)


def wakes(cta, key: int, warps: np.ndarray) -> bool:
    """Return whether the phase is complete; then the warps know what those knew who completed it."""
    bar = waited_for(cta, key)
    if bar.phase & 1 == key & 1:
        return False
    if key & 2:
        cta.shared.acquire(warps, bar.known)
    return True


# --- opcodes


@opcode("mbarrier ...")
def compile_mbarrier(cta, ins, p, o):
    make = {
        "init": _init,
        "inval": _inval,
        "arrive": _arrive,
        "arrive_drop": _arrive,
        "expect_tx": _expect_tx,
        "complete_tx": _complete_tx,
        "pending_count": _pending_count,
    }.get(p[1])
    if make is None or ("shared::cluster" in p and p[1] != "expect_tx" and p[1] != "complete_tx"):
        raise NotImplementedError(ins.opcode)
    return make(cta, ins, p, o)


def _init(cta, ins, p, o):
    address, count = cta.address(o[0], 32), cta.src(o[1], "u32")

    def init(m):
        flight = cta.in_flight
        for t in cta.tid if m is None else np.flatnonzero(m):
            n, at = int(np.broadcast_to(count, cta.T)[t]), int(np.broadcast_to(address(), cta.T)[t])
            cta.shared.index(np.array([at]), 8, np.array([t]))
            if not 1 <= n <= MOST_ARRIVALS:
                raise Hazard("mbarrier", f"an mbarrier of {n} arrivals")
            old = flight.mbarriers.get(at)
            if old is not None:
                raise Hazard("mbarrier", f"the {old} is initialised again, with no mbarrier.inval between")
            agent, earlier = flight.agents.setdefault(at, (len(flight.agents), 0))
            if agent >= Shared.AGENTS:
                raise NotImplementedError(f"more than {Shared.AGENTS} mbarriers in a CTA")
            flight.mbarriers[at] = MBarrier(at, n, agent, cta.shared.clock.shape[-1], earlier)

    return init


def _inval(cta, ins, p, o):
    address = cta.address(o[0], 32)

    def inval(m):
        flight = cta.in_flight
        for bar, _ in by_mbarrier(cta, address(), m):
            if bar.bytes or any(x.bar is bar for x in flight.transfers):
                raise Hazard("mbarrier", f"the {bar} is invalidated while a copy to it is under way")
            flight.agents[bar.address] = (bar.agent, bar.earlier + bar.phase + 1)
            del flight.mbarriers[bar.address]

    return inval


def token(bar: MBarrier) -> int:
    """Return the opaque state of an mbarrier before an arrival: its phase's parity, and the arrivals it lacks."""
    return (bar.left << 1) | (bar.phase & 1)


def _arrive(cta, ins, p, o):
    if "shared::cluster" in p:
        raise NotImplementedError(ins.opcode)
    state, rest = (o[0], o[1:]) if isinstance(o[0], (Reg, Sym)) else (None, o)
    out = cta.row(state, "u64") if isinstance(state, Reg) else None
    address = cta.address(rest[0], 32)
    count = cta.src(rest[1], "u32") if len(rest) > 1 else np.array(1, np.uint32)
    expects, drops = "expect_tx" in p, p[1] == "arrive_drop"

    def f(m):
        for bar, threads in by_mbarrier(cta, address(), m):
            known = None if "relaxed" in p else cta.shared.release(np.unique(cta.warp[threads]))
            for t, n in zip(threads, np.broadcast_to(count, cta.T)[threads], strict=True):
                phase = bar.phase
                if expects:
                    expect(bar, int(n))
                if out is not None:
                    out[t] = token(bar)
                if drops:
                    bar.count -= 1 if expects else int(n)
                arrive(cta, bar, 1 if expects else int(n), known)
                if "noComplete" in p and bar.phase != phase:
                    raise Hazard("mbarrier", f"an arrival with .noComplete completes a phase of the {bar}")

    return f


def _expect_tx(cta, ins, p, o):
    address, count = cta.address(o[0], 32), cta.src(o[1], "u32")

    def f(m):
        for bar, threads in by_mbarrier(cta, address(), m):
            expect(bar, int(np.broadcast_to(count, cta.T)[threads].sum()))

    return f


def _complete_tx(cta, ins, p, o):
    address, count = cta.address(o[0], 32), cta.src(o[1], "u32")

    def f(m):
        for bar, threads in by_mbarrier(cta, address(), m):
            expect(bar, -int(np.broadcast_to(count, cta.T)[threads].sum()))
            complete(cta, bar)

    return f


def _pending_count(cta, ins, p, o):
    state = cta.src(o[1], "u64")
    return cta.put(o[0], "u32", lambda: (np.broadcast_to(state, cta.T) >> np.uint64(1)).astype(np.uint32))
