"""wgmma: matrix products of a warpgroup, from shared memory and asynchronous."""

from __future__ import annotations

import numpy as np

from ..hazard import Hazard
from ..numbers import bf16_to_f32, pairs, tf32
from ..ptx import Instruction, Reg, Vec, number
from . import opcode
from .matrix import indices, register_names


@opcode("wgmma ...")
def compile_wgmma(cta, ins, p, o):
    kind = p[1]
    if kind == "fence":
        return lambda m: None
    if kind == "commit_group":

        def commit(m):
            for g in warpgroups(cta, m):
                cta.mma_groups[g].append(cta.mmas[g])
                cta.mmas[g] = []

        return commit
    if kind == "wait_group":
        keep = number(o[0].text)

        def wait(m):
            for g in warpgroups(cta, m):
                while len(cta.mma_groups[g]) > keep:
                    for mma in cta.mma_groups[g].pop(0):
                        retire(cta, mma)
            cta.pending = {
                r
                for groups, open_ in zip(cta.mma_groups, cta.mmas, strict=True)
                for q in [*groups, open_]
                for each in q
                for r in each["names"]
            }
            cta.shared.any_streaming = bool(cta.pending)

        return wait
    shape = next(x for x in p if x.startswith("m64n"))
    n, k = (int(x) for x in shape[4:].split("k"))
    kind = p[-1]
    if (kind, k) not in (("bf16", 16), ("f16", 16), ("tf32", 8)) or p[-3] != "f32":
        raise NotImplementedError(ins.opcode)
    acc = indices(o[0])
    a_regs = isinstance(o[1], Vec)
    a_index = indices(o[1]) if a_regs else None
    a_desc = None if a_regs else cta.row(o[1], "u64")
    b_desc = cta.row(o[2], "u64")
    scale, rest = o[3], [number(x.text) for x in o[4:]]
    sign = rest[0] * rest[1]
    size = 4 if kind == "tf32" else 2
    trans_a, trans_b = (0, 0) if size == 4 else (0, rest[2]) if a_regs else rest[2:4]
    names = frozenset(register_names(o[0]) + (register_names(o[1]) if a_regs else []))
    acc_names = frozenset(register_names(o[0]))
    scale_d = cta.row(scale) if isinstance(scale, Reg) else np.full(cta.T, bool(number(scale.text)))
    R = cta.files[32]

    def uniform(row):
        if (row != row[0]).any():
            raise Hazard("convergence", "a wgmma descriptor differs within its warpgroup")
        return int(row[0])

    def f(m):
        s = cta.shared
        for g in warpgroups(cta, m):
            t = slice(g * 128, g * 128 + 128)
            warps = (np.arange(4) + 4 * g)[:, None]
            uses = [descriptor(cta, uniform(b_desc[t]), k, n, trans_b, False, size)]
            if a_desc is not None:
                uses.append(descriptor(cta, uniform(a_desc[t]), k, 64, trans_a, True, size))
            for _, words in uses:
                if words[-1] * 4 + 4 > s.end or words[0] * 4 < s.BASE:
                    raise Hazard("address", "a wgmma descriptor leaves shared memory")
                s.read(words[None], warps, generic=False)
                s.streaming[words] += 1
            mma = {
                "acc": acc,
                "n": n,
                "sign": sign,
                "names": names,
                "acc_names": acc_names,
                "kind": kind,
                "group": g,
                "a_bits": R[a_index][:, t] if a_regs else None,
                "uses": uses,
                "scale": scale_d[t].copy(),
                "data": None,
                "view": s.words if size == 4 else s.halves,
            }
            if not cta.late:
                mma["data"] = [mma["view"][h].copy() for h, _ in uses]
            cta.mmas[g].append(mma)
        s.any_streaming = True
        cta.pending |= names

    return f


def warpgroups(cta, m):
    """The warpgroups that take part, each whole."""
    if m is None:
        return range(cta.T // 128)
    part = m.reshape(-1, 128)
    if (part.any(1) != part.all(1)).any():
        raise Hazard("convergence", "a wgmma instruction runs with threads of its warpgroup missing")
    return np.flatnonzero(part.all(1))


def retire(cta, mma: dict) -> None:
    s, n, R, g = cta.shared, mma["n"], cta.files[32], mma["group"]
    t = slice(g * 128, g * 128 + 128)
    data = mma["data"] or [mma["view"][h] for h, _ in mma["uses"]]
    conv = {"bf16": bf16_to_f32, "f16": lambda x: x.view(np.float16), "tf32": tf32}[mma["kind"]]
    b = conv(data[0]).astype(np.float64)  # [K, N]
    if mma["a_bits"] is None:
        a = conv(data[1]).astype(np.float64)  # [M, K]
    elif mma["kind"] == "tf32":
        a = tf32(mma["a_bits"]).astype(np.float64).reshape(2, 2, 4, 8, 4)  # k half, row half, warp, g, t
        a = a.transpose(2, 1, 3, 0, 4).reshape(64, 8)
    else:
        a = pairs(mma["kind"], mma["a_bits"]).reshape(2, 2, 4, 8, 4, 2)  # k half, row half, warp, g, t, h
        a = a.transpose(2, 1, 3, 0, 4, 5).reshape(64, 16)
    r = np.matmul(a, b) * mma["sign"]
    # [warp, row half, g, j, t, e] to registers [j, row half, e] of threads [warp, g, t]
    r = r.reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)
    old = R[mma["acc"]][:, t].view(np.float32).astype(np.float64)
    R[mma["acc"], t] = (r + np.where(mma["scale"], old, 0.0)).astype(np.float32).view(np.uint32)
    warps = np.arange(4) + 4 * g
    for _, words in mma["uses"]:
        s.streaming[words] -= 1
        if s.check:
            s.read_stamp[warps[:, None], words[None]] = s.clock[warps, warps][:, None]


def descriptor(cta, desc: int, k: int, mn: int, transposed: int, is_a: bool, size: int):
    """Where an operand lies: indices of elements ([M, K] for a, [K, N] for b) and of the distinct words."""
    key = (desc, k, mn, transposed, is_a, size)
    if key not in cta.descriptors:
        start, lead, stride = (desc & 0x3FFF) << 4, ((desc >> 16) & 0x3FFF) << 4, ((desc >> 32) & 0x3FFF) << 4
        mode, base = desc >> 62, (desc >> 49) & 7
        if base:
            raise NotImplementedError("base offset")
        row = {0: 16, 1: 128, 2: 64, 3: 32}[mode]  # bytes of one row of a swizzle atom
        bits = {0: 0, 1: 7, 2: 3, 3: 1}[mode]
        i, j = np.arange(mn)[:, None], np.arange(k)[None, :]
        if not transposed:  # K runs along rows
            if mode:
                off = (i // 8) * stride + (i % 8) * row + j * size
            else:
                per = 16 // size
                off = (i // 8) * stride + (i % 8) * 16 + (j // per) * lead + (j % per) * size
        else:  # M or N runs along rows
            e = row // 2
            if mode:
                off = (i % e) * 2 + (i // e) * lead + (j % 8) * row + (j // 8) * stride
            else:
                off = (i % 8) * 2 + (i // 8) * stride + (j % 8) * 16 + (j // 8) * lead
        at = start + off
        at = at ^ (((at >> 7) & bits) << 4)
        at = np.ascontiguousarray(at if is_a else at.T)
        cta.descriptors[key] = (at // size, np.unique(at >> 2))
    return cta.descriptors[key]


def check_fence(cta, at: int, n: int) -> None:
    """PTX wants a wgmma.fence on every path from another access of a wgmma's registers, and before the first."""
    ins = cta.kernel.blocks[at].body[n]
    data = set(register_names(ins.operands[0])) | (
        set(register_names(ins.operands[1])) if isinstance(ins.operands[1], Vec) else set()
    )
    seen, todo = set(), [(at, n)]
    while todo:
        block, stop = todo.pop()
        for prior in reversed(cta.kernel.blocks[block].body[:stop]):
            if prior.opcode.startswith("wgmma.fence"):
                break
            if not prior.opcode.startswith("wgmma") and data & (prior.reads | prior.writes):
                raise Hazard(
                    "fence",
                    f"PTX line {ins.line} ({ins.source}): a wgmma with no wgmma.fence since line "
                    f"{prior.line}: {prior.text[:80]}",
                )
        else:
            if block == 0:
                raise Hazard("fence", f"PTX line {ins.line} ({ins.source}): no wgmma.fence before it")
            for before in cta.before[block] - seen:
                seen.add(before)
                todo.append((before, None))


def pending_fault(cta, ins: Instruction, mask) -> None:
    if ins.opcode.startswith("wgmma."):
        return
    for g in range(cta.T // 128):
        if mask is None or mask[g * 128 : g * 128 + 128].any():
            under_way = [q for group in cta.mma_groups[g] + [cta.mmas[g]] for q in group]
            acc = {r for q in under_way for r in q["acc_names"]}
            used = {r for q in under_way for r in q["names"]}
            hit = sorted((ins.reads | ins.writes) & acc) or sorted(ins.writes & used)
            if hit:
                raise Hazard("async", f"touches {hit[0]}, which a wgmma under way uses")
