"""A kernel in PTX: its instructions and their operands, registers, parameters, variables and basic blocks (leaf)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BITS = {
    "pred": 1,
    **{t: 8 for t in ("b8", "u8", "s8")},
    **{t: 16 for t in ("b16", "u16", "s16", "f16", "bf16")},
    **{t: 32 for t in ("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32")},
    **{t: 64 for t in ("b64", "u64", "s64", "f64")},
}


@dataclass(unsafe_hash=True, slots=True)
class Reg:
    """A register. Its row in the file of its width is its own within the kernel."""

    name: str
    bits: int  # 1 is a predicate
    index: int  # its row
    negated: bool = False


@dataclass(unsafe_hash=True, slots=True)
class Imm:
    """A number as it is written."""

    text: str


@dataclass(unsafe_hash=True, slots=True)
class Vec:
    """Several operands in braces, or the parts of an address of a tensor: its map, then the coordinates."""

    items: tuple[Operand, ...]

    def registers(self) -> list[Reg]:
        """Return the elements, which must be registers."""
        assert all(isinstance(x, Reg) for x in self.items), self.items
        return [x for x in self.items if isinstance(x, Reg)]


@dataclass(unsafe_hash=True, slots=True)
class Addr:
    """An address in brackets; without a base the offset is all of it."""

    base: Reg | Sym | None
    offset: int


@dataclass(unsafe_hash=True, slots=True)
class Sym:
    """A special register, a label, a parameter, a variable, or the "_" of a result that nothing keeps."""

    name: str


Operand = Reg | Imm | Vec | Addr | Sym


@dataclass
class Instruction:
    """One instruction; `source` names its line of the kernel's source and those that it was inlined at."""

    opcode: str
    operands: tuple[Any, ...]  # each an Operand
    guard: Reg | None
    line: int  # of the PTX text, from 1
    text: str
    source: str
    destinations: int  # so many operands come first that are written
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    parts: list[str] = field(init=False)  # of the opcode

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")


@dataclass
class Block:
    """Instructions that run one after the other, and the one that ends them; without it the next block follows."""

    start: int
    body: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None


@dataclass(frozen=True)
class Variable:
    """A named array in shared, local or global memory, at an offset from where the kernel's part of it starts."""

    space: str
    offset: int
    size: int


@dataclass
class Kernel:
    """An entry of a PTX module."""

    name: str
    params: list[tuple[str, str]]  # name and type
    counts: dict[int, int]  # bits -> number of registers
    instructions: list[Instruction]
    blocks: list[Block]
    labels: dict[str, int]  # label -> block
    threads: int
    tables: dict[str, list[int]]  # of brx.idx: label -> blocks
    variables: dict[str, Variable]
    texts: dict[str, tuple[int, str]] = field(default_factory=dict)  # of variables with bytes: offset, text
    max_registers: int | None = None  # of a thread, where the kernel limits them

    def size(self, space: str) -> int:
        """Return the bytes of the variables of a space (of the dynamic part of shared memory: none)."""
        return max((v.offset + v.size for v in self.variables.values() if v.space == space), default=0)

    def predecessors(self) -> list[set[int]]:
        """Return for each block, and for the end, which blocks may run just before it."""
        before: list[set[int]] = [set() for _ in range(len(self.blocks) + 1)]
        for at, block in enumerate(self.blocks):
            end = block.end
            kind = "" if end is None else end.parts[0]
            if end is not None and kind == "bra":
                before[self.labels[symbol(end.operands[0])]].add(at)
            if end is not None and kind == "brx":
                for to in self.tables[symbol(end.operands[1])]:
                    before[to].add(at)
            if end is None or kind not in ("bra", "brx", "ret", "exit") or end.guard is not None:
                before[at + 1].add(at)
        return before


def number(text: str) -> int:
    """Return the value of a whole number as PTX writes it."""
    text = text.rstrip("U")
    if len(text) > 1 and text[0] == "0" and text.isdigit():
        return int(text, 8)
    return int(text, 0)


def registers(op: Operand | None) -> list[Reg]:
    """Return the registers of an operand."""
    if isinstance(op, Reg):
        return [op]
    if isinstance(op, Vec):
        return [reg for item in op.items for reg in registers(item)]
    if isinstance(op, Addr):
        return registers(op.base)
    return []


def symbol(op: Operand) -> str:
    """Return the name of an operand that must be one."""
    assert isinstance(op, Sym), op
    return op.name


def meeting(ins: Instruction) -> str | Imm | Reg | None:
    """Return with whom a thread executes an instruction: the "warp", the "warpgroup", a mask of lanes, or nobody."""
    kind = ins.parts[0]
    if kind == "wgmma":
        return "warpgroup"
    if kind in ("shfl", "vote", "match", "redux", "elect") or ins.opcode.startswith(("bar.warp", "barrier.warp")):
        members = ins.operands[-1]
        if isinstance(members, Imm) and number(members.text) & 0xFFFFFFFF == 0xFFFFFFFF:
            return "warp"
        return members if isinstance(members, (Imm, Reg)) else None
    if kind == "bar" or "aligned" in ins.parts:
        return "warp"
    return None


def synchronises(ins: Instruction) -> bool:
    """Return whether CTAs may hear of each other through an instruction."""
    kind, *rest = ins.parts
    if "shared" in rest or any(x.startswith("shared::") for x in rest):
        return False
    return kind in ("atom", "red") or (kind == "ld" and bool({"acquire", "relaxed", "volatile"} & set(rest)))
