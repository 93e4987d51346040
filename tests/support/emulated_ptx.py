"""Kernels of a few lines of PTX, run in the emulator on numpy arrays."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch

from fusemesh.kernels.emulator.global_memory import Global
from fusemesh.kernels.emulator.grid import run_grid
from fusemesh.kernels.emulator.hazard import Hazard
from fusemesh.kernels.emulator.machine import Machine
from fusemesh.kernels.emulator.parsing import parse
from fusemesh.kernels.emulator.tensor_maps import TensorMap


def text(body: str, parameters: str, count: int, threads: int, head: str = "") -> str:
    """Return a kernel with registers %r (32 bits), %h (16), %d (64) and %p; %a0, ... hold the parameters' addresses."""
    loads = "\n".join(
        f"mov.b64 %a{n}, k_param_{n};" if kind == "m" else f"ld.param.u64 %a{n}, [k_param_{n}];"
        for n, kind in enumerate(parameters)
    )
    declared = ",\n".join(
        f".param .align 64 .b8 k_param_{n}[128]" if kind == "m" else f".param .u64 k_param_{n}"
        for n, kind in enumerate(parameters)
    )
    return f""".version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{declared}
)
.reqntid {threads}
{head}
{{
.reg .pred %p<16>;
.reg .b16 %h<64>;
.reg .b32 %r<512>;
.reg .b64 %d<64>;
.reg .b64 %a<16>;
.reg .b32 %tid;
mov.u32 %tid, %tid.x;
{loads}
{body}
ret;
}}
"""


def load(argument: int, register: int, count: int) -> str:
    """Return PTX that loads ``count`` words of each thread from an array [threads, count]."""
    lines = [f"mul.wide.u32 %d0, %tid, {4 * count};", f"add.s64 %d0, %d0, %a{argument};"]
    return "\n".join(lines + [f"ld.global.b32 %r{register + n}, [%d0 + {4 * n}];" for n in range(count)])


def store(argument: int, register: int, count: int) -> str:
    """Return PTX that stores ``count`` words of each thread to an array [threads, count]."""
    lines = [f"mul.wide.u32 %d0, %tid, {4 * count};", f"add.s64 %d0, %d0, %a{argument};"]
    return "\n".join(lines + [f"st.global.b32 [%d0 + {4 * n}], %r{register + n};" for n in range(count)])


def fill_shared(argument: int, words: int, threads: int = 128) -> str:
    """Return PTX that copies words of an array to the start of shared memory, and waits until all have."""
    lines = ["mul.wide.u32 %d0, %tid, 4;", f"add.s64 %d0, %d0, %a{argument};", "mad.lo.s32 %r0, %tid, 4, 0;"]
    lines += ["mov.b32 %r1, global_smem;", "add.s32 %r0, %r0, %r1;"]
    assert words % threads == 0
    for n in range(words // threads):
        lines += [
            f"ld.global.b32 %r1, [%d0 + {4 * threads * n}];",
            f"st.shared.b32 [%r0 + {4 * threads * n}], %r1;",
        ]
    return "\n".join([*lines, "fence.proxy.async.shared::cta;", "bar.sync 0;"])


def registers(first: int, count: int) -> str:
    """Return a vector of neighbouring registers."""
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


def run(
    body: str,
    *arguments: np.ndarray | torch.Tensor | TensorMap,
    threads: int = 32,
    shared: int = 0,
    head: str = "",
    memory: tuple[np.ndarray, ...] = (),
    grid: tuple[int, int, int] = (1, 1, 1),
    undefined: tuple[int, ...] = (),
    strict: bool = True,
    **options: Any,
) -> Machine:
    """Run a kernel; arrays are changed in place.

    ``memory``: arrays that tensor maps point at. ``undefined``: which tensors of torch hold nothing before.
    """
    space = Global()
    for n, x in enumerate([*arguments, *memory]):
        if isinstance(x, np.ndarray):
            space.add(x.ctypes.data, x.nbytes, f"array {n}", x.itemsize)
        elif isinstance(x, torch.Tensor):
            space.add_tensor(x, f"tensor {n}", defined=n not in undefined)
    kinds = "".join("m" if isinstance(x, TensorMap) else "p" for x in arguments)
    machine = Machine(parse(text(body, kinds, len(arguments), threads, head)), shared, space, **options)
    machine.strict = strict
    values = [
        x.pack()
        if isinstance(x, TensorMap)
        else struct.pack("<Q", x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data)
        for x in arguments
    ]
    run_grid(machine, dict(zip((name for name, _ in machine.kernel.params), values, strict=True)), grid)
    return machine


def aligned(shape: tuple[int, ...], dtype: Any, alignment: int = 128) -> np.ndarray:
    """Return zeros whose first byte lies at a multiple of ``alignment``."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


ASYNCHRONY = [{}, {"asynchrony": "early"}, {"asynchrony": "random", "seed": 1}, {"asynchrony": "random", "seed": 2}]
each_way = pytest.mark.parametrize("options", ASYNCHRONY, ids=["late", "early", "random 1", "random 2"])


def changed(program: str, *changes: tuple[str, str]) -> str:
    """A program with pieces of text replaced, each of which it holds once."""
    for old, new in changes:
        assert program.count(old) == 1, (old, program.count(old))
        program = program.replace(old, new)
    return program


def fault(program: str, *arguments, **options) -> str:
    """The kind of hazard that a program has."""
    with pytest.raises(Hazard) as error:
        run(program, *arguments, **options)
    return error.value.kind
