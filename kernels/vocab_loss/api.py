"""Cross entropy whose vocabulary is split over a process group, without gathering the logits.

Each rank holds the logits of its own part of the vocabulary, which may be smaller than the others' or empty. What
crosses the group is one number a token for the maximum and two for the sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .. import compat, env, op_rules


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reduce(x: torch.Tensor, group: dist.ProcessGroup | None, op: Any) -> torch.Tensor:
    """Return ``x`` reduced over the group, in place."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
    return x


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_start: int,
        group: dist.ProcessGroup | None,
        ignore_index: int,
    ) -> torch.Tensor:
        # [*, V_local]
        z = _wide(logits)
        # [*]
        peak = z.amax(-1) if z.shape[-1] > 0 else z.new_full(targets.shape, float("-inf"))
        peak = reduce(peak, group, dist.ReduceOp.MAX)
        local = targets - vocab_start
        here = (local >= 0) & (local < z.shape[-1]) & (targets != ignore_index)
        # A rank with an empty part has no logit to gather from; its contribution is the zero of the sum.
        own = torch.zeros_like(peak)
        if z.shape[-1] > 0:
            picked = z.gather(-1, local.clamp(0, z.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
            own = torch.where(here, picked - peak, own)
        # [2, *]: the softmax's denominator, and the target's logit, which only one rank holds
        sums = torch.stack([torch.exp(z - peak.unsqueeze(-1)).sum(-1), own])
        denominator, target_logit = reduce(sums, group, dist.ReduceOp.SUM)
        ignored = targets == ignore_index
        log_denominator = torch.log(denominator)
        # Not their sum: added to a large maximum, the logarithm would lose its last digits.
        ctx.save_for_backward(logits, local, here, ignored, peak, log_denominator)
        return torch.where(ignored, torch.zeros_like(peak), log_denominator - target_logit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        logits, local, here, ignored, peak, log_denominator = ctx.saved_tensors
        dloss = torch.where(ignored, torch.zeros_like(dloss), dloss)
        # d loss / d logit = softmax - onehot(target). Every rank holds the same loss, so nothing is summed over ranks.
        dlogits = torch.exp(_wide(logits) - peak.unsqueeze(-1) - log_denominator.unsqueeze(-1)) * dloss.unsqueeze(-1)
        if logits.shape[-1] > 0:
            at = local.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
            dlogits.scatter_add_(-1, at, torch.where(here, -dloss, torch.zeros_like(dloss)).unsqueeze(-1))
        return dlogits.to(logits.dtype), None, None, None, None


def by_formula(logits: torch.Tensor, targets: torch.Tensor, vocab_start: int, ignore_index: int) -> torch.Tensor:
    """Return the loss of one process in PyTorch's differentiable functions, for the transforms of torch.func."""
    z = _wide(logits)
    own = z.new_zeros(targets.shape)
    if z.shape[-1] > 0:
        z = z - z.detach().amax(-1, keepdim=True)
        local = targets - vocab_start
        here = (local >= 0) & (local < z.shape[-1])
        picked = z.gather(-1, local.clamp(0, z.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        own = torch.where(here, picked, 0.0)
    return torch.where(targets == ignore_index, 0.0, torch.logsumexp(z, -1) - own)


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """``-log softmax(logits)[target]`` per token, where each rank of ``group`` holds some columns of the logits.

    The mathematics is in fp32 (fp64 for fp64 logits). The gradient is exact: ``softmax - onehot``, and it stays on the
    rank that holds the logit.

    Args:
        logits: [*, V_local], the columns ``vocab_start`` to ``vocab_start + V_local`` of this rank; V_local may be 0.
        targets: [*] integer token ids in the whole vocabulary, equal on every rank of the group; ``ignore_index``
            gives loss 0 and gradient 0. With FUSEMESH_CHECK=1 an id that no rank holds raises.
        vocab_start: the id of this rank's first column.
        group: the ranks that hold the vocabulary; None when this process holds all of it.

    Returns:
        loss [*], fp32 (fp64 for fp64), equal on every rank of the group. Its gradient must be too.

    Raises:
        ValueError: shapes that do not agree, targets that are not integers, or a transform of torch.func around the
            collectives of more than one rank.
    """
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])}, that of logits {tuple(logits.shape)} without its "
            f"last dim, received {tuple(targets.shape)}"
        )
    if not logits.dtype.is_floating_point:
        raise ValueError(f"logits: expected a floating dtype, received {logits.dtype}")
    check_ids("vocab_parallel_cross_entropy", targets, logits.shape[-1], vocab_start, group, ignore_index)
    targets = targets.long()
    if compat.transforms():
        return by_formula(logits, targets, vocab_start, ignore_index)
    return _VocabParallelCrossEntropy.apply(logits, targets, vocab_start, group, ignore_index)


def check_ids(
    function: str,
    targets: torch.Tensor,
    columns: int,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    ignore_index: int,
) -> None:
    """Check the token ids given to ``function``, of a vocabulary of which this rank holds so many columns.

    Raises:
        ValueError: as :func:`vocab_parallel_cross_entropy` does.
    """
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32 token ids, received {targets.dtype}; convert with .long()")
    if vocab_start < 0:
        raise ValueError(
            f"vocab_start: expected the id of this rank's first column, at least 0, received {vocab_start}"
        )
    transforms = compat.transforms()
    if transforms and group is not None and dist.get_world_size(group) > 1:
        op_rules.refuse_collectives(function, dist.get_world_size(group))
    if env.CHECK and not (transforms and compat.is_mapped(targets)):
        held = (targets >= vocab_start) & (targets < vocab_start + columns)
        missing = (reduce(held.long(), group, dist.ReduceOp.SUM) == 0) & (targets != ignore_index)
        if bool(missing.any()):
            raise ValueError(
                f"targets: {int(missing.sum())} ids are in no rank's part of the vocabulary, the first is "
                f"{int(targets[missing][0])}; use ids below the vocabulary's size, or ignore_index={ignore_index}"
            )
