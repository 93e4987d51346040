"""Cross entropy by its definition, on the whole vocabulary: what the sharded form must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
    """``-log softmax(logits)[target]`` per token, 0 where the target is ``ignore_index``.

    Args:
        logits: [*, V], any floating dtype; computed in fp32 (fp64 stays fp64).
        targets: [*] token ids below V, or ``ignore_index``.

    Returns:
        [*] in fp32 (fp64 for fp64).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), targets.reshape(-1), ignore_index=ignore_index, reduction="none"
    )
    return flat.reshape(targets.shape)
