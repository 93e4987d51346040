"""wgmma: matrix products of a warpgroup, with operands in shared memory, and asynchronous.

Sums are rounded as :mod:`.matrix` says. Missing: sparse operands, 1-bit operands. tcgen05, which takes the place of
wgmma on sm_100, is missing as a whole, with tensor memory and its allocation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..descriptors import Descriptor
from ..hazard import Hazard, UnknownInstruction
from ..ptx import Instruction, Reg, Vec, number
from ..state import Cta, Mask, Step
from . import opcode
from .matrix import WIDTHS, decode, fragment_a, pack_sum, register_names, registers, unpack_sum

WARPGROUP = 128


@dataclass(frozen=True)
class Form:
    """What a wgmma instruction says of all its executions."""

    ins: Instruction
    n: int
    k: int
    kinds: tuple[str, str, str]  # of the accumulator, of A, of B
    sign: int
    saturate: bool
    sums: np.ndarray  # registers of the accumulator
    sum_names: frozenset[str]
    a_names: frozenset[str]  # of the first operand, where it lies in registers

    def clashes(self, earlier: Form) -> bool:
        """Return whether this must wait for an earlier one: only accumulation in the same registers need not."""
        shared = self.sum_names & earlier.sum_names
        same = self.n == earlier.n and self.kinds[0] == earlier.kinds[0] and np.array_equal(self.sums, earlier.sums)
        return bool(shared and not same) or not (
            self.sum_names.isdisjoint(earlier.a_names) and self.a_names.isdisjoint(earlier.sum_names)
        )


@dataclass
class Product:
    """A wgmma under way."""

    form: Form
    group: int  # its warpgroup
    uses: list[tuple[np.ndarray, np.ndarray]]  # of B, and of A in shared memory: elements, and words without repetition
    views: list[np.ndarray]  # shared memory as elements
    accumulate: np.ndarray  # per thread
    a_words: np.ndarray | None  # A in registers
    data: list[np.ndarray] | None = None  # operands in shared memory, once they are read

    @property
    def names(self) -> frozenset[str]:
        """Return the names of all its registers."""
        return self.form.sum_names | self.form.a_names

    def read(self) -> None:
        """Read the operands in shared memory, once."""
        if self.data is None:
            self.data = [view[at] for view, (at, _) in zip(self.views, self.uses, strict=True)]


@opcode("wgmma fence sync aligned")
def compile_wgmma_fence(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    return lambda mask: None  # the rule is checked when the kernel is read


@opcode("wgmma commit_group sync aligned")
def compile_commit(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    def step(mask: Mask) -> None:
        flight = cta.in_flight
        for g in warpgroups(cta, mask):
            flight.product_groups[g].append(flight.products[g])
            flight.products[g] = []

    return step


@opcode("wgmma wait_group sync aligned")
def compile_wait(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    keep = number(o[0].text)

    def step(mask: Mask) -> None:
        flight = cta.in_flight
        for g in warpgroups(cta, mask):
            while len(flight.product_groups[g]) > keep:
                for product in flight.product_groups[g].pop(0):
                    retire(cta, product)
        flight.registers = {r for g in range(len(flight.products)) for x in flight.under_way(g) for r in x.names}

    return step


def _form(ins: Instruction, p: list[str], o: tuple[Any, ...]) -> tuple[Form, tuple[bool, bool]]:
    """Return what an instruction says, and which operands lie MN-major (A, B)."""
    n, k = (int(x) for x in p[4].removeprefix("m64n").split("k"))
    kinds = (p[-3], p[-2], p[-1])
    integer, width = kinds[0] == "s32", WIDTHS[kinds[1]]
    in_registers = isinstance(o[1], Vec)
    rest = [number(x.text) for x in o[4:]]
    wanted = 0 if integer else 2 if width != 16 else 3 if in_registers else 4
    sizes = n % 8 == 0 and 8 <= n <= 256 and (not integer or n <= 24 or n % 16 == 0)
    sums = registers(o[0])
    if not sizes or k * width != 256 or len(rest) != wanted or any(x not in (1, -1) for x in rest[:2]):
        raise UnknownInstruction(f"{ins.opcode}: shape or immediates {rest}")
    if len(sums) != n // (4 if kinds[0] == "f16" else 2) or (in_registers and len(registers(o[1])) != 4):
        raise UnknownInstruction(f"{ins.opcode}: {len(sums)} registers of the accumulator")
    sign = rest[0] * rest[1] if rest else 1
    major = [bool(x) for x in rest[2:]]
    form = Form(
        ins,
        n,
        k,
        kinds,
        sign,
        "satfinite" in p,
        sums,
        frozenset(register_names(o[0])),
        frozenset(register_names(o[1])),
    )
    return form, (len(major) == 2 and major[0], bool(major) and major[-1])


@opcode(
    r"wgmma mma_async sync aligned m64n\d+k16 f32 bf16 bf16",
    r"wgmma mma_async sync aligned m64n\d+k16 f32|f16 f16 f16",
    r"wgmma mma_async sync aligned m64n\d+k8 f32 tf32 tf32",
    r"wgmma mma_async sync aligned m64n\d+k32 f32|f16 e4m3|e5m2 e4m3|e5m2",
    r"wgmma mma_async sync aligned m64n\d+k32 satfinite? s32 s8|u8 s8|u8",
)
def compile_wgmma(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    form, (a_major, b_major) = _form(ins, p, o)
    size = WIDTHS[p[-1]] // 8
    view = cta.shared.raw.view(f"u{size}")
    a_index = registers(o[1]) if isinstance(o[1], Vec) else None
    a_descriptor = None if a_index is not None else cta.row(o[1], "u64")
    b_descriptor = cta.row(o[2], "u64")
    accumulate = cta.row(o[3]) if isinstance(o[3], Reg) else np.full(cta.T, bool(number(o[3].text)))
    negated = isinstance(o[3], Reg) and o[3].negated
    R = cta.files[32]
    names = form.sum_names | form.a_names
    clashes: dict[int, bool] = {}  # by line

    def operand(bits: np.ndarray, mn: int, major: bool, is_a: bool) -> tuple[np.ndarray, np.ndarray]:
        if (bits != bits[0]).any():
            raise Hazard("convergence", "a wgmma descriptor differs within its warpgroup")
        key = (int(bits[0]), mn, form.k, size, major, is_a)
        if key not in cta.descriptors:
            at = Descriptor.decode(key[0]).addresses(mn, form.k, size, major)
            if at.min() < cta.shared.BASE or at.max() + size > cta.shared.end:
                raise Hazard("address", f"the wgmma descriptor {key[0]:#018x} leaves shared memory")
            cta.descriptors[key] = (np.ascontiguousarray(at if is_a else at.T) // size, np.unique(at >> 2))
        return cta.descriptors[key]

    def step(mask: Mask) -> None:
        s, flight = cta.shared, cta.in_flight
        for g in warpgroups(cta, mask):
            t = slice(g * WARPGROUP, (g + 1) * WARPGROUP)
            for earlier in flight.under_way(g):
                line = earlier.form.ins.line
                if line not in clashes:
                    clashes[line] = form.clashes(earlier.form)
                if clashes[line]:
                    raise Hazard("async", f"a wgmma uses registers of one under way, of PTX line {line}")
            uses = [operand(b_descriptor[t], form.n, b_major, False)]
            if a_descriptor is not None:
                uses.append(operand(a_descriptor[t], 64, a_major, True))
            for _, words in uses:
                s.begin_stream(words[None], (np.arange(4) + 4 * g)[:, None])
            a_words = R[a_index][:, t] if a_index is not None else None
            adds = accumulate[t] ^ negated
            if adds.any() and not adds.all():
                raise Hazard("convergence", "the scale of a wgmma's accumulator differs within its warpgroup")
            product = Product(form, int(g), uses, [view] * len(uses), adds, a_words)
            if not flight.late():
                product.read()
            flight.products[g].append(product)
        flight.registers |= names

    return step


def warpgroups(cta: Cta, mask: Mask) -> Iterable[int]:
    """Return the warpgroups that take part, each whole."""
    if mask is None:
        return range(cta.T // WARPGROUP)
    part = mask.reshape(-1, WARPGROUP)
    if (part.any(1) != part.all(1)).any():
        raise Hazard("convergence", "a wgmma instruction runs with threads of its warpgroup missing")
    return np.flatnonzero(part.all(1))


def retire(cta: Cta, product: Product) -> None:
    """Compute a product and put it into its registers; its operands may be written from now on."""
    s, form, R, g = cta.shared, product.form, cta.files[32], product.group
    t = slice(g * WARPGROUP, (g + 1) * WARPGROUP)
    d_kind, a_kind, b_kind = form.kinds
    product.read()
    data = product.data
    assert data is not None
    if product.a_words is None:
        a = decode(a_kind, data[1])  # [64, K]
    else:
        a = fragment_a(product.a_words, a_kind).reshape(64, form.k)
    x = np.matmul(a, decode(b_kind, data[0]))
    if form.sign < 0:
        x = -x
    # [warp, row half, g, tile of 8 columns, t, column of two] to registers [tile, row half, column] of threads
    x = x.reshape(4, 2, 8, form.n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(form.n // 2, -1)
    old = unpack_sum(R[form.sums][:, t], d_kind)
    R[form.sums, t] = pack_sum(x + np.where(product.accumulate, old, 0.0), d_kind, form.saturate)
    warps = np.arange(4) + 4 * g
    for _, words in product.uses:
        s.end_stream(words[None], warps[:, None])


def check_fence(cta: Cta, at: int, n: int) -> None:
    """PTX wants a wgmma.fence on every path from another access of a wgmma's registers, and before the first.

    One access is let through, though PTX does not say that it may be: a mov that packs two halves into a register of
    the first operand. LLVM may put it behind the fence, on which it does not depend; ptxas follows such a register
    like any other and lets the warpgroup arrive behind it (test_packed_operands.py reads that in the machine code).
    """
    ins = cta.kernel.blocks[at].body[n]
    sums = set(register_names(ins.operands[0]))
    data = set(register_names(ins.operands[0])) | (
        set(register_names(ins.operands[1])) if isinstance(ins.operands[1], Vec) else set()
    )
    seen: set[int] = set()
    todo: list[tuple[int, int | None]] = [(at, n)]
    while todo:
        block, stop = todo.pop()
        for prior in reversed(cta.kernel.blocks[block].body[:stop]):
            if prior.opcode.startswith("wgmma.fence"):
                break
            packs = prior.opcode.startswith("mov.") and isinstance(prior.operands[1], Vec) and not sums & prior.writes
            if not prior.opcode.startswith("wgmma") and not packs and data & (prior.reads | prior.writes):
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


def pending_fault(cta: Cta, ins: Instruction, mask: Mask) -> None:
    """Check that an instruction leaves the registers of a wgmma under way alone: it may read the first operand's."""
    if ins.opcode.startswith("wgmma."):
        return
    for g in range(cta.T // 128):
        if mask is None or mask[g * 128 : g * 128 + 128].any():
            under_way = cta.in_flight.under_way(g)
            acc = {r for x in under_way for r in x.form.sum_names}
            used = {r for x in under_way for r in x.names}
            hit = sorted((ins.reads | ins.writes) & acc) or sorted(ins.writes & used)
            if hit:
                raise Hazard("async", f"touches {hit[0]}, which a wgmma under way uses")
