"""Dropout whose bits depend on positions in the whole alone, so that every layout trains as one process does.

Torch's dropout takes its bits from a generator in the order of calls, so that another cut of the batch, the heads, the
features or the layers drops other elements. Within :meth:`DropoutByPosition.forward` each call of dropout has a key:
the seed, the step, the name of the module in the whole model that calls it, and how many such calls came before it in
this forward. Philox of this key and of (feature, position, head, sample) in the whole decides about an element, as for
attention weights (:mod:`fusemesh.kernels.attention.reference.philox`), and our attention takes its seeds there, too.
So neither padding, nor micro-batches, nor what else a rank computes matters.

Calls are seen by a mode of torch for functions, so modules and functions are the same; hooks on all modules tell who
calls. A tensor's features are a rank's own part if the last tensor parallel layer that ran splits its output.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fusemesh.kernels.attention.call.place import Place, drawings, place_of
from fusemesh.kernels.attention.call.spec import dropout_threshold
from fusemesh.kernels.attention.reference.philox import philox

from .tensor.modules import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallelModule,
    VocabParallelEmbedding,
    own_rows,
)

_LAYERS = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
_USE_OURS = "use attn_implementation='fusemesh' (fusemesh.integrations.transformers.register()), or 'eager'"


class DropoutByPosition:
    """The dropout of one model, on a mesh or not.

    ``model(...)`` within :meth:`forward` drops by position; backward may run outside. What else a model draws of
    torch's generators there, and would so differ between layouts, is refused.

    Args:
        model: what is called; parallelized before it is called first, if it is at all.
        seed: of the run, equal on every rank.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self._step, self._first, self._is_said = -1, 0, False

    def at(self, step: int, first_sample: int, seed: int | None = None) -> None:
        """Say which samples of which step the next call has; without it each call is a step of its own.

        Args:
            step: of the run; each drops other elements.
            first_sample: the place in the step's batch, over all replicas and accumulated calls, of the call's first
                sample. The others follow it.
            seed: of the run; None leaves it.
        """
        self.seed = self.seed if seed is None else seed
        self._step, self._first, self._is_said = step, first_sample, True

    def begin(self, samples: int) -> None:
        """Begin a call with so many samples of this replica: those that :meth:`at` says, or else of a new step."""
        if not self._is_said:
            places = (place_of(module) for module in self.model.modules())
            replica = next((place.samples for place in places if place is not None), 0)
            self._step, self._first = self._step + 1, replica * samples
        self._is_said = False

    @contextlib.contextmanager
    def forward(self, samples: int) -> Iterator[None]:
        """Let the model, called once in the block with so many samples, drop by position."""
        self.begin(samples)
        with self.part(samples):
            yield

    @contextlib.contextmanager
    def part(self, samples: int, before: int = 0) -> Iterator[None]:
        """The same for a part of the samples, and of the layers, of a call that has begun.

        Args:
            before: samples of this replica that come before these in the call.
        """
        if not drops(self.model):
            with _no_other_draws(self.model):
                yield
            return
        names = {module: name for name, module in self.model.named_modules()}
        _check(names)
        state = _Forward(f"{self.seed}/{self._step}", names, self._first + before, samples)
        with _no_other_draws(self.model), drawing(state):
            yield


def drops(model: nn.Module) -> bool:
    """Return whether a model in training drops something, by its modules and by what its config says."""
    if not model.training:
        return False
    config = getattr(model, "config", None)
    said = (value for name, value in vars(config).items() if "drop" in name) if config is not None else iter(())
    rates = itertools.chain(said, (module.p for module in model.modules() if isinstance(module, nn.Dropout)))
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def keep_calls(module: nn.Module, calls: Collection[int]) -> None:
    """Let only these of a module's own dropout calls in a forward drop, counted from 0; a stage has no others."""
    vars(module)["fusemesh_dropout_calls"] = frozenset(calls)


def check_layers_stay(model: nn.Module, layout: Any) -> None:
    """Check that no layer is left out by chance where others wait for it.

    Raises:
        ValueError: a module's ``layerdrop`` is above 0 and ``layout`` has fsdp or pp.
    """
    if layout.fsdp == layout.pp == 1:
        return
    for name, module in model.named_modules():
        rate = getattr(module, "layerdrop", 0)
        if isinstance(rate, (int, float)) and rate > 0:
            key = f"{name.rpartition('.')[2]}_layerdrop"
            key = key if hasattr(getattr(module, "config", None), key) else "layerdrop"
            raise ValueError(
                f"{key}: expected 0 on {layout}, whose ranks gather or compute every layer together, received {rate}; "
                "set it to 0 in the model's config, or use dp and tp alone"
            )


@dataclass
class _Forward:
    """One forward of a model, or of a stage with a micro-batch: who calls, and how often each has called before.

    stack: modules that run, with names, innermost last. layer: the last tensor parallel layer that ran.
    """

    key: str
    names: dict[nn.Module, str]
    first_sample: int
    samples: int
    counts: dict[str, int] = field(default_factory=dict)
    stack: list[nn.Module] = field(default_factory=list)
    layer: TensorParallelModule | None = None

    def copy(self) -> _Forward:
        """Return the state as it is now, which goes on by itself."""
        return _Forward(
            self.key,
            self.names,
            self.first_sample,
            self.samples,
            dict(self.counts),
            list(self.stack),
            self.layer,
        )

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
        own = getattr(self.stack[-1], "fusemesh_dropout_calls", None) if self.stack else None
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
    def __init__(self, state: _Forward) -> None:
        self.state, self.entered = state, contextlib.ExitStack()

    def __enter__(self) -> None:
        self.entered.enter_context(drawing(self.state.copy()))

    def __exit__(self, *error: Any) -> None:
        self.entered.close()


@contextlib.contextmanager
def drawing(state: _Forward) -> Iterator[None]:
    """Let calls of dropout in the block, and in this thread, drop as ``state`` says."""
    thread = threading.get_ident()
    before = drawings.get(thread)
    drawings[thread] = state
    try:
        with contextlib.ExitStack() as entered:
            if before is None:
                entered.enter_context(_HOOKS)
                entered.enter_context(_Calls())
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
        answer = _ANSWERS.get(func)
        if answer is None:
            return func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            raise ValueError(
                "torch.compile: expected a model that is not compiled where dropout is drawn by position, received one "
                "that is; set its dropout to 0, or do not compile it"
            )
        state: Any = drawings[threading.get_ident()]
        return answer(state, *args, **(kwargs or {}))


def _dropout(
    state: _Forward, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    key, is_own = state.next_call()
    if not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    if not is_own:
        return input
    keep, factor = state.keeps(input, p, key), 1 / (1 - p)
    return input.mul_(keep).mul_(factor) if inplace else input * keep * factor


def _scaled_dot_product_attention(
    state: _Forward,
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
            f"F.scaled_dot_product_attention with dropout_p={dropout_p}; {_USE_OURS}"
        )
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)


def _rand(state: _Forward, *size: Any, **kwargs: Any) -> torch.Tensor:
    """Return torch.rand; one number, by which a model decides about a whole layer, is that of the call's key."""
    if size not in (((),), ([],), ()):
        return torch.rand(*size, **kwargs)
    word, *_ = philox(state.next_call()[0], (torch.zeros((), dtype=torch.int64),) * 4)
    return torch.tensor(int(word) / 2**32, **kwargs)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    torch.rand: _rand,
}


def _check(names: dict[nn.Module, str]) -> None:
    """Raise where a part of a model would run again without being seen."""
    for module, name in names.items():
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                f"gradient_checkpointing_enable(): expected False, received True on {name or type(module).__name__}, "
                "whose dropout would be drawn anew in backward; use parallelize(..., recompute='full')"
            )


@contextlib.contextmanager
def _no_other_draws(model: nn.Module) -> Iterator[None]:
    """Raise after the block if it has drawn from torch's generators: other layouts draw other numbers."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None or not model.training else parameter.device
    before = _generators(device)
    yield
    if model.training and not all(map(torch.equal, before, _generators(device))):
        raise ValueError(
            f"dropout: expected {type(model).__name__} to draw random numbers by F.dropout and our attention alone, "
            "received a model that draws from torch's generators otherwise, so that layouts would differ; set the "
            f"other dropout to 0, and for attention weights {_USE_OURS}"
        )


def _generators(device: torch.device) -> list[torch.Tensor]:
    found = [torch.get_rng_state()]
    return [*found, torch.cuda.get_rng_state(device)] if device.type == "cuda" else found
