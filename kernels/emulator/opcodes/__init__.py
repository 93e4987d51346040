"""The opcodes of PTX, a file for each family; each registers the functions that turn an instruction into a closure.

Such a function takes the state of a CTA, the instruction, its opcode's parts (`p`) and its operands (`o`), and returns
a step: a function of the threads that execute it, a mask [T], or None where all of them do.

It registers for forms, and an instruction of another form is refused before anything runs: a form is an opcode and its
modifiers in order, separated by blanks, as in ``add rn? ftz? f16|f32``. A modifier is a regular expression; one that
ends in "?" may be absent. "..." takes any further modifiers, for a function that looks at each of them itself.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

from ..hazard import UnknownInstruction
from ..ptx import Instruction
from ..state import Cta, Step

Compile = Callable[[Cta, Instruction, list[str], tuple[Any, ...]], Step]

OPCODES: dict[str, list[tuple[re.Pattern[str], Compile]]] = {}  # by the first part
FORMS: dict[str, Compile] = {}
_FAMILIES = (
    "atomics",
    "bulk",
    "calls",
    "conversions",
    "copies",
    "floats",
    "integers",
    "matrix",
    "mbarrier",
    "memory",
    "moves",
    "register_pool",
    "sync",
    "tensormap",
    "warp",
    "wgmma",
)
# The scheduler does what these say: they end a block.
_ENDS = (
    "bra uni?",
    "brx idx uni?",
    "ret uni?",
    "exit",
    "bar cta? sync|arrive",
    "bar cta? red popc u32",
    "bar cta? red and|or pred",
    "barrier cta? sync|arrive aligned?",
    "barrier cta? red popc aligned? u32",
    "barrier cta? red and|or aligned? pred",
    r"mbarrier test_wait|try_wait parity? ((acquire|relaxed)\.(cta|cluster))? shared::cta|shared b64",
)


def pattern(form: str) -> re.Pattern[str]:
    """Return a regular expression for the opcodes of a form."""
    name, *modifiers = form.split()
    text = re.escape(name)
    for each in modifiers:
        if each == "...":
            text += r"(?:\.[\w:]+)*"
        else:
            text += rf"(?:\.(?:{each.removesuffix('?')}))" + ("?" if each.endswith("?") else "")
    return re.compile(text)


_END_PATTERNS = [pattern(form) for form in _ENDS]


def opcode(*forms: str) -> Callable[[Compile], Compile]:
    """Register a function for instructions of these forms."""

    def register(function: Compile) -> Compile:
        for form in forms:
            known = OPCODES.setdefault(form.split()[0], [])
            # Forms that take any modifier come last.
            known.insert(len(known) if form.endswith("...") else 0, (pattern(form), function))
            assert form not in FORMS, form
            FORMS[form] = function
        return function

    return register


def load() -> None:
    """Import every family."""
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")


@functools.cache
def find(name: str) -> Compile:
    """Return the function that compiles an opcode; raise UnknownInstruction where no form of the table fits."""
    first = name.split(".", 1)[0]
    for expression, function in OPCODES.get(first, ()):
        if expression.fullmatch(name):
            return function
    known = [form for form in FORMS if form == first or form.startswith(f"{first} ")]
    raise UnknownInstruction(
        f"opcode {name}: " + (f"expected one of the forms {', '.join(known)}" if known else "no such opcode")
    )


def check_end(ins: Instruction) -> None:
    """Refuse an instruction at the end of a block that the scheduler does not know."""
    if not any(expression.fullmatch(ins.opcode) for expression in _END_PATTERNS):
        raise UnknownInstruction(f"opcode {ins.opcode}: expected one of the forms {', '.join(_ENDS)}")
