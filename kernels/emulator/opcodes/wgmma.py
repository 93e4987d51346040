"""wgmma: matrix products of a warpgroup, from shared memory and asynchronous."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..hazard import Hazard
from ..numbers import bf16_to_f32, pairs, tf32
from ..ptx import Instruction, Reg, Vec, number
from . import opcode
from .matrix import indices, register_names


@dataclass
class Product:
    """A wgmma under way."""

    group: int
    n: int
    kind: str
    sign: int
    acc: np.ndarray  # registers of the accumulator
    names: frozenset[str]  # of all its registers
    acc_names: frozenset[str]
    uses: list[tuple[np.ndarray, np.ndarray]]  # of each operand in shared memory: its elements, its words
    view: np.ndarray  # of shared memory, by elements
    scale: np.ndarray  # per thread: add to the accumulator, or replace it
    a_bits: np.ndarray | None  # the first operand, where it comes from registers
    data: list[np.ndarray] | None = None  # operands in shared memory, once they are read

    def read(self) -> None:
        """Read the operands in shared memory, once."""
        if self.data is None:
            self.data = [self.view[at] for at, _ in self.uses]


@opcode("wgmma ...")
def compile_wgmma(cta, ins, p, o):
    kind = p[1]
    if kind == "fence":
        return lambda m: None
    if kind == "commit_group":

        def commit(m):
            for g in warpgroups(cta, m):
                cta.in_flight.product_groups[g].append(cta.in_flight.products[g])
                cta.in_flight.products[g] = []

        return commit
    if kind == "wait_group":
        keep = number(o[0].text)

        def wait(m):
            flight = cta.in_flight
            for g in warpgroups(cta, m):
                while len(flight.product_groups[g]) > keep:
                    for product in flight.product_groups[g].pop(0):
                        retire(cta, product)
            flight.registers = {r for g in range(len(flight.products)) for x in flight.under_way(g) for r in x.names}
            flight.update_streaming(cta)

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
            view = s.words if size == 4 else s.halves
            product = Product(
                int(g),
                n,
                kind,
                sign,
                acc,
                names,
                acc_names,
                uses,
                view,
                scale_d[t].copy(),
                R[a_index][:, t] if a_regs else None,
            )
            if not cta.in_flight.late():
                product.read()
            cta.in_flight.products[g].append(product)
        s.any_streaming = True
        cta.in_flight.registers |= names

    return f


def warpgroups(cta, m):
    """The warpgroups that take part, each whole."""
    if m is None:
        return range(cta.T // 128)
    part = m.reshape(-1, 128)
    if (part.any(1) != part.all(1)).any():
        raise Hazard("convergence", "a wgmma instruction runs with threads of its warpgroup missing")
    return np.flatnonzero(part.all(1))


def retire(cta, product: Product) -> None:
    """Compute a product and put it into its registers; its operands may be written from now on."""
    s, n, R, g, kind = cta.shared, product.n, cta.files[32], product.group, product.kind
    t = slice(g * 128, g * 128 + 128)
    product.read()
    data = product.data
    assert data is not None
    conv = {"bf16": bf16_to_f32, "f16": lambda x: x.view(np.float16), "tf32": tf32}[kind]
    b = conv(data[0]).astype(np.float64)  # [K, N]
    if product.a_bits is None:
        a = conv(data[1]).astype(np.float64)  # [M, K]
    elif kind == "tf32":
        a = tf32(product.a_bits).astype(np.float64).reshape(2, 2, 4, 8, 4)  # k half, row half, warp, g, t
        a = a.transpose(2, 1, 3, 0, 4).reshape(64, 8)
    else:
        a = pairs(kind, product.a_bits).reshape(2, 2, 4, 8, 4, 2)  # k half, row half, warp, g, t, h
        a = a.transpose(2, 1, 3, 0, 4, 5).reshape(64, 16)
    r = np.matmul(a, b) * product.sign
    # [warp, row half, g, j, t, e] to registers [j, row half, e] of threads [warp, g, t]
    r = r.reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)
    old = R[product.acc][:, t].view(np.float32).astype(np.float64)
    R[product.acc, t] = (r + np.where(product.scale, old, 0.0)).astype(np.float32).view(np.uint32)
    warps = np.arange(4) + 4 * g
    for _, words in product.uses:
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
    """Check that an instruction leaves the registers of a wgmma under way alone: it may read the first operand's."""
    if ins.opcode.startswith("wgmma."):
        return
    for g in range(cta.T // 128):
        if mask is None or mask[g * 128 : g * 128 + 128].any():
            under_way = cta.in_flight.under_way(g)
            acc = {r for x in under_way for r in x.acc_names}
            used = {r for x in under_way for r in x.names}
            hit = sorted((ins.reads | ins.writes) & acc) or sorted(ins.writes & used)
            if hit:
                raise Hazard("async", f"touches {hit[0]}, which a wgmma under way uses")
