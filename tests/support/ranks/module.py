"""Functions that ranks run for tests/hybrid/test_tensor_parallel.py. Imported by the ranks, so it holds no tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.hybrid.tensor.modules import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fusemesh.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=101,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=12,
    max_sequence_length=8,
    use_bias=True,
)


def storage(world: World, text: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...], bool]]:
    """By parameter: mesh axes, placements by their class and dim, shape of the whole, and whether its value is kept."""
    layout = Layout.parse(text)
    plain = Transformer(CONFIG, seed=3)
    model = parallelize(Transformer(CONFIG, seed=3), build_mesh(layout, world), layout)
    table = {}
    for (name, parameter), (_, original) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        names = parameter.device_mesh.mesh_dim_names
        assert names is not None
        kinds = tuple(f"{type(p).__name__.strip('_')}{getattr(p, 'dim', '')}" for p in parameter.placements)
        kept = torch.equal(parameter.full_tensor(), original) and parameter.shape == original.shape
        table[name] = (names, kinds, tuple(parameter.to_local().shape), kept)
    return table


def embed(world: World, vocabulary: int, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """A vocabulary that leaves the last rank fewer rows, or none: y and the whole gradient, exact in integers."""
    layout = Layout(tp=world.world_size)
    model = nn.Sequential(VocabParallelEmbedding(vocabulary, 6))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(vocabulary * 6).view(vocabulary, 6))
    parallelize(model, build_mesh(layout, world), layout, sequence_parallel=sequence_parallel)
    ids = torch.arange(8).view(1, 8) % vocabulary
    y = model(ids)
    y.backward(torch.ones_like(y))
    gradient = model[0].weight.grad
    assert gradient is not None
    return {"y": y.detach(), "gradient": gradient.full_tensor(), "held": torch.tensor(model[0].weight.to_local().shape)}


class Own(nn.Module):
    """A user's model: some of its layers are plain torch."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(ColumnParallelLinear(6, 8, activation="gelu"), RowParallelLinear(8, 6)) for _ in range(2)
        )
        self.last = nn.Linear(6, 3) if plain else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def own_model(world: World, text: str, plain: bool) -> dict[str, Any]:
    """Gradients of a user's model, whole, and the message if it is refused."""
    layout = Layout.parse(text)
    torch.manual_seed(0)
    model = Own(plain).double()
    x = torch.randn(4, 8, 6, dtype=torch.float64).chunk(layout.replicas)[layout.replica_of(world.rank)]
    try:
        mesh = build_mesh(layout, world)
        parallelize(model, mesh, layout, sequence_parallel=False)
    except ValueError as error:
        return {"error": str(error)}
    loss = model(x).square().sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert isinstance(norm, DTensor)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": sum_over_replicas(loss, mesh), "norm": norm.full_tensor(), "gradients": gradients}


def refused(world: World, text: str, change: dict[str, Any]) -> str:
    """The message with which parallelize refuses a model on a layout."""
    layout = Layout.parse(text)
    model = Transformer(dataclasses.replace(CONFIG, **change))
    try:
        parallelize(model, build_mesh(layout, world), layout)
    except ValueError as error:
        return str(error)
    return ""


def refused_tokens(world: World) -> str:
    """The message for a sample whose length tp does not divide, under sequence parallel."""
    layout = Layout(tp=world.world_size)
    model = parallelize(Transformer(CONFIG), build_mesh(layout, world), layout)
    try:
        model(torch.zeros(1, 5, dtype=torch.long))
    except ValueError as error:
        return str(error)
    return ""


def logits(world: World, text: str, dtype: torch.dtype | None) -> torch.Tensor:
    """This rank's logits, after an evaluation and a change of the weights by load_state_dict."""
    layout = Layout.parse(text)
    model = parallelize(Transformer(CONFIG, seed=1), build_mesh(layout, world), layout, dtype=dtype)
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        model(tokens)
        model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
        return model(tokens)
