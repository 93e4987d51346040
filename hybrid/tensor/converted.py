"""torch's own modules as tensor parallel ones: the same parameters, under the same names."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

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


def features(table: nn.Embedding) -> None:
    """Split the columns of ``table``; it stays the same object, and a rank looks up its own."""
    kind: Any = type(table)
    table.__class__ = derived(kind, SplitFeatures)
    vars(table).update(group=None, sequence_parallel=False, is_partial=False)


class SplitFeatures(WholeModule):
    """In front of the class of an embedding: a rank has some of its columns, and y is those."""

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        return {"weight": (Shard(1), Shard(1))}


def holder(module: nn.Module, tied: dict[str, tuple[TensorParallelModule, str]]) -> None:
    """Let ``module`` hold its own parameters as the layers do that compute with them; it stays the same object.

    Args:
        tied: for the name of each, the layer that holds it, too, and its name there.
    """
    kind: Any = type(module)
    module.__class__ = derived(kind, TiedHolder)
    vars(module).update(group=None, sequence_parallel=False, tied=tied)


class TiedHolder(TensorParallelModule):
    """In front of a class whose own parameters are second names of other modules', with which it does not compute."""

    tied: dict[str, tuple[TensorParallelModule, str]]

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        return {name: layer.placements()[there] for name, (layer, there) in self.tied.items()}

    def distribute(
        self,
        mesh: DeviceMesh,
        sequence_parallel: bool,
        device: torch.device,
        shared: dict[nn.Parameter, nn.Parameter | None],
    ) -> None:
        # Placements depend on the number of ranks, which the layers must know first.
        for layer, _ in self.tied.values():
            if layer.group is None:
                layer.distribute(mesh, sequence_parallel, device, shared)
        super().distribute(mesh, sequence_parallel, device, shared)


@functools.cache
def derived(kind: Any, other: Any, *, behind: bool = False) -> Any:
    """Return a class of both, named as ``kind``; ``other`` comes first, or ``behind`` it, where super() finds it."""
    return type(kind.__name__, (kind, other) if behind else (other, kind), {"__module__": kind.__module__})


def _with_parameters_of(plain: nn.Module, made: Made) -> Made:
    for name, parameter in plain.named_parameters(recurse=False):
        made.register_parameter(name, parameter)
    if hasattr(plain, "sources"):  # of a layer that was cut: where its tensors stand on disk
        vars(made)["sources"] = plain.sources
    return made
