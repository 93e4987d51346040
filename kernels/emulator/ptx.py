"""Parse the PTX of one kernel into instructions, registers, parameters and basic blocks."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

_BITS = {
    "pred": 1,
    "b8": 8,
    "u8": 8,
    "s8": 8,
    "b16": 16,
    "u16": 16,
    "s16": 16,
    "f16": 16,
    "bf16": 16,
    "b32": 32,
    "u32": 32,
    "s32": 32,
    "f32": 32,
    "b64": 64,
    "u64": 64,
    "s64": 64,
    "f64": 64,
}
_INSTRUCTION = re.compile(r"^(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
# Opcodes whose first operand is no destination.
_NO_DESTINATION = (
    "st",
    "mbarrier.arrive",
    "brx",
    "bar",
    "barrier",
    "bra",
    "ret",
    "exit",
    "cp",
    "fence",
    "membar",
    "wgmma.fence",
    "wgmma.commit_group",
    "wgmma.wait_group",
    "mbarrier.init",
    "mbarrier.inval",
    "setmaxnreg",
    "red",
    "griddepcontrol",
    "nanosleep",
    "trap",
)


@dataclass(frozen=True)
class Reg:
    name: str
    bits: int  # 1 is a predicate
    index: int  # row in the file of registers of this width
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    text: str


@dataclass(frozen=True)
class Vec:
    items: tuple[Operand, ...]

    def registers(self) -> list[Reg]:
        """Return the elements, which must be registers."""
        assert all(isinstance(x, Reg) for x in self.items), self.items
        return [x for x in self.items if isinstance(x, Reg)]


@dataclass(frozen=True)
class Addr:
    base: Reg | Sym | None
    offset: int


@dataclass(frozen=True)
class Sym:
    """A special register, a label, a parameter or a variable."""

    name: str


Operand = Reg | Imm | Vec | Addr | Sym


@dataclass
class Instruction:
    opcode: str
    operands: tuple
    guard: Reg | None
    line: int  # of the PTX text, from 1
    text: str
    source: str  # file:line of the nearest .loc
    scope: int = 0
    reads: frozenset = frozenset()
    writes: frozenset = frozenset()

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Block:
    start: int
    body: list = field(default_factory=list)  # instructions before the terminator
    end: Instruction | None = None  # bra, bar.sync, ret; None falls through


@dataclass
class Kernel:
    name: str
    params: list  # (name, type)
    counts: dict  # bits -> number of registers
    instructions: list
    blocks: list
    labels: dict  # label -> block
    threads: int
    tables: dict = field(default_factory=dict)  # of brx.idx: label -> blocks

    def predecessors(self) -> list[set[int]]:
        """Return for each block, and for the end, which blocks may run just before it."""
        before: list[set[int]] = [set() for _ in range(len(self.blocks) + 1)]
        for at, block in enumerate(self.blocks):
            end = block.end
            kind = "" if end is None else end.parts[0]
            if kind == "bra":
                before[self.labels[end.operands[0].name]].add(at)
            if kind == "brx":
                for to in self.tables[end.operands[1].name]:
                    before[to].add(at)
            if kind not in ("bra", "brx", "ret", "exit") or end.guard is not None:
                before[at + 1].add(at)
        return before


def _split(text: str) -> list[str]:
    parts, depth, word = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(word.strip())
            word = ""
        else:
            word += c
    if word.strip():
        parts.append(word.strip())
    return parts


def number(text: str) -> int:
    return int(text.rstrip("U"), 0)


class _Parser:
    def __init__(self) -> None:
        self.regs: dict[str, Reg] = {}
        self.counts = {1: 0, 16: 0, 32: 0, 64: 0}
        self.scopes: list[dict[str, Reg]] = [self.regs]
        self.opened, self.ids = 0, [0]

    def declare(self, text: str) -> None:
        m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        bits = max(_BITS[m.group(1)], 16) if m.group(1) != "pred" else 1
        for name in _split(m.group(2)):
            ranged = re.match(r"(%?\w+)<(\d+)>", name)
            for each in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]:
                self.scopes[-1][each] = Reg(
                    f"{each}" if len(self.scopes) == 1 else f"{each}'{self.counts[bits]}", bits, self.counts[bits]
                )
                self.counts[bits] += 1

    def reg(self, name: str) -> Reg | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def operand(self, text: str):
        if text.startswith("{"):
            return Vec(tuple(self.operand(t) for t in _split(text[1:-1])))
        if text.startswith("["):
            inner = text[1:-1]
            if "," in inner:  # tensor coordinates: [map, {x, y}]
                return Vec(tuple(self.operand(t) for t in _split(inner)))
            m = re.match(r"^\s*([%$\w.]+?)\s*(?:\+\s*(-?\w+))?\s*$", inner)
            base = m.group(1)
            offset = number(m.group(2)) if m.group(2) else 0
            if re.match(r"^-?\d", base):
                return Addr(None, number(base) + offset)
            return Addr(self.reg(base) or Sym(base), offset)
        if text.startswith("!"):
            r = self.reg(text[1:])
            return Reg(r.name, r.bits, r.index, True)
        found = self.reg(text)
        if found:
            return found
        if re.match(r"^-?\d", text):
            return Imm(text)
        # labels of an inner scope are its own
        return Sym(
            f"{text}@{self.ids[-1]}"
            if len(self.ids) > 1 and re.match(r"^[a-zA-Z]\w*$", text) and text != "global_smem"
            else text
        )


def _regs(x) -> list[str]:
    if isinstance(x, Reg):
        return [x.name]
    if isinstance(x, Vec):
        return [n for item in x.items for n in _regs(item)]
    if isinstance(x, Addr):
        return _regs(x.base)
    return []


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Kernel:
    """The first ``.entry`` of a PTX module."""
    lines = [line.split("//")[0] for line in text.split("\n")]
    start = next(i for i, line in enumerate(lines) if ".entry" in line)
    name = re.search(r"\.entry\s+([\w$]+)", lines[start]).group(1)
    body = next(i for i in range(start, len(lines)) if lines[i].startswith("{"))
    head = " ".join(lines[start:body])
    params = [
        (m.group(2), m.group(1))
        for m in re.finditer(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,()]*?([\w$]+_param_\d+)", head)
    ]
    threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head).group(1))
    files = {m.group(1): m.group(2).split("/")[-1] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    p = _Parser()
    instructions, labels, tables, last_label, source, pending, at = [], {}, {}, "", "", "", 0
    for number_, line in enumerate(lines[body + 1 :], body + 2):
        if line.startswith("}") and len(p.scopes) == 1 and not pending.strip():
            break
        s = line.strip()
        if not pending:
            loc = re.match(r"^\.loc\s+(\d+)\s+(\d+)", s)
            if loc:
                source = f"{files.get(loc.group(1), loc.group(1))}:{loc.group(2)}"
                continue
            if s.startswith((".pragma", ".file")):
                continue
            at = number_
        pending += " " + s
        while True:
            t = pending.strip()
            label = re.match(r"^([$\w]+):\s*", t)
            if label:
                own = f"@{p.ids[-1]}" if len(p.ids) > 1 and label.group(1)[0] != "$" else ""
                labels.setdefault(label.group(1) + own, len(instructions))
                last_label = label.group(1)
                pending = t[label.end() :]
            elif t.startswith("{") and not re.match(r"^\{\s*%", t):
                p.scopes.append({})
                p.opened += 1
                p.ids.append(p.opened)
                pending = t[1:]
            elif t.startswith("}"):
                p.scopes.pop()
                p.ids.pop()
                pending = t[1:]
            elif ";" in t:
                statement, pending = t.split(";", 1)
                statement = re.sub(r"\s+", " ", statement.strip())
                if statement.startswith(".branchtargets"):
                    tables[last_label] = _split(statement.split(" ", 1)[1])
                elif statement.startswith(".reg"):
                    p.declare(statement)
                elif statement:
                    instructions.append(_instruction(p, statement, at, source))
            else:
                pending = t
                break
    blocks, where = _blocks(instructions, labels, {t for table in tables.values() for t in table})
    return Kernel(
        name,
        params,
        p.counts,
        instructions,
        blocks,
        where,
        threads,
        {n: [where[t] for t in table] for n, table in tables.items()},
    )


def _instruction(p: _Parser, statement: str, line: int, source: str) -> Instruction:
    m = _INSTRUCTION.match(statement)
    if not m:
        raise ValueError(f"line {line}: not understood: {statement}")
    negated, guard, opcode, rest = m.groups()
    g = None
    if guard:
        r = p.reg(guard)
        g = Reg(r.name, 1, r.index, negated == "!")
    words = []
    for word in _split(rest):
        # d|p: a second destination that is a predicate
        words += [w.strip() for w in word.split("|")] if "|" in word and word.startswith("%") else [word]
    operands = tuple(p.operand(w) for w in words)
    ins = Instruction(opcode, operands, g, line, statement, source)
    has_destination = not opcode.startswith(tuple(x + "." for x in _NO_DESTINATION)) and opcode not in _NO_DESTINATION
    writes = _regs(operands[0]) if has_destination and operands else []
    reads = [n for x in operands[1 if has_destination else 0 :] for n in _regs(x)] + ([g.name] if g else [])
    if opcode.startswith("wgmma.mma_async"):
        reads += writes
    ins.reads, ins.writes = frozenset(reads), frozenset(writes)
    return ins


def _blocks(instructions: list, labels: dict, more: set) -> tuple[list, dict]:
    """Blocks end at branches, barriers and returns, and before labels that are jumped to."""
    targets = more | {
        o.name for i in instructions if i.opcode.startswith("bra") for o in i.operands if isinstance(o, Sym)
    }
    starts = {0} | {labels[t] for t in targets}
    for n, ins in enumerate(instructions):
        if _is_end(ins):
            starts.add(n + 1)
    order = sorted(s for s in starts if s < len(instructions))
    blocks, where = [], {}
    for k, s in enumerate(order):
        stop = order[k + 1] if k + 1 < len(order) else len(instructions)
        body, end = instructions[s:stop], None
        if body and _is_end(body[-1]):
            body, end = body[:-1], body[-1]
        blocks.append(Block(s, body, end))
        where[s] = k
    return blocks, {t: where[labels[t]] for t in targets}


def _is_end(ins: Instruction) -> bool:
    return ins.opcode.split(".")[0] in ("bra", "brx", "ret", "exit") or ins.opcode.startswith(
        ("bar.sync", "barrier.sync", "bar.arrive", "barrier.arrive", "mbarrier.try_wait")
    )
