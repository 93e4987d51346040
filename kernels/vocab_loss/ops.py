"""The torch.library ops of the head's product with the cross entropy: schema, fake kernels. Torch only.

They compute one rank's part; what crosses a group stands between them (linear.py), and so does autograd. An op's
implementation loads its backend on the first call, so that importing this module needs no Triton.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import backends, op_rules
from ..backend_record import AUTO, Backend, Request, implementation
from .chunked import Head, Sums, wide

# Sums of each row, in fp32 (fp64 for fp64): see chunked.Sums.
FORWARD_SCHEMA = (
    "(Tensor h, Tensor weight, Tensor? bias, Tensor local, float scale, float? softcap, str backend)"
    " -> (Tensor largest, Tensor total, Tensor own)"
)
# rows [3, N]: dloss, the largest logit and log(total). A gradient that was not asked for is a tensor of shape [0].
BACKWARD_SCHEMA = (
    "(Tensor rows, Tensor h, Tensor weight, Tensor? bias, Tensor local, float scale, float? softcap,"
    " bool h_grad, bool weight_grad, bool bias_grad, str backend) -> (Tensor dh, Tensor dweight, Tensor dbias)"
)


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def forward(record: Backend, h: torch.Tensor, head: Head, local: torch.Tensor) -> Sums:
    """Return the sums of rows h over this rank's columns: by the op where these are kernels, else by the functions."""
    if "vocab_loss" not in record.differentiable:
        return Sums(*vocab_loss_forward(h, head.weight, head.bias, local, head.scale, head.softcap, record.name))
    backends.count("vocab_loss_forward", record.name)
    found: Sums = implementation(record.name, "vocab_loss").forward(h, head, local)
    return found


def backward(
    record: Backend,
    rows: torch.Tensor,
    h: torch.Tensor,
    head: Head,
    local: torch.Tensor,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Return the gradients of h, weight and bias that are wanted, in the way of :func:`forward`."""
    found: Gradients
    if "vocab_loss" not in record.differentiable:
        of_head = (head.weight, head.bias, local, head.scale, head.softcap)
        values = vocab_loss_backward(rows, h, *of_head, *wanted, record.name)
        dh, dweight, dbias = (x if want else None for x, want in zip(values, wanted, strict=True))
        return dh, dweight, dbias
    backends.count("vocab_loss_backward", record.name)
    found = implementation(record.name, "vocab_loss").backward(rows, h, head, local, wanted)
    return found


def _forward(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    local: torch.Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> Sums:
    head = Head(weight, bias, scale, softcap)
    found: Sums | None = None
    if backend in ("triton", AUTO):
        from ..proof import calls

        found = calls.vocab_loss_forward(h, head, local, backend == "triton")
        backend = "triton" if found is not None else _instead(h)
    if found is None:
        found = implementation(backend, "vocab_loss").forward(h, head, local)
    backends.count("vocab_loss_forward", backend)
    return found


def _forward_fake(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    local: torch.Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    largest, total, own = (h.new_empty(h.shape[:1], dtype=wide(h.dtype)) for _ in range(3))
    return largest, total, own


def _backward(
    rows: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    local: torch.Tensor,
    scale: float,
    softcap: float | None,
    h_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    head, wanted = Head(weight, bias, scale, softcap), (h_grad, weight_grad, bias_grad)
    found: Any = None
    if backend in ("triton", AUTO):
        from ..proof import calls

        found = calls.vocab_loss_backward(rows, h, head, local, wanted, backend == "triton")
        backend = "triton" if found is not None else _instead(h)
    if found is None:
        found = implementation(backend, "vocab_loss").backward(rows, h, head, local, wanted)
    backends.count("vocab_loss_backward", backend)
    # An op's outputs must not share memory, so that each absent one is an empty tensor of its own.
    return tuple(h.new_empty(0) if x is None else x for x in found)


def _backward_fake(
    rows: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    local: torch.Tensor,
    scale: float,
    softcap: float | None,
    h_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if h_grad else h.new_empty(0)
    dweight = torch.empty_like(weight) if weight_grad else h.new_empty(0)
    return dh, dweight, torch.empty_like(bias) if bias_grad and bias is not None else h.new_empty(0)


def _instead(h: torch.Tensor) -> str:
    """Return the backend that ``auto`` takes where Triton's kernels are not proven."""
    return backends.instead_of("triton", Request("vocab_loss", h.device, h.dtype, transforms=())).name


def _no_gradient(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
    raise RuntimeError(
        "fusemesh::vocab_loss_forward and fusemesh::vocab_loss_backward have no gradient of their own; call "
        "fused_linear_cross_entropy, which differentiates them once"
    )


op_rules.define("vocab_loss_forward", FORWARD_SCHEMA, _forward, _forward_fake)
op_rules.define("vocab_loss_backward", BACKWARD_SCHEMA, _backward, _backward_fake)
vocab_loss_forward = torch.ops.fusemesh.vocab_loss_forward.default
vocab_loss_backward = torch.ops.fusemesh.vocab_loss_backward.default
for _name in ("forward", "backward"):
    torch.library.register_autograd(f"fusemesh::vocab_loss_{_name}", _no_gradient, lib=op_rules.LIBRARY)
