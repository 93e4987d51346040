"""A Triton launch as the emulator runs it: its parameters, and the tensors that they point at."""

from __future__ import annotations

import struct
from typing import Any

import torch

from .. import compat
from ..runtime.launch import Target
from .compiled import Compiled, Device
from .global_memory import Global
from .grid import run_grid
from .machine import Machine
from .parsing import parse

Grid = tuple[int, int, int]
_SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8}
_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def flatten(signature: Any, value: Any, name: str) -> list[tuple[str, Any, str]]:
    """Return (type, value, argument's name) of each parameter: tuples laid flat, constexprs left out."""
    if isinstance(signature, tuple):
        return [x for s, v in zip(signature, value, strict=True) for x in flatten(s, v, name)]
    if signature.startswith("tensordesc"):
        return _descriptor(value, name)
    return [] if signature == "constexpr" else [(signature, value, name)]


def _descriptor(value: Any, name: str) -> list[tuple[str, Any, str]]:
    """Return the parameters of a tensor descriptor that the compiled kernel addresses by pointers of its own."""
    sizes = [*value.shape, *value.strides]
    flags = [value.padding == "nan", bool(getattr(value, "round_f32_to_tf32", False))]
    again = [*(("i32", x, name) for x in value.shape), *(("i64", x, name) for x in value.strides)]
    return [("*", value.base, name), *(("i64", x, name) for x in sizes), *(("i1", x, name) for x in flags), *again]


def as_bytes(kind: str, value: Any) -> bytes:
    """Return a parameter of Triton's type ``kind`` as it lies in parameter memory."""
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr() if hasattr(value, "data_ptr") else value)
    if kind in _SIZES:
        size = _SIZES[kind]
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    number = torch.tensor(float(value), dtype=torch.float64).to(_FLOATS[kind])
    return number.reshape(1).view(torch.uint8).numpy().tobytes()


class Bound:
    """One launch with its parameters and the memory they point at; it can be run as often as wanted."""

    def __init__(
        self, target: Target, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compile a launch and start nothing."""
        started: list[tuple[Compiled, Grid, tuple[Any, ...]]] = []
        with compat.driver(Device(target, lambda *launch: started.append(launch)), assembles=False):
            kernel[grid](*args, **kwargs)
        assert started, "a launch over an empty grid"
        self._bind(*started[0])

    @classmethod
    def of(cls, compiled: Compiled, grid: Grid, args: tuple[Any, ...]) -> Bound:
        """Return the launch of a compiled kernel with one value for each name of its signature."""
        bound = cls.__new__(cls)
        bound._bind(compiled, grid, args)
        return bound

    def _bind(self, compiled: Compiled, grid: Grid, args: tuple[Any, ...]) -> None:
        self.compiled, self.name, self.grid = compiled, compiled.name, grid
        self.memory = Global()
        self.values: list[tuple[str, Any]] = []
        self.tensors: dict[str, torch.Tensor] = {}
        for (name, sig), value in zip(compiled.signature.items(), args, strict=True):
            for kind, v, _ in flatten(sig, value, name):
                self.values.append((kind, v))
                if isinstance(v, torch.Tensor):
                    self._add(name, v)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"fusemesh.emulate: {self.name}: expected tensors on the CPU, received {name} on {tensor.device}; "
                "move the tensors to the CPU, or leave the block"
            )
        if tensor.numel():
            self.memory.add_tensor(tensor, name)
            self.tensors[name] = tensor

    def machine(self, text: str | None = None, **options: Any) -> Machine:
        """Return a machine for the launch's kernel, or for another text in its place."""
        return Machine(parse(text or self.compiled.text), self.compiled.shared_bytes, self.memory, **options)

    def run(self, machine: Machine, ctas: int | None = None) -> None:
        """Run every CTA of the grid, or the first ``ctas`` of them."""
        names = [name for name, _ in machine.kernel.params]
        packed = [as_bytes(*x) for x in self.values]
        # Two pointers follow the signature's: global scratch and the profiler's.
        packed += [bytes(8)] * 2
        assert len(names) == len(packed), (names, self.values)
        for (name, kind), raw in zip(machine.kernel.params, packed, strict=True):
            assert len(raw) * 8 == int(kind[1:]), (name, kind, raw)
        params = dict(zip(names, packed, strict=True))
        machine.memory.next_launch()
        run_grid(machine, params, self.grid, ctas)


class Emulator:
    """A device that runs launches at once, each CTA by its PTX; ``log`` holds the counts of each launch."""

    def __init__(self, target: Target, *, ctas: int | None = None, keep: bool = False, **options: Any) -> None:
        self.target, self.ctas, self.keep, self.options = target, ctas, keep, options
        self.name = f"emulated {target.name}"
        self.log: list[dict[str, Any]] = []
        self.bound: list[Bound] = []
        self.device = Device(target, self.start)

    def prepare(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Compile what the launch would run, run nothing, and return the compiled kernel's hash."""
        with compat.driver(self.device, assembles=False):
            return str(compat.compile_launch(kernel, grid, args, kwargs).hash)

    def run(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Run the launch, and return the compiled kernel's hash."""
        with compat.driver(self.device, assembles=False):
            return str(kernel[grid](*args, **kwargs).hash)

    def start(self, compiled: Compiled, grid: Grid, args: tuple[Any, ...]) -> None:
        """Run one compiled kernel over the grid."""
        bound = Bound.of(compiled, grid, args)
        machine = bound.machine(**self.options)
        bound.run(machine, self.ctas)
        if self.keep:
            self.bound.append(bound)
        self.log.append({"kernel": bound.name, "threads": machine.T, **machine.stats})
