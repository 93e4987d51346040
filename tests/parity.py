"""The parity model, one training run of it on any layout, and what to break to see that the comparison notices.

Imported by the ranks, so it holds no tests; those are in tests/hybrid/test_parity.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import Replicate

from fusemesh import transformer
from fusemesh.hybrid import data_parallel, tensor_parallel
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.launch import World, build_mesh
from fusemesh.hybrid.layout import Layout
from fusemesh.kernels import backends
from fusemesh.kernels.matmul import parallel
from fusemesh.kernels.vocab_loss import api as vocab_loss
from fusemesh.transformer import Transformer, TransformerConfig

# Key/value heads below tp4, a vocabulary that neither 2 nor 4 divides, a head dim of 18, 11 intermediate features on a
# rank of tp4, biases.
CONFIG = TransformerConfig(
    vocab_size=101,
    hidden_size=72,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=44,
    max_sequence_length=12,
    use_bias=True,
)
BATCH, LENGTH, STEPS = 4, 12, 3
# Below the gradients' norm at every step, so that clipping scales them.
MAX_NORM = 0.05


@dataclass
class Step:
    """What one training step left behind, whole and equal on every rank."""

    loss: torch.Tensor
    norm: torch.Tensor
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


@dataclass
class Run:
    """The steps of one training run, and how often each operation ran on each backend."""

    steps: list[Step]
    counts: dict[tuple[str, str], int]


def build_model(dtype: torch.dtype, backend: str, vocabulary: int) -> Transformer:
    """The parity model with every parameter moved off its initial value, biases and norms too."""
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=vocabulary), backend, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def batch(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets [BATCH, LENGTH] of all replicas; no two samples have equally many targets that count."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, vocabulary, (BATCH, LENGTH + 1), generator=generator)
    # The last ids, which stand in the smaller part of an uneven vocabulary, are seen too.
    text[:, 1] = vocabulary - 1 - torch.arange(BATCH)
    tokens, targets = text[:, :-1], text[:, 1:].clone()
    for sample, ignored in enumerate((0, 7, 2, 9)):
        targets[sample, LENGTH - ignored :] = -100
    return tokens, targets


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor behind a DTensor, as a copy that later steps do not change."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def train(
    model: Transformer,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    total: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
) -> Run:
    """A plain training loop; ``total`` sums over the replicas."""
    backends.reset_call_counts()
    # With AdamW's usual eps the first update is the gradient's sign, which magnifies the rounding of tiny gradients.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)
    done = []
    for _ in range(steps):
        optimizer.zero_grad()
        count = total((targets != -100).sum())
        loss = model.loss(tokens, targets) / count
        loss.backward()
        gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        # foreach=False: for a list of tensors DTensor plans a call anew, a second of each rank in every layout.
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=False))
        optimizer.step()
        parameters = {name: whole(parameter) for name, parameter in model.named_parameters()}
        done.append(Step(total(loss.detach()), norm, gradients, parameters))
    return Run(done, backends.call_counts())


def one_process(
    world: World, dtype: torch.dtype, backend: str, steps: int = STEPS, vocabulary: int = CONFIG.vocab_size
) -> Run:
    """The run that all others are held against: no mesh, no wrapper, no group."""
    return train(build_model(dtype, backend, vocabulary), *batch(vocabulary), lambda value: value, steps)


def on_layout(
    world: World,
    text: str,
    sequence_parallel: bool,
    dtype: torch.dtype,
    backend: str,
    steps: int = STEPS,
    mutation: str = "",
    vocabulary: int = CONFIG.vocab_size,
) -> Run:
    """The same run on a mesh, each replica with its share of the samples."""
    layout = Layout.parse(text)
    with MUTATIONS[mutation].broken() if mutation else contextlib.nullcontext():
        mesh = build_mesh(layout, world)
        model = parallelize(build_model(dtype, backend, vocabulary), mesh, layout, sequence_parallel=sequence_parallel)
        samples = BATCH // layout.replicas
        mine = slice(layout.replica_of(world.rank) * samples, (layout.replica_of(world.rank) + 1) * samples)
        tokens, targets = (part[mine] for part in batch(vocabulary))
        return train(model, tokens, targets, lambda value: data_parallel.sum_over_replicas(value, mesh), steps)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a - b| / max|b|; where b is 0 everywhere, max|a|."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    return difference / scale if scale > 0 else difference


def errors(found: Run, expected: Run, *, every_step: bool) -> dict[str, float]:
    """The error of every loss, norm, gradient and parameter by name; after the first step losses only, unless asked."""
    table = {}
    for number, (a, b) in enumerate(zip(found.steps, expected.steps, strict=True)):
        table[f"step {number} loss"] = error(a.loss, b.loss)
        if number == 0 or every_step:
            table[f"step {number} norm"] = error(a.norm, b.norm)
            for name in b.gradients:
                table[f"step {number} gradient of {name}"] = error(a.gradients[name], b.gradients[name])
                table[f"step {number} parameter {name}"] = error(a.parameters[name], b.parameters[name])
    return table


def assert_parity(found: list[Run], expected: Run, tolerance: float, *, every_step: bool) -> None:
    """Every rank's view of the run equals the run of one process, tensor by tensor."""
    for rank, run in enumerate(found):
        table = errors(run, expected, every_step=every_step)
        # not (e <= t) rather than e > t: a NaN is a failure.
        wrong = {name: value for name, value in table.items() if not value <= tolerance}
        worst = sorted(wrong.items(), key=lambda item: -item[1])[:8]
        assert not wrong, f"rank {rank}: {len(wrong)} of {len(table)} differ by more than {tolerance}, worst {worst}"


@dataclass(frozen=True)
class Mutation:
    """One bug, in words, and how to put it in."""

    bug: str
    layout: str
    sequence_parallel: bool
    patches: Callable[[], list[Any]]

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """Within the block, the bug is there."""
        with contextlib.ExitStack() as stack:
            for patch in self.patches():
                stack.enter_context(patch)
            yield


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
    original = transformer.rotary_table

    def table(positions: torch.Tensor, *rest: Any) -> Any:
        # What a rank would do that took its part of the sequence for the whole.
        return original(positions % (LENGTH // 2), *rest)

    return [mock.patch.object(transformer, "rotary_table", table)]


def _unmasked_embedding() -> list[Any]:
    return [mock.patch.object(tensor_parallel.torch, "where", lambda mask, a, b: a if a.ndim == 3 else b)]


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
    original = vocab_loss._reduce
    left_out = getattr(torch.distributed.ReduceOp, op)

    def reduce(x: torch.Tensor, group: Any, op: Any) -> torch.Tensor:
        # The sum over integers is the check of the ids.
        return x if op == left_out and x.is_floating_point() else original(x, group, op)

    return [mock.patch.object(vocab_loss, "_reduce", reduce)]


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

    return [
        Mutation("row: no all-reduce", "tp2", False, lambda: [_function(reduce, "forward", no_reduce)]),
        Mutation("row: gradient doubled", "tp2", False, lambda: [_function(reduce, "backward", double_sum)]),
        Mutation("column: no all-reduce of dx", "tp2", False, lambda: [_function(copy, "backward", no_copy_sum)]),
        Mutation(
            "column: no reduce-scatter of dx", "tp2", True, lambda: [_function(gather, "backward", no_gather_sum)]
        ),
        Mutation("row: no reduce-scatter", "tp2", True, lambda: [_function(scatter, "forward", no_scatter_sum)]),
        Mutation("row: bias added by every rank", "tp2", False, _bias_on_every_rank),
        Mutation("row: bias gradient of own tokens only", "tp2", True, lambda: [_placement(row, "bias", Replicate())]),
        Mutation("norm: gradient of own tokens only", "tp2", True, lambda: [_placement(norm, "weight", Replicate())]),
        Mutation("kv: replicas' gradients not summed", "tp4", True, _without_kv_sum),
        Mutation("kv: another head than the queries'", "tp4", True, _wrong_kv_head),
        Mutation("rope: positions of the own part", "tp2", True, _local_positions),
        Mutation("embedding: ids of other ranks not masked", "tp2", True, _unmasked_embedding),
        Mutation("loss: largest logit of the own part", "tp2", True, lambda: _loss_without("MAX")),
        Mutation("loss: sums of the own part", "tp2", True, lambda: _loss_without("SUM")),
        Mutation("dp: scaled by the local token count", "dp2 x tp2", True, _local_count),
        Mutation("dp: averaged over replicas", "dp2 x tp2", True, _average),
        Mutation("dp: replicas' gradients not summed", "dp2 x tp2", True, _no_replica_sum),
    ]


MUTATIONS = {mutation.bug: mutation for mutation in _table()}
