"""Functions that ranks run for test_parallel_transformers.py: Hugging Face models on a mesh. It holds no tests."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import fusemesh
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.hugging_face.sources import sources_of, to_disk
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.planner.published import FAMILIES as PLANNED
from fusemesh.hybrid.planner.published import PublishedDecoder
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.integrations.transformers import interface as ours
from fusemesh.kernels import backends
from fusemesh.transformer import Transformer
from tests.support.hugging_face import FAMILIES, VOCABULARY, Family, KeepDouble
from tests.support.hugging_face_families import MODELS
from tests.support.ranks import planner as planner_ranks
from tests.support.ranks.plan import learned, own

BATCH, LENGTH = 4, 9
# An odd vocabulary, so that tp cuts it unevenly.
ODD = VOCABULARY - 1


def family(name: str) -> Family:
    return {**FAMILIES, **MODELS}[name]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of all replicas; the padding id and the last id occur, and samples count differently."""
    ids = torch.randint(1, ODD, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 1], ids[:, 2] = 0, ODD - 1
    labels = ids.clone()
    for sample, ignored in enumerate((0, 3, 1, 5)):
        labels[sample, LENGTH - ignored :] = -100
    return ids, labels


def build(name: str, implementation: str, dtype: torch.dtype, changed: dict[str, Any]) -> Any:
    ours.register()
    model = family(name).build(implementation, **{"vocab_size": ODD, **changed})
    return model.train(drops(changed)).to(dtype)


def drops(changed: dict[str, Any]) -> bool:
    """Return whether a model with these options drops attention weights."""
    return "attention_dropout" in changed


def in_dtype(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return KeepDouble() if dtype == torch.float64 else contextlib.nullcontext()


def loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """transformers' own: the sum over a replica's tokens divided by the count of all replicas'."""
    count = (batch()[1][:, 1:] != -100).sum()
    torch.manual_seed(3)  # of dropout, the same on every rank
    return model(ids, labels=labels, num_items_in_batch=count, use_cache=False).loss


def on_one(
    name: str, implementation: str, dtype: torch.dtype, backend: str, changed: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """One process, without a mesh: the loss and every gradient."""
    with in_dtype(dtype), fusemesh.use_backend(backend):
        model = build(name, implementation, dtype, changed)
        return learned(model, lambda m: loss(m, *batch()), lambda x: x)


def alone(world: World, name: str, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    """:func:`on_one` on a rank, where the interpreter is on."""
    return on_one(name, "fusemesh", dtype, backend, {})


def on_layout(
    world: World, text: str, name: str, dtype: torch.dtype, backend: str, changed: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[tuple[str, str], int], dict[str, str]]:
    """The same on a mesh; how often each operation ran on each backend; and each parameter's placement on tp."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    ids, labels = (own(x, layout, world.rank) for x in batch())
    with in_dtype(dtype), fusemesh.use_backend(backend):
        model = fusemesh.parallelize(build(name, "fusemesh", dtype, changed), mesh, layout)
        placements = {}
        for parameter_name, parameter in model.named_parameters():
            # Without tp a plan stays unused.
            axes = ("dp", "fsdp", "tp") if layout.tp > 1 else ("dp", "fsdp")
            assert isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == axes
            placements[parameter_name] = str(parameter.placements[-1])
        backends.reset_call_counts()
        found = learned(model, lambda m: loss(m, ids, labels), lambda x: sum_over_replicas(x, mesh))
        # What is fused in one process is cut for tp.
        found = to_disk(found, sources_of(model))
    return found, backends.call_counts(), placements


def generated(world: World | None, name: str, changed: dict[str, Any]) -> torch.Tensor:
    """Greedy tokens in fp64 on the reference backend; on a mesh of tp, or (world None) by eager attention alone."""
    with in_dtype(torch.float64), fusemesh.use_backend("reference"), torch.no_grad():
        model = build(name, "eager" if world is None else "fusemesh", torch.float64, changed)
        if world is not None:
            layout = Layout(tp=world.world_size)
            fusemesh.parallelize(model, build_mesh(layout, world), layout)
        mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
        mask[0, :3] = 0
        return model.generate(batch()[0], attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)


def sampled(world: World | None, differ: bool) -> torch.Tensor | str:
    """Tokens drawn on tp, or alone, by generators that are in the same state on all ranks or not; or the refusal."""
    model = build("llama", "sdpa", torch.float32, {})
    if world is not None:
        layout = Layout(tp=world.world_size)
        fusemesh.parallelize(model, build_mesh(layout, world), layout)
    torch.manual_seed(world.rank if world is not None and differ else 0)
    try:
        return model.generate(batch()[0][:2], max_new_tokens=5, do_sample=True)
    except ValueError as error:
        return str(error)


def from_meta(world: World, text: str, name: str, folder: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Logits of a model that got memory on a mesh, and in one process; and what saving parts of it says."""
    layout = Layout.parse(text)
    torch.manual_seed(0)
    one = build(name, "eager", torch.float32, {})
    with torch.device("meta"):
        model = build(name, "eager", torch.float32, {})
    fusemesh.parallelize(model, build_mesh(layout, world), layout)
    model.to_empty(device="cpu")
    model.load_state_dict(one.state_dict())
    said = []
    model.get_decoder().save_pretrained(folder)
    try:
        torch.save(model.model.layers[0], io.BytesIO())
    except ValueError as error:
        said.append(str(error))
    ids = own(batch()[0], layout, world.rank)
    with torch.no_grad():
        return model(ids).logits, one(ids).logits, said


def generated_apart(world: World | None, rank: int) -> torch.Tensor:
    """Greedy tokens on shards, where each rank has a prompt of its own and asks for another number of them."""
    model = build("llama", "sdpa", torch.float32, {})
    if world is not None:
        layout = Layout(fsdp=world.world_size)
        fusemesh.parallelize(model, build_mesh(layout, world), layout)
    rank = rank if world is None else world.rank
    return model.generate(batch()[0][rank : rank + 1], max_new_tokens=2 + 3 * rank, do_sample=False)


def logits_on_more_ranks_than_keys(world: World | None, implementation: str) -> torch.Tensor:
    """Logits of a Llama with one key and value head, on a mesh of tp or (world None) alone, with padding."""
    model = build("llama", implementation, torch.float32, {"num_key_value_heads": 1})
    if world is not None:
        layout = Layout(tp=world.world_size)
        fusemesh.parallelize(model, build_mesh(layout, world), layout)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        return model(batch()[0], attention_mask=mask).logits[mask.bool()]


def saved(world: World, text: str, name: str, changed: dict[str, Any], folder: str) -> dict[str, torch.Tensor]:
    """The weights, whole, of a model that has learned a step on a mesh and is saved there in several files."""
    layout = Layout.parse(text)
    model = fusemesh.parallelize(build(name, "eager", torch.float32, changed), build_mesh(layout, world), layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss(model, *(own(x, layout, world.rank) for x in batch())).backward()
    optimizer.step()
    model.save_pretrained(folder, is_main_process=world.rank == 0, max_shard_size="30KB")
    assert os.path.isfile(os.path.join(folder, "model.safetensors.index.json")), "a rank went on too early"
    weights = {name: whole(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return to_disk(weights, sources_of(model))


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def not_saved(world: World, folder: str) -> tuple[str, str]:
    """The errors of saving where rank 0 cannot write, and of resizing."""
    layout = Layout(fsdp=world.world_size)
    model = fusemesh.parallelize(build("llama", "sdpa", torch.float32, {}), build_mesh(layout, world), layout)
    found = []
    for call in (lambda: model.save_pretrained(folder), lambda: model.resize_token_embeddings(60)):
        try:
            call()
        except (OSError, ValueError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found[0], found[1]


def refused(world: World, text: str, name: str, changed: dict[str, Any], styles: dict[str, str]) -> str:
    """The message with which parallelize refuses a model, some styles of whose plan are replaced."""
    layout = Layout.parse(text)
    model = build(name, "fusemesh", torch.float32, changed)
    if styles:
        model._tp_plan = {**model._tp_plan, **styles}
    try:
        fusemesh.parallelize(model, build_mesh(layout, world), layout)
    except ValueError as error:
        return str(error)
    return ""


OWN = {kind: planner_ranks.CONFIGS[kind] for kind in ("decoder", "span", "translation-tied")}


def published() -> dict[str, PublishedDecoder]:
    """A small decoder of each family that the planner knows, by the name of the family."""
    common: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "head_dim": 8, "sequence_length": 64}
    common |= {"num_kv_heads": 2, "intermediate_size": 48, "vocab_size": ODD}
    return {name: PublishedDecoder(name=name, family=name, **common) for name in PLANNED}


def verdicts(world: World, texts: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """The messages with which parallelize refuses each family, and our own models, on layouts; "" where it does not."""
    found = {}
    for text in texts:
        layout = Layout.parse(text)
        mesh = build_mesh(layout, world)
        for name in (*PLANNED, *OWN):
            with torch.device("meta"):
                model = Transformer(OWN[name]) if name in OWN else family(name).build("eager")
            try:
                fusemesh.parallelize(model, mesh, layout)
                found[name, text] = ""
            except ValueError as error:
                found[name, text] = str(error)
    return found


def example(script: str, arguments: list[str]) -> tuple[int, str]:
    """The status of a script's main() on this rank, and what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = runpy.run_path(script)["main"](arguments)
    return status, printed.getvalue()
