"""Packed attention on the C++ engine, which reads the lengths where they are."""

from __future__ import annotations

from typing import Any

import torch

from ..call.packed import Packed, as_batch, as_packed, check_contents
from . import dense as cpu


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence; arguments and results are those of :func:`reference.forward`.

    Raises:
        ValueError: as :func:`cpu.forward`, and where sequences lie beyond the tensors or are longer than was said.
    """
    check_contents(packed, q.shape[0], k.shape[0])
    q, k, v = (as_batch(x) for x in (q, k, v))
    out, lse = cpu.forward(q, k, v, **options, origin=None, packed=packed)
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
    """The gradients; arguments and results are those of :func:`reference.backward`.

    Raises:
        ValueError: as :func:`forward`.
    """
    check_contents(packed, q.shape[0], k.shape[0])
    do, q, k, v, out = (as_batch(x) for x in (do, q, k, v, out))
    dlse = None if dlse is None else dlse.unsqueeze(0)
    dq, dk, dv, *rest = cpu.backward(do, q, k, v, out, lse.unsqueeze(0), dlse, **options, origin=None, packed=packed)
    return as_packed(dq), as_packed(dk), as_packed(dv), rest[0], rest[1]
