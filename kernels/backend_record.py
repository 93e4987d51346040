"""The record of a backend: its name, the operations that it computes, and the calls that it refuses (leaf).

Each backend has a folder (``attention/reference``, ``sdpa``, ``engine``, ``gpu``) with one :class:`Backend` in its
``backend.py``; ``backends.py`` registers them. The choice of a backend, the errors about one asked for by name, and the
implementation itself ask the same :meth:`Backend.refuse`.
"""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import compat

# What an op is given in place of a backend's name: to choose when it runs. AUTO_AGAIN: likewise, in the backward of a
# forward over the same keys, which may compute that again.
AUTO, AUTO_AGAIN = "auto", "auto_again"
OPERATIONS = ("attention", "attention_varlen", "attention_decode", "linear", "vocab_loss")
# What an error calls a transform.
TRANSFORMS = {
    compat.VMAP: "torch.func.vmap",
    compat.GRADIENT: "gradients of torch.func (grad, vjp, jacrev, hessian)",
    compat.FORWARD: "forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad)",
}


class Refusal(NamedTuple):
    """Why a backend cannot do a call, as an error says it."""

    argument: str
    expected: str
    received: object
    why: str = ""  # the same for the message that tells what auto chose instead

    def error(self, backend: str, remedy: str) -> ValueError:
        """Return the error for a call that asked for ``backend`` by name."""
        expected = self.expected if self.argument == "backend" else f"{self.expected} for backend={backend!r}"
        return ValueError(f"{self.argument}: expected {expected}, received {self.received}; {remedy}")


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd, or a transform of torch.func, will ask for a gradient of one of the tensors."""
    if not torch.is_grad_enabled():
        return False
    transforms = compat.transforms()
    if transforms and torch.compiler.is_compiling() and compat.GRADIENT in transforms:
        return True  # traced tensors do not tell
    if transforms and not torch.compiler.is_compiling():
        return any(x is not None and compat.requires_grad(x) for x in tensors)
    return any(x is not None and x.requires_grad for x in tensors)


def has_derivative(x: torch.Tensor) -> bool:
    """Return whether a derivative of ``x`` will be asked for, in reverse or forward."""
    is_forward = compat.FORWARD in compat.transforms() and not torch.compiler.is_compiling()
    return needs_gradient(x) or (is_forward and compat.has_tangent(x))


# Not frozen, which would double the time of its construction, 2 us of each call. Nothing changes one.
@dataclass
class Request:
    """One call, as far as a backend needs to know it to accept or refuse it; nothing has run yet."""

    operation: str  # one of OPERATIONS
    device: torch.device
    dtype: torch.dtype  # of q, of a linear layer's x or of the loss's h
    head_dims: tuple[int, int] = (1, 1)  # D and Dv
    call: Any = None  # the attention.call.options.Call
    needs_grad: bool = False  # a gradient will be asked for
    needs_lse: bool = False
    is_latent: bool = False  # decode: the values are columns of the keys
    rows: int = 1  # decode: query rows that share a key head
    scores: tuple[int, ...] = ()  # [B, H, Sq, Sk], of attention
    kv_heads: int = 1  # of attention
    layer: Any = None  # linear: x, w, bias, w_up and the activation
    # The keys of TRANSFORMS under which the call runs.
    transforms: tuple[str, ...] = field(default_factory=compat.transforms)

    @property
    def aux_needs_grad(self) -> bool:
        """Return whether a gradient of a score mod's tensors will be asked for."""
        return self.needs_grad and any(x.requires_grad for x in self.call.aux)


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    Args:
        name: by which calls ask for it.
        implementations: for each operation that it computes, the module (or its absolute name). Attention: functions
            ``forward(q, k, v, call)`` and ``backward(do, q, k, v, out, lse, dlse, call, *, bias_grad)`` (see also
            ``keeps_rest``); decode:
            ``decode(call)``; linear: as ``matmul/reference.py`` and, through ops, ``matmul/gpu/linear.py``;
            vocab_loss: functions as in ``vocab_loss/chunked.py``.
        limits: the refusal of a request whatever the machine, or None.
        unavailable: why it cannot run on tensors of a device on this machine, or None.
        automatic: why ``auto`` takes it for a request that it does not refuse, or None where auto leaves it.
        differentiable: the operations whose implementation is written in PyTorch's differentiable functions, and so
            can run under every transform of torch.func; the others run inside a torch.library op with the backward as
            its gradient and a rule for vmap alone.
        instead: operations that another backend computes when this one is asked for.
        least_head_dim: smaller head dims are refused.
        stores_scores: whether attention takes memory of Sq * Sk.
        keeps_rest: whether attention's forward takes ``keep_rest=True``, with which it also returns what rounding took
            from out (:func:`attention.call.tensors.rest_of`), and its backward takes that as ``out_rest``.
        proves: whether its results on tensors of a device are proven at first use, which may fail: what ``auto`` takes
            then carries the name :data:`AUTO`, and the op decides when it runs.
    """

    name: str
    implementations: Mapping[str, Any]
    limits: Callable[[Request], Refusal | None] = lambda request: None
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    automatic: Callable[[Request], str | None] = lambda request: None
    differentiable: frozenset[str] = frozenset()
    instead: Mapping[str, str] = field(default_factory=dict)
    least_head_dim: int = 1
    stores_scores: bool = False
    keeps_rest: bool = False
    proves: Callable[[torch.device], bool] = lambda device: False

    def computes(self, operation: str) -> bool:
        """Return whether the backend takes the operation, itself or by another."""
        return operation in self.implementations or operation in self.instead

    def refuse(self, request: Request) -> Refusal | None:
        """Return why this backend cannot do the call, or None where it runs."""
        if not self.computes(request.operation):
            names = ", ".join(other.name for other in reversed(records().values()) if other.computes(request.operation))
            why = f"{self.name} does not compute {request.operation}"
            return Refusal("backend", f"one that computes {request.operation} ({names})", repr(self.name), why)
        refusal = (self._refuse_transform(request) if request.transforms else None) or self.limits(request)
        if refusal is not None:
            return refusal
        reason = why_unavailable(self.name, request.device)
        return (
            None if reason is None else Refusal("backend", "one that can run here", f"{self.name!r}: {reason}", reason)
        )

    def _refuse_transform(self, request: Request) -> Refusal | None:
        """Return the refusal of a transform for which ops have no rule."""
        record = _records.get(self.instead.get(request.operation, self.name), self)
        if request.operation in record.differentiable:
            return None
        without = [compat.FORWARD, *([compat.GRADIENT] if request.needs_grad else [])]
        for name in without:
            if name in request.transforms:
                what = TRANSFORMS[name]
                received = f"{self.name!r}, whose {request.operation} has none"
                return Refusal("backend", f"one with a rule for {what}", received, f"no rule for {what}")
        return None

    def check(self, request: Request) -> None:
        """Raise ValueError where :meth:`refuse` refuses: what an implementation does before it computes."""
        refusal = self.refuse(request)
        if refusal is not None:
            raise refusal.error(self.name, "use backend='auto' or backend='reference'")


# By name, in the order in which auto asks them. Never changed in place: other threads read it meanwhile.
_records: dict[str, Backend] = {}
_as_auto: dict[str, Backend] = {}  # each under the name AUTO
_changing = threading.Lock()


def records() -> dict[str, Backend]:
    """Return the registered backends by name, in the order in which ``auto`` asks them; do not change it."""
    return _records


def register(backend: Backend, *, before: str | None = None) -> Backend:
    """Make a backend known under its name, and return it.

    Args:
        backend: replaces the one of its name, if there is one.
        before: the backend before which ``auto`` asks it. None leaves it where it is, a new one last.

    Raises:
        ValueError: a name that calls cannot give, or no backend of the name ``before``.
    """
    global _records
    if not isinstance(backend.name, str) or not backend.name.isidentifier() or backend.name == "auto":
        raise ValueError(f"backend.name: expected an identifier other than 'auto', received {backend.name!r}")
    with _changing:
        names = list(_records)
        if before is not None or backend.name not in names:
            names = [name for name in names if name != backend.name]
            if before is not None and before not in names:
                raise ValueError(f"before: expected None or one of {tuple(names)}, received {before!r}")
            names.insert(len(names) if before is None else names.index(before), backend.name)
        _forget_modules(backend.name)
        found = {**_records, backend.name: backend}
        _records = {name: found[name] for name in names}
        _as_auto[backend.name] = dataclasses.replace(backend, name=AUTO)
    return backend


def as_auto(backend: Backend) -> Backend:
    """Return the record of a registered backend under the name :data:`AUTO`."""
    return _as_auto[backend.name]


def unregister(name: str) -> None:
    """Forget a backend.

    Raises:
        ValueError: there is none of this name.
    """
    global _records
    with _changing:
        if name not in _records:
            raise ValueError(f"name: expected one of {tuple(_records)}, received {name!r}")
        _records = {other: record for other, record in _records.items() if other != name}
        _forget_modules(name)


def _forget_modules(backend: str) -> None:
    for loaded in _LOADED.values():
        loaded.pop(backend, None)


_LOADED: dict[str, dict[str, Any]] = {}  # operation -> backend -> its module


def implementation(backend: str, operation: str) -> Any:
    """Return the module by which ``backend`` computes ``operation``; it is imported on the first call.

    Raises:
        ValueError: no such backend, or none that computes the operation itself.
    """
    _load(backend, operation)
    return _LOADED[operation][backend]


def _load(backend: str, operation: str) -> bool:
    """Import the module of an operation, if that has not been done."""
    loaded = _LOADED.setdefault(operation, {})
    record = _records.get(backend)
    found = None if record is None else record.implementations.get(operation)
    if found is None:
        names = tuple(name for name, other in _records.items() if operation in other.implementations)
        raise ValueError(
            f"backend: expected one of {names} for {operation}, received {backend!r}; call the public function"
        )
    if isinstance(found, str):
        if backend not in loaded:
            loaded[backend] = importlib.import_module(found)
    else:
        loaded[backend] = found
    return True


def why_unavailable(backend: str, device: torch.device | str) -> str | None:
    """Return why ``backend`` cannot run on tensors of ``device`` on this machine, or None if it can.

    Raises:
        ValueError: no such backend.
    """
    if backend not in _records:
        raise ValueError(f"backend: expected one of {('auto', *_records)}, received {backend!r}")
    return _records[backend].unavailable(torch.device(device))


# torch.compile takes the answers as constants: it cannot trace an import, and a process does not change its mind.
for _function in (_load, why_unavailable):
    compat.assume_constant_result(_function)
