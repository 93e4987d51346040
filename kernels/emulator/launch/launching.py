"""A Triton launch as the emulator runs it: its parameters, and the tensors that they point at."""

from __future__ import annotations

import functools
import itertools
import struct
import time
from collections.abc import Iterator
from typing import Any

import torch

from ... import compat
from ...runtime.launch import Target
from ..global_memory import Global
from ..grid import run_grid
from ..machine import Machine
from ..parsing import parse
from ..ptx import Kernel
from ..tensor_maps import ELEMENTS, SWIZZLES, TensorMap
from .compiled import Compiled, Device
from .counts import LaunchCounts, table

Grid = tuple[int, int, int]
Parameter = tuple[str, Any]  # its type and its value; of a tensor map the tensor and the map
_SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8}
_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def flatten(signature: Any, value: Any, maps: Iterator[dict[str, Any] | None]) -> list[Parameter]:
    """Return the parameters that one argument becomes: tuples laid flat, constexprs left out.

    Args:
        maps: what Triton says of each tensor descriptor, in order; None for one that is no tensor map.
    """
    if isinstance(signature, tuple):
        return [x for s, v in zip(signature, value, strict=True) for x in flatten(s, v, maps)]
    if signature.startswith("tensordesc"):
        return _descriptor(value, next(maps))
    return [] if signature == "constexpr" else [(signature, value)]


def _descriptor(value: Any, about: dict[str, Any] | None) -> list[Parameter]:
    """Return the parameters of a host's tensor descriptor: a tensor map, or what replaces it; then its sizes again."""
    sizes = [*(("i32", x) for x in value.shape), *(("i64", x) for x in value.strides)]
    if about is not None:
        return [("map", (value.base, _tensor_map(value, about))), *sizes]
    flags = [value.padding == "nan"]
    # triton 3.6 knows of one flag.
    if hasattr(value, "round_f32_to_tf32"):
        flags.append(bool(value.round_f32_to_tf32))
    first = [("*", value.base), *(("i64", x) for x in (*value.shape, *value.strides))]
    return [*first, *(("i1", x) for x in flags), *sizes]


def _tensor_map(value: Any, about: dict[str, Any]) -> TensorMap:
    if about["fp4_padded"] or about.get("is_im2col"):
        raise ValueError(
            "fusemesh.emulate: expected a tensor descriptor of tiles, received one of padded fp4 or of im2col, which "
            "are not emulated; load by pointers"
        )
    size = about["elem_size"]
    element = "tf32" if getattr(value, "round_f32_to_tf32", False) else ELEMENTS[about["elem_type"]]
    return TensorMap(
        element,
        value.base.data_ptr(),
        tuple(int(n) for n in reversed(value.shape)),
        tuple(int(s) * size for s in reversed(value.strides[:-1])),
        tuple(int(n) for n in reversed(about["block_size"])),
        SWIZZLES[about["swizzle"]],
        value.padding == "nan",
    )


def as_bytes(kind: str, value: Any) -> bytes:
    """Return a parameter of Triton's type ``kind`` as it lies in parameter memory."""
    if kind == "map":
        return bytes(value[1].pack())
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr() if hasattr(value, "data_ptr") else value)
    if kind in _SIZES:
        size = _SIZES[kind]
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    number = torch.tensor(float(value), dtype=torch.float64).to(_FLOATS[kind])
    return number.reshape(1).view(torch.uint8).numpy().tobytes()


def _bytes_of(kind: str) -> int:
    """Return the size of a parameter of PTX's type ``u64`` or ``b8[128]``."""
    return int(kind[3:-1]) if kind.endswith("]") else int(kind[1:]) // 8


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
        self.values: list[Parameter] = []
        self.tensors: dict[str, torch.Tensor] = {}
        maps = iter(compiled.maps or itertools.repeat(None))
        for (name, sig), value in zip(compiled.signature.items(), args, strict=True):
            for kind, v in flatten(sig, value, maps):
                self.values.append((kind, v))
                tensor = v[0] if kind == "map" else v
                if isinstance(tensor, torch.Tensor):
                    self._add(name, tensor)
        # Two pointers follow the signature's: global scratch and the profiler's.
        self.scratch = torch.full((self._scratch_bytes(),), 0xFF, dtype=torch.uint8)
        if self.scratch.numel():
            self.memory.add_tensor(self.scratch, "global scratch", defined=False)
        self.values += [("*", self.scratch if self.scratch.numel() else None), ("*", None)]

    def _scratch_bytes(self) -> int:
        x, y, z = self.grid
        return self.compiled.scratch_bytes * x * y * z

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
        assert len(names) == len(packed), (names, self.values)
        for (name, kind), raw in zip(machine.kernel.params, packed, strict=True):
            assert len(raw) == _bytes_of(kind), (name, kind, raw)
        params = dict(zip(names, packed, strict=True))
        machine.memory.next_launch()
        run_grid(machine, params, self.grid, ctas)


@functools.lru_cache(maxsize=128)
def _parsed(text: str) -> Kernel:
    return parse(text)


class Emulator:
    """A device that runs launches at once, each CTA by its PTX.

    Attributes:
        counts: what each launch did, in order; ``log`` is the same as plain numbers.
        bound: the launches themselves, with ``keep``.
    """

    def __init__(
        self, target: Target, *, ctas: int | None = None, keep: bool = False, proves: bool = True, **options: Any
    ) -> None:
        self.target, self.ctas, self.keep, self.proves, self.options = target, ctas, keep, proves, options
        self.name = f"emulated {target.name}"
        self.counts: list[LaunchCounts] = []
        self.log: list[dict[str, Any]] = []
        self.bound: list[Bound] = []
        self.device = Device(target, self.start)
        self._machines: dict[str, Machine] = {}  # by the compiled kernel's hash, those that run nothing

    def table(self) -> str:
        """Return the counts of all launches as lines of text."""
        return table(self.counts)

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
        start = time.perf_counter()
        machine = self._machine(bound)
        bound.run(machine, self.ctas)
        if self.keep:
            self.bound.append(bound)
        self.counts.append(_counted(bound, machine, time.perf_counter() - start))
        self.log.append({"kernel": bound.name, "threads": machine.T, **machine.stats})
        # After an error it is never used again: its state is that of the error.
        self._machines[compiled.hash] = machine

    def _machine(self, bound: Bound) -> Machine:
        """Return a machine that counts from 0: that of the kernel's last launch, or a new one."""
        machine = self._machines.pop(bound.compiled.hash, None)
        if machine is None:
            kernel = _parsed(bound.compiled.text)
            return Machine(kernel, bound.compiled.shared_bytes, bound.memory, **self.options)
        machine.memory = bound.memory
        machine.stats.update(dict.fromkeys(machine.stats, 0))
        machine.ran[:] = 0
        return machine


def _counted(bound: Bound, machine: Machine, seconds: float) -> LaunchCounts:
    stats = machine.stats
    return LaunchCounts(
        bound.name,
        bound.grid,
        stats["ctas"],
        machine.T,
        machine.executed(),
        stats["sectors"],
        stats["sectors_ideal"],
        stats["bank"],
        stats["bank_ideal"],
        round(seconds, 4),
    )
