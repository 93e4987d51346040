"""Short PTX programs, one for each form of an opcode, with what they must return: tests run them in the emulator, and
``bench/on_gpu.py --stage emulator`` on a device.

Each thread reads one element of each input into the registers %a0, %a1, ..., runs the body, and writes %d0, %d1, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

THREADS = 64
_REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
# The least version of PTX for a target, by its number.
_VERSIONS = {75: "7.0", 80: "7.0", 86: "7.1", 89: "8.1", 90: "8.7", 100: "8.8"}


@dataclass(frozen=True)
class Program:
    """A body of PTX with inputs and the outputs that the specification asks for.

    Attributes:
        name: the opcode, with what else tells programs apart.
        body: statements over %a0, ... and %d0, ..., and scratch registers %h (16 bits), %r, %l (64), %p.
        inputs: bits [n] for each of %a0, ..., unsigned; n is a multiple of THREADS.
        expected: bits [n] for each of %d0, ....
        exact: the specification fixes the bits of the outputs; else it bounds their error.
        nan: the floating-point format of the outputs if any NaN will do where one is expected.
        relative, absolute: the error allowed where `exact` is False, of outputs that are `nan`'s numbers.
        fixed: where the specification says anything at all [n]; None is everywhere.
        least: the number of the oldest target that has the instruction.
        target: a suffix of the target's name for instructions that only one generation has ("a").
    """

    name: str
    body: str
    inputs: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    exact: bool = True
    nan: str = ""
    relative: float = 0.0
    absolute: float = 0.0
    fixed: np.ndarray | None = None
    least: int = 80
    target: str = ""

    @property
    def threads(self) -> int:
        """How many threads run it, in CTAs of THREADS."""
        return len(self.expected[0])

    def text(self, target: str | None = None) -> str:
        """Return the module: an entry ``program`` whose parameters point at the inputs, then at the outputs."""
        target = target or f"sm_{self.least}{self.target}"
        version = _VERSIONS.get(int("".join(c for c in target if c.isdigit())), "8.7")
        arrays = [("a", k, x) for k, x in enumerate(self.inputs)] + [("d", k, x) for k, x in enumerate(self.expected)]
        parameters = ",\n".join(f"    .param .u64 program_param_{n}" for n in range(len(arrays)))
        declared = "\n".join(f".reg .{_REGISTERS[x.itemsize]} %{letter}{k};" for letter, k, x in arrays)
        lines = [
            *("mov.u32 %t0, %ctaid.x;", "mov.u32 %t1, %tid.x;", f"mad.lo.s32 %t0, %t0, {THREADS}, %t1;"),
            *(self._address(n, x) for n, (_, _, x) in enumerate(arrays)),
            *(f"ld.global.b{8 * x.itemsize} %a{k}, [%q{k}];" for k, x in enumerate(self.inputs)),
            self.body,
            *(f"st.global.b{8 * x.itemsize} [%q{len(self.inputs) + k}], %d{k};" for k, x in enumerate(self.expected)),
            "ret;",
        ]
        body = "\n".join(lines)
        return (
            f".version {version}\n.target {target}\n.address_size 64\n.visible .entry program(\n{parameters}\n)\n"
            f".reqntid {THREADS}\n{{\n.reg .b32 %t<2>;\n.reg .b64 %q<{len(arrays)}>;\n.reg .b16 %h<16>;\n"
            f".reg .b32 %r<16>;\n.reg .b64 %l<8>;\n.reg .pred %p<8>;\n{declared}\n{body}\n}}\n"
        )

    @staticmethod
    def _address(n: int, x: np.ndarray) -> str:
        wide = f"mul.wide.s32 %q{n}, %t0, {x.itemsize};"
        return (
            f"{{\n.reg .b64 %base;\nld.param.u64 %base, [program_param_{n}];\n{wide}\nadd.s64 %q{n}, %q{n}, %base;\n}}"
        )

    def differences(self, outputs: tuple[np.ndarray, ...]) -> list[str]:
        """Return what is wrong with outputs, a line for each thread and output."""
        found = []
        for k, (got, want) in enumerate(zip(outputs, self.expected, strict=True)):
            parts = (self.threads, 2 if self.nan.endswith("x2") else 1)
            kind = f"u{got.itemsize // parts[1]}"
            got_, want_ = got.view(kind).reshape(parts), want.view(kind).reshape(parts)
            bad = got_ != want_
            if self.nan:
                x, y = (_numbers(z, self.nan.removesuffix("x2")) for z in (got_, want_))
                bad &= ~(np.isnan(x) & np.isnan(y))
                if not self.exact:
                    with np.errstate(invalid="ignore"):
                        bad &= ~(np.abs(x - y) <= np.maximum(self.relative * np.abs(y), self.absolute))
            wrong = bad.any(1)
            if self.fixed is not None:
                wrong &= self.fixed
            for t in np.flatnonzero(wrong):
                values = ", ".join(f"{int(x[t]):#x}" for x in self.inputs)
                found.append(f"{self.name}({values}): d{k} is {int(got[t]):#x}, expected {int(want[t]):#x}")
        return found


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return bits as numbers in fp64."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    types: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}
    return np.asarray(bits.view(types[kind]).astype(np.float64))


def padded(*columns: Any, dtypes: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    """Return columns of bits as arrays of a multiple of THREADS elements; the first ones are repeated at the end."""
    n = -(-len(columns[0]) // THREADS) * THREADS
    return tuple(np.resize(np.array(c, dtype), n) for c, dtype in zip(columns, dtypes, strict=True))


def every(*edges: Any, dtype: Any) -> tuple[np.ndarray, ...]:
    """Return every combination of edge values, a column for each argument."""
    grids = np.meshgrid(*(np.array(e, dtype) for e in edges), indexing="ij")
    return padded(*(g.ravel() for g in grids), dtypes=(dtype,) * len(edges))


def all_programs() -> list[Program]:
    """Return every program."""
    from bench.gpu.programs import conversions, floats, integers, lanes, matrices, moves

    tables = (integers, floats, conversions, moves, lanes, matrices)
    return [program for table in tables for program in table.programs()]
