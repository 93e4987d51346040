"""Every form of an opcode, in short PTX programs, against formulas of Python's own numbers (bench/gpu/programs)."""

import numpy as np
import pytest

from bench.gpu.programs import THREADS, Program, all_programs
from fusemesh.kernels.emulator import opcodes
from fusemesh.kernels.emulator.global_memory import Global
from fusemesh.kernels.emulator.machine import Machine
from fusemesh.kernels.emulator.parsing import parse

ALL = all_programs()
PROGRAMS = {program.name: program for program in ALL}


def run(program: Program, **options) -> tuple[np.ndarray, ...]:
    """Return what a program writes in the emulator."""
    outputs = tuple(np.zeros_like(x) for x in program.expected)
    arrays = (*program.inputs, *outputs)
    memory = Global()
    for k, x in enumerate(arrays):
        memory.add(x.ctypes.data, x.nbytes, f"array {k}")
    machine = Machine(parse(program.text()), 0, memory, **options)
    params = {f"program_param_{k}": x.ctypes.data.to_bytes(8, "little") for k, x in enumerate(arrays)}
    grid = (program.threads // THREADS, 1, 1)
    for cta in range(grid[0]):
        machine.run(params, (cta, 0, 0), grid)
    return outputs


def test_names_are_unique():
    assert len(PROGRAMS) == len(ALL)


@pytest.mark.parametrize("name", PROGRAMS)
def test_opcode(name):
    wrong = PROGRAMS[name].differences(run(PROGRAMS[name]))
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:12]])


FAMILIES = ("conversions", "floats", "integers", "matrix", "moves", "warp")
# Instructions with nothing to compare.
WITHOUT_PROGRAMS = {
    "cvta global|param|const u64|u32": "generic addresses are those of global memory",
    "cvta to global|param|const u64|u32": "generic addresses are those of global memory",
}


def test_every_form_has_a_program():
    """Of each modifier that may be written, one program at least has it."""
    opcodes.load()
    ran = {ins.opcode for program in ALL for ins in parse(program.text()).instructions}
    missing = []
    for form, function in opcodes.FORMS.items():
        if function.__module__.rsplit(".", 1)[1] not in FAMILIES or form in WITHOUT_PROGRAMS:
            continue
        tried = [x for x in ran if opcodes.pattern(form).fullmatch(x)]
        choices = [choice for word in form.split()[1:] for choice in word.removesuffix("?").split("|")]
        untried = [c for c in choices if not any(c in x.split(".") for x in tried)]
        if untried or not tried:
            missing.append(f"{form}: {untried}")
    assert not missing, "\n".join(missing)
