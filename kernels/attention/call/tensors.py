"""What every public function of attention does to its inputs besides checking them."""

from __future__ import annotations

from typing import Any

import torch

from ... import backends


def autocast(*inputs: Any) -> tuple[Any, ...]:
    """What autocast does to the inputs of F.scaled_dot_product_attention; whatever is no such tensor stays as it is."""

    def cast(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point or x.dtype == torch.float64:
            return x
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return x
        return x.to(torch.get_autocast_dtype(kind))

    return tuple(cast(x) for x in inputs)


def unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last stride is 1, else a contiguous copy, which autograd sees."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def count(operation: str, backend: str) -> None:
    """Count a call that runs outside the custom ops, which count their own."""
    # A compiled graph runs without this file, so counting while it is traced would count what does not happen.
    if not torch.compiler.is_compiling():
        backends.count(operation, backend)
