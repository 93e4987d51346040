"""Compiled Triton kernels on a CPU: their PTX, instruction by instruction, with what a GPU may do wrong as errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..runtime.launch import TARGETS, Target, any_device, assume_target, intercept
from .hazard import Hazard as Hazard
from .launching import Emulator


@contextlib.contextmanager
def emulate(target: Target | str, **options: Any) -> Iterator[Emulator]:
    """Within the block, Triton launches on CPU tensors run as PTX compiled for ``target``."""
    chosen = TARGETS[target] if isinstance(target, str) else target
    emulator = Emulator(chosen, **options)
    with assume_target(chosen), any_device(), intercept(emulator):
        yield emulator
