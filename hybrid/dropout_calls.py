"""Calls of dropout in a model's forward: who calls, as how-manyth, with which part of the whole; and their answers.

A mode of torch for functions sees the calls, so that modules and functions are the same; hooks on all modules tell who
calls. A tensor's features are a rank's own part if the last tensor parallel layer that ran splits its output. What is
compiled runs as it was written meanwhile: compilers would keep one call's key as a constant.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fusemesh.kernels.attention.call.place import Place, drawings, place_of
from fusemesh.kernels.attention.call.spec import dropout_threshold
from fusemesh.kernels.attention.reference.philox import philox

from . import compat
from .tensor.modules import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallelModule,
    VocabParallelEmbedding,
    own_rows,
)

# Attribute of a module: the numbers, from 0, of those of its dropout calls in a forward that are its stage's.
OWN_CALLS = "fusemesh_dropout_calls"
USE_OURS = "use attn_implementation='fusemesh' (fusemesh.integrations.transformers.register()), or 'eager'"
_LAYERS = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


@dataclass
class Forward:
    """One forward of a model, or of a stage with a micro-batch: who calls, and how often each has called before.

    stack: modules that run, with names, innermost last. layer: the last tensor parallel layer that ran. is_answering:
    a call, so that torch's own functions within it are no further ones.
    """

    key: str
    names: dict[nn.Module, str]
    first_sample: int
    samples: int
    counts: dict[str, int] = field(default_factory=dict)
    stack: list[nn.Module] = field(default_factory=list)
    layer: TensorParallelModule | None = None
    is_answering: bool = False

    def copy(self) -> Forward:
        """Return the state as it is now, which goes on by itself."""
        return replace(self, counts=dict(self.counts), stack=list(self.stack))

    @property
    def caller(self) -> str:
        """The name of the innermost module that runs."""
        return self.names[self.stack[-1]] if self.stack else ""

    def next_call(self) -> tuple[int, bool]:
        """Return the key of the next call, an int64 number, and whether it belongs to this stage."""
        name = self.caller
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        digest = hashlib.blake2b(f"{self.key}/{number}/{name}".encode(), digest_size=8).digest()
        own = getattr(self.stack[-1], OWN_CALLS, None) if self.stack else None
        return int.from_bytes(digest, "little", signed=True), own is None or number in own

    def next_key(self, samples: int) -> int:
        """Return the key of a call of attention."""
        self.check_samples(samples)
        return self.next_call()[0]

    def check_samples(self, samples: int) -> None:
        if samples != self.samples:
            raise ValueError(
                f"dropout of {self.caller!r}: expected the {self.samples} samples of this call along dim 0, received "
                f"{samples}, so that their places in the batch are not known; set its dropout to 0"
            )

    def keeps(self, x: torch.Tensor, p: float, key: int) -> torch.Tensor:
        """Return the elements of ``x`` that stay: bool, its shape.

        x is [B, F], [B, S, F], or attention weights [B, H, S, S'].
        """
        self.check_samples(x.shape[0])
        head, position, feature = self._origin(x)
        device, columns = x.device, x.shape[-1]

        def count(first: int, number: int, dims_behind: int) -> torch.Tensor:
            at = torch.arange(first, first + number, dtype=torch.int64, device=device)
            return at.view(-1, *(1,) * dims_behind)

        # Four neighbours share the words of one counter.
        lanes = count(feature >> 2, (feature + columns + 3 >> 2) - (feature >> 2), 0)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        dims = x.dim()
        counter = (
            lanes,
            count(position, x.shape[-2], 1) if dims > 2 else zero,
            count(head, x.shape[1], 2) if dims == 4 else zero,
            count(self.first_sample, x.shape[0], dims - 1),
        )
        words = torch.stack(philox(key, counter), -1).flatten(-2)
        return words[..., feature & 3 : (feature & 3) + columns] >= dropout_threshold(p)

    def _origin(self, x: torch.Tensor) -> tuple[int, int, int]:
        """Return the head, the position and the feature at which a rank's part ``x`` of a tensor begins."""
        if not 2 <= x.dim() <= 4:
            raise ValueError(
                f"dropout of {self.caller!r}: expected [B, F], [B, S, F] or attention weights [B, H, S, S'], received "
                f"a tensor of shape {tuple(x.shape)}; set its dropout to 0"
            )
        if x.dim() == 4:
            places = (place_of(module) for module in reversed(self.stack))
            return next((place for place in places if place is not None), Place()).heads * x.shape[1], 0, 0
        layer = self.layer
        if layer is None or layer.ranks == 1:
            return 0, 0, 0
        if not isinstance(layer, ColumnParallelLinear):
            return 0, layer.rank * x.shape[1] if layer.sequence_parallel and x.dim() == 3 else 0, 0
        if layer.gather_output:
            return 0, 0, 0
        columns = x.shape[-1]
        if layer.num_heads is not None:
            return 0, 0, layer.rank * columns
        own = own_rows(layer.out_features, layer.ranks, layer.rank)
        if own.stop - own.start != columns:
            raise ValueError(
                f"dropout of {self.caller!r}: expected the {own.stop - own.start} features that the layer before it "
                f"leaves on this rank, received {columns}, so that their places are not known; use tp1"
            )
        return 0, 0, own.start


def again() -> contextlib.AbstractContextManager[None]:
    """Return a context in which what runs from here on drops, computed again, what it drops now; of several uses."""
    found = drawings.get(threading.get_ident())
    return contextlib.nullcontext() if found is None else _Again(found.copy())  # type: ignore[attr-defined]


class _Again(contextlib.AbstractContextManager[None]):
    def __init__(self, state: Forward) -> None:
        self.state, self.entered = state, contextlib.ExitStack()

    def __enter__(self) -> None:
        self.entered.enter_context(drawing(self.state.copy()))

    def __exit__(self, *error: Any) -> None:
        self.entered.close()


@contextlib.contextmanager
def drawing(state: Forward) -> Iterator[None]:
    """Let calls of dropout in the block, and in this thread, drop as ``state`` says."""
    thread = threading.get_ident()
    before = drawings.get(thread)
    drawings[thread] = state
    try:
        # Also where one is entered: backward runs with torch's modes off when it is called as a method of a tensor.
        with _HOOKS, compat.running_eagerly(), _Calls():
            yield
    finally:
        if before is None:
            del drawings[thread]
        else:
            drawings[thread] = before


class _Hooks(contextlib.AbstractContextManager[None]):
    """Hooks on all modules, while any thread needs them."""

    def __init__(self) -> None:
        self.users, self.lock, self.handles = 0, threading.Lock(), list[Any]()

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                modules = nn.modules.module
                self.handles = [
                    modules.register_module_forward_pre_hook(_enter),
                    modules.register_module_forward_hook(_leave, always_call=True),
                ]

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                for handle in self.handles:
                    handle.remove()


_HOOKS = _Hooks()


def _enter(module: nn.Module, args: Any) -> None:
    state: Any = drawings.get(threading.get_ident())
    if state is not None and module in state.names:
        state.stack.append(module)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    state: Any = drawings.get(threading.get_ident())
    if state is None:
        return
    if state.stack and state.stack[-1] is module:
        state.stack.pop()
    if isinstance(module, _LAYERS):
        state.layer = module


class _Calls(TorchFunctionMode):
    """Calls of torch's functions: those that draw are answered by position."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        state: Any = drawings.get(threading.get_ident())
        answer = _ANSWERS.get(func)
        if answer is None or state is None or state.is_answering:
            return func(*args, **(kwargs or {}))
        state.is_answering = True
        try:
            return answer(state, *args, **(kwargs or {}))
        finally:
            state.is_answering = False


def _dropout(
    state: Forward, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    key, is_own = state.next_call()
    if not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    if not is_own:
        return input
    keep, factor = state.keeps(input, p, key), 1 / (1 - p)
    return input.mul_(keep).mul_(factor) if inplace else input * keep * factor


def _torch_dropout(state: Forward, input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    return _dropout(state, input, p, train)


def _scaled_dot_product_attention(
    state: Forward,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    if dropout_p > 0:
        raise ValueError(
            f"attention of {state.caller!r}: expected weights that are dropped by position, received "
            f"F.scaled_dot_product_attention with dropout_p={dropout_p}; {USE_OURS}"
        )
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)


def _rand(state: Forward, *size: Any, **kwargs: Any) -> torch.Tensor:
    """Return torch.rand; one number, by which a model decides about a whole layer, is that of the call's key."""
    if size not in (((),), ([],), ()):
        return torch.rand(*size, **kwargs)
    word, *_ = philox(state.next_call()[0], (torch.zeros((), dtype=torch.int64),) * 4)
    return torch.tensor(int(word) / 2**32, **kwargs)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    torch.rand: _rand,
}
