"""The one function through which every Triton kernel starts.

Kernels are launched by :func:`launch` and never by ``kernel[grid](...)``, so that a test can record launches without
running them, and :mod:`fusemesh.kernels.aot` can compile just what a launch would compile, with no GPU present.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import env


@dataclass(frozen=True)
class Target:
    """A GPU as the tile tables and the compiler see it."""

    vendor: str  # "cuda" or "hip"; "interpreter" when kernels run on the CPU
    arch: int | str  # 80, 90, 100 for sm_80 ...; "gfx942"
    shared_memory: int  # bytes that one program may use

    @property
    def name(self) -> str:
        """``sm_90``, ``gfx942`` or ``interpreter``."""
        return f"sm_{self.arch}" if self.vendor == "cuda" else str(self.arch)


TARGETS = {
    "sm_80": Target("cuda", 80, 166912),
    "sm_86": Target("cuda", 86, 101376),
    "sm_89": Target("cuda", 89, 101376),
    "sm_90": Target("cuda", 90, 232448),
    "sm_100": Target("cuda", 100, 232448),
    "sm_120": Target("cuda", 120, 101376),
    "gfx942": Target("hip", "gfx942", 65536),
}
INTERPRETER = Target("interpreter", "interpreter", 1 << 40)

Hook = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]

_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("fusemesh_target", default=None)
_anywhere: contextvars.ContextVar[bool] = contextvars.ContextVar("fusemesh_any_device", default=False)
_hook: contextvars.ContextVar[Hook | None] = contextvars.ContextVar("fusemesh_launch_hook", default=None)


def target_of(device: torch.device) -> Target:
    """The target that a kernel on tensors of ``device`` is compiled for."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    if device.type == "cpu":
        return INTERPRETER
    # Any, because torch's type stub does not list all of the properties.
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.split(":")[0], 65536)
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", major * 10 + minor, properties.shared_memory_per_block_optin)


def dot_precision(target: Target, dtype: torch.dtype) -> str:
    """Return the precision by which ``tl.dot`` multiplies fp32: with matrix instructions, at fp32's accuracy.

    Three tf32 products on NVIDIA (IEEE ones run outside the tensor cores and spill), or one where PyTorch's own flag
    allows its error; on AMD, whose matrix units take fp32, IEEE. 16-bit operands are multiplied exactly anyway.
    """
    if dtype != torch.float32 or target.vendor != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def assumed_target() -> Target | None:
    """Return the target that :func:`assume_target` sets, or None outside it."""
    return _assumed.get()


def takes_any_device() -> bool:
    """Return whether launchers take tensors of any device: within :func:`any_device`."""
    return _anywhere.get()


@contextlib.contextmanager
def any_device() -> Iterator[None]:
    """Within the block backend="triton" takes tensors of any device, for launches that are recorded and not started."""
    token = _anywhere.set(True)
    try:
        yield
    finally:
        _anywhere.reset(token)


@contextlib.contextmanager
def assume_target(target: Target) -> Iterator[None]:
    """Within the block, launchers choose tiles for ``target`` whatever device the tensors are on."""
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


@contextlib.contextmanager
def intercept(hook: Hook) -> Iterator[None]:
    """Within the block, launches call ``hook(kernel, grid, args, kwargs)`` instead of running."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run ``kernel`` over ``grid``; ``kwargs`` hold constexprs, ``num_warps`` and ``num_stages``.

    A grid with an empty axis launches nothing. In the interpreter the repairs of
    :mod:`fusemesh.kernels.runtime.interpreter` are installed first, without which bf16 results are wrong; errors there
    end with the line of the kernel's source.
    """
    hook = _hook.get()
    if hook is not None:
        hook(kernel, grid, args, kwargs)
        return
    if 0 in grid:
        return
    if env.INTERPRET:
        from . import interpreter

        interpreter.run(kernel, grid, args, kwargs)
        return
    kernel[grid](*args, **kwargs)
