"""What the emulator does not implement is refused by name and PTX line, before anything runs."""

import itertools

import numpy as np
import pytest

from bench.gpu.programs import Program, all_programs
from fusemesh.kernels.emulator import opcodes
from fusemesh.kernels.emulator.global_memory import Global
from fusemesh.kernels.emulator.hazard import UnknownInstruction
from fusemesh.kernels.emulator.machine import Machine
from fusemesh.kernels.emulator.parsing import parse

# Modifiers that change what an instruction does. One that is put where it does not belong must never be passed over.
MODIFIERS = (
    *("sat", "ftz", "relu", "satfinite", "NaN", "abs", "rn", "rz", "rm", "rp", "rni", "lo", "hi", "wide", "cc", "wrap"),
    *("approx", "full", "noftz", "oob", "rs", "volatile", "x2", "global", "uni", "s128", "b128", "e2m1x2", "f8"),
)


def refusal(text: str) -> str:
    """Return why a module is refused; "" if it is not."""
    try:
        Machine(parse(text), 0, Global())
    except UnknownInstruction as error:
        return str(error)
    return ""


def module(statement: str) -> str:
    inputs = tuple(np.zeros(64, t) for t in ("u4", "u4", "u4"))
    return Program("", statement, inputs, (inputs[0],)).text()


@pytest.mark.parametrize(
    "statement",
    [
        "frobnicate.b32 %d0, %a0;",
        "add.s128 %d0, %a0, %a1;",
        "add.cc.u32 %d0, %a0, %a1;",
        "sqrt.rz.f32 %d0, %a0;",
        "fma.rn.f64 %l0, %l1, %l2, %l3;",
        "cvt.f32.s32 %d0, %a0;",
        "cvt.rn.satfinite.e2m1x2.f32 %h0, %a0, %a1;",
        "setp.lo.s32 %p0, %a0, %a1;",
        "shfl.down.b32 %d0, %a0, 1, 31;",
        "mov.b128 %l0, {%l1, %l2};",
        "tcgen05.wait::ld.sync.aligned;",
        "bra.convergent OVER;\\nOVER:",
        "add.u32 %d0, %a0, %nothing;",
        "add.u32 %d0, %a0, %h0;",
        "add.u32 %d0, !%a0, %a1;",
    ],
)
def test_refused_by_name_and_line(statement):
    text = module(statement.replace("\\n", "\n"))
    line = next(n for n, x in enumerate(text.split("\n"), 1) if statement.split(";")[0].split("\\n")[0] in x)
    message = refusal(text)
    assert f"PTX line {line}: " in message and statement.split()[0].rstrip(";") in message, message


def test_a_modifier_more_or_less_is_refused():
    """Every opcode of the programs with a modifier more, without one, or with one exchanged."""
    opcodes.load()
    known = {ins.opcode for program in all_programs() for ins in parse(program.text()).instructions}
    taken = set()
    tried = 0
    for opcode in sorted(x for x in known if not x.startswith(("ld.", "st."))):
        first, *parts = opcode.split(".")
        changed = {".".join([first, *parts[:n], *parts[n + 1 :]]) for n in range(len(parts))}
        for n, modifier in itertools.product(range(len(parts) + 1), MODIFIERS):
            changed.add(".".join([first, *parts[:n], modifier, *parts[n:]]))
        for other in sorted(changed - known)[::7]:
            tried += 1
            try:
                opcodes.find(other)
                taken.add(other)
            except UnknownInstruction as error:
                assert f"opcode {other}: " in str(error)
    # What is taken nevertheless are forms without their own program, each of modifiers that have one.
    assert tried > 5_000
    written = {(x.split(".")[0], part) for x in known for part in x.split(".")[1:]}
    assert not [x for x in taken if any((x.split(".")[0], part) not in written for part in x.split(".")[1:])]
    repeated = [x for x in taken if len(set(x.split(".")[1:-2])) < len(x.split(".")[1:-2])]
    assert len(taken) < 0.05 * tried and not repeated, (len(taken), tried, repeated)


def test_no_form_takes_any_modifier():
    opcodes.load()
    assert not [form for form in opcodes.FORMS if "..." in form or ".*" in form]
