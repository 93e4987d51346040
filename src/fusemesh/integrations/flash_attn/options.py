"""Options of the scores that flash-attn's functions share, translated into FuseMesh's."""

from __future__ import annotations

import math
from typing import Any

from fusemesh.kernels.attention.call.errors import short, wrong
from fusemesh.kernels.attention.call.validation import check_flag


def score_options(softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, alibi_slopes: Any) -> dict[str, Any]:
    """Return keyword arguments of flash_attention, flash_attention_varlen and flash_attention_decode.

    Raises:
        ValueError: one of them has no meaning; in flash-attn's name for it.
    """
    check_flag("causal", causal)
    if softmax_scale is not None and not _is_finite(softmax_scale):
        raise wrong("softmax_scale", "a finite number or None", short(softmax_scale), "None means 1 / sqrt(head dim)")
    if not _is_finite(softcap):
        raise wrong("softcap", "a finite number", short(softcap), "0.0 switches it off")
    sides = window_size if isinstance(window_size, (tuple, list)) else ()
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        remedy = "a negative side is open; (-1, -1) switches the window off"
        raise wrong("window_size", "two ints (left, right)", short(window_size), remedy)
    left, right = (None if side < 0 else side for side in sides)
    return {
        "scale": softmax_scale,
        "causal": causal,
        "align": "bottom_right",
        "window": None if left is None and right is None else (left, right),
        "softcap": float(softcap) if softcap > 0 else None,
        "alibi_slopes": alibi_slopes,
    }


def _is_finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
