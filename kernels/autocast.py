"""The dtype of torch.autocast, on every device (leaf)."""

from __future__ import annotations

import torch


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype in which autocast computes on devices of ``kind``; None where it is off, and on meta."""
    # On a device that autocast does not know, the other two raise.
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
