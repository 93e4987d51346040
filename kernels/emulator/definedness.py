"""Registers that nothing wrote: who may read them, by the flow of control, and who does, thread by thread.

A compiled kernel may compute with such a register as long as nothing comes of it: lanes beyond the number of warps take
part in a reduction over warps, and none of them stores. So what is undefined is followed through registers, and is an
error where it gets out: in a store, an address, a branch, a guard, or a matrix product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from . import opcodes
from .hazard import Hazard
from .ptx import Imm, Instruction, Kernel, Reg, Vec, number, registers
from .state import Cta, Mask, Step

# Values only go from register to register, within a thread.
_FLOWS = frozenset(
    (
        *("abs", "add", "and", "bfe", "bfi", "bfind", "brev", "clz", "cnot", "copysign", "cos", "cvt", "cvta", "div"),
        *("dp2a", "dp4a", "ex2", "fma", "lg2", "lop3", "mad", "mad24", "max", "min", "mov", "mul", "mul24", "neg"),
        *("not", "or", "popc", "prmt", "rcp", "rem", "rsqrt", "sad", "selp", "setp", "shf", "shfl", "shl", "shr"),
        *("sin", "slct", "sqrt", "sub", "tanh", "testp", "xor"),
    )
)


def _used(ins: Instruction) -> frozenset[str]:
    """Return the registers on which an instruction's effect depends: prmt with a constant may select of one alone."""
    if ins.parts[0] != "prmt" or len(ins.parts) > 2 or not isinstance(ins.operands[3], Imm):
        return ins.reads
    chosen = number(ins.operands[3].text)
    # Of each nibble, bit 2 says from which operand its byte comes.
    sources = {chosen >> 4 * byte + 2 & 1 for byte in range(4)}
    unused = {r.name for n in {0, 1} - sources for r in registers(ins.operands[1 + n])}
    used = {r.name for n in sources for r in registers(ins.operands[1 + n])}
    return ins.reads - (unused - used)


def unproven_reads(kernel: Kernel) -> dict[int, frozenset[str]]:
    """Return, by PTX instruction (its ``id``), the registers that some path reaches it without a write of.

    A write under a guard proves nothing, because threads whose guard does not hold keep what there was.
    """
    numbers: dict[str, int] = {}
    for ins in kernel.instructions:
        for name in (*ins.reads, *ins.writes):
            numbers.setdefault(name, len(numbers))
    everything = (1 << len(numbers)) - 1

    def bits(names: frozenset[str]) -> int:
        found = 0
        for name in names:
            found |= 1 << numbers[name]
        return found

    code: list[list[Instruction]] = [[*block.body, *([block.end] if block.end else [])] for block in kernel.blocks]
    sets = [[(bits(_used(ins)), 0 if ins.guard else bits(ins.writes)) for ins in block] for block in code]
    written = []
    for block in sets:
        total = 0
        for _, writes in block:
            total |= writes
        written.append(total)
    before = kernel.predecessors()
    # What every path to a block has written: from all of it down to what holds.
    known = [everything] * len(code)
    if code:
        known[0] = 0
    changed = True
    while changed:
        changed = False
        for at in range(1, len(code)):
            meet = everything
            for prior in before[at]:
                meet &= known[prior] | written[prior]
            if meet != known[at]:
                known[at], changed = meet, True
    names = list(numbers)
    found: dict[int, frozenset[str]] = {}
    for at, instructions in enumerate(code):
        have = known[at]
        for ins, (reads, writes) in zip(instructions, sets[at], strict=True):
            open_ = reads & ~have
            if open_:
                found[id(ins)] = frozenset(names[k] for k in range(open_.bit_length()) if open_ >> k & 1)
            have |= writes
    return found


def _packed(kernel: Kernel) -> dict[str, int]:
    """Return the registers that are written by movs of so many parts alone."""
    found: dict[str, set[int]] = {}
    for ins in kernel.instructions:
        packs = ins.parts[0] == "mov" and isinstance(ins.operands[0], Reg) and isinstance(ins.operands[1], Vec)
        for name in ins.writes:
            found.setdefault(name, set()).add(len(ins.operands[1].items) if packs else 0)
    return {name: min(counts) for name, counts in found.items() if len(counts) == 1 and min(counts)}


class Definedness:
    """Follows, thread by thread, those registers of a kernel that are not proven to be written before they are read.

    Attributes:
        undefined: register -> [T], where nothing has given it a value.
    """

    def __init__(self, cta: Cta) -> None:
        self.cta = cta
        self.unproven = unproven_reads(cta.kernel)
        followed = {name for names in self.unproven.values() for name in names}
        grown = bool(followed)
        while grown:
            before = len(followed)
            for ins in cta.kernel.instructions:
                if ins.parts[0] in _FLOWS and not followed.isdisjoint(_used(ins)):
                    followed |= ins.writes
            grown = len(followed) != before
        self.undefined = {name: np.ones(cta.T, bool) for name in followed}
        # Registers that are only ever packed of parts, which may be taken apart again: [parts, T].
        self.parts = {name: np.ones((n, cta.T), bool) for name, n in _packed(cta.kernel).items() if name in followed}

    def start(self) -> None:
        """Forget what was written."""
        for row in (*self.undefined.values(), *self.parts.values()):
            row[:] = True

    def _of(self, names: Any) -> np.ndarray:
        found = np.zeros(self.cta.T, bool)
        for name in names:
            if name in self.undefined:
                found |= self.undefined[name]
        return found

    def _refuse(self, bad: np.ndarray, mask: Mask, names: Any) -> None:
        if mask is not None:
            bad = bad & mask
        if np.count_nonzero(bad):
            thread = int(np.argmax(bad))
            which = sorted(x for x in names if x in self.undefined and self.undefined[x][thread])
            raise Hazard(
                "uninitialised",
                f"warp {thread // 32}, thread {thread}: uses {', '.join(which[:4])}, which nothing has given a value "
                f"({int(np.count_nonzero(bad))} threads)",
            )

    def wrap(self, ins: Instruction, step: Step) -> Step:
        """Return the step of an instruction, within its guard, with what it does to the followed registers."""
        guard = {ins.guard.name} if ins.guard is not None else set()
        reads = {x for x in _used(ins) - guard if x in self.undefined}
        if ins.opcode.startswith("wgmma.mma_async"):
            return self._product(ins, step)
        if ins.parts[0] == "mov" and not self.parts.keys().isdisjoint(ins.reads | ins.writes):
            parted = self._parted(ins, step)
            if parted is not None:
                return parted
        writes = [self.undefined[x] for x in ins.writes if x in self.undefined]
        if not reads and not writes:
            return step
        flows = ins.parts[0] in _FLOWS
        lanes = self._shuffled(ins) if ins.parts[0] == "shfl" and reads else None
        choice = ins.parts[0] == "selp" and reads

        def followed(mask: Mask) -> None:
            if not flows and reads:
                self._refuse(self._of(reads), mask, reads)
            value: Any = False
            if lanes is not None:
                value = lanes(mask)
            elif choice:
                value = self._chosen(ins)
            elif flows and reads:
                value = self._of(reads)
            step(mask)
            for row in writes:
                np.copyto(row, value, where=True if mask is None else mask)

        return followed

    def _parted(self, ins: Instruction, step: Step) -> Step | None:
        """Return the step of a mov that packs or takes apart a register whose parts are followed; None for others."""
        to, of = ins.operands[:2]
        if isinstance(of, Vec) and isinstance(to, Reg):
            whole, parts = self.undefined[to.name], self.parts[to.name]

            def packed(mask: Mask) -> None:
                found = np.stack([self._of([r.name for r in registers(x)]) for x in of.items])
                step(mask)
                where: Any = True if mask is None else mask
                np.copyto(parts, found, where=where)
                np.copyto(whole, found.any(0), where=where)

            return packed
        if not (isinstance(to, Vec) and isinstance(of, Reg)) or len(to.items) != len(self.parts[of.name]):
            return None
        source = self.parts[of.name]
        pairs = [(self.undefined.get(x.name), k) for k, x in enumerate(to.items) if isinstance(x, Reg)]

        def taken_apart(mask: Mask) -> None:
            found = source.copy()
            step(mask)
            for row, k in pairs:
                if row is not None:
                    np.copyto(row, found[k], where=True if mask is None else mask)

        return taken_apart

    def _chosen(self, ins: Instruction) -> np.ndarray:
        """Return where selp's result is undefined: by the operand that is chosen, and by the choice."""
        a, b, c = ins.operands[1:4]
        holds = self.cta.row(c)
        parts = [self._of([r.name for r in registers(x)]) for x in (a, b, c)]
        return np.where(holds, parts[0], parts[1]) | parts[2]

    def _shuffled(self, ins: Instruction) -> Any:
        """Return a function of where shfl's result is undefined: the same shuffle of the operand's flags."""
        cta, source = self.cta, ins.operands[ins.destinations]
        others = [r.name for x in ins.operands[ins.destinations + 1 :] for r in registers(x)]
        base = cta.kernel.counts[32]  # two rows that are no register's
        rows = [Reg(name, 32, base + k) for k, name in enumerate(("flags", "shuffled flags"))]
        shadow = replace(
            ins,
            operands=(
                replace(rows[1], index=base + 1),
                replace(rows[0], index=base),
                *ins.operands[ins.destinations + 1 :],
            ),
            destinations=1,
        )
        flags = cta.files[32][base:]
        step = opcodes.find(ins.opcode)(cta, shadow, shadow.parts, shadow.operands)

        def shuffled(mask: Mask) -> np.ndarray:
            self._refuse(self._of(others), mask, others)
            flags[0] = self._of([r.name for r in registers(source)])
            flags[1] = flags[0]
            step(mask)
            return flags[1] != 0

        return shuffled

    def _product(self, ins: Instruction, step: Step) -> Step:
        """Return the step of a wgmma, which reads its accumulator only where its scale is not 0."""
        acc = [r.name for r in registers(ins.operands[0]) if r.name in self.undefined]
        others = [r.name for x in ins.operands[1:] for r in registers(x) if r.name in self.undefined]
        if not acc and not others:
            return step
        scale = self.cta.predicate(ins.operands[3])
        rows = [self.undefined[name] for name in acc]

        def followed(mask: Mask) -> None:
            if acc:
                self._refuse(self._of(acc) & scale(), mask, acc)
            if others:
                self._refuse(self._of(others), mask, others)
            step(mask)
            for row in rows:
                np.copyto(row, False, where=True if mask is None else mask)

        return followed

    def wrap_guard(self, ins: Instruction, step: Any) -> Any:
        """Return a step, or the end of a block, that checks what decides about it."""
        names = set()
        if ins.guard is not None:
            names.add(ins.guard.name)
        if ins.parts[0] in ("brx", "bar", "barrier", "mbarrier") and step is not None:
            names |= {r.name for x in ins.operands[ins.destinations :] for r in registers(x)}
        names = {x for x in names if x in self.undefined}
        if not names:
            return step

        def checked(mask: Mask) -> Any:
            self._refuse(self._of(names), mask, names)
            return step(mask)

        return checked
