"""Where each tensor of a model stands in a Hugging Face folder.

Names on disk are the model's own. Only a module that was cut before tp (the fused projections of GPT-2 and Phi-3) holds
tensors that are parts of one on disk, or transposed; it says so in its attribute ``sources``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Source:
    """A tensor on disk, or a part of one: ``disk.narrow(dim, start, length)``, then transposed or not.

    Args:
        name: of the tensor on disk.
        dim, start, length: the part of it; ``length`` None: all of it.
        transposed: whether the model's tensor [m, n] is the transpose of the part [n, m].
    """

    name: str
    dim: int = 0
    start: int = 0
    length: int | None = None
    transposed: bool = False

    def of(self, disk: torch.Tensor) -> torch.Tensor:
        """Return the model's tensor, a view of the one on disk."""
        part = disk if self.length is None else disk.narrow(self.dim, self.start, self.length)
        return part.t() if self.transposed else part


def sources_of(model: nn.Module) -> dict[str, Source]:
    """Return for each name of the model's state dict where its values stand on disk.

    A module says by ``sources``, a dict from the names of its own state dict to :class:`Source` with names relative to
    the module's own, what differs from its own names.
    """
    found = {name: Source(name) for name in model.state_dict()}
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, source in (getattr(module, "sources", None) or {}).items():
            assert start + name in found, (start, name)
            found[start + name] = replace(source, name=start + source.name)
    return found


def to_disk(state: Mapping[str, Any], sources: Mapping[str, Source]) -> dict[str, Any]:
    """Return whole tensors of a model under the names and in the shapes that they have on disk.

    Args:
        state: of all parts of each tensor on disk, or of none.
        sources: from :func:`sources_of`.
    """
    found: dict[str, Any] = {}
    parts: dict[str, list[tuple[Source, torch.Tensor]]] = {}
    for name, value in state.items():
        source = sources.get(name, Source(name))
        if source == Source(name):
            found[name] = value
        else:
            parts.setdefault(source.name, []).append((source, value.t() if source.transposed else value))
            found[source.name] = None  # its place in the order
    for name, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0].start)
        found[name] = torch.cat([value for _, value in pieces], pieces[0][0].dim).contiguous()
    return found


def from_disk(state: Mapping[str, Any], sources: Mapping[str, Source]) -> dict[str, Any]:
    """Return whole tensors as they are on disk, under the model's names and in its shapes.

    What has the model's own names already, all of them, is returned as it is.
    """
    if sources.keys() <= state.keys():
        return dict(state)
    changed = {name: source for name, source in sources.items() if source != Source(name) and source.name in state}
    cut = {source.name for source in changed.values()}
    found = {name: value for name, value in state.items() if name not in cut}
    return found | {name: source.of(state[source.name]) for name, source in changed.items()}
