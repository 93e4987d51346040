"""Pipeline parallel: a model's blocks are dealt to stages, through which micro-batches flow by torch's schedules.

The ranks that differ in pp alone are one pipeline: they see the same samples, and each holds one stage, or with the
interleaved schedule several. Parameters keep the names they have in the whole model, so that a checkpoint does not know
of stages. The loss that the last stage differentiates is already divided by the global token count, so micro-batches
add up and nothing is scaled afterwards.

A parameter that several stages hold (tied embeddings, T5's biases) is a copy on each. The copies start equal, their
gradients are summed among these ranks, in one order on all, and so they stay equal; the norm counts them once.

Sources: Huang et al., "GPipe" (2019); Narayanan et al., "PipeDream" (2019) for 1F1B and "Efficient Large-Scale Language
Model Training on GPU Clusters" (2021) for the interleaved schedule and tied embeddings.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .dropout import dropout_of
from .pipeline_options import PipelineOptions, check_holders, deal_blocks

# Names in torch.distributed.pipelining, which only a pipeline imports: it takes a second.
_SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved1f1b": "ScheduleInterleaved1F1B"}
_MOST_SCHEDULES = 4  # kept, one for each shape of batches, with their buffers


class StageModule(nn.Module):
    """One stage of a model: forward takes tokens (the first stage) or the output of the stage before.

    That may be a tensor or a tuple of some. Further inputs of a sample, as padding, come by name to every stage. Where
    ``targets`` are among them, the last stage returns the loss summed over them, a scalar in fp32 or fp64, equal on
    every rank of tp; the others ignore them.
    """

    def input_shapes(self, batch: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes on this rank of forward's positional inputs, for these shapes of a micro-batch.

        Args:
            batch: of ``tokens`` [B, S], and of each further input by its name.
        """
        raise NotImplementedError

    def output_shapes(self, batch: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes on this rank of forward's outputs for them, of the last stage without targets."""
        raise NotImplementedError


class PipelinedModel(nn.Module):
    """A model that can be cut into stages: it has ``blocks``, and :meth:`stage`.

    Called with (tokens, targets) and what further inputs it has by name it gives the summed loss of a replica's
    samples. :func:`parallelize` sets ``mesh``, and ``pipeline`` if the layout has pp; then the model holds only what
    this rank's stages need.
    """

    pipeline: Pipeline | None = None
    mesh: DeviceMesh | None = None
    blocks: nn.ModuleList

    def stage(self, blocks: range, *, first: bool, last: bool) -> StageModule:
        """Return the stage of these blocks, made of this model's own modules."""
        raise NotImplementedError

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss summed over this replica's targets; with pp it has no gradient."""
        with dropout_of(self).forward(len(tokens)):
            # By the call, not by forward: fully_shard's hooks hang on it.
            return self(tokens, targets, **inputs)

    def loss_and_gradients(
        self, tokens: torch.Tensor, targets: torch.Tensor, count: int | torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Add the gradients of ``loss(tokens, targets, **inputs) / count`` to those there; with and without pp.

        Args:
            tokens: [B, S] of this replica, equal on its ranks of tp and pp.
            targets, inputs: [B, ...], likewise.
            count: targets of all replicas (and of all calls between two optimizer steps).

        Returns:
            The loss summed over this replica's targets, detached, equal on its ranks of tp and pp.
        """
        if self.pipeline is not None:
            return self.pipeline.loss_and_gradients(tokens, targets, count, **inputs)
        loss = self.loss(tokens, targets, **inputs)
        (loss / count).backward()
        return loss.detach()


@dataclass(frozen=True)
class Cut:
    """The part of ``model`` that one rank of pp keeps.

    ``stages``: this rank's, by their numbers. ``shared``: the names of parameters that stages on other ranks hold too,
    with all these ranks of pp, first the one whose copy the norm counts. ``spans``: the blocks of every stage.
    """

    model: PipelinedModel
    spans: list[range]
    stages: dict[int, StageModule]
    shared: dict[str, tuple[int, ...]]

    @property
    def num_stages(self) -> int:
        """Return the number of stages of the whole pipeline."""
        return len(self.spans)


def cut(model: PipelinedModel, ranks: int, rank: int, virtual_stages: int) -> Cut:
    """Reduce ``model`` in place to the stages of ``rank`` (0 to ``ranks - 1``): number rank, rank + ranks, and so on.

    Raises:
        ValueError: two stages of one rank share a parameter.
    """
    number = ranks * virtual_stages
    parts = deal_blocks(len(model.blocks), number)
    stages = [model.stage(part, first=i == 0, last=i == number - 1) for i, part in enumerate(parts)]
    holders: dict[int, list[int]] = {}
    for index, stage in enumerate(stages):
        for parameter in stage.parameters():
            holders.setdefault(id(parameter), []).append(index)
    shared = {}
    for name, parameter in model.named_parameters():
        found = holders.get(id(parameter), [])
        check_holders(name, found, ranks, virtual_stages)
        at = [index % ranks for index in found]
        assert at, f"{name} is held by no stage"
        if len(at) > 1 and rank in at:
            shared[name] = tuple(at)
    own = {index: stage for index, stage in enumerate(stages) if index % ranks == rank}
    _drop_all_but(model, {id(module) for stage in own.values() for module in stage.modules()})
    return Cut(model, parts, own, shared)


def _drop_all_but(module: nn.Module, kept: set[int]) -> None:
    """Take away the descendants of ``module`` that neither are in ``kept`` nor hold one that is; names stay."""
    for name, child in list(module.named_children()):
        if id(child) in kept:
            continue
        if any(id(descendant) in kept for descendant in child.modules()):
            _drop_all_but(child, kept)
        elif isinstance(module, nn.ModuleList):
            # Its own deletion would renumber the blocks that follow.
            delattr(module, name)
        else:
            setattr(module, name, None)


class Pipeline:
    """This rank's stages at work; every rank of the pipeline calls the same methods with the same samples.

    Args:
        parts: the result of :func:`cut`, sharded and on its device.
        mesh: of all ranks.
        dtype: of the activations between stages; None: the parameters'.
    """

    def __init__(self, parts: Cut, mesh: DeviceMesh, options: PipelineOptions, dtype: torch.dtype | None) -> None:
        self.group = mesh.get_group("pp")
        self.ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.parts, self.options = parts, options
        self.dtype = dtype or next(parts.model.parameters()).dtype
        self._loss_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._schedules: dict[tuple[Any, ...], Any] = {}
        self._losses: list[torch.Tensor] = []
        self._count: int | torch.Tensor = 1

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters: meta until they have memory."""
        return next(self.parts.model.parameters()).device

    @property
    def has_first(self) -> bool:
        """Return whether this rank holds the first stage."""
        return 0 in self.parts.stages

    @property
    def has_last(self) -> bool:
        """Return whether this rank holds the last stage."""
        return self.parts.num_stages - 1 in self.parts.stages

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss summed over targets [B, ...], on every rank; no gradient.

        Raises:
            ValueError: B does not fit the schedule; see :meth:`PipelineOptions.microbatches_of`.
        """
        schedule, is_new = self._schedule(tokens, inputs, training=False)
        with torch.no_grad(), self._gradients_set_aside(is_new):
            self._run(schedule.eval, tokens, targets, inputs)
        self._reshard()
        return self._broadcast_loss()

    @torch.no_grad()
    def flow(
        self, state: tuple[torch.Tensor, ...], leaving: list[list[tuple[int, ...]]], first: int = 0, **inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Run one batch through stage after stage, without micro-batches; return the last one's output on every rank.

        Args:
            state: the positional inputs of stage number ``first``.
            leaving: the shapes on this rank of each stage's outputs.
            inputs: the named inputs of every stage.
        """
        for index in range(first, self.parts.num_stages):
            if index in self.parts.stages:
                found = self.parts.stages[index](*state, **inputs)
                state = tuple(x.contiguous() for x in (found if isinstance(found, tuple) else (found,)))
            else:
                state = tuple(torch.empty(shape, dtype=self.dtype, device=self.device) for shape in leaving[index])
            for x in state:
                if x.numel():
                    dist.broadcast(x, group=self.group, group_src=index % self.ranks)
        self._reshard()
        return state

    def _reshard(self) -> None:
        """Make parameters shards again, which fully_shard does not do after a forward alone."""
        for stage in self.parts.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def loss_and_gradients(
        self, tokens: torch.Tensor, targets: torch.Tensor, count: int | torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """See :meth:`PipelinedModel.loss_and_gradients`; raises as :meth:`loss` does."""
        schedule, is_new = self._schedule(tokens, inputs, training=True)
        self._count = count
        with self._gradients_set_aside(is_new):
            self._run(schedule.step, tokens, targets, inputs)
            self._sum_shared_gradients()
        return self._broadcast_loss()

    def counted(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that this rank contributes to a sum over all stages, so that each is counted once."""
        for name, parameter in self.parts.model.named_parameters():
            if self.parts.shared.get(name, (self.rank,))[0] == self.rank:
                yield parameter

    def sum_over_stages(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``value`` over the ranks of pp, in a new tensor."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def _run(
        self, call: Callable[..., Any], tokens: torch.Tensor, targets: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> None:
        self._losses.clear()
        dropout_of(self.parts.model).begin(len(tokens))
        call(
            *((tokens,) if self.has_first else ()),
            target=targets if self.has_last else None,
            return_outputs=False,
            **inputs,
            **({"targets": targets} if self.has_last else {}),
        )

    @contextlib.contextmanager
    def _gradients_set_aside(self, all_of_them: bool) -> Iterator[None]:
        """Take the gradients of earlier calls away from the block, and add them afterwards.

        Those of shared parameters are summed over the stages already. And a schedule that runs for the first time
        deletes whatever gradients it finds.
        """
        model = self.parts.model
        chosen = model.parameters() if all_of_them else map(model.get_parameter, self.parts.shared)
        before = [(parameter, parameter.grad) for parameter in chosen if parameter.grad is not None]
        for parameter, _ in before:
            parameter.grad = None
        yield
        for parameter, earlier in before:
            if parameter.grad is None:
                parameter.grad = earlier
            else:
                _own_part(parameter.grad).add_(_own_part(earlier))

    def _microbatch_loss(self, loss: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self._losses.append(loss.detach())
        return loss / self._count

    def _broadcast_loss(self) -> torch.Tensor:
        """Return the sum of the micro-batches' losses, which the last stage has, on every rank."""
        total = torch.zeros((), dtype=self._loss_dtype, device=self.device)
        if self.has_last:
            total = torch.stack(self._losses).double().sum().to(self._loss_dtype)
        dist.broadcast(total, group=self.group, group_src=(self.parts.num_stages - 1) % self.ranks)
        return total

    def exchange(self, own: torch.Tensor, ranks: tuple[int, ...]) -> list[torch.Tensor]:
        """Return the tensors that these ranks of pp, this one among them, pass as ``own``, in their order."""
        own = own.contiguous()
        found = {rank: own if rank == self.rank else torch.empty_like(own) for rank in ranks}
        messages = [
            dist.P2POp(way, tensor, group=self.group, group_peer=rank)
            for rank in ranks
            if rank != self.rank
            for way, tensor in ((dist.isend, own), (dist.irecv, found[rank]))
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        return list(found.values())

    def _sum_shared_gradients(self) -> None:
        for name, ranks in self.parts.shared.items():
            parameter = self.parts.model.get_parameter(name)
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.grad is not None and (own := _own_part(parameter.grad)).numel() > 0:
                # In one order everywhere: the same bits.
                own.copy_(functools.reduce(torch.add, self.exchange(own, ranks)))

    def _schedule(self, tokens: torch.Tensor, inputs: dict[str, torch.Tensor], *, training: bool) -> tuple[Any, bool]:
        """Return torch's schedule for these shapes, which fix its buffers, and whether it has not run yet."""
        from torch.distributed import pipelining

        shapes = {"tokens": tuple(tokens.shape), **{name: tuple(x.shape) for name, x in inputs.items()}}
        key = (*sorted(shapes.items()), training)
        if is_new := key not in self._schedules:
            if len(self._schedules) == _MOST_SCHEDULES:
                del self._schedules[next(iter(self._schedules))]
            options = self.options if training else self.options.evaluating()
            number = options.microbatches_of(self.ranks, len(tokens))
            micro = {name: (shape[0] // number, *shape[1:]) for name, shape in shapes.items()}
            stages = [self._torch_stage(index, micro) for index in self.parts.stages]
            # The loss is divided by the global token count: the default would divide gradients by micro-batches again.
            self._schedules[key] = getattr(pipelining, _SCHEDULES[self.options.schedule])(
                stages if self.options.schedule == "interleaved1f1b" else stages[0],
                number,
                loss_fn=self._microbatch_loss,
                scale_grads=False,
            )
        # Behind the others: the one that was not used for longest goes first. Batches of texts may all differ.
        self._schedules[key] = self._schedules.pop(key)
        return self._schedules[key], is_new

    def _torch_stage(self, index: int, batch: dict[str, tuple[int, ...]]) -> Any:
        from torch.distributed.pipelining import PipelineStage

        stage = self.parts.stages[index]
        # Shapes are given, not inferred: torch would run the model once more to find them.
        tokens = torch.empty(batch["tokens"], dtype=torch.int64, device="meta")
        is_last = index == self.parts.num_stages - 1
        entering, leaving = (
            tuple(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes)
            for shapes, dtype in (
                (stage.input_shapes(batch), self.dtype),
                ([()], self._loss_dtype) if is_last else (stage.output_shapes(batch), self.dtype),
            )
        )
        taken = tokens if index == 0 else entering
        made = PipelineStage(
            stage, index, self.parts.num_stages, self.device, input_args=taken, output_args=leaving, group=self.group
        )
        return dropout_of(self.parts.model).numbering(made, stage, len(tokens))


def clip_gradients(model: nn.Module, max_norm: float, *, foreach: bool | None = None) -> torch.Tensor:
    """Scale the gradients of a parallelized model down to ``max_norm``, in any layout; every rank calls it.

    Args:
        foreach: see ``torch.nn.utils.clip_grad_norm_``. The default is False for a model on CPU: it would save nothing
            there, and DTensor plans every call with a list of tensors anew, a second of each rank in every layout.

    Returns:
        The norm before clipping, of every parameter of all stages once.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if foreach is None and all(parameter.device.type == "cpu" for parameter in parameters):
        foreach = False
    pipeline = model.pipeline if isinstance(model, PipelinedModel) else None
    counted = parameters if pipeline is None else pipeline.counted()
    norm = nn.utils.get_total_norm([p.grad for p in counted if p.grad is not None], foreach=foreach)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline is not None:
        norm = pipeline.sum_over_stages(norm.square()).sqrt()
    owners: Any = [SimpleNamespace(grad=_own_part(p.grad)) for p in parameters if p.grad is not None]
    nn.utils.clip_grads_with_norm_(owners, max_norm, norm, foreach=foreach)
    return norm


@torch.no_grad()
def _own_part(gradient: torch.Tensor) -> torch.Tensor:
    """Return the part of a gradient that this rank holds, for arithmetic in place that is the same in every element.

    On a DTensor the same takes a second of each rank, which plans it for every shape and layout.
    """
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
