"""AttentionSpec: one frozen description of an attention call, which every backend takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Origin:
    """Where element 0 of what was passed stands in the whole tensor.

    A shard of a tensor computes what the whole would: query i stands at position ``q + i``, key j at ``k + j``, head h
    at ``head + h``, batch b at ``batch + b``. Causal and window masks, and everything else that depends on a position,
    see only these. Each is an int within +-2^60, or an integer device tensor with one element (read on the device, no
    synchronisation).
    """

    q: int | torch.Tensor = 0
    k: int | torch.Tensor = 0
    head: int | torch.Tensor = 0
    batch: int | torch.Tensor = 0


@dataclass(frozen=True)
class AttentionSpec:
    """The numbers of a call: what is computed, apart from the tensors.

    Query i and key j see each other iff ``-window_left <= (origin_k + j) - (origin_q + i) <= window_right``, where None
    leaves a side open; ``causal`` is ``window_right = 0``.

    The fields are plain numbers and names, because a torch custom op carries nothing else; ``None`` travels as -1.
    Origins that are device tensors travel beside the spec as one int64 tensor ``[q, k, head, batch]``, and are added to
    those here. So do the tensors of the score mods (``aux``), the sinks and dropout's seed.
    """

    scale: float
    window_left: int | None = None
    window_right: int | None = None
    origin_q: int = 0
    origin_k: int = 0
    origin_head: int = 0
    origin_batch: int = 0
    mods: tuple[str, ...] = ()  # names of registered score mods, in the order in which they apply
    params: tuple[float, ...] = ()  # their parameters, those of the first mod first
    dropout_p: float = 0.0


FP8 = torch.float8_e4m3fn


def dropout_threshold(p: float) -> int:
    """Random words of 32 bits below this are dropped: floor(p * 2^32)."""
    return math.floor(p * 2**32)


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the output of attention on q of ``dtype``: bf16 for fp8, whose range three bits cannot resolve."""
    return torch.bfloat16 if dtype == FP8 else dtype
