"""What stands in the place of a model's modules in a stage of a pipeline that has others of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import compat


class Same(nn.Module):
    """Returns its first argument: a block, a norm or a dropout that another stage has."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x


class Zero(nn.Module):
    """Returns 0: embeddings of positions, which the first stage has added."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Of no dimension, so that the sum keeps its dtype and device.
        return torch.zeros(())


class Embedded(nn.Module):
    """Returns embeddings as they are: the first stage has added those of positions and token types."""

    def forward(
        self, input_ids: Any = None, inputs_embeds: torch.Tensor | None = None, position_ids: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        assert inputs_embeds is not None
        return inputs_embeds


class BiasedSame(nn.Module):
    """A block of T5 that another stage has: h and both biases are those that came in."""

    def forward(
        self,
        h: torch.Tensor,
        attention_mask: Any = None,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        encoder_decoder_position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return h, position_bias, encoder_decoder_position_bias


class BiasAlone(nn.Module):
    """T5's first block of a stack, that another stage has: its bias for relative positions is every block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        attention: Any = block.get_submodule("layer.0.SelfAttention")
        others = {name: None for name, _ in attention.named_children() if name != "relative_attention_bias"}
        self.attention: Any = replaced(attention, others)

    def forward(
        self, h: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        # Of cross attention it is zero, which the first block with one adds by itself.
        return h, self.attention.compute_bias(h.shape[1], h.shape[1], device=h.device), None


def replaced(
    module: nn.Module, others: Mapping[str, nn.Module | None], constants: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return a module that shares everything with ``module`` but the descendants ``others``, by their names.

    Args:
        others: the modules in their places; None: nothing.
        constants: attributes that are no modules, and other values of them.
    """
    deeper: dict[str, dict[str, nn.Module | None]] = {}
    children: dict[str, nn.Module | None] = {}
    for name, other in others.items():
        first, _, rest = name.partition(".")
        if rest:
            deeper.setdefault(first, {})[rest] = other
        else:
            children[first] = other
    for name, below in deeper.items():
        # What itself is replaced keeps its own.
        if name not in children:
            children[name] = replaced(module.get_submodule(name), below)
    return compat.with_children(module, children, constants or {})
