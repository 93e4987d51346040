"""Packed attention in Triton: the kernels of forward.py and backward.py on views of packed tensors."""

from __future__ import annotations

import torch

from ..call.options import Call
from ..call.packed import as_batch, as_packed
from . import backward as backward_passes
from . import forward as forward_pass


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence; arguments and results are those of the reference.

    Nothing waits for the device, and no length is compiled into a kernel.

    Raises:
        ValueError: the call is beyond the limits of these kernels.
    """
    out, lse = forward_pass.forward(as_batch(q), as_batch(k), as_batch(v), call)
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
    """The gradients, the same bits on every run; arguments and results are those of the reference.

    Raises:
        ValueError: the call is beyond the limits of these kernels.
    """
    do, q, k, v, out = (as_batch(x) for x in (do, q, k, v, out))
    # The kernels find a sequence's rows in these by total_q alone.
    lse = lse.contiguous().unsqueeze(0)
    dlse = None if dlse is None else dlse.contiguous().unsqueeze(0)
    dq, dk, dv, *rest = backward_passes.backward(do, q, k, v, out, lse, dlse, call, bias_grad=bias_grad)
    return as_packed(dq), as_packed(dk), as_packed(dv), rest[0], rest[1]
