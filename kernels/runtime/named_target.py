"""What stands where Triton expects a driver, for a GPU that is not there (leaf)."""

from __future__ import annotations

from typing import Any

from .launch import Target


class NamedTarget:
    """Answers what the JIT asks of a driver before it starts a kernel, for a GPU that is not there."""

    def __init__(self, target: Target, use: str = "ahead of time") -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.vendor, target.arch, 64 if target.vendor == "hip" else 32)
        # Kernels keep their compiled forms by device; a name of its own keeps these apart from a real device's.
        self._device = f"{use}, {target.name}"

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: str) -> int:
        return 0
