"""cp.async: copies from global to shared memory that land later.

Missing: the check that what cp.async wrote is fenced before the async proxy reads it, where an mbarrier was waited for;
it is made where the thread waits for its groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..hazard import Hazard
from ..ptx import Instruction, Reg, number
from ..state import Cta, Mask, Step
from . import opcode
from .mbarrier import Transfer, arrive, by_mbarrier, issue
from .memory import banks, sectors

POISON = 0x7FFF7FFF  # two NaN of bf16, one of fp32


@dataclass(eq=False)
class Copy:
    """What one cp.async of several threads copies."""

    ins: Instruction
    order: int  # of issue
    threads: np.ndarray
    group: np.ndarray  # the number of the group that each thread's copy belongs to
    first: int  # of the groups
    last: int
    words: np.ndarray  # [threads, words] of shared memory
    warp: np.ndarray  # [threads, 1]
    values: np.ndarray
    addresses: np.ndarray  # in global memory; 0 where nothing is read, or a part
    piece: int  # bytes
    late: bool
    writes: bool = False
    reduces: bool = False

    def part(self, take: np.ndarray) -> Copy:
        """Return the copies of the threads in a mask of ``threads``, of which there are some."""
        group = self.group[take]
        return replace(
            self,
            threads=self.threads[take],
            group=group,
            first=int(group.min()),
            last=int(group.max()),
            words=self.words[take],
            warp=self.warp[take],
            values=self.values[take],
            addresses=self.addresses[take],
        )

    def land(self, cta: Cta) -> None:
        """Put the data in place, as written by the threads that have waited for it."""
        s = cta.shared
        s.end_copy(self.words)
        if self.late:
            s.words[self.words] = self.values
        s.wrote(self.words, self.warp)

    def land_at(self, cta: Cta, agent: int, stamp: int) -> None:
        """Put the data in place, as written by an mbarrier."""
        s = cta.shared
        s.end_copy(self.words)
        s.landed(self.words, self.values, agent, stamp)


def _separate(cta: Cta, copy: Copy, take: np.ndarray) -> tuple[Copy | None, Copy | None]:
    """Return what is done, of the threads in a mask of ``copy.threads``, and what stays under way."""
    if not take.any():
        return None, copy
    cta.memory.under_way.end(copy)
    if take.all():
        return copy, None
    left = copy.part(~take)
    cta.memory.under_way.begin(left)
    return copy.part(take), left


@opcode("cp async commit_group")
def compile_commit(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    return lambda mask: commit(cta, mask)


@opcode("cp async wait_group", "cp async wait_all")
def compile_wait(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    keep, commits = number(o[0].text) if o else 0, p[2] == "wait_all"

    def step(mask: Mask) -> None:
        if commits:
            commit(cta, mask)
        wait(cta, mask, keep)

    return step


def commit(cta: Cta, mask: Mask) -> None:
    """Close a group of copies of each thread."""
    flight = cta.in_flight
    if mask is None:
        flight.committed += 1
    else:
        flight.committed[mask] += 1
        flight.in_step = False


def wait(cta: Cta, mask: Mask, keep: int) -> None:
    """Land the groups of the threads of a mask, all but the last ``keep`` of each."""
    flight = cta.in_flight
    who = slice(None) if mask is None else mask
    flight.waited[who] = np.maximum(flight.waited[who], flight.committed[who] - keep)
    if not flight.copies:
        return
    least, most = int(flight.waited.min()), int(flight.waited.max())
    left = []
    for copy in flight.copies:
        if copy.last < least:
            cta.memory.under_way.end(copy)
            copy.land(cta)
        elif copy.first >= most:
            left.append(copy)
        else:
            done, rest = _separate(cta, copy, copy.group < flight.waited[copy.threads])
            if done is not None:
                done.land(cta)
            if rest is not None:
                left.append(rest)
    flight.copies = left


_SPACE = r"(shared|shared::cta) global (L2::cache_hint)? (L2::(64|128|256)B)?"


@opcode(f"cp async ca {_SPACE}", f"cp async cg {_SPACE}")
def compile_copy(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    dst, src = cta.address(o[0], 32), cta.address(o[1], 64)
    size = number(o[2].text)
    if size not in ((16,) if p[2] == "cg" else (4, 8, 16)):
        raise Hazard("alignment", f"cp.async.{p[2]} of {size} bytes")
    rest = list(o[3 : len(o) - ("L2::cache_hint" in p)])
    ignored = cta.row(rest[0]) if rest and isinstance(rest[0], Reg) and rest[0].bits == 1 else None
    inverted = ignored is not None and rest[0].negated
    count = cta.src(rest[0], "u32") if rest and ignored is None else np.array(size, np.uint32)

    def step(mask: Mask) -> None:
        sel = cta.tid if mask is None else np.flatnonzero(mask)
        at = cta.shared.index(dst()[sel], size, sel)
        if cta.count_stats:
            banks(cta, at, sel, size)
        if ignored is None:
            n = np.broadcast_to(count, cta.T)[sel]
        else:
            n = np.where(ignored[sel] ^ inverted, 0, size)
        values, addresses = _source(cta, src()[sel], n, size, sel)
        words = (at >> 2)[:, None] + np.arange(size // 4)
        warp = cta.warp[sel][:, None]
        s, flight = cta.shared, cta.in_flight
        s.write(words, warp, None)
        late = flight.late()
        s.begin_copy(words)
        if cta.check or not late:
            s.words[words] = POISON if late else values
        group = flight.committed[sel]
        first, last = (group[0], group[0]) if flight.in_step else (group.min(), group.max())
        flight.newest += 1
        copy = Copy(ins, flight.newest, sel, group, int(first), int(last), words, warp, values, addresses, size, late)
        flight.copies.append(copy)
        cta.memory.under_way.begin(copy)

    return step


def _source(
    cta: Cta, addresses: np.ndarray, n: np.ndarray, size: int, sel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what threads copy, ``n`` bytes each and then zeros, and the addresses of those that copy ``size``."""
    full = n == size
    if full.all():
        if cta.count_stats:
            sectors(cta, addresses, sel, size)
        return cta.memory.load(addresses, 4, size // 4, sel), addresses.copy()
    values = np.zeros((len(sel), size // 4), np.uint32)
    if full.any():
        a = addresses[full]
        values[full] = cta.memory.load(a, 4, size // 4, sel[full])
        if cta.count_stats:
            sectors(cta, a, sel[full], size)
    for k in np.flatnonzero(~full & (n > 0)):  # a part: byte by byte
        if n[k] > size:
            raise Hazard("address", f"thread {sel[k]}: cp.async of {n[k]} bytes into {size}")
        if addresses[k] & np.uint64(size - 1):
            raise Hazard("alignment", f"thread {sel[k]}: cp.async of {size} bytes from {int(addresses[k]):#x}")
        part = cta.memory.load(addresses[k] + np.arange(n[k], dtype=np.uint64), 1, 1, np.full(n[k], sel[k]))
        values.view(np.uint8)[k, : n[k]] = part[:, 0]
    return values, np.where(full, addresses, np.uint64(0))


@dataclass
class Arrival(Transfer):
    """The arrival at an mbarrier of threads whose cp.async up to one of them are done."""

    threads: np.ndarray
    newest: int

    def land(self, cta: Cta) -> None:
        """Land the copies, and count the arrivals."""
        flight, left = cta.in_flight, []
        for copy in flight.copies:
            take = np.isin(copy.threads, self.threads) & (copy.order <= self.newest)
            done, rest = _separate(cta, copy, take)
            if done is not None:
                done.land_at(cta, self.bar.agent, self.bar.land())
            if rest is not None:
                left.append(rest)
        flight.copies = left
        arrive(cta, self.bar, len(self.threads), self.known)


@opcode("cp async mbarrier arrive noinc? (shared|shared::cta) b64")
def compile_arrive(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    address = cta.address(o[0], 32)
    counts_itself = "noinc" not in p  # the arrival to come is added to those that the phase expects

    def step(mask: Mask) -> None:
        flight = cta.in_flight
        for bar, threads in by_mbarrier(cta, address(), mask):
            if counts_itself:
                bar.left += len(threads)
            known = cta.shared.release(np.unique(cta.warp[threads]))
            issue(cta, Arrival(ins, bar, known, threads, flight.newest))

    return step
