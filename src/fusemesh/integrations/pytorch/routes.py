"""Where calls of PyTorch's attention functions go inside ``fusemesh.accelerate()``: the rule, and the counts.

A backend asked for by name computes the call or raises. Under ``auto`` FuseMesh computes what the op's own ``auto``
would give to a kernel; what only its eager reference could do, and what it refuses, goes to PyTorch's original
function. So do gradients of torch.func and vmap. Forward-mode derivatives, which PyTorch's kernels do not have, are
those of the reference.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from fusemesh import compat
from fusemesh.kernels import backends
from fusemesh.kernels import compat as kernels_compat
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.scalars import as_number
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.call.validation import wrong
from fusemesh.kernels.attention.sdpa.backend import inexpressible
from fusemesh.kernels.autocast import autocast_dtype
from fusemesh.kernels.backend_record import Request


class Route(NamedTuple):
    """The destination of calls of one of PyTorch's functions."""

    function: str  # PyTorch's name of it
    backend: str | None  # FuseMesh's that computed it, or None for the original function
    reason: str  # why not FuseMesh; empty where it was


# The backend of this thread's innermost accelerate(), and that of calls from every other thread: replicas of
# nn.DataParallel, and autograd, which computes a checkpointed layer again, run in threads that nobody told. The second
# one is also what torch.compile reads, since it guards on a global and traces no context variable. None: not active.
own_backend: ContextVar[str | None] = ContextVar("fusemesh_accelerate", default=None)
shared_backend: str | None = None

_routes: Counter[Route] = Counter()
_observer: Callable[[Route, dict[str, Any]], None] | None = None


def routes() -> dict[Route, int]:
    """Return the calls of each function by destination in this process. Compiled graphs are not counted."""
    return dict(_routes)


def reset_routes() -> None:
    """Set every count of :func:`routes` back to zero."""
    _routes.clear()


@contextlib.contextmanager
def observe(observer: Callable[[Route, dict[str, Any]], None]) -> Iterator[None]:
    """Within the block, every counted call is also shown to ``observer(route, arguments by name)``."""
    global _observer
    outer, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = outer


def active_backend() -> str | None:
    """The backend that this call is to have, or None outside accelerate() and install()."""
    if torch.compiler.is_compiling():
        return shared_backend
    own = own_backend.get()
    return shared_backend if own is None else own


def route(
    function: str,
    backend: str,
    arguments: dict[str, Any],
    automatic: tuple[str | None, str],
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
) -> Any:
    """``ours()`` or ``theirs()``, by the rule at the top, counted.

    Args:
        function: PyTorch's name of it.
        backend: as accelerate() takes it.
        arguments: its tensors by name.
        automatic: what :func:`automatic_backend` says of the call.
    """
    requested = backends.requested(backend)
    unfit = _why_not_ours(arguments.values())
    if requested != "auto":
        if unfit is not None:
            remedy = "backend='auto' leaves such calls to PyTorch"
            raise wrong("backend", "'auto'", f"{requested!r} for {function} with {unfit}", remedy)
        result, taken = ours(), Route(function, requested, "")
    else:
        chosen, reason = automatic
        transforms = kernels_compat.transforms()
        if unfit is not None:
            chosen, reason = None, unfit
        elif kernels_compat.FORWARD in transforms:
            chosen, reason = "reference", ""
        elif transforms:
            chosen, reason = None, "a transform of torch.func"
        result = None
        if chosen is not None:
            try:
                result = ours()
            except (ValueError, NotImplementedError) as error:
                # Both come before anything runs. What was received is cut off, or each size would be a reason.
                chosen, reason = None, "refused: " + str(error).partition(", received")[0]
        if chosen is None:
            result = theirs()
        taken = Route(function, chosen, reason)
    if not torch.compiler.is_compiling():
        _routes[taken] += 1
        if _observer is not None:
            _observer(taken, arguments)
    return result


def automatic_backend(
    query: Any, head_dims: tuple[int, int], *, dropout_p: Any = 0.0, mask: Any = None, only_fused: str | None = None
) -> tuple[str | None, str]:
    """Return the backend that ``auto`` has for a call, the reference apart, or None and why there is none.

    Args:
        head_dims: of query and value.
        mask: bool, or float and then added to the scores.
        only_fused: what of this call PyTorch's kernel does not do, if the caller knows; such calls are left to PyTorch
            unless a GPU's kernels are proven.
    """
    if not isinstance(query, torch.Tensor):
        return None, f"an argument of type {type(query).__name__}"
    dtype = query.dtype
    if dtype.is_floating_point and dtype != torch.float64:
        dtype = autocast_dtype(query.device.type) or dtype
    bias = mask if isinstance(mask, torch.Tensor) and mask.dtype != torch.bool else None
    # Where everything is dropped, there is nothing to draw; what is no number is refused when the call is computed.
    share = as_number(dropout_p)
    call = Call(AttentionSpec(1.0, dropout_p=0.0 if share is None or share == 1 else share), bias=bias)
    request = Request("attention", query.device, dtype, head_dims, call)
    without = ("reference",) if only_fused is None else ("reference", "torch", "cpu")
    try:
        return backends.automatic(request, without)[0].name, ""
    except ValueError:
        what = only_fused or inexpressible(request) or "this transform of torch.func"
    return None, f"only the eager reference has {what} here"


def _why_not_ours(values: Iterable[Any]) -> str | None:
    """Return why these arguments go to PyTorch's own functions, being beyond custom ops on plain tensors; else None."""
    for x in values:
        if x is None:
            continue
        kind = type(x)
        if not isinstance(x, torch.Tensor):
            return f"an argument of type {kind.__name__}"
        if x.is_nested and x.layout == torch.jagged:
            continue
        plain = kind is torch.Tensor or kind is torch.nn.Parameter
        # The last are what torch.compile and torch.export trace with.
        if not plain and not compat.is_tracing_tensor(kind):
            return f"a tensor subclass ({kind.__name__})"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    return None
