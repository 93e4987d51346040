"""torch's own modules as tensor parallel ones: the same parameters, under the same names."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from .. import compat
from .modules import ColumnParallelLinear, RowParallelLinear, TensorParallelModule, VocabParallelEmbedding

Made = TypeVar("Made", bound=TensorParallelModule)


def column(linear: nn.Linear, num_heads: int | None, *, gather_output: bool) -> ColumnParallelLinear:
    """Return the layer with its output features split; see :class:`ColumnParallelLinear`."""
    sizes = linear.in_features, linear.out_features
    with torch.device("meta"):
        made = ColumnParallelLinear(
            *sizes, bias=linear.bias is not None, num_heads=num_heads, gather_output=gather_output
        )
    return _with_parameters_of(linear, made)


def row(linear: nn.Linear, *, split_input: bool) -> RowParallelLinear:
    """Return the layer with its input features split; see :class:`RowParallelLinear`."""
    sizes = linear.in_features, linear.out_features
    with torch.device("meta"):
        made = RowParallelLinear(*sizes, bias=linear.bias is not None, split_input=split_input)
    return _with_parameters_of(linear, made)


class SplitTable(VocabParallelEmbedding, nn.Embedding):  # type: ignore[misc]
    """A torch.nn.Embedding whose rows are split; a class derived from that keeps its other methods."""


def embedding(table: nn.Embedding) -> None:
    """Split the rows of ``table``; it stays the same object, and a forward of its own that calls super's stays, too."""
    kind: Any = type(table)
    table.__class__ = SplitTable if kind is nn.Embedding else derived(kind, SplitTable, behind=True)
    vars(table).update(group=None, sequence_parallel=False)


def check_free(module: nn.Module) -> None:
    """Raise ValueError if ``module`` has an attribute that :func:`whole` and :func:`embedding` need for themselves."""
    own = {name for name in vars(TensorParallelModule) if not name.startswith("__")} | {"group", "sequence_parallel"}
    taken = sorted(name for name in own if hasattr(module, name))
    # One that hangs on the object would hide the class's.
    taken += ["forward of its own"] if "forward" in vars(module) else []
    if taken:
        raise ValueError(
            f"model: expected modules without attributes {', '.join(sorted(own))}, received {type(module).__name__} "
            f"with {', '.join(taken)}; rename them, or use tp1"
        )


def whole(module: nn.Module, is_partial: bool) -> None:
    """Make ``module``, of any class, one that every rank holds whole; it stays the same object, of a class derived.

    Args:
        is_partial: whether its gradient on a rank is a part of a sum over tp, for it sees a part of the activations.
    """
    kind: Any = type(module)
    module.__class__ = derived(kind, WholeModule)
    vars(module).update(group=None, sequence_parallel=False, is_partial=is_partial)


class WholeModule(TensorParallelModule):
    """In front of any class: its forward, computed with local tensors in place of DTensor parameters."""

    is_partial: bool

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        pair: tuple[Placement, Placement] = (Replicate(), Partial() if self.is_partial else Replicate())
        return dict.fromkeys((name for name, _ in self.named_parameters(recurse=False)), pair)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._local_parameters():
            return super().forward(*args, **kwargs)

    @contextlib.contextmanager
    def _local_parameters(self) -> Iterator[None]:
        parameters = compat.parameters_of(self)
        held = {name: x for name, x in parameters.items() if isinstance(x, DTensor)}
        parameters.update({name: self.local(name) for name in held})
        try:
            yield
        finally:
            parameters.update(held)


@functools.cache
def derived(kind: Any, other: Any, *, behind: bool = False) -> Any:
    """Return a class of both, named as ``kind``; ``other`` comes first, or ``behind`` it, where super() finds it."""
    return type(kind.__name__, (kind, other) if behind else (other, kind), {"__module__": kind.__module__})


def _with_parameters_of(plain: nn.Module, made: Made) -> Made:
    for name, parameter in plain.named_parameters(recurse=False):
        made.register_parameter(name, parameter)
    return made
