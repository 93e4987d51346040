"""The parity model, one training run of it on any layout, and the comparison of two runs.

Imported by the ranks, so it holds no tests; those are in tests/hybrid/test_parity.py.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusemesh.hybrid import data_parallel
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.pipeline_parallel import clip_gradients
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.kernels import backends
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
BATCH, LENGTH, STEPS = 4, 12, 2
DEFAULTS = PipelineOptions()
# Below the gradients' norm at every step, so that clipping scales them.
MAX_NORM = 0.05


@dataclass(frozen=True)
class Variant:
    """The options of a model that differ from :data:`CONFIG`: it is compared with one process's run of the same."""

    layers: int = CONFIG.num_layers
    tied: bool = False
    vocabulary: int = CONFIG.vocab_size


@dataclass(frozen=True)
class Case:
    """A layout with its options, and the variant that is trained on it."""

    layout: str
    sequence_parallel: bool = True
    variant: Variant = Variant()
    pipeline: PipelineOptions = DEFAULTS

    def __str__(self) -> str:
        """For the names of tests."""
        words = [self.layout.replace(" ", ""), "sp" if self.sequence_parallel else "nosp"]
        if "pp" in self.layout:
            words += [f"{self.variant.layers}layers", self.pipeline.schedule, f"m{self.pipeline.microbatches}"]
        return "-".join(words + ["tied"] * self.variant.tied)


@dataclass
class Step:
    """The results of one training step on a rank: whole tensors, with pp those of its own stages."""

    loss: torch.Tensor
    norm: torch.Tensor
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


@dataclass
class Run:
    """The steps of one training run, and how often each operation ran on each backend."""

    steps: list[Step]
    counts: dict[tuple[str, str], int]


def build_model(dtype: torch.dtype, backend: str, variant: Variant) -> Transformer:
    """The parity model with every parameter moved off its initial value, biases and norms too."""
    config = dataclasses.replace(
        CONFIG, num_layers=variant.layers, tie_embeddings=variant.tied, vocab_size=variant.vocabulary
    )
    model = Transformer(config, backend, dtype=dtype)
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
    *,
    plain: bool = False,
) -> Run:
    """A training loop; ``total`` sums over the replicas. A ``plain`` one calls torch alone for gradients and norm."""
    backends.reset_call_counts()
    # With AdamW's usual eps the first update is the gradient's sign, which magnifies the rounding of tiny gradients.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)
    done = []
    for _ in range(steps):
        optimizer.zero_grad()
        count = total((targets != -100).sum())
        if plain:
            loss = model.loss(tokens, targets)
            (loss / count).backward()
        else:
            loss = model.loss_and_gradients(tokens, targets, count)
        gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        if plain:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=False)
        else:
            norm = clip_gradients(model, MAX_NORM)
        optimizer.step()
        parameters = {name: whole(parameter) for name, parameter in model.named_parameters()}
        done.append(Step(total(loss.detach()) / count, whole(norm), gradients, parameters))
    return Run(done, backends.call_counts())


def one_process(world: World, dtype: torch.dtype, backend: str, variant: Variant, steps: int = STEPS) -> Run:
    """The run that all others are held against: no mesh, no wrapper, no group."""
    model = build_model(dtype, backend, variant)
    return train(model, *batch(variant.vocabulary), lambda value: value, steps, plain=True)


def on_layout(world: World, case: Case, dtype: torch.dtype, backend: str, steps: int = STEPS) -> Run:
    """The same run on a mesh, each replica with its share of the samples."""
    layout = Layout.parse(case.layout)
    mesh = build_mesh(layout, world)
    model = parallelize(
        build_model(dtype, backend, case.variant),
        mesh,
        layout,
        sequence_parallel=case.sequence_parallel,
        pipeline=case.pipeline,
    )
    samples = BATCH // layout.replicas
    mine = slice(layout.replica_of(world.rank) * samples, (layout.replica_of(world.rank) + 1) * samples)
    tokens, targets = (part[mine] for part in batch(case.variant.vocabulary))
    return train(model, tokens, targets, lambda value: data_parallel.sum_over_replicas(value, mesh), steps)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a - b| / max|b|; where b is 0 everywhere, max|a|."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    return difference / scale if scale > 0 else difference


def errors(found: Run, expected: Run, *, every_step: bool) -> dict[str, float]:
    """The error of every loss, norm, gradient and parameter by name; after the first step losses only, unless asked.

    A stage of a pipeline holds some of the parameters: the others are not compared here.
    """
    table = {}
    for number, (a, b) in enumerate(zip(found.steps, expected.steps, strict=True)):
        table[f"step {number} loss"] = error(a.loss, b.loss)
        if number == 0 or every_step:
            table[f"step {number} norm"] = error(a.norm, b.norm)
            for name in a.gradients:
                table[f"step {number} gradient of {name}"] = error(a.gradients[name], b.gradients[name])
                table[f"step {number} parameter {name}"] = error(a.parameters[name], b.parameters[name])
    return table


def assert_parity(found: list[Run], expected: Run, tolerance: float, *, every_step: bool) -> None:
    """Every rank's view of the run equals the run of one process, tensor by tensor, and none is held by no rank."""
    for number, step in enumerate(expected.steps):
        held = {name for run in found for name in run.steps[number].gradients}
        assert held == step.gradients.keys(), held ^ step.gradients.keys()
    for rank, run in enumerate(found):
        table = errors(run, expected, every_step=every_step)
        # not (e <= t) rather than e > t: a NaN is a failure.
        wrong = {name: value for name, value in table.items() if not value <= tolerance}
        worst = sorted(wrong.items(), key=lambda item: -item[1])[:8]
        assert not wrong, f"rank {rank}: {len(wrong)} of {len(table)} differ by more than {tolerance}, worst {worst}"
