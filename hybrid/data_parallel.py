"""Data parallel: torch's fully_shard over the axes (dp, fsdp), set so that gradients are summed, not averaged.

The loss that each replica differentiates is already divided by the token count of all replicas. An average would weigh
a token by how many others happen to share its replica.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from . import compat
from .layout import LOSS_AXES


def shard_data_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: list[nn.Module],
    prepare: Callable[[nn.Module], None] = lambda part: None,
    dtype: torch.dtype | None = None,
    keep_gathered: bool = False,
) -> None:
    """Wrap each of ``blocks``, then the rest of ``model``, in fully_shard over (dp, fsdp), sizes of 1 included.

    Args:
        mesh: with the axes dp and fsdp: replicas along dp, shards along fsdp.
        blocks: parts of the model whose parameters are gathered and freed together; usually its layers.
        prepare: is called with each of them, and last with the model, right before it is wrapped: what it makes of one
            part becomes shards before it turns to the next.
        dtype: of the computation; gradients are then reduced in fp32 and parameters stay in theirs. None: as they are.
        keep_gathered: keep the blocks' parameters between forward and backward, for a stage of a pipeline: it runs many
            micro-batches in between, each of which would gather them again.
    """
    compat.silence_redistribute_advice()
    precision = MixedPrecisionPolicy()
    if dtype is not None:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    replicas = mesh["dp", "fsdp"]
    # With one shard there is nothing to free between forward and backward, and gathering again would only copy.
    reshard = mesh["fsdp"].size() > 1 and not keep_gathered
    for block in blocks:
        prepare(block)
        fully_shard(block, mesh=replicas, mp_policy=precision, reshard_after_forward=reshard)
    prepare(model)
    fully_shard(model, mesh=replicas, mp_policy=precision, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum, which a factor would otherwise ask for.
            module.set_force_sum_reduction_for_comms(True)


def sum_over_replicas(value: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return the sum of ``value`` over all ranks that see other tokens, in a new tensor: of token counts and losses."""
    total = value.detach().clone()
    for axis in LOSS_AXES:
        if mesh[axis].size() > 1:
            dist.all_reduce(total, group=mesh.get_group(axis))
    return total
