"""parallelize(): everything that happens to a model on its way onto the mesh, in order, on one screen."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .data_parallel import shard_data_parallel
from .layout import Layout
from .tensor_parallel import TensorParallelModule

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    layout: Layout,
    *,
    sequence_parallel: bool = True,
    dtype: torch.dtype | None = None,
) -> Model:
    """Place ``model`` on ``mesh``, in place, and return it.

    Every rank passes the same whole model, built from the modules of :mod:`fusemesh.hybrid.tensor_parallel`. Afterwards
    every parameter is a DTensor on (dp, fsdp, tp); each replica runs forward and backward on its own samples with a
    loss divided by the global token count; gradients are sums over the replicas; torch's clipping and optimizers work
    unchanged.

    Args:
        model: its layers, which are sharded one by one, are the members of its ``nn.ModuleList``.
        mesh: from :func:`fusemesh.hybrid.launch.build_mesh`.
        layout: the degrees of the mesh's axes.
        sequence_parallel: whether activations between the matmuls are split along the sequence over tp. The sequence
            length must then be a multiple of tp.
        dtype: of the computation; None computes in the parameters' own.

    Raises:
        ValueError: the layout has an axis that is not there yet or other degrees than the mesh, or a module cannot be
            split over tp. Raised before any communication.
    """
    layout.validate(world_size=mesh.size(), **_sizes(model))
    parts = [module for module in model.modules() if isinstance(module, TensorParallelModule)]
    for module in parts:
        module.check(layout.tp)
    strangers = _strangers(model, parts)
    if strangers and layout.tp > 1:
        raise ValueError(
            f"model: expected every parameter in a module of fusemesh.hybrid.tensor_parallel, received {strangers[:5]} "
            f"in other modules; replace those modules, or use tp1"
        )

    # 1. The mesh's device, before parameters are cut.
    model.to(torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu")
    # 2. Tensor parallel: parameters become DTensors on tp; all or none, because clipping takes no mixture.
    if not strangers:
        for module in parts:
            module.distribute(mesh["tp"], sequence_parallel and layout.tp > 1)
    # 3. Data parallel: DTensors on (dp, fsdp, tp), gathered and reduced layer by layer.
    shard_data_parallel(model, mesh, blocks=_blocks(model), dtype=dtype)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]


def _sizes(model: nn.Module) -> dict[str, Any]:
    """What the model's configuration says of the sizes that a layout must fit."""
    config = getattr(model, "config", None)
    names = ("num_heads", "num_kv_heads", "intermediate_size")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _strangers(model: nn.Module, parts: list[TensorParallelModule]) -> list[str]:
    """Parameters of modules that do not know how tp splits them."""
    owned = {id(parameter) for module in parts for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in owned]
