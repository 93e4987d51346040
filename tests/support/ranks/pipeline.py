"""Functions that ranks run for tests/hybrid/test_pipeline_parallel.py. Imported by the ranks, so it holds no tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.pipeline_parallel import clip_gradients
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.transformer import Transformer, TransformerConfig
from tests.support.ranks import module as module_ranks

CONFIG = TransformerConfig(
    vocab_size=31,
    hidden_size=16,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=12,
    max_sequence_length=8,
    tie_embeddings=True,
)
COUNT = 100


def plain(tied: bool = True) -> Transformer:
    return Transformer(dataclasses.replace(CONFIG, tie_embeddings=tied), "reference", seed=1, dtype=torch.float64)


def batch(samples: int, length: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(0, CONFIG.vocab_size, (samples, length + 1), generator=torch.Generator().manual_seed(samples))
    return text[:, :-1], text[:, 1:]


def placed(world: World, text: str, options: PipelineOptions, dtype: torch.dtype | None = None) -> Transformer:
    layout = Layout.parse(text)
    return parallelize(plain(), build_mesh(layout, world), layout, pipeline=options, dtype=dtype)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in found.items()}


def held(world: World, text: str, options: PipelineOptions) -> list[str]:
    """The names of this rank's parameters, after it was seen that they have the whole model's values."""
    model, whole = placed(world, text, options), dict(plain().named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and torch.equal(parameter.full_tensor(), whole[name]), name
        assert torch.equal(model.state_dict()[name].full_tensor(), whole[name]), name
    return [name for name, _ in model.named_parameters()]


def calls_of_every_kind(world: World, text: str, options: PipelineOptions) -> None:
    """Training, evaluation between and after, batches of other shapes, gradients over several calls: one model."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    model, alone = parallelize(plain(), mesh, layout, pipeline=options), plain()
    for samples, length in ((4, 8), (4, 8), (8, 4)):
        tokens, targets = batch(samples, length)
        own = [part.chunk(layout.replicas)[layout.replica_of(world.rank)] for part in (tokens, targets)]
        expected = alone.loss_and_gradients(tokens, targets, COUNT)
        loss = model.loss(*own)
        assert not loss.requires_grad
        assert_close(sum_over_replicas(loss, mesh), expected, rtol=1e-13, atol=0)
        found = model.loss_and_gradients(*own, COUNT)
        assert_close(sum_over_replicas(found, mesh), expected, rtol=1e-13, atol=0)
        # What an evaluation leaves is neither gathered parameters nor other gradients.
        model.loss(*own)
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == ("dp", "fsdp", "tp")
    assert_gradients(model, alone)
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
    assert_close(clip_gradients(model, 0.01), norm, rtol=1e-13, atol=0)
    assert_gradients(model, alone)


def assert_gradients(model: Transformer, alone: Transformer) -> None:
    expected = gradients(alone)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


def copies_after(world: World, text: str, options: PipelineOptions, steps: int) -> torch.Tensor | None:
    """This rank's copy of the tied weight after some steps in bf16, fp32 parameters; None on stages without one."""
    layout = Layout.parse(text)
    model = Transformer(CONFIG, seed=1)
    model = parallelize(model, build_mesh(layout, world), layout, pipeline=options, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, targets = (part.chunk(layout.replicas)[layout.replica_of(world.rank)] for part in batch(8))
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss_and_gradients(tokens, targets, COUNT)
        clip_gradients(model, 0.5)
        optimizer.step()
    weight = dict(model.named_parameters()).get("embedding.weight")
    return weight.full_tensor() if isinstance(weight, DTensor) else None


def refused(world: World, what: str) -> str:
    """The message with which every rank refuses, by itself."""
    tokens, targets = batch(6)
    try:
        if what == "plain model":
            layout = Layout(pp=world.world_size)
            parallelize(module_ranks.Own(plain=False), build_mesh(layout, world), layout)
        elif what == "logits":
            placed(world, "pp2", PipelineOptions())(tokens)
        elif what == "micro-batches":
            placed(world, "pp2", PipelineOptions(4)).loss_and_gradients(tokens, targets, 1)
        elif what == "evaluation":
            placed(world, "pp2", PipelineOptions(4)).loss(tokens[:1], targets[:1])
        elif what == "length":
            placed(world, "pp2", PipelineOptions(2)).loss_and_gradients(*batch(6, 9), 1)
    except ValueError as error:
        return str(error)
    return "accepted"


def schedules_that_torch_takes(world: World, schedule: str, largest: int) -> list[int]:
    """Numbers of micro-batches for which torch's schedule runs, found by running it."""
    virtual = 2 if schedule == "interleaved1f1b" else 1
    runs = []
    for number in range(1, largest + 1):
        model = placed(world, f"pp{world.world_size}", PipelineOptions(0, schedule, virtual))
        assert model.pipeline is not None
        # Past our own check, to see what torch says.
        model.pipeline.options = _Unchecked(number, schedule, virtual)
        try:
            model.loss_and_gradients(*batch(number), 1)
        except ValueError:
            continue
        runs.append(number)
    return runs


class _Unchecked(PipelineOptions):
    def microbatches_of(self, *_: Any) -> int:
        return self.microbatches
