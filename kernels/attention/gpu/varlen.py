"""Packed attention in Triton: the kernels of forward.py and backward.py on views of packed tensors."""

from __future__ import annotations

from typing import Any

import torch

from ..call.packed import Packed, as_batch, as_packed
from . import backward as triton_backward
from . import forward as triton_forward


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence; arguments and results are those of :func:`reference.forward`.

    Nothing waits for the device, and no length is compiled into a kernel.

    Raises:
        ValueError: a dtype or head dimension that these kernels do not have.
    """
    q, k, v = (as_batch(x) for x in (q, k, v))
    out, lse = triton_forward.forward(q, k, v, **options, origin=None, packed=packed)
    return as_packed(out), lse.squeeze(0)


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    packed: Packed,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients, the same bits on every run; arguments and results are those of :func:`reference.backward`.

    Raises:
        ValueError: a dtype or head dimension that these kernels do not have.
    """
    do, q, k, v, out = (as_batch(x) for x in (do, q, k, v, out))
    # The kernels find a sequence's rows in these by total_q alone.
    lse = lse.contiguous().unsqueeze(0)
    dlse = None if dlse is None else dlse.contiguous().unsqueeze(0)
    dq, dk, dv, *rest = triton_backward.backward(do, q, k, v, out, lse, dlse, **options, origin=None, packed=packed)
    return as_packed(dq), as_packed(dk), as_packed(dv), rest[0], rest[1]
