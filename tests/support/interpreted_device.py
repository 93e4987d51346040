"""A device for tests: launches run in Triton's interpreter, and are told apart as the compiler would."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fusemesh.kernels.runtime import interpreter
from fusemesh.kernels.runtime.launch import TARGETS, Target

Spoil = Callable[[dict[str, Any]], None]


def specialisation(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return what Triton's JIT compiles a launch for: types, numbers that are 1 or multiples of 16, alignment."""
    unspecialised = _unspecialised(kernel)
    names = list(kernel.arg_names) if hasattr(kernel, "arg_names") else [p.name for p in kernel.params]
    parts: list[Any] = []
    for name, value in zip(names, args, strict=False):
        parts += _classes(value, name not in unspecialised)
    constants = {name: getattr(value, "cache_key", value) for name, value in kwargs.items()}
    return f"{kernel.__name__} {parts} {constants}"


@functools.cache
def _unspecialised(kernel: Any) -> frozenset[str]:
    """Return the arguments named in ``do_not_specialize``, which the interpreter's functions do not keep."""
    found = re.search(r"do_not_specialize=\[(.*?)\]", inspect.getsource(kernel.fn), re.DOTALL)
    return frozenset(re.findall(r'"(\w+)"', found.group(1))) if found else frozenset()


def _classes(value: Any, specialised: bool) -> Iterator[Any]:
    if isinstance(value, tuple):
        yield "("
        for part in value:
            yield from _classes(part, specialised)
        yield ")"
    elif isinstance(value, torch.Tensor):
        yield (str(value.dtype), value.data_ptr() % 16 == 0)
    elif isinstance(value, bool) or value is None:
        yield value
    elif isinstance(value, int):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        yield (kind, value == 1, value % 16 == 0) if specialised else kind
    else:
        yield type(value).__name__


_interpreting = threading.Lock()  # Triton's interpreter is of one thread


class RecordingDevice:
    """An executor that runs nothing, and tells launches apart as the compiler would."""

    proves = True

    def __init__(self, target: str = "sm_90") -> None:
        self.target = TARGETS[target]
        self.name = f"recorded {target}"

    def prepare(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return a hash of what the launch would be compiled for."""
        return hashlib.sha256(specialisation(kernel, args, kwargs).encode()).hexdigest()[:32]

    run = prepare


class InterpretedDevice:
    """An executor that runs launches in Triton's interpreter.

    Args:
        name: the device's.
        spoil: by the name of a kernel, what is done to the arguments of a launch, by name, after it ran.
    """

    proves = True

    def __init__(self, name: str = "interpreted sm_90", spoil: dict[str, Spoil] | None = None) -> None:
        self.target: Target = Target("interpreter", "interpreter", TARGETS["sm_90"].shared_memory)
        self.name = name
        self.spoil = spoil or {}
        self.proves = True
        self.prepared: list[str] = []
        self.ran: list[str] = []
        self.error: Exception | None = None  # raised by every launch that is not only prepared

    def prepare(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return a hash of what the launch would be compiled for."""
        self.prepared.append(kernel.__name__)
        return self._hash(kernel, args, kwargs)

    def run(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Run the launch in the interpreter, spoil what is to be, and return its hash."""
        if self.error is not None:
            raise self.error
        with _interpreting:
            self.ran.append(kernel.__name__)
            interpreter.run(kernel, grid, args, kwargs)
        if kernel.__name__ in self.spoil:
            self.spoil[kernel.__name__](dict(zip(kernel.arg_names, args, strict=False)))
        return self._hash(kernel, args, kwargs)

    def _hash(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return hashlib.sha256(specialisation(kernel, args, kwargs).encode()).hexdigest()[:32]
