"""A compiled kernel as the emulator takes it, and the device that Triton compiles for and starts it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ...runtime.launch import Target
from ...runtime.named_target import NamedTarget

Run = Callable[["Compiled", tuple[int, int, int], tuple[Any, ...]], None]


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, and how its parameters follow from a launch's arguments."""

    name: str
    hash: str
    text: str
    shared_bytes: int
    signature: dict[str, Any]  # argument -> Triton's type, a tuple of types, or "constexpr"
    scratch_bytes: int  # global memory for each CTA, beside the arguments
    scratch_align: int
    maps: tuple[dict[str, Any], ...]  # of each tensor descriptor that the kernel takes as a tensor map


class Device(NamedTarget):
    """Stands where Triton expects a driver: launches end in ``run``, with the arguments bound to the signature."""

    def __init__(self, target: Target, run: Run) -> None:
        # Triton keeps kernels, and the device's limits, by the device's name.
        super().__init__(target, f"emulated with {target.shared_memory} bytes")
        self.run = run
        self.launcher_cls = _Launcher
        properties = {"max_shared_mem": target.shared_memory, "warpSize": 32, "multiprocessor_count": 1}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # The PTX in place of machine code is the function; there is no module to unload.
            load_binary=lambda name, text, shared, device: (None, text.decode(), 0, 0, 1024),
        )

    def get_benchmarker(self) -> Any:
        """Refuse: nothing is timed here, and a choice made here would stay chosen on a GPU."""
        raise ValueError(
            "fusemesh.emulate: expected a kernel with one configuration, received one of triton.autotune, which times "
            "several; launch its function with one, kernel.fn[grid](..., BLOCK=64, num_warps=4)"
        )


class _Launcher:
    """Starts one compiled kernel on the device of the block that launches it."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature = dict(src.signature)
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, text: str, packed: Any, *more: Any) -> None:
        from triton.runtime import driver

        about, before, after, *args = more
        if before is not None:
            before(about)
        if x * y * z > 0:
            driver.active.run(self.compiled(text), (x, y, z), tuple(args))
        if after is not None:
            after(about)

    def compiled(self, text: str) -> Compiled:
        """Return what runs; refuse what the emulator does not know how to start."""
        metadata = self.metadata
        name = metadata.name
        if metadata.num_ctas != 1:
            raise ValueError(
                f"fusemesh.emulate: {name}: expected num_ctas=1 (clusters are not emulated), received "
                f"{metadata.num_ctas}; launch it with num_ctas=1"
            )
        if metadata.profile_scratch_size:
            raise ValueError(
                f"fusemesh.emulate: {name}: expected a kernel without instrumentation, received one that asks for "
                f"{metadata.profile_scratch_size} bytes for a profiler; switch triton.profiler off"
            )
        return Compiled(
            name,
            metadata.hash,
            text,
            metadata.shared,
            self.signature,
            metadata.global_scratch_size,
            metadata.global_scratch_align,
            tuple(getattr(metadata, "tensordesc_meta", None) or ()),
        )
