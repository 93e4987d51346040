"""Functions that ranks run for the tests of plans: plain torch models and Hugging Face's. It holds no tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import fusemesh
from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.hybrid.tensor import converted, table
from fusemesh.hybrid.tensor import modules as tensor_parallel
from fusemesh.kernels.matmul import parallel

VOCABULARY, LENGTH, BATCH = 23, 8, 4


class Attention(nn.Module):
    """Grouped-query attention with a norm on the heads of queries; head counts come from the tensors."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = 8
        self.query = nn.Linear(hidden, heads * 8)
        self.key = nn.Linear(hidden, kv_heads * 8, bias=False)  # its gradient would be zero, by cancellation
        self.value = nn.Linear(hidden, kv_heads * 8)
        self.query_norm = nn.RMSNorm(8, eps=1e-5)
        self.output = nn.Linear(heads * 8, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x) for layer in (self.query, self.key, self.value))
        q, k, v = (y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2) for y in (q, k, v))
        y = fusemesh.flash_attention(self.query_norm(q), k, v, causal=True, backend="reference")
        assert isinstance(y, torch.Tensor)
        return self.output(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.attention = Attention(hidden, heads, kv_heads)
        self.mlp = nn.Sequential(nn.Linear(hidden, 12), nn.GELU(), nn.Linear(12, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Plain(nn.Module):
    """A language model of torch's modules alone; the vocabulary is odd, one id is padding, embeddings may be tied."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16, padding_idx=3)
        self.layers = nn.ModuleList(Layer(16, heads, kv_heads) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


PLAN = {
    "embedding": "vocab",
    **{f"layers.*.attention.{name}": "column" for name in ("query", "key", "value")},
    "layers.*.attention.query_norm": "heads",
    "layers.*.attention.output": "row",
    "layers.*.mlp.0": "column",
    "layers.*.mlp.2": "row",
    "head": "vocab",
}
SEQUENCE = {**PLAN, "layers.*.norms.*": "sequence", "norm": "sequence"}
# Heads gathered before they are attended to, as models do that norm all heads at once.
GATHERED = {
    **{name: style for name, style in PLAN.items() if "attention" not in name},
    **{f"layers.*.attention.{name}": "vocab" for name in ("query", "key", "value")},
    "layers.*.attention.query_norm": "whole",
    "layers.*.attention.output": "row_of_whole",
}
# With tied weights the head's style is the embedding's.
HEAD_ALONE = {name: style for name, style in PLAN.items() if name != "embedding"}
PLANS = {"plan": PLAN, "sequence": SEQUENCE, "gathered": GATHERED, "head_alone": HEAD_ALONE}


def plain(seed: int = 0, **options: Any) -> Plain:
    """The model in fp64, every parameter moved off its initial value."""
    torch.manual_seed(seed)
    model = Plain(**options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets of all replicas; the padding id and the last id occur, and samples count differently."""
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 1], ids[:, 2] = 3, VOCABULARY - 1
    targets = ids.roll(-1, 1)
    for sample, ignored in enumerate((0, 3, 1, 5)):
        targets[sample, LENGTH - ignored :] = -100
    return ids, targets


def own(x: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """This replica's samples."""
    return x.chunk(layout.replicas)[layout.replica_of(rank)]


def learned(
    model: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor], total: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The loss over all replicas and every gradient, whole."""
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    found = {"loss": total(loss.detach())}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return found


def plain_loss(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    count = (batch()[1] != -100).sum()
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum") / count


def on_one(**options: Any) -> dict[str, torch.Tensor]:
    """The plain model in one process, without a mesh."""
    return learned(plain(**options), lambda model: plain_loss(model, *batch()), lambda x: x)


def on_layout(
    world: World,
    text: str,
    plan: str,
    sequence_parallel: bool = True,
    bug: str = "",
    options: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """The same on a mesh; every parameter is checked to be a DTensor on all three axes."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    with BUGS[bug]() if bug else contextlib.nullcontext():
        model = fusemesh.parallelize(
            plain(**(options or {})), mesh, layout, plan=PLANS[plan], sequence_parallel=sequence_parallel
        )
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == ("dp", "fsdp", "tp"), name
        ids, targets = (own(x, layout, world.rank) for x in batch())
        return learned(model, lambda m: plain_loss(m, ids, targets), lambda x: sum_over_replicas(x, mesh))


@contextlib.contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


def _heads_not_summed() -> contextlib.AbstractContextManager[None]:
    original = converted.WholeModule.placements

    def placements(self: Any) -> Any:
        return {name: (pair[0], pair[0]) for name, pair in original(self).items()}

    return _replaced(converted.WholeModule, "placements", placements)


def _columns_summed() -> contextlib.AbstractContextManager[None]:
    original = parallel._GatherFromColumns

    class Summed(original):
        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            return original.backward(ctx, parallel.all_reduce(dy, torch.distributed.group.WORLD))

    return _replaced(parallel, "_GatherFromColumns", Summed)


def _padding_learns() -> contextlib.AbstractContextManager[None]:
    original = table.embedding

    def embedding(table: nn.Embedding) -> None:
        original(table)
        table.padding_idx = None

    return _replaced(table, "embedding", embedding)


# What a test must notice: each makes one gradient wrong and leaves the loss right.
BUGS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "heads_not_summed": _heads_not_summed,
    "columns_summed": _columns_summed,
    "padding_learns": _padding_learns,
}


def refused(world: World, text: str, plan: Any, options: dict[str, Any]) -> str:
    """The message with which parallelize refuses a plan; the model must be as it was."""
    layout = Layout.parse(text)
    model = plain(**options)
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        fusemesh.parallelize(model, build_mesh(layout, world), layout, plan=plan)
    except ValueError as error:
        assert before == {name: type(module) for name, module in model.named_modules()}
        return str(error)
    return ""


def of_other_values(world: World, text: str, changed: dict[int, str], seeds: tuple[int, ...] = ()) -> str:
    """The message of parallelize for models that differ among the ranks.

    Args:
        changed: rank to the name of a parameter or buffer of which it flips one bit, "+name" of one that it alone has,
            "-name" of one that it negates, "=name" of one that it freezes, or "meta".
        seeds: of the ranks.
    """
    model = plain(seeds[world.rank] if seeds else 0)
    model.register_buffer("scale", torch.ones(3))
    name = changed.get(world.rank, "")
    if name == "meta":
        model.to("meta")
    elif name.startswith("+"):
        model.register_buffer(name[1:], torch.ones(1))
    elif name.startswith("-"):
        model.state_dict()[name[1:]].neg_()
    elif name.startswith("="):
        model.get_parameter(name[1:]).requires_grad_(False)
    elif name:
        bits = model.state_dict()[name].view(torch.uint8).view(-1)
        bits[-1] ^= 1
    layout = Layout.parse(text)
    try:
        fusemesh.parallelize(model, build_mesh(layout, world), layout, plan=PLAN)
    except ValueError as error:
        return str(error)
    return ""


def moved(world: World, text: str) -> tuple[list[int], list[int], list[int]]:
    """The sizes of the parts that went to the device, in order, and those of the parameters held afterwards.

    And how many parts of the model fully_shard had wrapped by then.
    """
    sizes, wrapped = [], []
    model = plain()
    original = tensor_parallel.to_device

    def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        sizes.append(x.numel())
        wrapped.append(sum(isinstance(module, FSDPModule) for module in model.modules()))
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), "a view moves alone, but keeps the whole"
        return original(x, device)

    layout = Layout.parse(text)
    with _replaced(tensor_parallel, "to_device", to_device):
        fusemesh.parallelize(model, build_mesh(layout, world), layout, plan=PLAN)
    return sizes, [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)], wrapped


def from_meta(world: World, text: str) -> dict[str, torch.Tensor]:
    """A model that was cut on meta and then filled from one that was cut with its values: as :func:`on_one`."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    filled = fusemesh.parallelize(plain(), mesh, layout, plan=PLAN)
    with torch.device("meta"):
        model = Plain().double()
    fusemesh.parallelize(model, mesh, layout, plan=PLAN)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(filled.state_dict())
    ids, targets = (own(x, layout, world.rank) for x in batch())
    return learned(model, lambda m: plain_loss(m, ids, targets), lambda x: sum_over_replicas(x, mesh))


def through_a_checkpoint(world: World, directory: str, first: str, then: str, tied: bool) -> dict[str, torch.Tensor]:
    """A step on one layout, saved; another model on another layout, loaded: what the weights have become, whole."""

    def placed(text: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Layout]:
        layout = Layout.parse(text)
        model = fusemesh.parallelize(plain(seed, tied=tied), build_mesh(layout, world), layout, plan=PLAN)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3), layout

    model, optimizer, layout = placed(first, 0)
    plain_loss(model, *(own(x, layout, world.rank) for x in batch())).backward()
    optimizer.step()
    checkpoint.save(directory, model, optimizer, {}, step=1)
    loaded, its_optimizer, _ = placed(then, 1)
    checkpoint.load(directory, loaded, its_optimizer)
    return {name: p.detach().full_tensor() for name, p in loaded.named_parameters() if isinstance(p, DTensor)}


def stepped(tied: bool) -> dict[str, torch.Tensor]:
    """The weights after the same step in one process."""
    model = plain(tied=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    plain_loss(model, *batch()).backward()
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def dropped(world: World | None, text: str) -> torch.Tensor:
    """The output of a MultiheadAttention with dropout for a replica's samples, or in one process for all."""
    torch.manual_seed(0)
    model: Any = fusemesh.MultiheadAttention(16, 2, dropout=0.5, batch_first=True, backend="reference").double()
    x = torch.randn(BATCH, 5, 16, dtype=torch.float64)
    if world is not None:
        layout = Layout.parse(text)
        model = fusemesh.parallelize(model, build_mesh(layout, world), layout)
        x = own(x, layout, world.rank)
    torch.manual_seed(1)  # the same on every rank
    return model(x, x, x)[0].detach()
