"""Packed attention on the C++ engine, which reads the lengths where they are."""

from __future__ import annotations

import torch

from ..call.options import Call
from ..call.packed import as_batch, as_packed, check_contents
from . import dense


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence; arguments and results are those of the reference.

    Raises:
        ValueError: as :func:`dense.forward`, and where sequences lie beyond the tensors or are longer than was said.
    """
    assert call.packed is not None
    check_contents(call.packed, q.shape[0], k.shape[0])
    out, lse = dense.forward(*(as_batch(x) for x in (q, k, v)), call)
    return as_packed(out), lse.squeeze(0)


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    call: Call,
    *,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients; arguments and results are those of the reference.

    Raises:
        ValueError: as :func:`forward`.
    """
    assert call.packed is not None
    check_contents(call.packed, q.shape[0], k.shape[0])
    do, q, k, v, out = (as_batch(x) for x in (do, q, k, v, out))
    dlse = None if dlse is None else dlse.unsqueeze(0)
    dq, dk, dv, *rest = dense.backward(do, q, k, v, out, lse.unsqueeze(0), dlse, call, bias_grad=bias_grad)
    return as_packed(dq), as_packed(dk), as_packed(dv), rest[0], rest[1]
