"""The stage ``emulator``: short programs of PTX on a device, which must return what the specification fixes."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.gpu.programs import THREADS, Program, all_programs
from fusemesh.kernels import measure
from fusemesh.kernels.emulator.global_memory import Global
from fusemesh.kernels.emulator.machine import Machine
from fusemesh.kernels.emulator.parsing import parse

Outputs = tuple[np.ndarray, ...]
_DRY_TARGET = (9, 0)  # which stands for the device in a dry run
_LOG_SIZE, _ERROR_LOG, _ERROR_LOG_BYTES = 8192, 5, 6  # CU_JIT_ERROR_LOG_BUFFER and its size


def run(device: torch.device, clock: measure.Clock, is_dry: bool, only: str = "") -> dict[str, Any]:
    """Run every program that the device has the instructions for; return rows, and names without time."""
    capability = _DRY_TARGET if is_dry else torch.cuda.get_device_capability(device)
    start = emulated if is_dry else on_device
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    chosen = [program for program in all_programs() if only in program.name]
    mine = [program for program in chosen if _is_for(program, *capability)]
    for program in mine:
        if not clock.allows_another():
            left_out.append(program.name)
            continue
        begin = time.monotonic()
        rows.append(_row(program, start, capability))
        clock.took(time.monotonic() - begin)
    return {"rows": rows, "left_out": left_out, "other_targets": len(chosen) - len(mine)}


def _is_for(program: Program, major: int, minor: int) -> bool:
    """Return whether a GPU has a program's instructions; those with a suffix are of one generation alone."""
    number = 10 * major + minor
    return number == program.least if program.target else number >= program.least


def _row(program: Program, start: Callable[[Program, str], Outputs], capability: tuple[int, int]) -> dict[str, Any]:
    row: dict[str, Any] = {"op": "ptx", "case": program.name, "contender": "emulator", "exact": program.exact}
    target = f"sm_{capability[0]}{capability[1]}{program.target}"
    try:
        outputs = start(program, target)
        wrong = program.differences(outputs)
        ours = emulated(program, target)
        differing = sum(int((x != y).sum()) for x, y in zip(outputs, ours, strict=True))
    except Exception as error:
        return row | {"check": f"did not run: {type(error).__name__}: {error}"}
    check = f"WRONG: {len(wrong)} results, the first: {wrong[0]}" if wrong else "ok"
    return row | {"check": check, "results": sum(x.size for x in outputs), "other_bits_than_emulated": differing}


def emulated(program: Program, target: str) -> Outputs:
    """Return what a program writes in the emulator."""
    outputs = tuple(np.zeros_like(x) for x in program.expected)
    arrays = (*program.inputs, *outputs)
    memory = Global()
    for k, x in enumerate(arrays):
        memory.add(x.ctypes.data, x.nbytes, f"array {k}")
    machine = Machine(parse(program.text(target)), 0, memory)
    params = {f"program_param_{k}": x.ctypes.data.to_bytes(8, "little") for k, x in enumerate(arrays)}
    grid = (program.threads // THREADS, 1, 1)
    for cta in range(grid[0]):
        machine.run(params, (cta, 0, 0), grid)
    return outputs


def on_device(program: Program, target: str) -> Outputs:
    """Return what a program writes on the current GPU, whose driver assembles the text."""
    tensors = [torch.from_numpy(x.view(np.uint8).copy()).cuda() for x in program.inputs]
    tensors += [torch.zeros(x.nbytes, dtype=torch.uint8, device="cuda") for x in program.expected]
    torch.cuda.synchronize()
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    log = ctypes.create_string_buffer(_LOG_SIZE)
    keys = (ctypes.c_int * 2)(_ERROR_LOG, _ERROR_LOG_BYTES)
    values = (ctypes.c_void_p * 2)(ctypes.cast(log, ctypes.c_void_p), _LOG_SIZE)
    text = program.text(target).encode() + b"\0"
    _check(driver.cuModuleLoadDataEx(ctypes.byref(module), text, 2, keys, values), log.value.decode())
    try:
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, b"program"))
        pointers = [ctypes.c_uint64(t.data_ptr()) for t in tensors]
        given = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(p) for p in pointers))
        sizes = (program.threads // THREADS, 1, 1, THREADS, 1, 1, 0)
        _check(driver.cuLaunchKernel(function, *sizes, None, given, None))
        torch.cuda.synchronize()
    finally:
        driver.cuModuleUnload(module)
    found = tensors[len(program.inputs) :]
    return tuple(t.cpu().numpy().view(x.dtype) for t, x in zip(found, program.expected, strict=True))


def _check(status: int, log: str = "") -> None:
    if status != 0:
        raise RuntimeError(f"the CUDA driver returned {status} {log.strip()}".strip())


def table(payload: dict[str, Any]) -> str:
    """Return a line for instructions with fixed bits, one for those with bounds, and one for each wrong program."""
    lines = []
    for exact, words in ((True, "bits fixed by the specification"), (False, "errors bounded by it")):
        rows = [row for row in payload["rows"] if row["exact"] is exact]
        right = [row for row in rows if row["check"] == "ok"]
        other = sum(row.get("other_bits_than_emulated", 0) for row in right)
        results = sum(row.get("results", 0) for row in right)
        shares = f"{len(right)} of {len(rows)} programs right; {other} of {results} results with other bits"
        lines.append(f"{words}: {shares} than the emulator's")
    if payload["other_targets"]:
        lines.append(f"{payload['other_targets']} programs are for other GPUs")
    return "\n".join([*lines, *(f"{r['case']}: {r['check'][:300]}" for r in payload["rows"] if r["check"] != "ok")])
