"""The options of attention, each stated once: as users give them, and in the form that every backend takes.

A new option is a field of :class:`Options` and one of :class:`Call` (a tensor) or :class:`AttentionSpec` (a number).
The schemas of the ops, and what goes into them and comes out, follow from these fields (op_fields.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .packed import Packed
from .spec import AttentionSpec, Origin


@dataclass(frozen=True)
class Options:
    """The options of one call as the user gave them; the docstring of :func:`fusemesh.flash_attention` defines each."""

    causal: bool = False
    align: str | None = None
    window: tuple[int | None, int | None] | None = None
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    softcap: float | None = None
    score_mod: Any = None
    sinks: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: int | torch.Tensor | None = None
    scale: float | None = None
    origin: Origin | None = None
    descale: Any = None


@dataclass(frozen=True)
class Call:
    """One call of attention besides q, k and v, checked and normalised: what every backend takes."""

    spec: AttentionSpec  # the numbers
    mask: torch.Tensor | None = None  # bool, True = attend; 4-D, each dim 1 or that of [B, H, Sq, Sk]
    bias: torch.Tensor | None = None  # added to the scores; likewise
    # int64 [4] on the device: q, k, head, batch, added to those of spec; [4, B] inside the reference of decode.
    origin: torch.Tensor | None = None
    aux: tuple[torch.Tensor, ...] = ()  # tensors of the score mods of spec, in their order
    sinks: torch.Tensor | None = None  # [H], a logit of each head that joins the denominator
    seed: torch.Tensor | None = None  # int64 [1] on the device, of dropout
    descale: torch.Tensor | None = None  # fp32 [B, Hkv, 3], factors of fp8's q, k and v
    packed: Packed | None = None  # where packed sequences lie; mask and bias are then for a batch of the longest

    def replace(self, **changes: Any) -> Call:
        """Return the call with other values in some fields."""
        return dataclasses.replace(self, **changes)

    @property
    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the call through which gradients may flow."""
        return tuple(x for x in (self.bias, self.sinks, *self.aux) if x is not None)
