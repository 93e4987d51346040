"""The order in which the warps of a CTA run: of the threads that can, those that lag furthest behind."""

from __future__ import annotations

import numpy as np

from .hazard import Hazard
from .opcodes.bulk import finish
from .opcodes.mbarrier import land_next, wait_keys, waited_for, wakes
from .opcodes.wgmma import pending_fault
from .ptx import number
from .shared_memory import Shared


def execute(cta) -> None:
    T, blocks = cta.T, cta.blocks
    pc = np.zeros(T, np.int32)
    state = np.zeros(T, np.int8)  # 0 runs, 1 waits at a barrier, 2 has ended
    P = cta.files[1]
    barrier_id = np.zeros(T, np.int32)
    sleeps = np.zeros(T, np.int64)  # what a thread in state 3 waits for (wait_keys)
    bars: dict[int, list] = {}  # number -> threads that arrived, what they know
    steps, at, mask = 0, 0, None
    last = len(blocks)
    while True:
        body, end = blocks[at]
        cta.ran[at] += 1
        for fn, ins, touch in body:
            cta.current = ins
            if cta.in_flight.registers and touch and not cta.in_flight.registers.isdisjoint(touch):
                pending_fault(cta, ins, mask)
            fn(mask)
        steps += len(body) + 1
        if steps > cta.most_steps:
            raise Hazard("hang", f"{steps} instructions and no end")
        # --- the terminator
        kind = None if end is None else end.opcode.split(".")[0]
        if end is not None:
            cta.current = end
        if kind == "bra":
            target = cta.kernel.labels[end.operands[0].name]
            g = end.guard
            if g is None:
                taken = None
            else:
                taken = P[g.index] if not g.negated else ~P[g.index]
                active = taken if mask is None else taken[mask]
                if active.all():
                    taken = None
                elif not active.any():
                    target, taken = at + 1, None
            if mask is None and taken is None:
                at = target
                if at < last:
                    continue
                raise Hazard("hang", "runs past the end")
            live = np.ones(T, bool) if mask is None else mask
            if taken is None:
                pc[live] = target
            else:
                pc[live] = at + 1
                pc[live & taken] = target
        elif kind in ("bar", "barrier"):
            number_ = number(end.operands[0].text)
            expected = number(end.operands[1].text) if len(end.operands) > 1 else T
            if end.guard is not None:
                raise NotImplementedError(end.text)
            if mask is None and expected == T and end.parts[1] == "sync" and not bars:
                cta.shared.barrier()
                at += 1
                continue
            live = np.ones(T, bool) if mask is None else mask
            warps = np.unique(cta.warp[live])
            b = bars.setdefault(number_, [0, np.zeros(cta.W + Shared.AGENTS, np.int32)])
            b[0] += int(live.sum())
            b[1] = np.maximum(b[1], cta.shared.release(warps))
            pc[live] = at + 1
            if end.parts[1] == "sync":
                state[live], barrier_id[live] = 1, number_
            if b[0] > expected:
                raise Hazard("barrier", f"{b[0]} threads arrive at barrier {number_} of {expected}")
            if b[0] == expected:
                waiting = (state == 1) & (barrier_id == number_)
                if number_ == 0 and expected == T and len(np.unique(pc[waiting])) > 1:
                    raise Hazard("barrier", "threads wait at different bar.sync instructions")
                state[waiting] = 0
                cta.shared.acquire(np.unique(cta.warp[waiting]), b[1])
                del bars[number_]
        elif kind == "brx":
            table = np.array(cta.kernel.tables[end.operands[1].name])
            index = cta.files[32][end.operands[0].index]
            live = np.ones(T, bool) if mask is None else mask
            pc[live] = table[index[live]]
        elif kind == "mbarrier":  # try_wait: a thread sleeps until its phase completes
            live = np.ones(T, bool) if mask is None else mask
            sleeps[live] = wait_keys(cta, end)[live]
            P[end.operands[0].index][live] = True
            pc[live], state[live] = at + 1, 3
        elif kind in ("ret", "exit"):
            live = np.ones(T, bool) if mask is None else mask
            if end.guard is not None:
                t = P[end.guard.index] ^ end.guard.negated
                state[live & t] = 2
                pc[live & ~t] = at + 1
            else:
                state[live] = 2
        else:
            if mask is None:
                at += 1
                continue
            pc[mask] = at + 1
        # --- the next block: of the threads that can run, those that lag furthest behind
        while True:
            waiting = np.unique(sleeps[state == 3])
            for key in waiting:
                wake = (state == 3) & (sleeps == key)
                if wakes(cta, int(key), np.unique(cta.warp[wake])):
                    state[wake] = 0
            if (state == 0).any() or not land_next(cta, [waited_for(cta, int(key)) for key in waiting]):
                break
        if not (state == 0).any():
            if (state == 2).all():
                break
            stuck = {
                int(cta.warp[t]): f"barrier {barrier_id[t]}"
                if state[t] == 1
                else f"{waited_for(cta, int(sleeps[t]))} parity {sleeps[t] & 1}"
                for t in np.flatnonzero((state == 1) | (state == 3))
            }
            raise Hazard("deadlock", f"warps wait for ever ({int((state == 2).sum())} threads have ended): {stuck}")
        runs = state == 0
        at = int(pc[runs].min())
        mask = runs & (pc == at)
        if mask.all():
            mask = None
    cta.stats["instructions"] += steps
    finish(cta)
    left = cta.in_flight.leftovers()
    if left:
        raise Hazard("async", left)
