"""PyTorch's own attention, computed by FuseMesh, without a change to the model.

with fusemesh.accelerate():
    loss = model(x)  # nn.Transformer, nn.MultiheadAttention, F.scaled_dot_product_attention
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from fusemesh import compat
from fusemesh.kernels import backends

from . import routes as torch_routes
from .functions import REPLACEMENTS

_lock = threading.Lock()
_installed: str | None = None
_entered: list[
    list[str]
] = []  # the backend of every accelerate() that is open in any thread, each in a list of its own
_replaced: list[tuple[Any, str, Any, Any]] = []  # (namespace, name, original, replacement)


def install(backend: str = "auto") -> None:
    """Do as :func:`accelerate` until :func:`uninstall`; a further call changes the backend.

    Raises:
        ValueError: no such backend.
    """
    global _installed
    backends.requested(backend)
    with _lock:
        _installed = backend
        _apply()


def uninstall() -> None:
    """Undo :func:`install`: PyTorch's functions are the originals again, unless an accelerate() is open. Idempotent."""
    global _installed
    with _lock:
        _installed = None
        _apply()


@contextlib.contextmanager
def accelerate(backend: str = "auto") -> Iterator[None]:
    """Within the block, PyTorch's attention runs on FuseMesh: ``with fusemesh.accelerate():``; also a decorator.

    F.scaled_dot_product_attention, nn.MultiheadAttention (with and without weights) and nn.Transformer, its encoder,
    decoder and their layers, with the fused paths that they take in inference. Models, parameters and state_dicts stay
    as they are. After the outermost block, also after an exception, PyTorch's functions are the originals.

    Values, gradients, shapes and dtypes are those that PyTorch documents. Where PyTorch leaves a choice, or does not
    keep to its documentation, this is what holds here:

    - a query that sees no key gets zeros and no gradient, also where nn.MultiheadAttention that returns weights, and
      the fused paths, give NaN;
    - dropout draws other elements from the same state of torch's generator;
    - a float mask is added to the scores in nn.TransformerEncoderLayer's fused path, too, which in PyTorch 2.13 hides
      whatever is not 0.

    Args:
        backend: ``auto`` takes what :func:`fusemesh.flash_attention` takes, and leaves to PyTorch's own functions what
            only the eager reference could compute (dropout and attention weights where no fused kernel is proven) and
            what FuseMesh refuses (both a mask and is_causal; strided nested tensors in F.scaled_dot_product_attention;
            tensor subclasses; torch.func and forward-mode differentiation). ``reference``, ``torch``, ``cpu`` and
            ``triton`` compute every call or raise. ``fusemesh.use_backend`` and FUSEMESH_BACKEND decide what ``auto``
            leaves open.

    Which of the two each call took is counted: :func:`fusemesh.integrations.pytorch.routes.routes`, and ``fusemesh
    doctor --trace SCRIPT``.

    The replacement is seen by all threads, as PyTorch's own flags are, because autograd and nn.DataParallel run layers
    in threads of their own; each thread has the backend of its own innermost block, other threads that of the block
    opened last. Processes started inside begin with PyTorch's functions. torch.compile inside a block compiles
    FuseMesh's ops into the graph, and compiles again outside. What took F.scaled_dot_product_attention by ``from ...
    import`` before keeps PyTorch's, and so does a TorchScript module; torch.jit.script inside a block does not work.

    Raises:
        ValueError: no such backend; and, from calls within, that the backend asked for by name cannot do one.
    """
    backends.requested(backend)
    entry = [backend]
    token = torch_routes.own_backend.set(backend)
    with _lock:
        _entered.append(entry)
        _apply()
    try:
        yield
    finally:
        torch_routes.own_backend.reset(token)
        with _lock:
            # By identity: blocks of several threads do not end in the order in which they began.
            _entered[:] = [other for other in _entered if other is not entry]
            _apply()


def _apply() -> None:
    """Replace or restore PyTorch's functions as _installed and _entered ask for; under the lock."""
    backend = _entered[-1][0] if _entered else _installed
    torch_routes.shared_backend = backend
    if backend is not None and not _replaced:
        compat.keep_out_of_compilers_table()
        for namespace, name, replacement_of in REPLACEMENTS:
            original = getattr(namespace, name)
            replacement = replacement_of(original)
            replacement.__doc__ = original.__doc__
            replacement.replaced_by_fusemesh = original
            _replaced.append((namespace, name, original, replacement))
            setattr(namespace, name, replacement)
    elif backend is None:
        for namespace, name, original, replacement in _replaced:
            # Whoever has replaced ours since, and calls it, is left alone: without a backend it calls the original.
            if getattr(namespace, name) is replacement:
                setattr(namespace, name, original)
        _replaced.clear()
