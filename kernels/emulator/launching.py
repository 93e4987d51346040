"""A Triton launch as the emulator runs it: its PTX, its parameters, and the tensors that they point at."""

from __future__ import annotations

import struct
from typing import Any

import torch

from ..runtime.launch import Target
from .compiled import Compiled, compile_text
from .global_memory import Global
from .grid import run_grid
from .machine import Machine
from .parsing import parse

_PACK = {
    "i1": "<B",
    "i8": "<b",
    "i16": "<h",
    "i32": "<i",
    "i64": "<q",
    "u8": "<B",
    "u16": "<H",
    "u32": "<I",
    "u64": "<Q",
    "fp32": "<f",
    "fp64": "<d",
}


def flatten(signature: Any, value: Any) -> list[tuple[str, Any]]:
    """Return (type, value) of each parameter in order: tuples laid flat, constexprs left out."""
    if isinstance(signature, tuple):
        return [x for s, v in zip(signature, value, strict=True) for x in flatten(s, v)]
    return [] if signature == "constexpr" else [(signature, value)]


def as_bytes(kind: str, value: Any) -> bytes:
    """Return a parameter of Triton's type ``kind`` as it lies in parameter memory."""
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr() if hasattr(value, "data_ptr") else value)
    if kind[0] in "iu":
        size = struct.calcsize(_PACK[kind])
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return struct.pack(_PACK[kind], value)


def extent(t: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if t.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.itemsize


class Bound:
    """One launch, compiled, with its parameters and the memory they point at; it can be run as often as wanted."""

    def __init__(
        self, target: Target, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.compiled: Compiled = compile_text(target, kernel, grid, args, kwargs)
        self.name, self.grid = self.compiled.name, (*grid, 1, 1)[:3]
        self.memory = Global()
        self.values: list[tuple[str, Any]] = []
        self.tensors: dict[str, torch.Tensor] = {}
        # The signature goes by parameter; options and constexprs come last and by name, so zip may stop early.
        for (name, sig), value in zip(self.compiled.signature.items(), args, strict=False):
            for kind, v in flatten(sig, value):
                self.values.append((kind, v))
                if isinstance(v, torch.Tensor) and v.numel():
                    self.memory.add(v.data_ptr(), extent(v), name)
                    self.tensors[name] = v

    def machine(self, text: str | None = None, **options: Any) -> Machine:
        """Return a machine for the launch's kernel, or for another text in its place."""
        return Machine(parse(text or self.compiled.text), self.compiled.shared_bytes, self.memory, **options)

    def run(self, machine: Machine, ctas: int | None = None) -> None:
        """Run every CTA of the grid, or the first ``ctas`` of them."""
        names = [name for name, _ in machine.kernel.params]
        # Two pointers follow the signature's: global scratch and the profiler's.
        assert len(names) == len(self.values) + 2, (len(names), len(self.values))
        packed = [as_bytes(*x) for x in self.values] + [bytes(8)] * 2
        for (name, kind), raw in zip(machine.kernel.params, packed, strict=True):
            assert len(raw) * 8 == int(kind[1:]), (name, kind, raw)
        params = dict(zip(names, packed, strict=True))
        machine.memory.next_launch()
        run_grid(machine, params, self.grid, ctas)


class Emulator:
    """Runs launches at once; a hook for ``launch.intercept``. ``log`` holds the counts of each."""

    def __init__(self, target: Target, *, ctas: int | None = None, keep: bool = False, **options: Any) -> None:
        self.target, self.ctas, self.keep, self.options = target, ctas, keep, options
        self.log: list[dict[str, Any]] = []
        self.bound: list[Bound] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if 0 in grid:
            return
        bound = Bound(self.target, kernel, grid, args, kwargs)
        machine = bound.machine(**self.options)
        bound.run(machine, self.ctas)
        if self.keep:
            self.bound.append(bound)
        self.log.append({"kernel": bound.name, "threads": machine.T, **machine.stats})
