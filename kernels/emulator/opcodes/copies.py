"""cp.async: copies from global to shared memory that land later."""

from __future__ import annotations

import numpy as np

from ..hazard import Hazard
from ..ptx import number
from . import opcode
from .bulk import bulk
from .memory import banks, sectors


@opcode("cp ...")
def compile_cp(cta, ins, p, o):
    if "bulk" in p:
        return bulk(cta, ins, p, o)
    if p[1] != "async":
        raise NotImplementedError(ins.opcode)
    if p[2] == "commit_group":

        def commit(m):
            if m is not None:
                raise NotImplementedError("cp.async.commit_group under divergence")
            cta.copy_groups.append(cta.copies)
            cta.copies = []

        return commit
    if p[2] in ("wait_group", "wait_all"):
        keep = number(o[0].text) if o else 0

        def wait(m):
            if m is not None:
                raise NotImplementedError("cp.async.wait_group under divergence")
            if not o:
                cta.copy_groups.append(cta.copies)
                cta.copies = []
            while len(cta.copy_groups) > keep:
                for words, warp, values in cta.copy_groups.pop(0):
                    s = cta.shared
                    s.landing[words] = False
                    s.words[words] = values
                    s.wrote(words, warp)

        return wait
    dst, src = cta.address(o[0], 32), cta.address(o[1], 64)
    size = number(o[2].text)
    count = cta.src(o[3], "u32") if len(o) > 3 else np.array(size, np.uint32)

    def copy(m):
        sel = cta.tid if m is None else np.flatnonzero(m)
        at = cta.shared.index(dst()[sel], size, sel)
        if cta.count_stats:
            banks(cta, at, sel, size)
        n = np.broadcast_to(count, cta.T)[sel]
        values = np.zeros((len(sel), size // 4), np.uint32)
        full = n == size
        if full.any():
            a = src()[sel][full]
            values[full] = cta.memory.load(a, 4, size // 4, sel[full])
            if cta.count_stats:
                sectors(cta, a, sel[full], size)
        for k in np.flatnonzero(~full & (n > 0)):  # a part: byte by byte
            if n[k] > size:
                raise Hazard("address", f"cp.async of {n[k]} bytes into {size}")
            part = cta.memory.load(src()[sel][k] + np.arange(n[k], dtype=np.uint64), 1, 1, np.full(n[k], sel[k]))
            values.view(np.uint8)[k, : n[k]] = part[:, 0]
        words = (at >> 2)[:, None] + np.arange(size // 4)
        warp = cta.warp[sel][:, None]
        s = cta.shared
        s.write(words, warp, None)
        if cta.check:
            s.landing[words] = True
            s.words[words] = 0x7FFF7FFF
        cta.copies.append((words, warp, values))

    return copy
