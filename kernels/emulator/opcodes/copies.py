"""cp.async: copies from global to shared memory that land later."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..hazard import Hazard
from ..ptx import Instruction, Reg, number
from . import opcode
from .bulk import compile_bulk
from .mbarrier import Transfer, arrive, by_mbarrier, issue
from .memory import banks, sectors

POISON = 0x7FFF7FFF  # two NaN of bf16, one of fp32


@dataclass
class Copy:
    """What one cp.async of several threads copies, with the number of the group that each thread's copy belongs to."""

    ins: Instruction
    order: int  # of issue
    threads: np.ndarray
    group: np.ndarray
    first: int  # of the groups
    last: int
    words: np.ndarray  # [threads, words]
    warp: np.ndarray  # [threads, 1]
    values: np.ndarray
    late: bool

    def split(self, take: np.ndarray) -> tuple[Copy, Copy]:
        """Return the copies of the threads that are in a mask of ``threads``, and of the others."""
        parts = []
        for x in (take, ~take):
            group = self.group[x]
            parts.append(
                Copy(
                    self.ins,
                    self.order,
                    self.threads[x],
                    group,
                    int(group.min(initial=self.last)),
                    int(group.max(initial=self.first)),
                    self.words[x],
                    self.warp[x],
                    self.values[x],
                    self.late,
                )
            )
        return parts[0], parts[1]

    def land(self, cta) -> None:
        """Put the data in place, as written by the threads that have waited for it."""
        s = cta.shared
        s.landing[self.words] = False
        if self.late:
            s.words[self.words] = self.values
        s.wrote(self.words, self.warp)


@opcode("cp ...")
def compile_cp(cta, ins, p, o):
    if "bulk" in p:
        return compile_bulk(cta, ins, p, o)
    if p[1] != "async":
        raise NotImplementedError(ins.opcode)
    if p[2] == "commit_group":
        return lambda m: commit(cta, m)
    if p[2] == "wait_group":
        keep = number(o[0].text)
        return lambda m: wait(cta, m, keep)
    if p[2] == "wait_all":

        def wait_all(m):
            commit(cta, m)
            wait(cta, m, 0)

        return wait_all
    if p[2] == "mbarrier":
        return _mbarrier_arrive(cta, ins, p, o)
    return _copy(cta, ins, p, o)


def commit(cta, m) -> None:
    flight = cta.in_flight
    if m is None:
        flight.committed += 1
    else:
        flight.committed[m] += 1
        flight.in_step = False


def wait(cta, m, keep: int) -> None:
    """Land the groups of the threads of a mask, all but the last ``keep`` of each."""
    flight = cta.in_flight
    who = slice(None) if m is None else m
    flight.waited[who] = np.maximum(flight.waited[who], flight.committed[who] - keep)
    least, most = int(flight.waited.min()), int(flight.waited.max())
    left = []
    for copy in flight.copies:
        if copy.last < least:
            copy.land(cta)
        elif copy.first >= most:
            left.append(copy)
        else:
            done, rest = copy.split(copy.group < flight.waited[copy.threads])
            done.land(cta)
            if len(rest.threads):
                left.append(rest)
    flight.copies = left


def _copy(cta, ins, p, o):
    dst, src = cta.address(o[0], 32), cta.address(o[1], 64)
    size = number(o[2].text)
    if p[2] not in ("ca", "cg") or size not in ((16,) if p[2] == "cg" else (4, 8, 16)):
        raise NotImplementedError(ins.opcode)
    rest = list(o[3 : len(o) - ("L2::cache_hint" in p)])
    ignored = cta.row(rest[0]) if rest and isinstance(rest[0], Reg) and rest[0].bits == 1 else None
    count = cta.src(rest[0], "u32") if rest and ignored is None else np.array(size, np.uint32)

    def copy(m):
        sel = cta.tid if m is None else np.flatnonzero(m)
        at = cta.shared.index(dst()[sel], size, sel)
        if cta.count_stats:
            banks(cta, at, sel, size)
        n = np.broadcast_to(count, cta.T)[sel] if ignored is None else np.where(ignored[sel], 0, size)
        values = np.zeros((len(sel), size // 4), np.uint32)
        full = n == size
        if full.any():
            a = src()[sel][full]
            values[full] = cta.memory.load(a, 4, size // 4, sel[full])
            if cta.count_stats:
                sectors(cta, a, sel[full], size)
        for k in np.flatnonzero(~full & (n > 0)):  # a part: byte by byte
            if n[k] > size:
                raise Hazard("address", f"thread {sel[k]}: cp.async of {n[k]} bytes into {size}")
            a = src()[sel[k]]
            if a & np.uint64(size - 1):
                raise Hazard("alignment", f"thread {sel[k]}: cp.async of {size} bytes from {int(a):#x}")
            part = cta.memory.load(a + np.arange(n[k], dtype=np.uint64), 1, 1, np.full(n[k], sel[k]))
            values.view(np.uint8)[k, : n[k]] = part[:, 0]
        words = (at >> 2)[:, None] + np.arange(size // 4)
        warp = cta.warp[sel][:, None]
        s, flight = cta.shared, cta.in_flight
        s.write(words, warp, None)
        late = flight.late()
        if cta.check:
            s.landing[words] = True
        if cta.check or not late:
            s.words[words] = POISON if late else values
        group = flight.committed[sel]
        first, last = (group[0], group[0]) if flight.in_step else (group.min(), group.max())
        flight.newest += 1
        flight.copies.append(Copy(ins, flight.newest, sel, group, int(first), int(last), words, warp, values, late))

    return copy


@dataclass
class Arrival(Transfer):
    """The arrival at an mbarrier of threads whose cp.async up to one of them are done."""

    threads: np.ndarray
    newest: int

    def land(self, cta) -> None:
        flight, left = cta.in_flight, []
        for copy in flight.copies:
            done, rest = copy.split(np.isin(copy.threads, self.threads) & (copy.order <= self.newest))
            if len(done.threads):
                cta.shared.landed(done.words, done.values, self.bar.agent, self.bar.stamp())
            if len(rest.threads):
                left.append(rest)
        flight.copies = left
        arrive(cta, self.bar, len(self.threads), self.known)


def _mbarrier_arrive(cta, ins, p, o):
    address = cta.address(o[0], 32)
    keeps_count = "noinc" not in p  # the arrival to come is counted on top of those that the phase expects

    def arrive_when_done(m):
        flight = cta.in_flight
        for bar, threads in by_mbarrier(cta, address(), m):
            if keeps_count:
                bar.left += len(threads)
            known = cta.shared.release(np.unique(cta.warp[threads]))
            issue(cta, Arrival(ins, bar, known, threads, flight.newest))

    return arrive_when_done
