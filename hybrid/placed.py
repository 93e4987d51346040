"""A model on a mesh, as a whole again: its state gathered on rank 0, and a Hugging Face model's save_pretrained."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fusemesh.kernels import op_rules

from . import compat
from .consistency import agree, check_has_memory, check_same_on_all_ranks
from .hugging_face.exports.save import save_slices
from .hugging_face.sources import from_disk, sources_of, to_disk
from .pipeline_parallel import PipelinedModel
from .tensor.converted import derived
from .tensor.modules import own_slices

_logger = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds


@torch.no_grad()
def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return on rank 0 the parameters and buffers of a parallelized model, whole, on the CPU; on other ranks {}.

    Every rank calls it. The names are those of the whole model, and tied parameters share memory, as in the state
    dict of a model in one process, where ``load_state_dict`` takes the result. Projections that
    :func:`fusemesh.hybrid.hugging_face.families.prepare` cut are one tensor again.

    Args:
        model: from :func:`fusemesh.hybrid.apply.parallelize`, in any layout; or a part of one.

    Raises:
        ValueError: a parameter or buffer is on meta.
    """
    check_has_memory("whole_state_dict, save_pretrained", model)
    with _told_while_alone("whole_state_dict() or save_pretrained()"):
        dist.barrier()
    compat.silence_redistribute_advice()
    wholes: dict[int, torch.Tensor] = {}
    found = {}
    group = model.pipeline.group if isinstance(model, PipelinedModel) and model.pipeline is not None else None
    # Of a pipeline the stages beside rank 0's.
    keeps = dist.get_rank() == 0 if group is None else 0 in dist.get_process_group_ranks(group)
    for name, value in _own_state(model).items():
        if id(value) not in wholes:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            # A copy: what is returned stays as it is when the model goes on training.
            wholes[id(value)] = whole.detach().to("cpu", copy=True) if keeps else torch.empty(0)
        found[name] = wholes[id(value)]
    if not keeps:
        return {}
    found = to_disk(found, sources_of(model))
    if group is None:
        return found
    stages: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(found, stages if dist.get_rank() == 0 else None, dst=0, group=group)
    # A parameter that two stages hold is equal on both.
    return {name: value for stage in reversed(stages) if stage is not None for name, value in stage.items()}


def _own_state(model: nn.Module) -> dict[str, Any]:
    """Return what the state dict names: the parameters themselves, tied ones as one object, and the rest as it is."""
    # Called first: it takes back what a forward has gathered.
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters.get(name, value) for name, value in state.items()}


def _part_like(own: Any, whole: Any) -> Any:
    """Return the part of a ``whole`` tensor that stands where ``own`` does; what is no whole tensor as it is."""
    if not isinstance(own, DTensor) or isinstance(whole, DTensor) or not isinstance(whole, torch.Tensor):
        return whole
    if own.shape != whole.shape:
        return whole  # load_state_dict names the parameter and both shapes
    part = whole[own_slices(own)].to(own.to_local().device).contiguous()
    return DTensor.from_local(part, own.device_mesh, own.placements, shape=own.shape, stride=own.stride())


@contextlib.contextmanager
def _told_while_alone(what: str) -> Iterator[None]:
    """Log a warning if the block, a first meeting of all ranks, takes long."""
    text = "rank %d waits in %s for the other ranks: every rank calls it, not the first alone"
    timer = threading.Timer(_PATIENCE, _logger.warning, (text, dist.get_rank(), what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def mark(model: nn.Module) -> None:
    """Let a model that is placed, and what it is made of, answer what only a whole one can do.

    All stay the same objects, of classes derived.
    """
    for module in model.modules():
        mixin: Any = PlacedPart
        if hasattr(module, "save_pretrained") and hasattr(module, "config"):
            mixin = PlacedGenerator if hasattr(module, "generate") else PlacedHuggingFaceModel
        elif module is model:
            mixin = PlacedModel
        elif type(module) in _CONTAINERS or next(itertools.chain(module.parameters(), module.buffers()), None) is None:
            continue
        kind: Any = type(module)
        module.__class__ = derived(kind, mixin)
        if mixin is not PlacedPart:
            # Before fully_shard's own, which gathers.
            module.register_forward_pre_hook(_refuse_transforms, prepend=True)
        if mixin is PlacedGenerator and module is model and getattr(module.config, "is_encoder_decoder", False):
            # It runs the encoder by itself, before any forward of the model has gathered the embedding.
            register_fsdp_forward_method(module, "generate")


# They make others of their class, of slices of themselves; copying goes on to their members.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def _refuse_transforms(module: nn.Module, args: Any) -> None:
    """Raise under a transform of torch.func: neither collectives nor fully_shard's gathering have a rule for one."""
    found = op_rules.active_transforms()
    if found:
        raise ValueError(
            f"torch.func: expected a whole model under {found}, received {type(module).__name__} that is placed on a "
            "mesh, whose collectives have no rule; differentiate with backward() or torch.autograd.grad, or transform "
            "a model that was not given to parallelize()"
        )


class PlacedPart(nn.Module):
    """In front of the class of what holds parts of parameters: what cannot be done with them says what to do."""

    def to_empty(self, *, device: str | torch.device | int | None, recurse: bool = True) -> Any:
        """Give memory to parameters and buffers as torch does; buffers that no state dict holds have their values.

        Those that were on meta are computed as Hugging Face's from_pretrained does; those with values keep them. What
        was tied stays so.

        Raises:
            ValueError: it is on meta, and its model does not compute it.
        """
        return make_empty(self, lambda: super(PlacedPart, self).to_empty(device=device, recurse=recurse))

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError(
            f"copy.deepcopy: expected a whole model, received {type(self).__name__} that is placed on a mesh; build "
            "another, parallelize() it in the same way, and copy by load_state_dict(model.state_dict())"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            f"pickle, torch.save: expected a whole model, received {type(self).__name__} that is placed on a mesh; "
            "save fusemesh.whole_state_dict(model), which every rank calls and rank 0 gets, or all of a training by "
            "fusemesh.hybrid.checkpoint.save"
        )


def make_empty(model: Any, to_empty: Callable[[], Any]) -> Any:
    """Give memory to ``model`` by ``to_empty``; see :meth:`PlacedPart.to_empty`, which is for whole models, too."""
    loaded = model.state_dict().keys()
    before = {name: x for name, x in model.named_buffers(remove_duplicate=False) if name not in loaded}
    tied = _tied(model)
    to_empty()
    for (first, name), *others in tied:
        for module, other in others:
            # Those that fully_shard manages are the first holder's.
            compat.parameters_of(module)[other] = compat.parameters_of(first)[name]
    after = dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, buffer in before.items():
            if not buffer.is_meta and buffer is not after[name]:
                after[name].copy_(buffer)
    lost = _not_computed(model, [name for name, x in before.items() if x.is_meta and not after[name].is_meta])
    if lost:
        raise ValueError(
            f"to_empty: expected values of the buffers that no state dict holds, received {', '.join(lost)} on "
            f"meta, which {type(model).__name__} does not compute again; give them values before parallelize(), "
            "as by building the modules that hold them outside torch.device('meta'): to_empty() keeps those"
        )
    return model


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return the holders of each parameter that several modules hold, in the order of the modules."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append((module, name))
    return [found for found in holders.values() if len(found) > 1]


@torch.no_grad()
def _not_computed(model: nn.Module, names: list[str]) -> list[str]:
    """Let a Hugging Face model compute the buffers ``names``, and return those that it has left as they were."""
    found = []
    for filling in (0, 1):  # what has one value after both is computed
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for name in names:
            buffers[name].fill_(filling)
        for holder in dict.fromkeys(name.rpartition(".")[0] for name in names):
            compat.initialize_hugging_face(model, holder)
        buffers = dict(model.named_buffers(remove_duplicate=False))
        found.append([buffers[name].clone() for name in names])
    return [name for name, first, then in zip(names, *found, strict=True) if not torch.equal(first, then)]


class PlacedModel(PlacedPart):
    """In front of any model's class: it loads whole tensors, too."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parts, as ``state_dict`` gives them, or whole tensors, of which each rank takes its part.

        Every rank is given the same whole ones, which is checked. In a pipeline each takes what its stages have.

        Raises:
            ValueError: the ranks' whole tensors differ, or the model is on meta.
        """
        if not assign or not all(isinstance(x, DTensor) for x in state_dict.values()):
            check_has_memory("load_state_dict", self)
        own = _own_state(self)
        if not any(isinstance(x, DTensor) for x in state_dict.values()):
            state_dict = from_disk(state_dict, sources_of(self))
        plain = [
            (name, x.detach())
            for name, x in state_dict.items()
            if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)
        ]
        held = next((own[name] for name, _ in plain if isinstance(own.get(name), DTensor)), None)
        if held is not None:
            with _told_while_alone("load_state_dict() of whole tensors"):
                check_same_on_all_ranks(plain, held.to_local().device)
        if isinstance(self, PipelinedModel) and self.pipeline is not None:
            state_dict = {name: value for name, value in state_dict.items() if name in own}
        parts = {name: _part_like(own.get(name), value) for name, value in state_dict.items()}
        return super().load_state_dict(parts, strict, assign)


def _check_saving(options: Mapping[str, Any]) -> None:
    """Raise ValueError for what save_pretrained of a model on a mesh does not do."""
    if options.get("push_to_hub"):
        raise ValueError(
            "save_pretrained: expected push_to_hub=False for a model on a mesh, received True; save it, then upload "
            "the folder once: hf upload NAME FOLDER"
        )
    if options.get("distributed_checkpoint"):
        raise ValueError(
            "save_pretrained: expected distributed_checkpoint=False for a model on a mesh, received True; save a "
            "checkpoint for any layout by fusemesh.hybrid.checkpoint.save"
        )
    if not options.get("safe_serialization", True):
        raise ValueError(
            "save_pretrained: expected safe_serialization=True for a model on a mesh, received False; save it, load it "
            "in one process by from_pretrained, and save that"
        )


class PlacedHuggingFaceModel(PlacedModel):
    """In front of a Hugging Face model's class: it saves its whole weights when every rank calls it."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save the model as transformers does, for ``from_pretrained`` in one process or many; every rank calls it.

        Each rank writes its own slices, so that nobody holds a whole model; all return when the files are there, and
        until then the folder has no weights that could be taken for whole. Models of which transformers saves more than
        their tensors (quantised, adapters, experts that are stored apart) are gathered, and rank 0 writes.

        Args:
            save_directory, args, kwargs: of transformers' own save_pretrained.
            is_main_process: whether rank 0, and with it all others, may write.
            state_dict: on rank 0, of whole tensors, which rank 0 writes; None: the model's own.

        Raises:
            OSError: on every rank, the folder cannot be written.
            ValueError: ``push_to_hub``, ``distributed_checkpoint`` or ``safe_serialization=False`` is asked for.
            RuntimeError: on the other ranks, when rank 0 writes and has raised its own error.
        """
        given = inspect.signature(super().save_pretrained).bind(  # type: ignore[misc]
            save_directory, is_main_process, state_dict, *args, **kwargs
        )
        given.apply_defaults()
        options = {**given.arguments, **given.arguments.get("kwargs", {})}
        _check_saving(options)
        if state_dict is None:
            with _told_while_alone("whole_state_dict() or save_pretrained()"):
                dist.barrier()
            if save_slices(self, save_directory, options, is_main_process):
                return
            state_dict = whole_state_dict(self)
        failure: list[Any] = [None]
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)  # type: ignore[misc]
            except Exception as raised:
                error, failure = raised, [f"{type(raised).__name__}: {raised}"]
        dist.broadcast_object_list(failure, src=0)
        if error is not None:
            raise error
        if failure[0] is not None:
            raise RuntimeError(f"save_pretrained: rank 0 could not save: {failure[0]}")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the rows are split already."""
        raise ValueError(
            f"resize_token_embeddings: expected a whole model, received {type(self).__name__} that is placed on a "
            "mesh; call it before parallelize()"
        )


class PlacedGenerator(PlacedHuggingFaceModel):
    """In front of the class of a Hugging Face model that generates."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; the ranks of a tp group must draw the same random numbers.

        Raises:
            ValueError: on every rank of a tp group, before anything is drawn, their generators' states differ.
        """
        parameter = next((p for p in self.parameters() if isinstance(p, DTensor)), None)
        axes = (parameter.device_mesh.mesh_dim_names if parameter is not None else None) or ()
        if (
            parameter is not None
            and "tp" in axes
            and parameter.device_mesh["tp"].size() > 1
            and self._samples(args, kwargs)
        ):
            device = parameter.to_local().device
            state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            if not agree(state.tolist(), device, parameter.device_mesh.get_group("tp")):
                raise ValueError(
                    "generate(do_sample=True): expected the same state of torch's random generator on the ranks of a "
                    "tp group, which draw each token together, received others; call torch.manual_seed() with one "
                    "seed on all of them before"
                )
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _samples(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        own = self.generation_config
        choices = (kwargs.get("do_sample"), *(getattr(config, "do_sample", None) for config in (given, own)))
        return bool(next((x for x in choices if x is not None), False))
