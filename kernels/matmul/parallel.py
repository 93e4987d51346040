"""Linear layers whose weights are split over a process group, and the ways activations cross it.

Plain local tensors and an explicit process group; no mesh is known here. ``group=None``, or a group of one rank, is a
single process and communicates nothing. R is the number of ranks in the group.

=======================  =========================  =========================
function                 forward                    backward
=======================  =========================  =========================
copy_to_group            identity                   all-reduce
reduce_from_group        all-reduce                 identity
gather_from_sequence     all-gather along ``dim``   reduce-scatter
reduce_scatter_to_seq..  reduce-scatter             all-gather
scatter_to_sequence      own part of ``dim``        all-gather
gather_from_columns      all-gather, last dim       own part
=======================  =========================  =========================

Each backward is the transpose of its forward when the group's losses are one loss that every rank computes alike. What
follows ``gather_from_columns`` is computed by every rank alike, so that each holds the whole gradient of it already.

Source: Shoeybi et al., "Megatron-LM" (2019), section 3; Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models" (2022), section 4.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import compat, op_rules
from .api import fused_linear

# torch 2.13 renamed these two and warns at the old names; 2.11 and 2.12 have only the old ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks in ``group``; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank within ``group``; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


# The three collectives. Autograd functions below call them by these names, so that a test can take one away.


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum (or ``op``) of ``x`` over the group, in a new tensor."""
    # Autograd may hand the same gradient tensor to several functions: never reduce in place.
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op=op, group=group)
    return out


def all_gather(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """The ranks' ``x`` [.., S, ..] one after the other along ``dim``: [.., R * S, ..]."""
    ranks = group_size(group)
    gathered = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    _all_gather_single(gathered, x.contiguous(), group=group)
    if dim == 0:
        return gathered
    return torch.cat(gathered.chunk(ranks, dim=0), dim=dim)


def reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """This rank's part along ``dim`` [.., S / R, ..] of the sum over the group of ``x`` [.., S, ..]."""
    ranks = group_size(group)
    # The collective scatters along dim 0, so the parts are laid one after the other there.
    parts = x if dim == 0 else torch.cat(x.chunk(ranks, dim=dim), dim=0)
    out = x.new_empty((parts.shape[0] // ranks, *parts.shape[1:]))
    _reduce_scatter_single(out, parts.contiguous(), group=group)
    return out


def own_part(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """This rank's part of ``x`` along ``dim``."""
    return x.chunk(group_size(group), dim=dim)[group_rank(group)].contiguous()


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(dy, ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy, None


class _GatherFromSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return reduce_scatter(dy, ctx.group, ctx.dim), None, None


class _ReduceScatterToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return reduce_scatter(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(dy, ctx.group, ctx.dim), None, None


class _ScatterToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return own_part(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(dy, ctx.group, ctx.dim), None, None


class _GatherFromColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, columns: int) -> torch.Tensor:
        ranks, own = group_size(group), x.shape[-1]
        most = -(-columns // ranks)
        ctx.start, ctx.own = group_rank(group) * most, own
        # Only the last ranks have fewer, so what pads them ends up behind the last column.
        whole = all_gather(F.pad(x, (0, most - own)), group, x.dim() - 1)
        return whole.narrow(-1, 0, columns).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return dy.narrow(-1, min(ctx.start, dy.shape[-1]), ctx.own).contiguous(), None, None


def _is_alone(group: dist.ProcessGroup, function: str) -> bool:
    """Return whether the group has one rank; raise for more where a transform of torch.func is active."""
    ranks = group_size(group)
    if ranks > 1 and compat.transforms():
        op_rules.refuse_collectives(function, ranks)
    return ranks == 1


def copy_to_group(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """``x``, equal on every rank, enters a computation that the ranks split: its gradients are summed over them."""
    if group is None or _is_alone(group, "copy_to_group"):
        return x
    return _CopyToGroup.apply(x, group)


def reduce_from_group(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over the group of each rank's ``x``, equal on every rank."""
    if group is None or _is_alone(group, "reduce_from_group"):
        return x
    return _ReduceFromGroup.apply(x, group)


def gather_from_sequence(x: torch.Tensor, group: dist.ProcessGroup | None, dim: int = 1) -> torch.Tensor:
    """The whole sequence from its parts, for a computation that the ranks split: [.., S / R, ..] to [.., S, ..]."""
    if group is None or _is_alone(group, "gather_from_sequence"):
        return x
    return _GatherFromSequence.apply(x, group, dim)


def reduce_scatter_to_sequence(x: torch.Tensor, group: dist.ProcessGroup | None, dim: int = 1) -> torch.Tensor:
    """This rank's part of the sequence of the sum over the group: [.., S, ..] to [.., S / R, ..].

    Raises:
        ValueError: the group's size does not divide the sequence.
    """
    if group is None or _is_alone(group, "reduce_scatter_to_sequence"):
        return x
    _check_divides(x, group, dim)
    return _ReduceScatterToSequence.apply(x, group, dim)


def scatter_to_sequence(x: torch.Tensor, group: dist.ProcessGroup | None, dim: int = 1) -> torch.Tensor:
    """This rank's part of the sequence of ``x``, which is equal on every rank: [.., S, ..] to [.., S / R, ..].

    Raises:
        ValueError: the group's size does not divide the sequence.
    """
    if group is None or _is_alone(group, "scatter_to_sequence"):
        return x
    _check_divides(x, group, dim)
    return _ScatterToSequence.apply(x, group, dim)


def gather_from_columns(x: torch.Tensor, group: dist.ProcessGroup | None, columns: int) -> torch.Tensor:
    """The whole last dimension from its parts, for a computation that every rank does alike: [.., N] of ``columns`` N.

    Parts are as torch.chunk cuts them: ceil(N / R) on each rank, fewer or none on the last ones.
    """
    if group is None or _is_alone(group, "gather_from_columns"):
        return x
    return _GatherFromColumns.apply(x, group, columns)


def column_parallel_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    w_up: torch.Tensor | None = None,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """A linear layer whose output features are split over the group.

    Local shapes: x [B, S, K], or [B, S / R, K] with ``sequence_parallel``; w, w_up [N / R, K]; bias [N / R];
    y [B, S, N / R].

    - forward: y = act(X w^T + bias) (* X w_up^T), with X = all-gather(x) along the sequence, or X = x
    - dgrad: dx = reduce-scatter(dz w (+ dz_up w_up)) along the sequence, or all-reduce
    - wgrad: dw = dz^T X; X is whole on every rank, so nothing crosses the group

    The collective of dgrad stands in the backward of the gather (or copy), not of the matmul, so that several layers
    can share one: gather once, and call :func:`fused_linear` for each.

    Raises:
        ValueError: see :func:`fused_linear`.
    """
    x = gather_from_sequence(x, group) if sequence_parallel else copy_to_group(x, group)
    return fused_linear(x, w, bias, activation=activation, w_up=w_up, backend=backend)


def row_parallel_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool = False,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A linear layer whose input features are split over the group.

    Local shapes: x [B, S, K / R]; w [N, K / R]; bias [N], equal on every rank; y and residual [B, S, N], or
    [B, S / R, N] with ``sequence_parallel``.

    - forward: y = reduce-scatter(x w^T) along the sequence, or all-reduce; then + bias, + residual
    - dgrad: dx = DY w, with DY = all-gather(dy) along the sequence, or DY = dy
    - wgrad: dw = DY^T x; dbias = sum of dy over the tokens this rank holds

    The bias joins after the reduction, else R ranks would add it R times. With ``sequence_parallel`` each rank's dbias
    covers only its own tokens: whoever owns the bias sums it over the group.

    Raises:
        ValueError: the group's size does not divide the sequence (``sequence_parallel``), and see :func:`fused_linear`.
    """
    alone = group is None or group_size(group) == 1
    y = fused_linear(x, w, bias if alone else None, backend=backend)
    if not alone:
        y = reduce_scatter_to_sequence(y, group) if sequence_parallel else reduce_from_group(y, group)
        if bias is not None:
            y = y + bias
    return y if residual is None else residual + y


def _check_divides(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> None:
    ranks = group_size(group)
    if x.shape[dim] % ranks != 0:
        raise ValueError(
            f"x: dim {dim} (the sequence) has size {x.shape[dim]}, which the {ranks} ranks of the group do not divide; "
            f"use a multiple of {ranks}, or sequence_parallel=False"
        )
