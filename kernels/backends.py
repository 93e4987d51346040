"""The registered backends, the choice among them, and how often each one ran.

A backend asked for by name runs or raises; it never falls back. ``backend="auto"`` asks the records in their order,
takes the first that is willing and does not refuse the call, and says so once at INFO; the one that a table of
``fusemesh bench --compare`` names for calls of this class is asked first. It never raises where the reference can
compute; but it warns, once for each reason, where that takes memory of Sq * Sk. Under a transform of torch.func, where
ops have no rule for most, it asks only those written in PyTorch's differentiable functions.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator

import torch

from . import compat, env
from .attention.engine.backend import CPU
from .attention.gpu.backend import TRITON
from .attention.reference.backend import REFERENCE
from .attention.sdpa.backend import TORCH
from .backend_record import TRANSFORMS, Backend, Request, as_auto, records, register
from .backend_record import why_unavailable as why_unavailable
from .proof import preferences
from .runtime import launch
from .scoped import Scoped

# The one place where backends are registered, in the order in which auto asks them.
for _record in (TRITON, CPU, TORCH, REFERENCE):
    register(_record)

_override: Scoped[str | None] = Scoped("fusemesh_backend", None)
_counts: Counter[tuple[str, str]] = Counter()
_announced: set[tuple[str, str, str]] = set()
_warned: set[tuple[str, str, str]] = set()
MOST_SILENT = 2**28  # bytes of scores on a CPU that are not worth a warning


def names() -> tuple[str, ...]:
    """Return the names of all backends, the plainest first."""
    return tuple(reversed(records()))


def requested(backend: str) -> str:
    """Return the backend that a call asks for: its argument, else ``use_backend``'s, else FUSEMESH_BACKEND, else auto.

    Raises:
        ValueError: the name is neither ``auto`` nor that of a backend.
    """
    source = "backend"
    if backend == "auto":
        inner = _override.get()
        if inner is not None:
            backend = inner
        elif env.BACKEND != "auto":
            backend, source = env.BACKEND, "FUSEMESH_BACKEND"
    if backend != "auto" and backend not in records():
        raise ValueError(f"{source}: expected one of {('auto', *names())}, received {backend!r}")
    return backend


def choose(backend: str, request: Request) -> Backend:
    """Return the backend that runs a call: the one given by name, or for ``auto`` the first willing one.

    Where that one proves its results at first use, the record that ``auto`` gets is called ``auto``, too, and the op
    asks again when it runs (:func:`instead_of`).

    Args:
        backend: the call's argument; ``auto`` leaves it to ``use_backend``, to FUSEMESH_BACKEND and to the records.
        request: the call.

    Raises:
        ValueError: no such backend, or the one given by name cannot do this call or cannot run here.
    """
    name = requested(backend)
    # Read so that torch.compile compiles anew for another one, as it does for the values of use_backend.
    launch.executor_name()
    if name == "auto":
        record, why = automatic(request)
        if not torch.compiler.is_compiling():
            _announce(request.operation, record.name, why)
        if record.stores_scores and request.scores:
            _warn_of_scores(record, request, why)
        if record.proves(request.device):
            return as_auto(record)
    else:
        record = records()[name]
        check(record, request)
    if request.operation in record.instead:
        record = records()[record.instead[request.operation]]
    return record


def automatic(request: Request, without: Collection[str] = ()) -> tuple[Backend, str]:
    """Return the backend that ``auto`` takes for a call, and why.

    Args:
        without: names that the caller does not want.

    Raises:
        ValueError: every backend refuses, with the last one's reason.
    """
    last, why_not = None, ""
    preferred = preferences.prefers(request)
    ordered = list(records().values())
    if preferred is not None:
        ordered.sort(key=lambda record: record.name != preferred)
    only_formulas = bool(request.transforms) and any(request.operation in x.differentiable for x in records().values())
    for record in ordered:
        if record.name in without:
            continue
        if only_formulas and request.operation not in record.differentiable:
            why_not = "under " + ", ".join(TRANSFORMS[name] for name in request.transforms)
            continue
        willing = record.automatic(request)
        if willing is None:
            continue
        refusal = record.refuse(request)
        if refusal is None:
            measured = "the fastest here, by fusemesh bench --compare" if record.name == preferred else ""
            return record, why_not or measured or willing
        last, why_not = (record, refusal), refusal.why
    if last is None:
        raise ValueError(f"backend: expected one that takes {request.operation}, received none; name one")
    raise last[1].error(last[0].name, "change the call")


def instead_of(without: str, request: Request) -> Backend:
    """Return what ``auto`` takes, inside an op, where the backend ``without`` could not be proven."""
    record, why = automatic(request, (without,))
    _announce(request.operation, record.name, f"{without} is not proven on {request.device.type}; {why}")
    if record.stores_scores and request.scores:
        _warn_of_scores(record, request, f"{without} is not proven")
    return record


def check(record: Backend, request: Request) -> None:
    """Raise ValueError, with the remedy, unless the backend can do the call here."""
    refusal = record.refuse(request)
    if refusal is None:
        return
    if refusal.why and refusal.why == why_unavailable(record.name, request.device):
        raise ValueError(
            f"backend={record.name!r} cannot run here: {refusal.why}. Use backend='auto' to let FuseMesh choose"
        )
    others = [
        name
        for name in ("reference", "torch")
        if name in records() and name != record.name and records()[name].refuse(request) is None
    ]
    raise refusal.error(record.name, "use backend=" + " or ".join(repr(name) for name in ("auto", *others)))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls that leave ``backend="auto"`` use this one: ``with fusemesh.use_backend("triton"):``.

    For places where a signature is fixed and leaves no room for ``backend=``. Holds in this thread and in tasks started
    from it; for functions under ``torch.compile``, which are compiled again for it, in all threads. Spawned processes
    take FUSEMESH_BACKEND instead.
    """
    requested(name)
    with _override.use(name):
        yield


def _announce(operation: str, backend: str, why: str) -> None:
    """Say at INFO, once for each outcome, what ``auto`` chose."""
    key = (operation, backend, why)
    if key not in _announced:
        _announced.add(key)
        env.logger.info("%s: auto chose backend %r (%s)", operation, backend, why)


def _warn_of_scores(record: Backend, request: Request, why: str) -> None:
    """Warn, once for each reason, that ``auto`` took a backend with memory of Sq * Sk, and say what to do."""
    kind = request.device.type
    if kind == "meta":
        return
    others = [x for x in records().values() if not x.stores_scores and x.refuse(request) is None]
    remedy = "leave that out of the call, or attend to parts of the keys (fusemesh.merge_attention)"
    if request.transforms:  # where PyTorch's functions store the scores, too
        others = [x for x in others if request.operation not in x.differentiable]
        remedy = "take gradients by backward(), or attend to parts of the keys (fusemesh.merge_attention)"
    if others:
        remedy = f"name backend={others[0].name!r} in the call or in fusemesh.use_backend, which computes it"
    if torch.compiler.is_compiling():  # where sizes may be symbols
        if kind != "cpu":
            _warn_once(request.operation, kind, record.name, why, "[B, H, Sq, Sk]", remedy)
        return
    size = math.prod(request.scores) * (8 if request.dtype == torch.float64 else 4)
    if kind != "cpu" or size >= MOST_SILENT:
        memory = f"{' x '.join(map(str, request.scores))} [B, H, Sq, Sk], {size / 2**20:.4g} MiB"
        _warn_once(request.operation, kind, record.name, why, memory, remedy)


def _warn_once(operation: str, device: str, backend: str, why: str, memory: str, remedy: str) -> bool:
    key = (operation, device, why)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"{operation}: backend='auto' took {backend!r} on {device} ({why}), which stores scores of {memory}, and "
            f"matrices as large beside them; {remedy}. Said once for each reason",
            stacklevel=2,
        )
    return True


# Traced code cannot warn; torch.compile calls it once and goes on.
compat.assume_constant_result(_warn_once)


def count(operation: str, backend: str) -> None:
    """Count one execution of ``operation`` by ``backend``; a graph that is being traced executes nothing."""
    if not torch.compiler.is_compiling():
        _counts[(operation, backend)] += 1


def call_counts() -> dict[tuple[str, str], int]:
    """Return how often each backend executed each operation in this process: ``{(operation, backend): calls}``."""
    return dict(_counts)


def reset_call_counts() -> None:
    """Set every count back to zero."""
    _counts.clear()
