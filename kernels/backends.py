"""What this machine can run, which backend a call gets, and how often each one ran.

A backend asked for by name runs or raises; it never falls back. ``backend="auto"`` chooses, and says so once at INFO.
The choice within one operation is that operation's (``attention/api.py``, ``matmul/api.py``); this module holds what
all of them share: the names, availability, the override for fixed signatures, and the call counts.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator

import torch

from . import engine, env

NAMES = ("reference", "torch", "cpu", "triton")

# Operations whose Triton kernels a GPU has run and found right: {(operation, compute capability): where the record is}.
# `auto` chooses a Triton kernel on a GPU only if it stands here; asked for by name, it runs anywhere Triton compiles.
PROVEN_ON_GPU: dict[tuple[str, str], str] = {}

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("fusemesh_backend", default=None)
# The same, for torch.compile, which traces no context variable but guards on a global; one for all threads.
_traced_override: str | None = None
_counts: Counter[tuple[str, str]] = Counter()
_announced: set[tuple[str, str, str]] = set()


@functools.cache
def _triton_importable() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def why_unavailable(backend: str, device: torch.device | str) -> str | None:
    """Why ``backend`` cannot run on tensors of ``device`` on this machine, or None if it can."""
    kind = torch.device(device).type
    if backend in ("reference", "torch"):
        return None
    if backend == "cpu":
        if kind != "cpu":
            return f"the cpu engine takes CPU tensors, these are on {kind}"
        return engine.why_unavailable()
    if backend == "triton":
        if not _triton_importable():
            return "triton is not installed (pip install triton; Linux only)"
        if kind == "cpu" and not env.INTERPRET:
            return (
                "Triton compiles for GPUs and these tensors are on the CPU; to run the kernels in Triton's interpreter "
                "set TRITON_INTERPRET=1 before Python starts"
            )
        return None
    raise ValueError(f"backend: expected one of {('auto', *NAMES)}, received {backend!r}")


# torch.compile takes the answer as a constant: it cannot trace an import, and a process does not change its mind. This
# is the mark of torch.compiler.assume_constant_result, which itself imports torch._dynamo: 2 s before the first call.
why_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def requested(backend: str) -> str:
    """The backend that a call asks for: its own argument, else ``use_backend``'s, else FUSEMESH_BACKEND, else auto.

    Raises:
        ValueError: the name is none of ``auto`` and :data:`NAMES`.
    """
    source = "backend"
    if backend == "auto":
        inner = _traced_override if torch.compiler.is_compiling() else _override.get()
        if inner is not None:
            backend = inner
        elif env.BACKEND != "auto":
            backend, source = env.BACKEND, "FUSEMESH_BACKEND"
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"{source}: expected one of {('auto', *NAMES)}, received {backend!r}")
    return backend


def require(backend: str, device: torch.device | str) -> None:
    """Raise ValueError, with the remedy, unless ``backend`` can run on ``device`` here."""
    reason = why_unavailable(backend, device)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run here: {reason}. Use backend='auto' to let FuseMesh choose")


def proven(operation: str, device: torch.device) -> bool:
    """Whether a GPU of this device's kind has run the operation's Triton kernels and found them right."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return (operation, f"sm_{major}{minor}") in PROVEN_ON_GPU


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls that leave ``backend="auto"`` use this one: ``with fusemesh.use_backend("triton"):``.

    For places where a signature is fixed and leaves no room for ``backend=``. Holds in this thread and in tasks started
    from it; for functions under ``torch.compile``, which are compiled again for it, in all threads. Spawned processes
    take FUSEMESH_BACKEND instead.
    """
    global _traced_override
    requested(name)
    token, outer = _override.set(name), _traced_override
    _traced_override = name
    try:
        yield
    finally:
        _override.reset(token)
        _traced_override = outer


def announce(operation: str, backend: str, why: str) -> None:
    """Say at INFO, once for each outcome, what ``auto`` chose."""
    key = (operation, backend, why)
    if key not in _announced:
        _announced.add(key)
        env.logger.info("%s: auto chose backend %r (%s)", operation, backend, why)


def count(operation: str, backend: str) -> None:
    """Count one execution of ``operation`` by ``backend``."""
    _counts[(operation, backend)] += 1


def call_counts() -> dict[tuple[str, str], int]:
    """How often each backend executed each operation in this process: ``{(operation, backend): calls}``."""
    return dict(_counts)


def reset_call_counts() -> None:
    """Set every count back to zero."""
    _counts.clear()
