"""The PTX of a launch for a GPU that is absent, compiled by Triton as far as that and kept in Triton's own cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import compat
from ..aot import NamedTarget
from ..runtime.launch import Target


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, and how its parameters follow from a launch's arguments."""

    name: str
    hash: str
    text: str
    shared_bytes: int
    signature: dict[str, Any]  # argument -> Triton's type, a tuple of types, or "constexpr"


def compile_text(target: Target, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict) -> Compiled:
    """Return what ``kernel[grid](*args, **kwargs)`` would run on ``target``, as PTX."""
    # A device name of its own: kernels keep compiled forms by device, and these have no machine code.
    with compat.without_assembler(), compat.driver(NamedTarget(target, "emulated")):
        compiled = compat.compile_launch(kernel, grid, args, kwargs)
    metadata = compiled.metadata
    assert metadata.global_scratch_size == 0 and metadata.profile_scratch_size == 0 and metadata.num_ctas == 1
    return Compiled(kernel.__name__, compiled.hash, compiled.asm["ptx"], metadata.shared, dict(compiled.src.signature))
