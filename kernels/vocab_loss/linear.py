"""fused_linear_cross_entropy: the product of the head and the cross entropy in one; the logits are never whole."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .. import compat, op_rules
from ..autocast import autocast_dtype
from ..backend_record import Backend, Refusal, Request, needs_gradient
from ..backends import choose
from . import api, chunked, ops


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        local: torch.Tensor,
        counted: torch.Tensor,
        head: tuple[float, float | None],
        group: dist.ProcessGroup | None,
        record: Backend,
    ) -> torch.Tensor:
        # [n, E]: the rows that count alone
        rows = counted.nonzero().squeeze(1)
        used, own = h[rows], local[rows]
        found = ops.forward(record, used, chunked.Head(weight, bias, *head), own)
        largest = api.reduce(found.largest.clone(), group, dist.ReduceOp.MAX)
        # A rank without columns has -inf, of which nothing is left; a total that is NaN stays NaN.
        total = (found.total * torch.exp(found.largest - largest)).masked_fill(found.total == 0, 0.0)
        total, target = api.reduce(torch.stack([total, found.own]), group, dist.ReduceOp.SUM)
        log_total = torch.log(total)
        ctx.save_for_backward(h, weight, bias, rows, own, largest, log_total)
        ctx.head, ctx.record = head, record
        loss = largest.new_zeros(len(h))
        # Not the sum of both: beside a large one the logarithm would lose its last digits.
        loss[rows] = log_total - (target - largest)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[Any, ...]:
        h, weight, bias, rows, own, largest, log_total = ctx.saved_tensors
        head, of_rows = chunked.Head(weight, bias, *ctx.head), torch.stack([dloss[rows], largest, log_total])
        found = ops.backward(ctx.record, of_rows, h[rows], head, own, ctx.needs_input_grad[:3])
        dh = None if found[0] is None else torch.zeros_like(h).index_copy_(0, rows, found[0])
        return dh, *found[1:], None, None, None, None, None


def fused_linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> torch.Tensor:
    """``-log softmax(z)[target]`` per token, with the logits ``z = cap(scale * (h weight^T + bias))`` never kept.

    ``cap(s) = softcap * tanh(s / softcap)``, or s without a softcap. Rows whose target is ignored take no part in any
    product. Logits are computed some columns of the vocabulary at a time, in the forward, and again in the backward, in
    fp32 (fp64 for fp64; bf16 on a CPU is as its matmul gives it), and so are all sums; a weight's gradient is rounded
    once. Beside its results the op needs memory for some chunks of 64 MiB and, in the backward, h's gradient in fp32.

    On a GPU, in fp32, fp16 and bf16, ``auto`` takes Triton's kernels, each proven at its first use: in the forward
    logits exist in registers alone, and in the backward one kernel goes from h to the logits' gradient, which it writes
    in the dtype of h, a chunk at a time; PyTorch's products make those of h and weight of it. On a CPU, in fp64, and
    where a kernel was not right, PyTorch's operations compute all of it in chunks.

    Args:
        h: [*, E], equal on every rank of ``group``.
        weight: [V_local, E], rows ``vocab_start`` to ``vocab_start + V_local`` of the head; V_local may be 0.
        targets: [*] integer token ids in the whole vocabulary, equal on every rank of the group; ``ignore_index``
            gives loss 0 and gradient 0. With FUSEMESH_CHECK=1 an id that no rank holds raises.
        bias: [V_local] or None.
        scale: of the logits, before the softcap.
        softcap: above 0 (Gemma 2's ``final_logit_softcapping``), or None.
        vocab_start: the id of this rank's first row.
        group: the ranks that hold the vocabulary; None when this process holds all of it.
        backend: ``"triton"``, ``"torch"`` (as it is called on a CPU by ``"cpu"``, and by ``"reference"``, too), or
            ``"auto"``. Calls are counted (:func:`fusemesh.kernels.backends.call_counts`) as
            ``("vocab_loss_forward", backend)`` and ``("vocab_loss_backward", backend)``.

    Returns:
        loss [*], fp32 (fp64 for fp64), equal on every rank of the group. Its gradient must be too. The gradient of
        ``h`` is this rank's term of the sum over the group: let h come out of
        :func:`fusemesh.kernels.matmul.parallel.copy_to_group`, whose backward sums it.

    Raises:
        ValueError: shapes or dtypes that do not agree, a scale or softcap out of range, targets that are not integers,
            or a transform of torch.func around the collectives of more than one rank.
    """
    dtype = autocast_dtype(h.device.type)
    if dtype is not None and h.dtype != torch.float64:
        h, weight, bias = (None if x is None else x.to(dtype) for x in (h, weight, bias))  # type: ignore[assignment]
    _check(h, weight, targets, bias, scale, softcap)
    api.check_ids("fused_linear_cross_entropy", targets, weight.shape[0], vocab_start, group, ignore_index)
    targets = targets.long()
    transforms = compat.transforms()
    needs_grad = bool(transforms) and needs_gradient(h, weight, bias)
    record = choose(backend, Request("vocab_loss", h.device, h.dtype, needs_grad=needs_grad, transforms=transforms))
    if transforms and "vocab_loss" not in record.differentiable:
        what = op_rules.active_transforms()
        refusal = Refusal("backend", f"one with a rule for {what}", f"{record.name!r}, whose vocab_loss has none")
        raise refusal.error(record.name, "use backend='auto' or 'torch'")
    if transforms:
        acc = chunked.wide(h.dtype)
        z = scale * torch.nn.functional.linear(h.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return api.by_formula(z, targets, vocab_start, ignore_index)
    flat = targets.reshape(-1)
    arguments = (h.reshape(-1, h.shape[-1]), weight, bias, flat - vocab_start, flat != ignore_index)
    loss = _FusedLinearCrossEntropy.apply(*arguments, (float(scale), softcap), group, record)
    return loss.reshape(targets.shape)


def _check(
    h: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    if not h.dtype.is_floating_point:
        raise ValueError(f"h: expected a floating dtype, received {h.dtype}")
    if h.ndim < 1 or h.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(h.shape[:-1])}, that of h {tuple(h.shape)} without its last dim, received "
            f"{tuple(targets.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != h.shape[-1] or weight.dtype != h.dtype:
        raise ValueError(
            f"weight: expected [V, {h.shape[-1]}] in the dtype of h, {h.dtype}, received {tuple(weight.shape)} in "
            f"{weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != h.dtype):
        raise ValueError(
            f"bias: expected [{weight.shape[0]}], one a row of weight, in the dtype of h, {h.dtype}, received "
            f"{tuple(bias.shape)} in {bias.dtype}"
        )
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != h.device:
            raise ValueError(
                f"{name}: expected the device of h, {h.device}, received {tensor.device}; move it with .to({h.device})"
            )
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, received {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a number above 0, or None, received {softcap}")
