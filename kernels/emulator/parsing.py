"""Parse the PTX of one kernel."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from .ptx import (
    BITS,
    Addr,
    Block,
    Imm,
    Instruction,
    Kernel,
    Operand,
    Reg,
    Sym,
    Variable,
    Vec,
    meeting,
    number,
    registers,
)

_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERANDS = re.compile(r"\s*(\{[^{}]*\}|\[[^\[\]]*\]|[^,{}\[\]]+?)\s*(?:,|$)")
_ADDRESS = re.compile(r"\s*([%$\w.]+?)\s*(?:\+\s*(-?\w+)\s*)?")
_LABEL = re.compile(r"([$\w]+):\s*")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*?inlined_at\s+(\d+)\s+(\d+))?")
_PLACE = re.compile(r"([\w.<>-]+):(\d+):\d+")
_PARAMETER = re.compile(r"\.param\s+((?:\.\w+\s+|\d+\s+)*)([$%\w]+)\s*(?:\[(\d+)\])?")
_VARIABLE = re.compile(
    r"(?:\.extern\s+)?\.(shared|local|global)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)(?:\[(\d*)\])?"
)
# What tl.device_assert and tl.device_print say, and the result of the latter's call.
_TEXT = re.compile(r"(assertFunc|assertFile|assertMessage|printfFormat|printfPrefix)_")
_RESULT = re.compile(r"ld\.param\.b32 %\w+, \[retval0(\+0)?\]")
# Opcodes whose first operand is no destination although it is no address either.
_NO_DESTINATION = (
    *("bar.", "barrier.", "bra", "brx", "call", "cp.", "exit", "fence", "membar", "nanosleep", "ret", "setmaxnreg"),
    *("tcgen05.dealloc", "trap", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"),
)


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Kernel:
    """Return the first ``.entry`` of a PTX module."""
    return _Parser(text).kernel()


def changed(old: Instruction, statement: str) -> Instruction:
    """Return an instruction of another text at the place of ``old``, whose registers alone it may name."""
    parser = _Parser("")
    parser.source = old.source
    for x in (*old.operands, *([old.guard] if old.guard else [])):
        for r in registers(x):
            parser.scopes[0][r.name.split("'")[0]] = Reg(r.name, r.bits, r.index)
    ins = parser.instruction(statement, old.line)
    # A label of an inner scope has a name of its own, which the text does not say.
    return replace(ins, operands=old.operands) if ins.parts[0] == "bra" else ins


class _Parser:
    """Reads a module line by line; statements may span lines, and lines may hold several."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.files = {m[1]: m[2].split("/")[-1] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
        self.counts = {1: 0, 16: 0, 32: 0, 64: 0}
        # Of each open scope its registers, where those of a range are made when they are used, and its ranges.
        self.scopes: list[dict[str, Reg]] = [{}]
        self.ranges: list[dict[str, tuple[int, int]]] = [{}]  # prefix -> bits, how many
        self.ids, self.opened = [0], 0
        self.seen: dict[str, Operand] = {}  # operands of the outermost scope, where names keep their meaning
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.variables: dict[str, Variable] = {}
        self.texts: dict[str, tuple[int, str]] = {}
        self.last_label, self.source = "", ""

    def kernel(self) -> Kernel:
        start = next((i for i, line in enumerate(self.lines) if ".entry" in line.split("//")[0]), None)
        if start is None:
            raise ValueError("PTX: expected a module with an .entry, received none")
        body = next(i for i in range(start, len(self.lines)) if self.lines[i].lstrip().startswith("{"))
        for line in self.lines[:start]:
            self.variable(line.split("//")[0].strip())
        head = " ".join(line.split("//")[0] for line in self.lines[start:body])
        name = re.search(r"\.entry\s+([\w$]+)", head)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
        assert name is not None and threads is not None, head
        limit = re.search(r"\.maxnreg\s+(\d+)", head)
        params = []
        for m in _PARAMETER.finditer(head):
            kind = next(t for t in m[1].split() if t.lstrip(".") in BITS)
            params.append((m[2], kind.lstrip(".") if m[3] is None else f"b8[{m[3]}]"))
        self.read(body + 1)
        more = {label for table in self.tables.values() for label in table}
        blocks, where = _blocks(self.instructions, self.labels, more)
        tables = {name: [where[label] for label in table] for name, table in self.tables.items()}
        return Kernel(
            name[1],
            params,
            self.counts,
            self.instructions,
            blocks,
            where,
            int(threads[1]),
            tables,
            self.variables,
            self.texts,
            int(limit[1]) if limit else None,
        )

    def read(self, first: int) -> None:
        """Read the statements from a line to the brace that closes the kernel."""
        pending, at = "", first
        for n in range(first, len(self.lines)):
            line = self.lines[n]
            if not pending:
                stripped = line.lstrip()
                if stripped.startswith((".loc ", ".loc\t")):
                    self.location(stripped)
                    continue
                if stripped.startswith((".pragma", ".file", "//")):
                    continue
                at = n + 1
            pending = f"{pending} {line.split('//')[0].strip()}".strip()
            while pending:
                if pending[0] == "}":
                    if len(self.scopes) == 1:
                        return
                    for stack in (self.scopes, self.ranges, self.ids):
                        stack.pop()  # type: ignore[attr-defined]
                    pending = pending[1:].lstrip()
                elif pending[0] == "{":
                    self.opened += 1
                    self.scopes.append({})
                    self.ranges.append({})
                    self.ids.append(self.opened)
                    pending = pending[1:].lstrip()
                elif (label := _LABEL.match(pending)) is not None:
                    self.last_label = label[1]
                    self.labels.setdefault(self.own(label[1]), len(self.instructions))
                    pending = pending[label.end() :]
                elif ";" in pending:
                    statement, pending = pending.split(";", 1)
                    self.statement(" ".join(statement.split()), at)
                    pending = pending.lstrip()
                else:
                    break

    def own(self, label: str) -> str:
        """Return a label as it is told from its namesakes in other scopes; those of the compiler are unique."""
        return label if len(self.ids) == 1 or label[0] == "$" else f"{label}@{self.ids[-1]}"

    def location(self, line: str) -> None:
        """Take in a ``.loc``: from the compiler's comment, which has the chain of inlined calls, or from itself."""
        places = _PLACE.findall(line.split("//")[1]) if "//" in line else []
        if not places:
            m = _LOC.match(line)
            assert m is not None, line
            places = [(self.files.get(file, file), at) for file, at in ((m[1], m[2]), (m[3], m[4])) if file]
        self.source = ", inlined at ".join(f"{file}:{at}" for file, at in places)

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith(".branchtargets"):
            self.tables[self.last_label] = [x.strip() for x in text.split(" ", 1)[1].split(",")]
        elif text.startswith(".param ") or _RESULT.match(text):
            pass  # the arguments of a call, and its result, which nothing uses
        elif text.startswith("."):
            if not self.variable(text):
                raise ValueError(f"PTX line {line}: a directive that is not known: {text}")
        elif text:
            self.instructions.append(self.instruction(text, line))

    def declare(self, text: str) -> None:
        """Take in ``.reg``; there are no registers of 8 bits."""
        _, kind, names = text.split(" ", 2)
        bits = BITS[kind[1:]]
        bits = 16 if bits == 8 else bits
        for name in (x.strip() for x in names.split(",")):
            if name.endswith(">"):
                prefix, many = name[:-1].split("<")
                self.ranges[-1][prefix] = (bits, int(many))
            else:
                self.new(name, bits, len(self.scopes) - 1)

    def new(self, name: str, bits: int, scope: int) -> Reg:
        unique = name if scope == 0 else f"{name}'{self.ids[scope]}"
        reg = self.scopes[scope][name] = Reg(unique, bits, self.counts[bits])
        self.counts[bits] += 1
        return reg

    def variable(self, text: str) -> bool:
        """Take in the declaration of a variable; return whether it is one. Dynamic shared memory follows the static."""
        m = _VARIABLE.match(text)
        if m is None:
            return False
        space, align, many = m[1], int(m[2] or BITS[m[3]] // 8), m[5]
        size = BITS[m[3]] // 8 * int(many or (0 if many is not None else 1))
        end = max((v.offset + v.size for v in self.variables.values() if v.space == space), default=0)
        variable = self.variables[m[4]] = Variable(space, -(-end // align) * align, size)
        if space == "global" and _TEXT.match(m[4]) and "{" in text:
            raw = bytes(number(x) for x in text.split("{")[1].split("}")[0].split(","))
            self.texts[m[4]] = variable.offset, raw.rstrip(b"\0").decode("utf-8", "replace")
        return True

    def reg(self, name: str) -> Reg | None:
        for scope in range(len(self.scopes) - 1, -1, -1):
            found = self.scopes[scope].get(name)
            if found is not None:
                return found
            prefix = name.rstrip("0123456789")
            bits, many = self.ranges[scope].get(prefix, (0, 0))
            if prefix != name and int(name[len(prefix) :]) < many:
                return self.new(name, bits, scope)
        return None

    def operand(self, text: str) -> Operand:
        if len(self.scopes) > 1:
            return self.new_operand(text)
        found = self.seen.get(text)
        if found is None:
            found = self.seen[text] = self.new_operand(text)
        return found

    def new_operand(self, text: str) -> Operand:
        first = text[0]
        if first == "{":
            return Vec(tuple(self.operand(t) for t in _OPERANDS.findall(text[1:-1])))
        if first == "[":
            inner = text[1:-1]
            if "," in inner:
                return Vec(tuple(self.operand(t) for t in _OPERANDS.findall(inner)))
            m = _ADDRESS.fullmatch(inner)
            if m is None:
                raise ValueError(f"an address that is not understood: {text}")
            base, offset = m[1], number(m[2]) if m[2] else 0
            return Addr(None, number(base) + offset) if base[0].isdigit() else Addr(self.reg(base) or Sym(base), offset)
        if first == "!":
            found = self.reg(text[1:])
            assert found is not None, text
            return Reg(found.name, found.bits, found.index, True)
        if first.isdigit() or (first == "-" and len(text) > 1):
            return Imm(text)
        return self.reg(text) or Sym(text)

    def instruction(self, text: str, line: int) -> Instruction:
        m = _INSTRUCTION.fullmatch(text)
        if m is None:
            raise ValueError(f"PTX line {line}: not understood: {text}")
        negated, name, opcode, rest = m.groups()
        guard = None
        if name:
            found = self.reg(name)
            assert found is not None, text
            guard = Reg(found.name, 1, found.index, negated == "!")
        words = _OPERANDS.findall(rest)
        destinations = 1
        if words and "|" in words[0]:  # a second destination, a predicate
            words[:1] = [w.strip() for w in words[0].split("|")]
            destinations = 2
        operands = tuple(self.operand(w) for w in words)
        kind = opcode.split(".", 1)[0]
        if kind in ("bra", "brx"):
            operands = tuple(Sym(self.own(x.name)) if isinstance(x, Sym) else x for x in operands)
        reduces = kind in ("bar", "barrier") and ".red." in opcode
        if not operands or isinstance(operands[0], Addr) or (opcode.startswith(_NO_DESTINATION) and not reduces):
            destinations = 0
        ins = Instruction(opcode, operands, guard, line, text, self.source, destinations)
        writes = [r.name for x in operands[:destinations] for r in registers(x)]
        reads = [r.name for x in operands[destinations:] for r in registers(x)]
        if guard is not None:
            reads.append(guard.name)
        if opcode.startswith("wgmma.mma_async"):
            reads += writes
        ins.reads, ins.writes = frozenset(reads), frozenset(writes)
        return ins


def _blocks(
    instructions: list[Instruction], labels: dict[str, int], more: set[str]
) -> tuple[list[Block], dict[str, int]]:
    """Return the basic blocks, which end where _is_end says and before labels jumped to, and the labels' blocks."""
    targets = more | {o.name for i in instructions if i.parts[0] == "bra" for o in i.operands if isinstance(o, Sym)}
    starts = {0} | {labels[t] for t in targets}
    met: str | Imm | Reg | None = None  # in the current block
    visible = False  # others may see what the current block did
    for n, ins in enumerate(instructions):
        if n in starts:
            met, visible = None, False
        meets = meeting(ins)
        if meets is not None and meets != met:
            # Threads wait at the start of a block for those with whom they run it: nobody may wait for its other part.
            if met is not None or visible or not isinstance(meets, str):
                starts.add(n)
            met, visible = meets, False
        visible = visible or ins.parts[0] in ("st", "red", "atom", "mbarrier", "cp", "fence")
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
    kind, *rest = ins.parts
    if kind in ("bra", "brx", "ret", "exit") or (kind == "mbarrier" and rest[0] in ("try_wait", "test_wait")):
        return True
    return kind in ("bar", "barrier") and "warp" not in rest
