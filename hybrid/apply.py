"""parallelize(): place a model on the mesh, step by step, on one screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fusemesh.kernels.attention.call.place import Place

from .capabilities import Capabilities
from .consistency import check_same_on_all_ranks
from .data_parallel import shard_data_parallel
from .dropout import check_layers_stay
from .hugging_face import families
from .hugging_face.exports.names import remember_whole_names
from .hugging_face.stages import as_trainable, is_known, model_type_of
from .layout import Layout
from .pipeline_options import PipelineOptions
from .pipeline_parallel import Pipeline, PipelinedModel, cut
from .placed import PlacedPart, mark
from .recompute import check_recompute, recompute_blocks
from .tensor.fused import columns_of
from .tensor.modules import TensorParallelModule
from .tensor.table import convert, find_table

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    layout: Layout,
    *,
    plan: Mapping[str, str] | None = None,
    sequence_parallel: bool = True,
    dtype: torch.dtype | None = None,
    pipeline: PipelineOptions | None = None,
    recompute: str = "none",
) -> Model:
    """Place ``model`` on ``mesh``, in place, and return it.

    Every rank passes the same whole model, on any device: built from the modules of
    :mod:`fusemesh.hybrid.tensor.modules`, or of torch's own with a ``plan``, or Hugging Face's, which brings its plan
    along. Afterwards every parameter is a DTensor on (dp, fsdp, tp) (on (dp, fsdp) where a model without a plan is not
    split over tp); each replica runs forward and backward on its own samples with a loss divided by the global token
    count; gradients are sums over the replicas; torch's clipping and optimizers work unchanged.

    Parameters are cut where they are, layer by layer, and a layer's part alone moves to the mesh's device. Those on
    meta stay there: give them memory by ``model.to_empty(device=...)``, then load a checkpoint. Of the buffers
    that no state dict holds, such as rotary frequencies, to_empty() keeps those that had values, computes Hugging
    Face's again as from_pretrained does (transformers 5), and names the rest, which it refuses.

    With pp a rank keeps the parameters of its own stages, under the names of the whole model; forward and backward are
    one call, :meth:`~fusemesh.hybrid.pipeline_parallel.PipelinedModel.loss_and_gradients`, and clipping is
    :func:`~fusemesh.hybrid.pipeline_parallel.clip_gradients`. Both work without pp too. A Hugging Face model of a known
    family gets these methods with pp; without, :func:`~fusemesh.hybrid.hugging_face.stages.as_trainable` gives them.

    Args:
        model: its layers, which are sharded one by one, are the members of its outermost ``nn.ModuleList``s.
        mesh: from :func:`fusemesh.hybrid.ranks.join.build_mesh`.
        layout: the degrees of the mesh's axes.
        plan: for tp, name patterns of plain torch modules and how each is split, such as ``{"layers.*.query":
            "column"}``; see :mod:`fusemesh.hybrid.tensor.table` for the styles. None takes that of a Hugging Face
            model's family, for which :func:`~fusemesh.hybrid.hugging_face.families.prepare` cuts fused projections
            (call it without tp, too, where checkpoints are to fit layouts with it), or the model's own.
        sequence_parallel: whether activations between the matmuls are split along the sequence over tp. The sequence
            length must then be a multiple of tp. With a plan they are only where it has the style ``sequence``.
        dtype: of the computation; None computes in the parameters' own. Floating-point tensors that the model and its
            layers are called with are cast to it, those in lists, dicts and dataclasses too, of which a copy is then
            passed; a container in which nothing is to be cast is passed itself, so that a layer may write into it.
        pipeline: micro-batches, schedule and virtual stages, with pp; None takes the defaults.
        recompute: "full": in training each layer keeps its inputs alone, and backward computes it again; a Hugging Face
            model then fills no cache. See :mod:`fusemesh.hybrid.recompute`.

    Raises:
        ValueError: the model is on a mesh already, the layout has an axis that is not built yet or other degrees than
            the mesh, a module cannot be split over tp, the plan does not fit the model, or the model cannot be cut for
            pp, or it leaves out layers by chance (layerdrop) with fsdp or pp; raised before any communication. Or the
            ranks' models differ, which the first one finds.
    """
    _check_whole(model)
    options = pipeline or PipelineOptions()
    check_recompute(recompute, len(_blocks(model)))
    check_layers_stay(model, layout)
    capabilities_of(model, plan).check(layout)
    if layout.pp > 1:
        as_trainable(model)
    layout.validate(world_size=mesh.size(), virtual_stages=options.virtual_stages, **checked_sizes(model))
    if layout.tp > 1 and plan is None:
        families.prepare(model)
    table = find_table(model, plan, layout.tp)
    if table is not None:
        sequence_parallel = convert(model, table, layout.tp, sequence_parallel=sequence_parallel)
        families.share_heads(model, layout.tp)
    parts = _parts(model)
    for module in parts:
        module.check(layout.tp)
    plain = _plain_parameters(model, parts)
    assert not plain or layout.tp == 1, plain

    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else _CPU
    # What is about to be cut is the same on every rank: replicas and parts of different models would train silently.
    if mesh.size() == dist.get_world_size():
        check_same_on_all_ranks([*model.named_parameters(), *model.named_buffers()], device)

    remember_whole_names(model)
    # 1. Pipeline parallel: the rank keeps its stages alone, before anything else takes memory.
    mine = None
    if layout.pp > 1:
        assert isinstance(model, PipelinedModel)
        mine = cut(model, layout.pp, mesh.get_local_rank("pp"), options.virtual_stages)
    roots: list[nn.Module] = [model] if mine is None else list(mine.stages.values())
    shared = _shared(model)

    def split(part: nn.Module) -> None:
        # 2. Tensor parallel: parameters become DTensors on tp; all or none, because clipping takes no mixture.
        for module in [] if plain else _parts(part):
            if module.group is None:
                module.distribute(mesh["tp"], sequence_parallel and layout.tp > 1, device, shared)

    for root in roots:
        # 3. Data parallel: DTensors on (dp, fsdp, tp), gathered and reduced layer by layer.
        shard_data_parallel(
            root, mesh, blocks=_blocks(root), prepare=split, dtype=dtype, keep_gathered=mine is not None
        )
        if recompute == "full":
            recompute_blocks(_blocks(root))
    # 4. What attends knows its heads and samples, so that dropout is that of one process.
    for root in roots:
        _set_places(root, layout.replica_of(mesh.get_rank()))
    # 5. The stages are connected.
    if isinstance(model, PipelinedModel):
        model.mesh = mesh
    if mine is not None:
        mine.model.pipeline = Pipeline(mine, mesh, options, dtype)
    # 6. What would save, copy or grow the whole model knows that there are parts.
    mark(model)
    return model


_CPU = torch.device("cpu")


def _check_whole(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is, or holds, what is on a mesh already."""
    found = [name for name, module in model.named_modules() if isinstance(module, (PlacedPart, FSDPModule))]
    found += [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if found:
        inside = f" with {found[0]!r}" if found[0] else ""
        raise ValueError(
            f"model: expected a whole model, received {type(model).__name__}{inside} that is on a mesh already; "
            "call parallelize() once, without fully_shard before, on a model that is built anew"
        )


def capabilities_of(model: nn.Module, plan: Mapping[str, str] | None = None) -> Capabilities:
    """Return the axes over which :func:`parallelize` can split ``model``, with the ``plan`` or without one."""
    parts = _parts(model)
    has_table = plan is not None or families.has_table(model)
    plain = [] if has_table else _plain_parameters(model, parts)
    return Capabilities(
        type(model).__name__,
        tp=not plain,
        pp=isinstance(model, PipelinedModel) or is_known(model),
        family=model_type_of(model),
        # Hugging Face's models have no table with parts of the sequence.
        sequence_parallel="sequence" in (plan or {}).values() if has_table else not plain,
        without_table=plain[0] if plain and parts else "",
    )


def _parts(model: nn.Module) -> list[TensorParallelModule]:
    """Return the tensor parallel modules of ``model``."""
    return [module for module in model.modules() if isinstance(module, TensorParallelModule)]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers. Lists inside a layer are left out: a module in one may run on some ranks and not on others."""
    if isinstance(model, nn.ModuleList):
        # What stands in the place of another stage's layer has no parameters.
        return [block for block in model if any(True for _ in block.parameters())]
    return [block for child in model.children() for block in _blocks(child)]


def _set_places(model: nn.Module, replica: int) -> None:
    """Set on every module that contains others which part of the heads and samples is its own."""
    for module in model.modules():
        heads = next((column.rank for column in columns_of(module) if not column.gather_output), 0)
        if any(True for _ in module.children()):
            vars(module)["fusemesh_place"] = Place(heads, replica)


def checked_sizes(model: nn.Module) -> dict[str, Any]:
    """Return the sizes in the model's configuration that a layout must fit."""
    config = getattr(model, "config", None)
    names = ("num_heads", "num_kv_heads", "intermediate_size")
    sizes = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {**sizes, "num_layers": len(model.blocks) if isinstance(model, PipelinedModel) else None}


def _shared(model: nn.Module) -> dict[nn.Parameter, nn.Parameter | None]:
    """Return the parameters that several modules hold, each with None for its part, which is not made yet."""
    holders = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    return {parameter: None for parameter, count in holders.items() if count > 1}


def _plain_parameters(model: nn.Module, parts: list[TensorParallelModule]) -> list[str]:
    """Return the names of the parameters that are in no tensor parallel module, so that tp cannot split them."""
    owned = {id(parameter) for module in parts for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in owned]
