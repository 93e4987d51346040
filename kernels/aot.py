"""Compile any kernel for any GPU target with no GPU present, and say what the machine code holds.

The launchers themselves say what is compiled: they run on CPU tensors for an assumed target, every launch is recorded
instead of started, and each record goes through the kernel's own JIT path under a driver that only names the target.
Types, specialised values, alignment and options are therefore those of a real launch.

    python -m fusemesh.kernels.aot --target sm_90 --kernel attention --head-dim 128 --dtype bf16

With ``--emulate`` the kernels run, too: their PTX, on this machine's processor, on small random inputs.

    python -m fusemesh.kernels.aot --target sm_90 --kernel attention --head-dim 64 --causal --emulate
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import compat, env
from .runtime.launch import TARGETS, Target, assume_target, intercept
from .runtime.named_target import NamedTarget as NamedTarget

# Opcodes of matrix units. NVIDIA: mma.sync (HMMA, IMMA, QMMA, OMMA), wgmma (the same with G), tcgen05 (UTC...MMA).
_TENSOR_CORE = re.compile(r"^(?:[HIQO]G?MMA|UTC[A-Z]*MMA|v_(?:s?mfmac?|wmma)\w*)")
# Opcodes that read, combine and write memory in one step, in an order that differs from run to run. Not among them:
# SYNCS (barriers), REDUX (a reduction within one warp), and ATOMS.OR and ATOMS.AND, with which sm_100 keeps the bitmap
# of its tensor memory's allocator (no order changes what they leave behind).
_ATOMIC = re.compile(
    r"^(?:RED|REDG|REDAS|ATOM|ATOMG|ATOMS|ATOMCAS|SUATOM|SURED|UTMAREDG|UTMAREDS|UBLKRED"
    r"|(?:global|flat|buffer|s_buffer)_atomic\w*|ds_(?:add|sub|rsub|inc|dec|min|max|and|or|xor|pk_add|cmpst|wrxchg)\w*)$"
)
# One group matches: a label, or an instruction's opcode, with the label it jumps to if it is a branch.
_SASS_LINE = re.compile(
    r"^(\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(?:.*`\((\.L\w+)\))?",
    re.MULTILINE,
)
_GCN_LINE = re.compile(r"^(\.L\w+):|^\t([a-z][a-z0-9_]+)\b(?:[ \t]+(\.L\w+))?", re.MULTILINE)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Report:
    """The result of compiling one kernel for one target.

    Sizes are in bytes. ``spill_stores`` and ``spill_loads`` add up the widths of the instructions, each counted once
    for one thread, as ptxas does; on AMD they are registers spilled (vector and scalar) times 4. ``loop_spills`` is the
    part, stores and loads together, inside the innermost loops that hold matrix instructions: what is spilled elsewhere
    (addresses computed before a loop, read back once after it) costs little. ``registers`` is per thread (AMD: vector
    registers, accumulation registers included).
    """

    kernel: str
    target: str
    constants: dict[str, Any]  # the launch's constexprs and options
    registers: int
    spill_stores: int
    spill_loads: int
    loop_spills: int
    shared_memory: int
    shared_memory_limit: int
    tensor_core: dict[str, int]  # opcode -> number of instructions of the matrix units
    atomics: dict[str, int]  # opcode -> number of atomic instructions
    instructions: int
    launches: int  # how many of the recorded launches this machine code serves
    seconds: float  # wall time to compile, or to find in Triton's cache

    @property
    def fits(self) -> bool:
        """Return whether the target has the shared memory that the kernel asks for; Triton checks only at launch."""
        return self.shared_memory <= self.shared_memory_limit

    @property
    def tile(self) -> str:
        """The tile in short: ``128x64 w8 s3``."""
        blocks = [str(value) for name, value in self.constants.items() if name.startswith("BLOCK_")]
        options = [f"{short}{self.constants[name]}" for short, name in _OPTIONS if name in self.constants]
        return " ".join(["x".join(blocks) or "-", *options])


_OPTIONS = (("w", "num_warps"), ("s", "num_stages"))


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record_launches(fn: Callable[[], Any], target: Target) -> list[Launch]:
    """The launches that ``fn`` makes for ``target``; none is started.

    ``fn`` calls launchers on tensors of any device (CPU will do; the contents of outputs stay undefined). Launches over
    an empty grid are left out, as :func:`~fusemesh.kernels.runtime.launch.launch` leaves them out.
    """
    records: list[Launch] = []

    def hook(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if 0 not in grid:
            records.append(Launch(kernel, grid, args, kwargs))

    with assume_target(target), intercept(hook):
        fn()
    return records


def compile_launches(fn: Callable[[], Any], target: Target | str) -> list[Report]:
    """Compile what ``fn`` would launch on ``target``; one report for each different machine code, in launch order.

    Args:
        fn: calls launchers, as in :func:`record_launches`.
        target: a :class:`~fusemesh.kernels.runtime.launch.Target` or a name from ``launch.TARGETS``: ``"sm_90"``.

    Raises:
        ValueError: the target is unknown, ``fn`` launches nothing, triton is missing, or this process has Triton's
            interpreter switched on (kernels are then plain Python functions, which nothing can compile).

    Not thread-safe: it replaces Triton's driver while it compiles.
    """
    chosen = _target(target)
    _refuse_interpreter()
    launches = record_launches(fn, chosen)
    if not launches:
        raise ValueError(
            "fn: expected a callable that launches at least one kernel through fusemesh.kernels.runtime.launch, "
            f"received {fn!r}, which launched none; call a Triton launcher on tensors with elements"
        )
    found: dict[str, tuple[Any, Launch, float]] = {}
    times: Counter[str] = Counter()
    with compat.driver(NamedTarget(chosen)):
        for item in launches:
            start = time.perf_counter()
            compiled = compat.compile_launch(item.kernel, item.grid, item.args, item.kwargs)
            seconds = time.perf_counter() - start
            times[compiled.hash] += 1
            found.setdefault(compiled.hash, (compiled, item, seconds))
    return [_report(*entry, launches=times[key], target=chosen) for key, entry in found.items()]


def _target(target: Target | str) -> Target:
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {tuple(TARGETS)} or a Target, received {target!r}")
    return TARGETS[target]


def _refuse_interpreter() -> None:
    if env.INTERPRET:
        raise ValueError(
            "TRITON_INTERPRET: expected it unset to compile ahead of time, received 1 (kernels are then Python "
            "functions); unset it before Python starts"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "triton: expected it installed to compile kernels, it is missing; pip install triton"
        ) from error


def _report(compiled: Any, item: Launch, seconds: float, *, launches: int, target: Target) -> Report:
    read = _read_nvidia if "cubin" in compiled.asm else _read_amd
    constants = {name: getattr(value, "value", value) for name, value in item.kwargs.items()}
    constants.setdefault("num_warps", compiled.metadata.num_warps)
    constants.setdefault("num_stages", compiled.metadata.num_stages)
    return Report(
        kernel=item.kernel.__name__,
        target=target.name,
        constants=constants,
        shared_memory=compiled.metadata.shared,
        shared_memory_limit=target.shared_memory,
        launches=launches,
        seconds=seconds,
        **read(compiled.asm),
    )


def _read_nvidia(asm: Any) -> dict[str, Any]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        resources = _run(knobs.nvidia.cuobjdump.path, "-res-usage", path)
        # Both read the same formats; nvdisasm writes less around the code.
        lines = _SASS_LINE.findall(_run(knobs.nvidia.nvdisasm.path, "-c", "-hex", path))
    opcodes = [opcode for _, opcode, _ in lines if opcode]
    registers = re.search(r"REG:(\d+)", resources)
    assert registers is not None and opcodes, f"cuobjdump or nvdisasm wrote nothing readable: {resources}"
    counts = Counter(name if name in ("ATOMS.OR", "ATOMS.AND") else name.split(".")[0] for name in opcodes)
    return {
        "registers": int(registers.group(1)),
        "spill_stores": _spilled(opcodes, "STL"),
        "spill_loads": _spilled(opcodes, "LDL"),
        "loop_spills": _spilled(_in_matrix_loops(lines), "STL", "LDL"),
        **_summary(counts),
    }


def _read_amd(asm: Any) -> dict[str, Any]:
    text = asm["amdgcn"]

    def value(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match is not None, f"the compiler's text lacks .{name}"
        return int(match.group(1))

    spilled = 4 * (value("vgpr_spill_count") + value("sgpr_spill_count"))
    lines = _GCN_LINE.findall(text)
    return {
        "registers": value("vgpr_count"),
        "spill_stores": spilled,
        "spill_loads": spilled,
        "loop_spills": _spilled(_in_matrix_loops(lines), "scratch_store", "scratch_load"),
        **_summary(Counter(opcode for _, opcode, _ in lines if opcode)),
    }


def _in_matrix_loops(lines: list[tuple[str, str, str]]) -> list[str]:
    """Opcodes inside the innermost loops that hold matrix instructions; lines are (label, opcode, label jumped to)."""
    starts = {label: index for index, (label, _, _) in enumerate(lines) if label}
    loops: dict[int, int] = {}  # first line -> last jump back to it
    for index, (_, _, target) in enumerate(lines):
        if target in starts and starts[target] < index:
            loops[starts[target]] = index
    # Other loops may lie within: those that wait for a barrier.
    bodies = {
        (first, last): [opcode for _, opcode, _ in lines[first : last + 1] if opcode]
        for first, last in loops.items()
        if any(_TENSOR_CORE.match(opcode) for _, opcode, _ in lines[first : last + 1])
    }
    found = []
    for (first, last), body in bodies.items():
        if not any(first < start <= last for start, _ in bodies):
            found += body
    return found


def _spilled(opcodes: list[str], *prefixes: str) -> int:
    """Bytes that instructions to and from a thread's own memory move: ``STL.64``, ``scratch_load_dwordx2``."""
    total = 0
    for opcode in opcodes:
        if opcode.startswith(prefixes):
            width = re.search(r"\.(64|128)\b|dwordx([234])$", opcode)
            bits, words = width.groups() if width else (None, None)
            total += int(bits) // 8 if bits else 4 * int(words or 1)
    return total


def _summary(opcodes: Counter[str]) -> dict[str, Any]:
    return {
        "tensor_core": {name: number for name, number in opcodes.items() if _TENSOR_CORE.match(name)},
        "atomics": {name: number for name, number in opcodes.items() if _ATOMIC.match(name)},
        "instructions": sum(opcodes.values()),
    }


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def table(reports: list[Report]) -> str:
    """The reports as lines of text, one row each."""
    head = (
        "kernel",
        "target",
        "tile",
        "regs",
        "spill st/ld/loop",
        "shared",
        "of",
        "tensor core",
        "atomics",
        "instr",
        "s",
    )
    rows = [head]
    for report in reports:
        rows.append(
            (
                report.kernel,
                report.target,
                report.tile,
                str(report.registers),
                f"{report.spill_stores}/{report.spill_loads} ({report.loop_spills})",
                str(report.shared_memory) + ("" if report.fits else " TOO MUCH"),
                str(report.shared_memory_limit),
                " ".join(f"{name} {number}" for name, number in report.tensor_core.items()) or "none",
                " ".join(f"{name} {number}" for name, number in report.atomics.items()) or "none",
                str(report.instructions),
                f"{report.seconds:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 if a kernel asks for more shared memory than its target has, else 0.

    With --emulate it is 1 if a result is wrong, or if the emulator finds a hazard.
    """
    parser = argparse.ArgumentParser(prog="python -m fusemesh.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", nargs="+", default=["sm_90"], choices=tuple(TARGETS))
    parser.add_argument("--kernel", default="attention", choices=("attention", "linear", "loss"))
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=tuple(_DTYPES))
    parser.add_argument("--head-dim", type=int, default=128, help="attention: D")
    parser.add_argument("--v-head-dim", type=int, help="attention: Dv (default: D)")
    parser.add_argument("--causal", action="store_true", help="attention")
    parser.add_argument("--mask", action="store_true", help="attention: with a boolean mask")
    parser.add_argument("--bias", help="attention: with a bias and its gradient; the dims, out of BHQK, of its shape")
    parser.add_argument("--activation", help="linear: gelu, gelu_tanh, silu or relu2")
    parser.add_argument("--gated", action="store_true", help="linear: with w_up")
    parser.add_argument("--softcap", type=float, help="loss: of the logits")
    parser.add_argument("--no-backward", action="store_true", help="the forward kernels only")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--emulate", action="store_true", help="run the compiled kernels on random inputs, check results, print counts"
    )
    parser.add_argument("--length", type=int, default=136, help="--emulate: Sq and Sk, or rows")
    parser.add_argument("--seed", type=int, default=0, help="--emulate: of the inputs")
    options = parser.parse_args(arguments)
    _refuse_interpreter()
    if options.emulate:
        if options.json:
            parser.error("--json: expected without --emulate, whose results are text; leave one of them out")
        if not all(TARGETS[name].vendor == "cuda" for name in options.target):
            parser.error(f"--emulate: expected targets of NVIDIA's, received {' '.join(options.target)}; name others")
        if not set(options.bias or "") <= set("BHQK"):
            parser.error(f"--bias: expected letters out of BHQK, received {options.bias}")
        from .emulator.launch import command

        return command.run(options)
    from .runtime.launches import attention_launches, linear_launches, loss_launches

    reports = []
    for target in options.target:
        for name in options.dtype:
            dtype, backward = _DTYPES[name], not options.no_backward
            if options.kernel == "attention":
                fn = attention_launches(
                    dtype,
                    options.head_dim,
                    options.v_head_dim,
                    causal=options.causal,
                    mask=options.mask,
                    bias=options.bias,
                    backward=backward,
                )
            elif options.kernel == "loss":
                fn = loss_launches(dtype, softcap=options.softcap, backward=backward)
            else:
                fn = linear_launches(dtype, options.activation, gated=options.gated, backward=backward)
            reports += compile_launches(fn, target)
    print(
        json.dumps([dataclasses.asdict(r) for r in reports], default=str, indent=1) if options.json else table(reports)
    )
    return 0 if all(report.fits for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
