"""Loads and stores, global and shared, and ldmatrix and stmatrix."""

from __future__ import annotations

import numpy as np

from ..hazard import Hazard
from ..numbers import FILES, TYPES
from ..ptx import Reg, Sym, Vec
from . import opcode
from .conversions import narrow
from .warp import whole_warps


@opcode("ld ...")
def compile_ld(cta, ins, p, o):
    t = p[-1]
    size = np.dtype(TYPES[t]).itemsize
    space = next((x for x in p[1:] if x.split("::")[0] in ("param", "global", "shared", "local")), None)
    if space == "param":
        name, offset = o[1].base.name, o[1].offset
        bits = o[0].bits

        def f(m):
            raw = cta.param[name][offset : offset + size]
            v = np.frombuffer(raw, TYPES[t])[0]
            np.copyto(cta.row(o[0]), np.array(v).astype(FILES[bits]), where=True if m is None else m)

        return f
    outs = [x for x in (o[0].items if isinstance(o[0], Vec) else (o[0],))]
    n = len(outs)
    width = min(size, 4)
    per = size // width
    addr = cta.address(o[1], 64 if space == "global" else 32)
    rows = [None if isinstance(x, Sym) else cta.row(x) for x in outs]

    def f(m):
        sel = cta.tid if m is None else np.flatnonzero(m)
        a = addr() if m is None else addr()[sel]
        if space == "global":
            v = cta.memory.load(a, width, n * per, sel)
            if cta.count_stats:
                sectors(cta, a, sel, size * n)
        else:
            v = load_shared(cta, a, sel, width, n * per)
        if per == 2:
            v = np.ascontiguousarray(v).view(np.uint64)
        for k, row in enumerate(rows):
            if row is not None:
                if m is None:
                    row[...] = v[:, k]
                else:
                    row[sel] = v[:, k]

    return f


def load_shared(cta, a, sel, width, count):
    s = cta.shared
    at = s.index(a, width * count, sel)
    if cta.count_stats:
        banks(cta, at, sel, width * count)
    if width == 4:
        words = (at >> 2)[:, None] + np.arange(count)
        s.read(words, cta.warp[sel][:, None])
        return s.words[words]
    view = s.halves if width == 2 else s.raw
    index = (at // width)[:, None] + np.arange(count)
    s.read(index * width >> 2, cta.warp[sel][:, None])
    return view[index]


@opcode("st ...")
def compile_st(cta, ins, p, o):
    t = p[-1]
    size = np.dtype(TYPES[t]).itemsize
    space = next(x for x in p[1:] if x.split("::")[0] in ("global", "shared", "local"))
    items = o[1].items if isinstance(o[1], Vec) else (o[1],)
    wide = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}[size]
    sources = [
        cta.src(x, wide) if not (isinstance(x, Reg) and x.bits > size * 8) else narrow(cta, x, wide) for x in items
    ]
    addr = cta.address(o[0], 64 if space == "global" else 32)
    T = cta.T

    def f(m):
        sel = cta.tid if m is None else np.flatnonzero(m)
        a = addr() if m is None else addr()[sel]
        v = np.stack([np.broadcast_to(s, T) for s in sources], 1)
        v = v if m is None else v[sel]
        if size == 8:
            v = np.ascontiguousarray(v).view(np.uint32)
        if space == "global":
            cta.memory.store(a, v, sel)
            if cta.count_stats:
                sectors(cta, a, sel, size * len(items))
        else:
            store_shared(cta, a, sel, v)

    return f


def store_shared(cta, a, sel, v):
    s = cta.shared
    width, count = v.itemsize, v.shape[1]
    at = s.index(a, width * count, sel)
    if cta.count_stats:
        banks(cta, at, sel, width * count)
    if width * count >= 4:
        v = np.ascontiguousarray(v).view(np.uint32)
        words = (at >> 2)[:, None] + np.arange(v.shape[1])
        warp = cta.warp[sel][:, None]
        s.write(words, warp, v)
        s.words[words] = v
        if (s.words[words] != v).any():
            raise Hazard("race", "two threads of one instruction store different values to one shared address")
        s.wrote(words, warp)
    else:
        index = (at // width)[:, None]
        words, warp = index * width >> 2, cta.warp[sel][:, None]
        for part in (0, 1) if width == 2 else ():
            pick = (index[:, 0] & 1) == part
            if pick.any():
                s.write(words[pick], warp[pick], v[pick], half=1 + part)
        view = s.halves if width == 2 else s.raw
        view[index] = v
        if (view[index] != v).any():
            raise Hazard("race", "two threads of one instruction store different values to one shared address")
        s.wrote(words, warp)


def banks(cta, at, sel, size) -> None:
    """Passes over the 32 banks, 128 bytes a pass at best."""
    for w in np.unique(cta.warp[sel]):
        words = np.unique(((at[cta.warp[sel] == w] >> 2)[:, None] + np.arange(max(size // 4, 1))).ravel())
        cta.stats["bank"] += int(np.bincount(words % 32).max())
        cta.stats["bank_ideal"] += -(-len(words) // 32)


def sectors(cta, addr, sel, size) -> None:
    for w in np.unique(cta.warp[sel]):
        a = addr[cta.warp[sel] == w].astype(np.int64)
        cta.stats["sectors"] += len(np.unique(a >> 5))
        cta.stats["sectors_ideal"] += -(-len(np.unique(a)) * size // 32)


@opcode("ldmatrix ...")
def compile_ldmatrix(cta, ins, p, o):
    n = len(o[0].items) if isinstance(o[0], Vec) else 1
    items = o[0].items if isinstance(o[0], Vec) else (o[0],)
    trans = "trans" in p
    addr = cta.address(o[1], 32)
    rows = [cta.row(x) for x in items]
    W, row, col = cta.W, cta.matrix_row, cta.matrix_col

    def f(m):
        whole_warps(cta, m)
        sel = cta.tid if m is None else np.flatnonzero(m)
        ws = np.unique(cta.warp[sel]) if m is not None else np.arange(W)
        lanes = addr().reshape(W, 32)[ws][:, : 8 * n]
        s = cta.shared
        a = s.index(lanes.reshape(-1), 16, sel).reshape(len(ws), n, 8)
        if cta.count_stats:
            for w in range(len(ws)):
                for k in range(n):
                    banks = ((a[w, k] >> 2)[:, None] + np.arange(4)) % 32
                    cta.stats["bank"] += int(np.bincount(banks.ravel()).max())
                    cta.stats["bank_ideal"] += 1
        if not trans:
            words = (a[:, :, row] >> 2) + col
            s.read(words.reshape(len(ws), -1), ws[:, None])
            v = s.words[words]
        else:
            halves = np.stack([a[:, :, 2 * col + h] + 2 * row for h in (0, 1)], -1) >> 1
            s.read((halves >> 1).reshape(len(ws), -1), ws[:, None])
            v = np.ascontiguousarray(s.halves[halves]).view(np.uint32)[..., 0]
        for k, out in enumerate(rows):
            if m is None:
                out[...] = v[:, k].reshape(-1)
            else:
                out.reshape(W, 32)[ws] = v[:, k]

    return f


@opcode("stmatrix ...")
def compile_stmatrix(cta, ins, p, o):
    items = o[1].items if isinstance(o[1], Vec) else (o[1],)
    n, trans = len(items), "trans" in p
    addr = cta.address(o[0], 32)
    rows = [cta.row(x) for x in items]
    W, row, col = cta.W, cta.matrix_row, cta.matrix_col

    def f(m):
        whole_warps(cta, m)
        ws = np.arange(W) if m is None else np.unique(cta.warp[m])
        s, c = cta.shared, len(ws)
        a = s.index(addr().reshape(W, 32)[ws][:, : 8 * n].reshape(-1), 16, cta.tid).reshape(c, n, 8)
        v = np.stack([r.reshape(W, 32)[ws] for r in rows], 1)  # [warps, n, 32]
        if trans:
            h = np.ascontiguousarray(v).view(np.uint16).reshape(c, n, 8, 4, 2)  # lane (g, t), half
            v = np.ascontiguousarray(h.transpose(0, 1, 3, 4, 2).reshape(c, n, 8, 8)).view(np.uint32)
            words = (a[..., None] >> 2) + np.arange(4)
        else:
            words = (a[:, :, row] >> 2) + col
        flat, values, warp = words.reshape(c, -1), v.reshape(c, -1), ws[:, None]
        s.write(flat, warp, values)
        s.words[flat] = values
        s.wrote(flat, warp)

    return f
