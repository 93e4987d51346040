"""Data parallel: torch's fully_shard over the axes (dp, fsdp), set so that gradients are summed, not averaged.

The loss that each replica differentiates is already divided by the token count of all replicas. An average would weigh
a token by how many others happen to share its replica.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

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
        # fully_shard's own cast copies dataclasses, lists and dicts; what a layer writes into them would be lost.
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    replicas = mesh["dp", "fsdp"]
    # With one shard there is nothing to free between forward and backward, and gathering again would only copy.
    reshard = mesh["fsdp"].size() > 1 and not keep_gathered
    for block in blocks:
        prepare(block)
        fully_shard(block, mesh=replicas, mp_policy=precision, reshard_after_forward=reshard)
        _cast_inputs(block, dtype)
    prepare(model)
    fully_shard(model, mesh=replicas, mp_policy=precision, reshard_after_forward=False)
    _cast_inputs(model, dtype)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum, which a factor would otherwise ask for.
            module.set_force_sum_reduction_for_comms(True)


def _cast_inputs(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Let ``module`` receive its floating-point arguments in ``dtype``; None leaves them as they are."""
    if dtype is None:
        return

    def cast_all(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return _cast(args, dtype), _cast(kwargs, dtype)

    # Before fully_shard's own hook.
    module.register_forward_pre_hook(cast_all, prepend=True, with_kwargs=True)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return ``value`` with the floating-point tensors in it in ``dtype``; a container without others is not copied."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = _changed(fields, dtype)
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, dict):
        changed = _changed(value, dtype)
        copied = copy.copy(value) if changed else value
        copied.update(changed)
        return copied
    if isinstance(value, (list, tuple)):
        changed = _changed(dict(enumerate(value)), dtype)
        items = [changed.get(index, item) for index, item in enumerate(value)]
        if not changed:
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _changed(parts: dict[Any, Any], dtype: torch.dtype) -> dict[Any, Any]:
    """Return those of ``parts`` that :func:`_cast` changes, cast."""
    return {key: new for key, part in parts.items() if (new := _cast(part, dtype)) is not part}


def sum_over_replicas(value: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return the sum of ``value`` over all ranks that see other tokens, in a new tensor: of token counts and losses."""
    total = value.detach().clone()
    for axis in LOSS_AXES:
        if mesh[axis].size() > 1:
            dist.all_reduce(total, group=mesh.get_group(axis))
    return total
