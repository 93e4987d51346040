"""Several linear layers that a model calls as one, each of which tp splits by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .modules import ColumnParallelLinear


class FusedColumns(nn.Module):
    """y = the outputs of linear layers of one input, one behind the other in the last dim.

    Each part may become column parallel. A rank's y then holds its features of each part, and who slices y must do it
    by the rank's sizes.

    Args:
        parts: the layers by name, in the order of their outputs.
        head_dim: features of a head, none of which is then cut; None where the output has none.
    """

    def __init__(self, parts: Mapping[str, nn.Linear], head_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def columns_of(module: nn.Module) -> list[ColumnParallelLinear]:
    """Return the column parallel layers that ``module`` calls: its own, and those of its fused ones."""
    children = [child for child in module.children()]
    children += [part for child in children if isinstance(child, FusedColumns) for part in child.children()]
    return [child for child in children if isinstance(child, ColumnParallelLinear)]
