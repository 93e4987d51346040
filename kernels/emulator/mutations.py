"""One place of a kernel's PTX changed at a time, to see whether the emulator's checks or the result's bits notice."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .machine import Machine
from .opcodes.wgmma import check_fence
from .parsing import changed
from .ptx import Instruction, Reg, number
from .state import Mask, Step

DELETED = ""
_SHARED = r"(?:ld\.shared|st\.shared|ldmatrix|stmatrix|cp\.async\.c[ag])"
_SWAP = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


def _delete(pattern: str) -> Callable[[str], list[str]]:
    """Return a change that deletes the statements that begin with ``pattern``."""
    return lambda s: [DELETED] if re.match(pattern, s) else []


def _change(pattern: str, new: Callable[[re.Match[str]], str]) -> Callable[[str], list[str]]:
    """Return a change of the part of a statement that matches ``pattern``, in which ^ is the statement's begin."""

    def of(s: str) -> list[str]:
        out = re.sub(pattern, new, s, count=1)
        return [out] if out != s else []

    return of


def _number(add: int) -> Callable[[re.Match[str]], str]:
    return lambda m: f"{m[1]}{int(m[2], 0) + add}"


def _without_last_bit(m: re.Match[str]) -> str:
    value = int(m[2], 0)
    return f"{m[1]}{value & (value - 1)}"


def _predicate_is_a_constant(s: str) -> list[str]:
    """What stands in the place of a wait by try_wait: its predicate is set, and nobody waits."""
    m = re.match(r"mbarrier\.try_wait\S*\s+(%?\w+),", s)
    return [f"mov.pred {m[1]}, -1"] if m else []


def _descriptor_bits(s: str) -> list[str]:
    """The layout (bits 62 and 63) and the stride (bits 32 to 45) in a constant that goes into a wgmma descriptor."""
    m = re.match(r"((?:or\.b64|add\.s64)\s+%\w+, %\w+, )(\d{17,})$", s)
    return [f"{m[1]}{(int(m[2]) ^ bit) & (1 << 64) - 1}" for bit in (3 << 62, 1 << 38)] if m else []


def _swap_coordinates(m: re.Match[str]) -> str:
    first, second, *others = m[1].split(", ")
    return "{" + ", ".join([second, first, *others]) + "}]"


# Each takes a statement without its semicolon and returns the statements that may stand in its place.
KINDS: dict[str, Callable[[str], list[str]]] = {
    "barrier deleted": _delete(r"bar(rier)?\.sync"),
    "wait deleted": lambda s: (
        _delete(r"(cp\.async|cp\.async\.bulk|wgmma)\.wait_(group|all)")(s) or _predicate_is_a_constant(s)
    ),
    "wait count + 1": _change(r"^((?:cp\.async|cp\.async\.bulk|wgmma)\.wait_group\S*\s+)(\d+)$", _number(1)),
    "fence deleted": _delete(r"fence|membar|wgmma\.fence"),
    "commit deleted": _delete(r"(cp\.async|cp\.async\.bulk|wgmma)\.commit_group"),
    "copy deleted": _delete(r"cp\.async\.(c[ag]|bulk\.tensor)"),
    "swizzle constant": lambda s: (
        _change(r"^(xor\.b32\s.*, )(\d+)$", lambda m: f"{m[1]}{int(m[2]) ^ 16}")(s)
        or _change(r"^(and\.b32\s.*, )(48|56|112|120)$", _without_last_bit)(s)
    ),
    "shuffle lane": _change(r"^(shfl\.sync\.bfly\S*\s.*, )(\d+)(, 31, -1)$", lambda m: f"{m[1]}{int(m[2]) ^ 3}{m[3]}"),
    "predicate flipped": _change(r"^@(!?)(%?\w+)", lambda m: f"@{'' if m[1] else '!'}{m[2]}"),
    "guard dropped": lambda s: (
        _change(r"^@!?%?\w+ (?=(?:ld|st|red|atom)\.)", lambda m: "")(s)
        or _change(r"^(cp\.async\.c[ag]\S*\s.*, (?:0x)?)(\w+), %\w+$", lambda m: m[1] + m[2])(s)
    ),
    "bound": _change(r"^setp\.(lt|le|gt|ge)\.([su]\d+)", lambda m: f"setp.{_SWAP[m[1]]}.{m[2]}"),
    "select swapped": _change(r"^(selp\.\w+\s+%\w+, )(\S+), (\S+), ", lambda m: f"{m[1]}{m[3]}, {m[2]}, "),
    "descriptor bit": _descriptor_bits,
    "matrix transposed": lambda s: (
        [s.replace(".trans", "") if ".trans" in s else re.sub(r"(\.x[124])", r"\1.trans", s)]
        if re.match(r"(ldmatrix|stmatrix)", s)
        else []
    ),
    "shared offset + 16": _change(
        rf"^((?:@!?%?\w+ )?{_SHARED}[^\[]*\[\s*%\w+)(?:\s*\+\s*(-?\d+))?",
        lambda m: f"{m[1]}+{int(m[2] or 0) + 16}",
    ),
    "expected bytes / 2": _change(r"^(.*\.expect_tx\S*\s.*, )(\d+)$", lambda m: f"{m[1]}{int(m[2]) // 2}"),
    "coordinates swapped": lambda s: (
        _change(r"\{(%\w+, %\w+[^}]*)\}\s*\]", _swap_coordinates)(s) if "bulk.tensor" in s else []
    ),
    "parity flipped": _change(r"^(.*mbarrier\.try_wait\S*\s.*, )([01])$", lambda m: f"{m[1]}{1 - int(m[2])}"),
    "mbarrier count + 1": _change(r"^((?:@!?%?\w+ )?mbarrier\.init\S*\s.*, )(\d+)$", _number(1)),
    "arrival deleted": _delete(r"(@!?%?\w+ )?mbarrier\.arrive"),
}

# Of these the order of a kernel's operations is changed, and nothing that it computes.
ORDER = ("barrier deleted", "fence deleted", "commit deleted", "wait deleted", "wait count + 1", "arrival deleted")


@dataclass(frozen=True, eq=False)
class Mutation:
    """A statement of a kernel and what stands in its place; ``at`` is None for the statement that ends its block."""

    kind: str
    block: int
    at: int | None
    old: Instruction
    new: str

    def __str__(self) -> str:
        return f"{self.kind}: line {self.old.line}: {self.old.text[:90]} => {self.new[:90] or 'nothing'}"


def mutations(machine: Machine) -> list[Mutation]:
    """Return every change of the kernel's statements in blocks that have run, in their order."""
    found = []
    for n, block in enumerate(machine.kernel.blocks):
        if machine.ran[n]:
            for at, ins in [*enumerate(block.body), *([(None, block.end)] if block.end is not None else [])]:
                for kind, of in KINDS.items():
                    found += [Mutation(kind, n, at, ins, new) for new in of(ins.text)]
    return found


@contextlib.contextmanager
def mutated(machine: Machine, *chosen: Mutation) -> Iterator[None]:
    """Within the block the machine runs the changed kernel: one closure of one block is another.

    Raises:
        Hazard: what the machine's checks before anything runs find.
    """
    blocks = machine.kernel.blocks
    kept = [(m.block, machine.blocks[m.block], blocks[m.block]) for m in chosen]
    try:
        for m in chosen:
            _put(machine, m)
        if any(m.old.opcode.startswith("wgmma.fence") for m in chosen):
            for n, block in enumerate(blocks):
                for at, ins in enumerate(block.body):
                    if ins.opcode.startswith("wgmma.mma_async"):
                        check_fence(machine, n, at)
        yield
    finally:
        for n, code, block in reversed(kept):
            machine.blocks[n], blocks[n] = code, block


def step(machine: Machine, ins: Instruction) -> tuple[Step, Instruction, frozenset[str]]:
    """Return an instruction as the machine's blocks hold it."""
    return machine._compile(ins), ins, ins.reads | ins.writes


def mutated_step(machine: Machine, m: Mutation) -> tuple[Step, Instruction, frozenset[str]]:
    """Return the changed instruction as the machine's blocks hold it."""
    return step(machine, changed(m.old, m.new))


def is_computation(m: Mutation) -> bool:
    """Return whether a change is of an instruction that writes registers and does nothing else."""
    return m.new != DELETED and m.old.opcode.split(".")[0] in ("setp", "selp", "and", "or", "xor", "add")


def is_idle(machine: Machine, m: Mutation) -> Callable[[Mask], bool] | None:
    """Return a test whether a guard hides no thread, or a copy copies nothing, where a change is of one; else None."""
    old, dropped = m.old, m.kind == "guard dropped"
    if not dropped and m.kind != "copy deleted":
        return None
    if dropped and old.guard is not None:
        predicate, wanted = machine.row(old.guard), not old.guard.negated
        return lambda mask: bool((predicate[... if mask is None else mask] == wanted).all())
    size = old.operands[-1]
    if not (old.parts[0] == "cp" and isinstance(size, Reg)):
        return None
    row, whole = machine.row(size), number(old.operands[-2].text) if dropped else 0
    return lambda mask: bool((row[... if mask is None else mask] == whole).all())


def _put(machine: Machine, m: Mutation) -> None:
    block, code = machine.kernel.blocks[m.block], machine.blocks[m.block]
    body, closures, leave, end = list(block.body), list(code.body), code.leave, code.end
    ins = changed(m.old, m.new) if m.new else None
    if m.at is None:
        ends = ins is not None and ins.opcode == m.old.opcode
        end = ins if ends else None
        leave = machine._compile_end(m.block, replace(block, end=end)) if ends else None
        if ins is not None and not ends:
            # What stands in the place of a wait is a statement of the block, which then runs on into the next one.
            body.append(ins)
            closures.append(step(machine, ins))
    elif ins is None:
        # An empty place, so that the places of other mutations stay right.
        body[m.at] = replace(
            m.old, opcode="nothing", operands=(), guard=None, destinations=0, reads=frozenset(), writes=frozenset()
        )
        closures[m.at] = (lambda mask: None, body[m.at], frozenset())
    else:
        body[m.at], closures[m.at] = ins, step(machine, ins)
    machine.kernel.blocks[m.block] = replace(block, body=body, end=end)
    machine.blocks[m.block] = code._replace(body=closures, leave=leave, end=end)
