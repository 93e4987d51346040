"""Arguments that flash-attn's functions share, translated into FuseMesh's.

flash-attn hands its numbers to C++, which converts them: numpy's numbers, tensors and arrays of one element count as
numbers, numbers as flags, and a window is any two integers. So they do here; a tensor on a GPU is read with one
synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.kernels.attention.call.errors import short, wrong
from fusemesh.kernels.attention.call.option_checks import checked_scale
from fusemesh.kernels.attention.call.scalars import as_integer, as_number, as_pair, element
from fusemesh.kernels.attention.call.validation import check_truth


def score_options(
    q: torch.Tensor, softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, alibi_slopes: Any
) -> dict[str, Any]:
    """Return keyword arguments of flash_attention, flash_attention_varlen and flash_attention_decode.

    Raises:
        ValueError: one of them has no meaning; in flash-attn's name for it.
    """
    cap = as_number(element(softcap))
    if cap is None or not abs(cap) < float("inf"):
        raise wrong("softcap", "a finite number", short(softcap), "0.0 switches it off")
    pair = as_pair(window_size)
    left, right = (None, None) if pair is None else (as_integer(side) for side in pair)
    if left is None or right is None:
        remedy = "a negative side is open; (-1, -1) switches the window off"
        raise wrong("window_size", "two ints (left, right)", short(window_size), remedy)
    return {
        "scale": checked_scale(element(softmax_scale), q, "softmax_scale"),
        "causal": check_truth("causal", causal),
        "align": "bottom_right",
        "window": None if left < 0 and right < 0 else (None if left < 0 else left, None if right < 0 else right),
        "softcap": cap if cap > 0 else None,
        "alibi_slopes": alibi_slopes,
    }


def length(name: str, value: Any, remedy: str = "pass the longest length, or any larger number") -> int:
    """Return a length, an int of at least 0."""
    number = as_integer(element(value))
    if number is None or number < 0:
        raise wrong(name, "an int of at least 0", short(value), remedy)
    return number
