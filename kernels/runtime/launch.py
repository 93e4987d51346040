"""The one function through which every Triton kernel starts, and the devices that run what it starts.

Kernels are launched by :func:`launch` and never by ``kernel[grid](...)``, so that a test can record launches without
running them, :mod:`fusemesh.kernels.aot` can compile just what a launch would compile, with no GPU present, and an
:class:`Executor` can stand for a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import compat, env
from ..scoped import Scoped


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


class Executor(Protocol):
    """A device that runs compiled kernels: a GPU, or a program that stands for one."""

    @property
    def target(self) -> Target:
        """The device as the tile tables and the compiler see it."""
        ...

    @property
    def name(self) -> str:
        """``NVIDIA H200``, ``emulated sm_90``: what is proven on one is not proven on another."""
        ...

    @property
    def proves(self) -> bool:
        """Whether kernels are proven on it before their first result is handed out."""
        ...

    def prepare(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Compile what the launch would run, run nothing, and return the compiled kernel's hash."""
        ...

    def run(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Run the launch, and return the compiled kernel's hash."""
        ...


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    target: Target
    name: str
    proves: bool = True

    def prepare(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Compile what the launch would run, run nothing, and return the compiled kernel's hash."""
        return _prepare(kernel, grid, args, kwargs)

    def run(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Run the launch, and return the compiled kernel's hash."""
        return _run(kernel, grid, args, kwargs)


@dataclass(frozen=True)
class Seen:
    """One kernel that was launched, and the constants that it was compiled for."""

    kernel: Any
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.__name__)


class Observed:
    """A block within which the launches of this thread are observed.

    Args:
        prepares_only: whether launches are compiled and not run.
    """

    def __init__(self, prepares_only: bool = False) -> None:
        self.prepares_only = prepares_only
        self.kernels: dict[str, Seen] = {}  # by compiled hash
        self._tokens: list[contextvars.Token[Observed | None]] = []

    def __enter__(self) -> Observed:
        self._tokens.append(_observed.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _observed.reset(self._tokens.pop())


_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("fusemesh_target", default=None)
_anywhere: contextvars.ContextVar[bool] = contextvars.ContextVar("fusemesh_any_device", default=False)
_hook: contextvars.ContextVar[Hook | None] = contextvars.ContextVar("fusemesh_launch_hook", default=None)
_observed: contextvars.ContextVar[Observed | None] = contextvars.ContextVar("fusemesh_observed", default=None)
_executor: contextvars.ContextVar[Executor | None] = contextvars.ContextVar("fusemesh_executor", default=None)
# Its name: what code under torch.compile is compiled again for.
_executor_name: Scoped[str | None] = Scoped("fusemesh_executor_name", None)
_gpus: dict[int, Gpu] = {}


def target_of(device: torch.device) -> Target:
    """The target that a kernel on tensors of ``device`` is compiled for."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    if device.type == "cpu":
        executor = _executor.get()
        return INTERPRETER if executor is None else executor.target
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
def execute_on(executor: Executor) -> Iterator[None]:
    """Within the block CPU tensors are on the executor's device: it runs launches, and ``auto`` chooses as for a GPU.

    Holds in this thread and in tasks started from it; the backward of CPU tensors runs in the thread that calls it.
    """
    token = _executor.set(executor)
    try:
        with _executor_name.use(executor.name):
            yield
    finally:
        _executor.reset(token)


def executor_name() -> str | None:
    """Return the name of the executor that :func:`execute_on` sets, or None outside it; torch.compile guards on it."""
    return _executor_name.get()


def executor_of(device: torch.device) -> Executor | None:
    """Return what runs launches on tensors of ``device``; None where the interpreter does, or where nothing runs them.

    Nothing runs them within :func:`intercept`.
    """
    if _hook.get() is not None:
        return None
    if device.type != "cuda":
        return _executor.get() if device.type == "cpu" else None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _gpus:
        _gpus[index] = Gpu(target_of(torch.device("cuda", index)), torch.cuda.get_device_name(index))
    return _gpus[index]


def has_compiled_kernels(device: torch.device) -> bool:
    """Return whether Triton's compiled code runs on tensors of ``device``: a GPU's, or an executor's."""
    if device.type == "cpu":
        return _executor_name.get() is not None
    return device.type == "cuda" and _has_gpu()


@functools.cache
def _has_gpu() -> bool:
    """Return whether there is a GPU; fake tensors are on one that may be absent."""
    return torch.cuda.is_available()


compat.assume_constant_result(_has_gpu)


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
    executor, observed = _executor.get(), _observed.get()
    if executor is not None and _on_gpu(args):
        executor = None
    elif executor is None and env.INTERPRET:
        from . import interpreter

        interpreter.run(kernel, grid, args, kwargs)
        return
    if executor is None and observed is None:
        kernel[grid](*args, **kwargs)
        return
    act = _prepare if observed is not None and observed.prepares_only else _run
    if executor is not None:
        act = executor.prepare if act is _prepare else executor.run
    compiled_hash = act(kernel, grid, args, kwargs)
    if observed is not None:
        observed.kernels[compiled_hash] = Seen(kernel, kwargs)


def _on_gpu(args: tuple[Any, ...]) -> bool:
    """Return whether the tensors of a launch are on a GPU."""
    return any(_on_gpu(x) if isinstance(x, tuple) else isinstance(x, torch.Tensor) and x.is_cuda for x in args)


def _prepare(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return str(compat.compile_launch(kernel, grid, args, kwargs).hash)


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    compiled_hash: str = kernel[grid](*args, **kwargs).hash
    return compiled_hash
