"""An encoder with either head and an encoder-decoder, trained a step on any layout; imported by the ranks.

The tests are in tests/hybrid/test_architectures.py.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from fusemesh.hybrid import data_parallel
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.pipeline_parallel import clip_gradients
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.hybrid.tensor.modules import TensorParallelModule
from fusemesh.kernels import backends
from fusemesh.transformer import Transformer, TransformerConfig
from fusemesh.transformer.generation import generate

SIZES = {
    "vocab_size": 13,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 20,
    "max_sequence_length": 12,
}
CONFIGS = {
    # Three classes, which neither 2 nor 4 divides.
    "class": TransformerConfig(**SIZES, architecture="encoder", output="class", num_classes=3),
    "span": TransformerConfig(**SIZES, architecture="encoder", output="span", local_window=2),
    "translation": TransformerConfig(**SIZES, architecture="encoder-decoder", use_bias=True),
    "translation-tied": TransformerConfig(**SIZES, architecture="encoder-decoder", tie_embeddings=True),
    "decoder": TransformerConfig(**SIZES, local_window=3),
}
BATCH, LENGTH = 4, 12
BEGIN, END = 1, 2


@dataclass
class Found:
    """loss; norm of all gradients; gradients by name, whole; logits of the first half of the samples, whole."""

    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]
    logits: torch.Tensor
    counts: dict[tuple[str, str], int]


def build(kind: str, dtype: torch.dtype, backend: str) -> Transformer:
    """The model, with every parameter moved off its initial value."""
    model = Transformer(CONFIGS[kind], backend, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def batch(kind: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens, targets and inputs of all replicas; no two samples are equally long."""
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, SIZES["vocab_size"], (BATCH, LENGTH), generator=random)
    lengths = torch.tensor([12, 7, 9, 5])
    tokens[torch.arange(LENGTH) >= lengths[:, None]] = 0
    if kind == "class":
        return tokens, torch.tensor([[0], [2], [-100], [1]]), {"lengths": lengths}
    if kind == "span":
        starts = torch.tensor([3, 0, 4, 2])
        return (
            tokens,
            torch.tensor([[4, 11], [0, 6], [-100, -100], [3, 3]]),
            {"lengths": lengths, "span_starts": starts},
        )
    target = torch.randint(3, SIZES["vocab_size"], (BATCH, LENGTH), generator=random)
    expected = target.roll(-1, 1).masked_fill(torch.arange(LENGTH) >= torch.tensor([[10], [12], [6], [9]]), -100)
    return tokens, expected, {"lengths": lengths, "target_tokens": target}


def _step(model: Transformer, kind: str, mine: slice, total) -> Found:
    backends.reset_call_counts()
    tokens, targets, inputs = batch(kind)
    count = (targets != -100).sum()
    own = {name: value[mine] for name, value in inputs.items()}
    loss = model.loss_and_gradients(tokens[mine], targets[mine], count, **own)
    counts = backends.call_counts()
    plain = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    gradients = {name: value.detach().clone() for name, value in plain.items()}
    norm = clip_gradients(model, 1e9)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    half = slice(0, BATCH // 2)
    logits = model.logits(tokens[half], **{name: value[half] for name, value in inputs.items()})
    evaluated = model.loss(tokens[mine], targets[mine], **own).detach()
    assert abs(evaluated.item() - loss.item()) <= 1e-6 * abs(loss.item())
    return Found((total(loss.detach()) / count).item(), norm.item(), gradients, logits, counts)


def one_process(world: World, kind: str, dtype: torch.dtype, backend: str) -> Found:
    """Without mesh, wrapper and group."""
    return _step(build(kind, dtype, backend), kind, slice(None), lambda value: value)


def on_layout(
    world: World, kind: str, name: str, dtype: torch.dtype, backend: str, sequence_parallel: bool, virtual: int = 1
) -> Found:
    """On a mesh, each replica with its share of the samples."""
    model, layout, mesh = _parallel(world, kind, name, dtype, backend, sequence_parallel, virtual)
    samples = BATCH // layout.replicas
    mine = slice(layout.replica_of(world.rank) * samples, (layout.replica_of(world.rank) + 1) * samples)
    return _step(model, kind, mine, lambda value: data_parallel.sum_over_replicas(value, mesh))


def _parallel(world, kind, name, dtype, backend, sequence_parallel=True, virtual=1):
    layout = Layout.parse(name)
    mesh = build_mesh(layout, world)
    options = PipelineOptions(max(2, layout.pp), "interleaved1f1b" if virtual > 1 else "1f1b", virtual)
    model = build(kind, dtype, backend)
    return parallelize(model, mesh, layout, sequence_parallel=sequence_parallel, pipeline=options), layout, mesh


def prompts(kind: str) -> list[torch.Tensor]:
    """Of three lengths."""
    random = torch.Generator().manual_seed(8)
    return [torch.randint(3, SIZES["vocab_size"], (n,), generator=random) for n in (4, 1, 6)]


def generated(world: World, kind: str, name: str | None, dtype: torch.dtype, backend: str, options: dict) -> list:
    """Return the tokens that a model adds to the prompts; sequence parallel is as it was afterwards."""
    if name is None:
        model = build(kind, dtype, backend)
    else:
        model, _, _ = _parallel(world, kind, name, dtype, backend)
    begin = None if kind == "decoder" else BEGIN
    found = generate(model, prompts(kind), max_new_tokens=6, begin=begin, end=END, **options)
    parts = [module for module in model.modules() if isinstance(module, TensorParallelModule)]
    assert all(part.sequence_parallel == (part.ranks > 1) for part in parts if part.group is not None)
    return [row.tolist() for row in found]


def generated_in_bf16(world: World, kind: str, layout: str) -> list[list[list[int]]]:
    """Return the tokens that a model which computes in bf16 adds to the prompts, with a cache and without."""
    chosen = Layout.parse(layout)
    model = parallelize(
        build(kind, torch.float32, "reference"), build_mesh(chosen, world), chosen, dtype=torch.bfloat16
    )
    begin = None if kind == "decoder" else BEGIN
    rows = [generate(model, prompts(kind), max_new_tokens=6, begin=begin, use_cache=cache) for cache in (True, False)]
    return [[row.tolist() for row in found] for found in rows]


@dataclass
class Notes:
    """What a layer writes into, beside a tensor."""

    seen: torch.Tensor | None = None


class Writing(torch.nn.Module):
    """A layer that writes into its arguments, and adds the others, which it receives in the dtype of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, notes: Notes, by_name: dict, listed: list, *, pair: tuple) -> torch.Tensor:
        notes.seen = by_name["seen"] = x
        listed.append(x)
        return self.linear(x + pair[0] + pair[1]["y"])


def written(world: World) -> tuple[list[torch.dtype], torch.dtype]:
    """Return the dtypes of the tensors that a layer in bf16 has left in its arguments, and of its output."""
    layout = Layout.parse("single")
    model = parallelize(Writing(), build_mesh(layout, world), layout, dtype=torch.bfloat16)
    x, notes, by_name, listed = torch.ones(2, 4), Notes(), {"count": torch.tensor(3)}, []
    pair = (x, {"y": x.double()})
    with torch.no_grad():
        found = model(x, notes, by_name, listed, pair=pair)
    assert pair[1]["y"].dtype == torch.float64 and notes.seen is not None
    return [notes.seen.dtype, by_name["seen"].dtype, listed[0].dtype], found.dtype
