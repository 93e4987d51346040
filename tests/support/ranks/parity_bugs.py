"""Bugs to plant in the parity runs, to see that the comparison notices: what each is, and how it is put in.

Imported by the ranks, so it holds no tests; those are in tests/hybrid/test_parity.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.distributed import pipelining
from torch.distributed.tensor import Replicate

from fusemesh.hybrid import data_parallel, pipeline_parallel
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.ranks.join import World
from fusemesh.hybrid.tensor import modules as tensor_parallel
from fusemesh.kernels.matmul import parallel
from fusemesh.kernels.vocab_loss import api as vocab_loss
from fusemesh.transformer import stage as transformer_stage
from tests.support.ranks import parity


@dataclass(frozen=True)
class Mutation:
    """One bug, in words, where it shows, and how to put it in."""

    bug: str
    case: parity.Case
    patches: Callable[[], list[Any]]

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """Within the block, the bug is there."""
        with contextlib.ExitStack() as stack:
            for patch in self.patches():
                stack.enter_context(patch)
            yield


def on_layout(world: World, bug: str, dtype: torch.dtype, backend: str, steps: int) -> parity.Run:
    """:func:`parity.on_layout` with the bug put in."""
    with MUTATIONS[bug].broken():
        return parity.on_layout(world, MUTATIONS[bug].case, dtype, backend, steps)


def _function(cls: type, method: str, fn: Callable[..., Any]) -> Any:
    return mock.patch.object(cls, method, staticmethod(fn))


def _placement(cls: type, name: str, replacement: Any) -> Any:
    original = cls.placements

    def placements(self: Any) -> dict[str, Any]:
        table = original(self)
        if name in table:
            table[name] = (table[name][0], replacement)
        return table

    return mock.patch.object(cls, "placements", placements)


def _without_kv_sum() -> list[Any]:
    original = tensor_parallel.ColumnParallelLinear.placements

    def placements(self: Any) -> dict[str, Any]:
        table = original(self)
        return {name: (pair[0], Replicate()) for name, pair in table.items()} if self.replicated else table

    return [mock.patch.object(tensor_parallel.ColumnParallelLinear, "placements", placements)]


def _wrong_kv_head() -> list[Any]:
    original = tensor_parallel.TensorParallelModule.local

    def local(self: Any, name: str) -> Any:
        part = original(self, name)
        if part is None or not self.replicated:
            return part
        rows = self.out_features // self.num_heads
        return part.narrow(0, (self.rank % self.num_heads) * rows, rows)

    return [mock.patch.object(tensor_parallel.ColumnParallelLinear, "local", local)]


def _bias_on_every_rank() -> list[Any]:
    original = parallel.row_parallel_linear

    def row(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, *, group: Any, **rest: Any) -> torch.Tensor:
        return original(x, w, bias * parallel.group_size(group), group=group, **rest)

    return [mock.patch.object(parallel, "row_parallel_linear", row)]


def _local_positions() -> list[Any]:
    original = transformer_stage.rotary_table

    def table(positions: torch.Tensor, *rest: Any) -> Any:
        # What a rank would do that took its part of the sequence for the whole.
        return original(positions % (parity.LENGTH // 2), *rest)

    return [mock.patch.object(transformer_stage, "rotary_table", table)]


def _unmasked_embedding() -> list[Any]:
    original = torch.where
    return [mock.patch.object(tensor_parallel.torch, "where", lambda *x: x[1] if x[1].ndim == 3 else original(*x))]


def _average() -> list[Any]:
    original = data_parallel.shard_data_parallel

    def shard(model: Any, mesh: Any, **rest: Any) -> None:
        original(model, mesh, **rest)
        for module in model.modules():
            if isinstance(module, data_parallel.FSDPModule):
                module.set_gradient_divide_factor(float(mesh["dp"].size() * mesh["fsdp"].size()))

    return [mock.patch("fusemesh.hybrid.apply.shard_data_parallel", shard)]


def _no_replica_sum() -> list[Any]:
    original = data_parallel.fully_shard

    def shard(module: Any, *, mesh: Any, **rest: Any) -> None:
        original(module, mesh=mesh["fsdp"], **rest)

    return [mock.patch.object(data_parallel, "fully_shard", shard)]


def _local_count() -> list[Any]:
    original = data_parallel.sum_over_replicas
    # The first sum of a step counts tokens, in integers; losses are still summed.
    return [
        mock.patch.object(
            data_parallel,
            "sum_over_replicas",
            lambda value, mesh: original(value, mesh) if value.is_floating_point() else value,
        )
    ]


def _loss_without(op: str) -> list[Any]:
    original = vocab_loss.reduce
    left_out = getattr(torch.distributed.ReduceOp, op)

    def reduce(x: torch.Tensor, group: Any, op: Any) -> torch.Tensor:
        # The sum over integers is the check of the ids.
        return x if op == left_out and x.is_floating_point() else original(x, group, op)

    return [mock.patch.object(vocab_loss, "reduce", reduce)]


def _scaled_gradients() -> list[Any]:
    original = pipelining.Schedule1F1B

    def schedule(stage: Any, number: int, **rest: Any) -> Any:
        return original(stage, number, **{**rest, "scale_grads": True})

    return [mock.patch.object(pipelining, "Schedule1F1B", schedule)]


def _pipeline(method: str, replacement: Callable[..., Any]) -> list[Any]:
    """Patch a method of Pipeline by ``replacement(original, self, *arguments)``."""
    original = getattr(pipeline_parallel.Pipeline, method)

    def patched(self: Any, *arguments: Any) -> Any:
        return replacement(original, self, *arguments)

    return [mock.patch.object(pipeline_parallel.Pipeline, method, patched)]


def _without_a_gradient() -> list[Any]:
    original = pipelining.PipelineStage._retrieve_recv_grads

    def receive(self: Any, microbatch: int) -> Any:
        gradients = original(self, microbatch)
        return tuple(torch.zeros_like(part) for part in gradients) if microbatch == 1 else gradients

    return [mock.patch.object(pipelining.PipelineStage, "_retrieve_recv_grads", receive)]


def _one_sided(original: Any, self: Any) -> None:
    before = {name: self.parts.model.get_parameter(name).grad.clone() for name in self.parts.shared}
    original(self)
    if self.has_last:
        for name, gradient in before.items():
            self.parts.model.get_parameter(name).grad.copy_(gradient)


def _unequal_copies() -> list[Any]:
    original = pipeline_parallel.cut

    def cut(model: Any, ranks: int, rank: int, virtual_stages: int) -> Any:
        parts = original(model, ranks, rank, virtual_stages)
        for name, ranks in parts.shared.items():
            if rank == ranks[-1]:
                parts.model.get_parameter(name).data *= 1.001
        return parts

    return [mock.patch("fusemesh.hybrid.apply.cut", cut)]


def _blocks_in_a_row() -> list[Any]:
    original = pipeline_parallel.deal_blocks

    def deal(blocks: int, stages: int) -> list[range]:
        # As if a rank's stages were neighbours: of 4 stages on 2 ranks, 0 and 1 on the first.
        parts = original(blocks, stages)
        return [parts[0], parts[2], parts[1], parts[3]]

    return [mock.patch.object(pipeline_parallel, "deal_blocks", deal)]


def _detached_head() -> list[Any]:
    original = tensor_parallel.VocabParallelEmbedding.head_weight
    return [
        mock.patch.object(tensor_parallel.VocabParallelEmbedding, "head_weight", lambda self: original(self).detach())
    ]


def _pipeline_table() -> list[Mutation]:
    def flipped(original: Any, self: Any, call: Any, tokens: torch.Tensor, targets: torch.Tensor, inputs: Any) -> None:
        original(self, call, tokens.flip(0), targets, inputs)

    def own_tokens(original: Any, self: Any, loss: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self._count = (targets != -100).sum()
        return original(self, loss, targets)

    def dropped(original: Any, self: Any, loss: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return original(self, loss * (len(self._losses) == 0), targets)

    def nothing(original: Any, self: Any) -> None:
        pass

    def all_counted(original: Any, self: Any) -> Any:
        return self.parts.model.parameters()

    def none_counted(original: Any, self: Any) -> Any:
        return (p for name, p in self.parts.model.named_parameters() if name not in self.parts.shared)

    def own(original: Any, self: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    pp2 = parity.Case("pp2", pipeline=PipelineOptions(2))
    tied = dataclasses.replace(pp2, variant=parity.Variant(tied=True))
    spread = dataclasses.replace(pp2, layout="pp2 x dp2")
    looped = parity.Case("pp2", True, parity.Variant(4), PipelineOptions(2, "interleaved1f1b", 2))
    return [
        Mutation("pp: gradients divided by the number of micro-batches", pp2, _scaled_gradients),
        Mutation("pp: scaled by the micro-batch's token count", pp2, lambda: _pipeline("_microbatch_loss", own_tokens)),
        Mutation("pp: a micro-batch's gradient lost between stages", pp2, _without_a_gradient),
        Mutation("pp: micro-batches in another order than their targets", pp2, lambda: _pipeline("_run", flipped)),
        Mutation("pp: a micro-batch's loss left out", pp2, lambda: _pipeline("_microbatch_loss", dropped)),
        Mutation("pp: blocks of the wrong stage", looped, _blocks_in_a_row),
        Mutation("pp: norm of the own stages", pp2, lambda: _pipeline("sum_over_stages", own)),
        Mutation("pp x dp: replicas' gradients not summed", spread, _no_replica_sum),
        Mutation("pp x dp: scaled by the local token count", spread, _local_count),
        Mutation("tied: gradients not summed", tied, lambda: _pipeline("_sum_shared_gradients", nothing)),
        Mutation("tied: gradients summed on one stage", tied, lambda: _pipeline("_sum_shared_gradients", _one_sided)),
        Mutation("tied: counted twice in the norm", tied, lambda: _pipeline("counted", all_counted)),
        Mutation("tied: not counted in the norm", tied, lambda: _pipeline("counted", none_counted)),
        Mutation("tied: copies that start unequal", tied, _unequal_copies),
        Mutation("tied: no gradient from the head", dataclasses.replace(tied, layout="tp2"), _detached_head),
    ]


def _table() -> list[Mutation]:
    norm, row = tensor_parallel.RMSNorm, tensor_parallel.RowParallelLinear
    copy, reduce = parallel._CopyToGroup, parallel._ReduceFromGroup
    gather, scatter = parallel._GatherFromSequence, parallel._ReduceScatterToSequence

    def no_reduce(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        return x.clone()

    def no_copy_sum(ctx: Any, dy: torch.Tensor) -> Any:
        return dy, None

    def double_sum(ctx: Any, dy: torch.Tensor) -> Any:
        return 2 * dy, None

    def no_gather_sum(ctx: Any, dy: torch.Tensor) -> Any:
        return parallel.own_part(dy, ctx.group, ctx.dim), None, None

    def no_scatter_sum(ctx: Any, x: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return parallel.own_part(x, group, dim)

    Case = parity.Case
    return [
        Mutation("row: no all-reduce", Case("tp2", False), lambda: [_function(reduce, "forward", no_reduce)]),
        Mutation("row: gradient doubled", Case("tp2", False), lambda: [_function(reduce, "backward", double_sum)]),
        Mutation("column: no all-reduce of dx", Case("tp2", False), lambda: [_function(copy, "backward", no_copy_sum)]),
        Mutation(
            "column: no reduce-scatter of dx", Case("tp2"), lambda: [_function(gather, "backward", no_gather_sum)]
        ),
        Mutation("row: no reduce-scatter", Case("tp2"), lambda: [_function(scatter, "forward", no_scatter_sum)]),
        Mutation("row: bias added by every rank", Case("tp2", False), _bias_on_every_rank),
        Mutation("row: bias gradient of own tokens only", Case("tp2"), lambda: [_placement(row, "bias", Replicate())]),
        Mutation("norm: gradient of own tokens only", Case("tp2"), lambda: [_placement(norm, "weight", Replicate())]),
        Mutation("kv: replicas' gradients not summed", Case("tp4"), _without_kv_sum),
        Mutation("kv: another head than the queries'", Case("tp4"), _wrong_kv_head),
        Mutation("rope: positions of the own part", Case("tp2"), _local_positions),
        Mutation("embedding: ids of other ranks not masked", Case("tp2"), _unmasked_embedding),
        Mutation("loss: largest logit of the own part", Case("tp2"), lambda: _loss_without("MAX")),
        Mutation("loss: sums of the own part", Case("tp2"), lambda: _loss_without("SUM")),
        Mutation("dp: scaled by the local token count", Case("dp2 x tp2"), _local_count),
        Mutation("dp: averaged over replicas", Case("dp2 x tp2"), _average),
        Mutation("dp: replicas' gradients not summed", Case("dp2 x tp2"), _no_replica_sum),
    ]


MUTATIONS = {mutation.bug: mutation for mutation in [*_table(), *_pipeline_table()]}
