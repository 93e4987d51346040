"""Instructions in which the lanes of a warp exchange values."""

from __future__ import annotations

import numpy as np

from ..numbers import BINARY
from ..ptx import Imm, Reg, Sym, number
from . import opcode


@opcode("vote ...")
def compile_vote(cta, ins, p, o):
    c = cta.row(o[1])

    def lanes():
        x = c.reshape(-1, 32)
        if p[2] == "ballot":
            r = (x.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
            return np.repeat(r, 32).astype(np.uint32)
        return np.repeat(x.all(1) if p[2] == "all" else x.any(1), 32)

    put = cta.put(o[0], None, lanes)

    def f(m):
        whole_warps(cta, m)
        put(m)

    return f


@opcode("redux ...")
def compile_redux(cta, ins, p, o):
    uf = {"max": np.maximum, "min": np.minimum, "add": np.add, **BINARY}[p[2]]
    a, members = cta.src(o[1], p[-1]), cta.src(o[2], "u32")

    def value():
        if (members != 0xFFFFFFFF).any():
            raise NotImplementedError("redux of some lanes")
        return np.repeat(uf.reduce(a.reshape(-1, 32), axis=1), 32).astype(a.dtype)

    put = cta.put(o[0], p[-1], value)

    def f(m):
        whole_warps(cta, m)
        put(m)

    return f


@opcode("shfl ...")
def compile_shfl(cta, ins, p, o):
    mode = p[2]
    dst, pred = (o[0], None) if isinstance(o[1], Reg) and len(o) == 5 else (o[0], o[1])
    a, b, c, members = o[-4:]
    if not (isinstance(members, Imm) and number(members.text) & 0xFFFFFFFF == 0xFFFFFFFF):
        raise NotImplementedError("shfl of some lanes")
    value, b, c = cta.src(a, "u32"), cta.src(b, "u32").astype(np.int64), cta.src(c, "u32").astype(np.int64)
    if isinstance(o[-3], Reg):
        raw_b = cta.src(o[-3], "u32")
    else:
        raw_b = None
    lane = cta.lane
    out = cta.row(dst, "u32")
    pout = None if pred is None or isinstance(pred, Sym) else cta.row(pred)

    def f(m):
        whole_warps(cta, m)
        d = b if raw_b is None else raw_b.astype(np.int64)
        d = d & 31
        seg, cv = (c >> 8) & 31, c & 31
        low = lane & seg
        high = low | (cv & ~seg)
        if mode == "up":
            j = lane - d
            ok = j >= high
        elif mode == "down":
            j = lane + d
            ok = j <= high
        elif mode == "bfly":
            j = lane ^ d
            ok = j <= high
        else:
            j = low | (d & ~seg)
            ok = j <= high
        j = np.where(ok, j, lane)
        r = value[cta.warp * 32 + j]
        np.copyto(out, r, where=True if m is None else m)
        if pout is not None:
            np.copyto(pout, ok, where=True if m is None else m)

    return f


@opcode("elect ...")
def compile_elect(cta, ins, p, o):
    pout = cta.row(o[1])

    def f(m):
        whole_warps(cta, m)
        np.copyto(pout, cta.lane == 0, where=True if m is None else m)

    return f


def whole_warps(cta, m) -> None:
    cta.whole_warps(m)
