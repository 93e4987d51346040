"""Functions that ranks run for test_families.py: every family of Hugging Face models on a mesh. It holds no tests."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import fusemesh
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.hugging_face.sources import Source, sources_of
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.integrations.transformers import interface as ours
from tests.support.hugging_face import KeepDouble
from tests.support.pretrained.folders import CAUSAL, CLASSES, PAIRS, PRETRAINED, SPANS, VOCABULARY, make_model
from tests.support.ranks.plan import own

BATCH, LENGTH = 4, 9
END = 2
LENGTHS = torch.tensor([9, 6, 8, 4])


def batch(kind: str, changed: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the inputs and ``targets`` of all replicas; samples are padded behind, and end in the end of a text."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = min(changed.get(key, VOCABULARY) for key in ("vocab_size", "decoder_vocab_size"))
    ids = torch.randint(3, vocabulary, (BATCH, LENGTH), generator=generator)
    ids[:, 1] = vocabulary - 1
    kept = torch.arange(LENGTH) < LENGTHS[:, None]
    ids[torch.arange(BATCH), LENGTHS - 1] = END
    found = {"input_ids": ids.where(kept, 0), "attention_mask": kept.long()}
    if kind == CAUSAL:
        found["targets"] = ids.where(kept, -100).roll(-1, 1)
        found["targets"][:, -1] = -100
    elif kind == CLASSES:
        found["targets"] = torch.tensor([[1], [0], [0], [1]])
    elif kind == SPANS:
        found["targets"] = torch.tensor([[1, 3], [0, 5], [7, 7], [2, 1]])
    else:
        found["decoder_input_ids"] = ids.flip(1)[:, :7]
        found["targets"] = ids.flip(1)[:, 1:8].where(torch.arange(7) < LENGTHS[:, None] - 1, -100)
    if changed.get("add_cross_attention"):
        found["encoder_hidden_states"] = torch.randn(BATCH, 5, 32, generator=generator, dtype=torch.float64)
    return found


def loss(model: Any, kind: str, inputs: dict[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
    """Return the sum over a replica's targets divided by the ``count`` of all replicas', in the logits' dtype."""
    inputs = dict(inputs)
    targets = inputs.pop("targets")
    # transformers' caches would be filled in vain.
    output = model(**inputs, **({"use_cache": False} if kind in (CAUSAL, PAIRS) else {}))
    if kind == SPANS:
        logits = torch.stack([output.start_logits, output.end_logits], 1).flatten(0, 1)
    else:
        logits = output.logits.flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum") / count


def build(name: str, kind: str, changed: dict[str, Any]) -> Any:
    """Return the model in fp64, with PyTorch's attention, or eager where transformers has no other of the family."""
    ours.register()
    implementation = "eager" if name == "gemma2" else "sdpa"
    model = make_model(name, kind, **{"attn_implementation": implementation, **changed}).double()
    draw(model)
    return model


@torch.no_grad()
def draw(model: Any) -> None:
    """Draw weights with which every gradient is a good deal larger than its roundings.

    With small ones, and large biases, tokens become alike from layer to layer, and the gradients of queries cancel.
    """
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        x = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        *_, module, own = name.split(".")
        if parameter.requires_grad and parameter.dim() == 1:
            # Norms of Gemma multiply by 1 + weight.
            parameter.copy_(0.2 * x + (own == "weight" and "gemma" not in model.config.model_type))
        elif parameter.requires_grad and module in _TABLES:
            parameter.copy_(x)
        elif parameter.requires_grad:
            # T5 does not divide scores by the root of the head dim.
            parameter.copy_(x * parameter.shape[1] ** -0.5 * (0.25 if module == "q" else 1))


_TABLES = ("embed_tokens", "wte", "wpe", "shared", "word_embeddings", "position_embeddings", "token_type_embeddings")
_TABLES += ("embed_positions", "relative_attention_bias")


def learned(model: Any, value: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of a replica and every gradient, whole, with the norm of all as ``norm``."""
    value.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    found = {"norm": whole(norm)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.grad is not None:
            found[name] = whole(parameter.grad)
    return value.detach(), found


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def on_one(name: str, kind: str, changed: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Plain transformers in one process: ``loss``, ``norm`` and every gradient."""
    with KeepDouble():
        model, inputs = build(name, kind, changed), batch(kind, changed)
        value, found = learned(model, loss(model, kind, inputs, (inputs["targets"] != -100).sum()))
    return {"loss": value, **found}


def on_layout(
    world: World, text: str, name: str, kind: str, changed: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Source], dict[str, str]] | None:
    """The same on a mesh, where each tensor stands on disk, and each parameter's placement on tp; of rank 0 alone."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    inputs = batch(kind, changed)
    count = (inputs["targets"] != -100).sum()
    inputs = {key: own(x, layout, world.rank) for key, x in inputs.items()}
    with KeepDouble(), fusemesh.use_backend("reference"):
        model = fusemesh.parallelize(build(name, kind, changed), mesh, layout)
        value, found = learned(model, loss(model, kind, inputs, count))
    found["loss"] = sum_over_replicas(value, mesh)
    if world.rank:
        return None
    placements = {key: str(p.placements[-1]) for key, p in model.named_parameters(remove_duplicate=False)}
    return found, sources_of(model), placements


def generated(world: World | None, text: str, name: str) -> torch.Tensor:
    """Greedy tokens on a mesh, or (world None) alone; each replica has all samples."""
    kind = PRETRAINED[name].kinds[0]
    inputs = batch(kind, {})
    with KeepDouble():
        model = build(name, kind, {})
        if world is not None:
            layout = Layout.parse(text)
            fusemesh.parallelize(model, build_mesh(layout, world), layout)
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        if kind != PAIRS:
            # What goes on is padded on the left.
            mask, ids = mask.flip(1), ids.flip(1)
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def refused(world: World, text: str, name: str, changed: dict[str, Any], wrapped: str) -> str:
    """The message with which parallelize refuses a model, in which a module may stand in a wrapper."""
    layout = Layout.parse(text)
    model = make_model(name, **changed)
    if wrapped:
        parent, _, child = wrapped.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.nn.Sequential(model.get_submodule(wrapped)))
    try:
        fusemesh.parallelize(model, build_mesh(layout, world), layout)
    except ValueError as error:
        return str(error)
    return ""
