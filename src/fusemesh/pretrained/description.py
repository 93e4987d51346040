"""A Hugging Face folder, or its ``config.json`` alone, as the planner sees it, read from transformers' own class."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusemesh.hybrid.apply import capabilities_of, checked_sizes
from fusemesh.hybrid.dropout import check_layers_stay
from fusemesh.hybrid.hugging_face.heads import vocabulary
from fusemesh.hybrid.hugging_face.stages import TrainableModel
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.planner.model import Head, Layer, ModelDescription, Outer, weights_of
from fusemesh.hybrid.tensor.table import convert, find_table

from .build import build, longest, sizes_of
from .folder import check_task, check_version, config_of, own_task

_ROTARY = "rotary_emb"
# Names of the second projection of a feed-forward that multiplies.
_SECOND = ("gate_proj", "gate", "wi_1")
_ENCODERS = ("bert", "roberta", "distilbert")
# Of a model that sets no end to its positions; T5's own training had as many.
_LENGTH = 512


def is_folder(name: str) -> bool:
    """Return whether ``name`` is a folder, or a ``config.json``, that the transformers that is here can read.

    Of a config under another name, or without transformers, :mod:`fusemesh.hybrid.planner.published` reads some
    decoders' sizes.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.name != "config.json" or not file.is_file():
        return False
    try:
        check_version()
    except ValueError:
        return False
    return True


def describe_folder(name: str, task: str | None = None) -> ModelDescription:
    """Return the planner's description of the model that a folder is trained as.

    Args:
        name: the folder, or the ``config.json`` in it. Tied weights are compared where the folder holds them.
        task: that it is trained for; None: the one of its architecture's head.

    Raises:
        ValueError: transformers does not know it, or not with this task's head; or its family is not known.
    """
    path = str(Path(name).parent if Path(name).is_file() else Path(name))
    config = config_of(path)
    task = task or own_task(config)
    check_task(config, path, task)
    untied = None if any(Path(path).glob("*.safetensors")) else ()
    model, _ = build(path, task, dtype=torch.float32, untied=untied)
    return describe_model(model, Path(path).resolve().name)


def describe_model(model: TrainableModel, name: str) -> ModelDescription:
    """Return the planner's description of a model on meta, as :func:`fusemesh.pretrained.build.build` makes it.

    The modules of a copy, once the tensor table is applied, say which parameters there are and how tp splits them; its
    stages, which of them each stage holds. ``name`` is for people.
    """
    config, sizes = model.config, sizes_of(model.config)
    hidden, heads = config.hidden_size, sizes["num_heads"]
    modules = [name for name, _ in model.named_modules()]
    layers, outer = _parameters(_split(model, 1))
    refusal = functools.cache(functools.partial(_refusal, model))

    def fits(layout: Layout, virtual_stages: int) -> None:
        check_layers_stay(model, layout)
        layout.validate(virtual_stages=virtual_stages, **checked_sizes(model))
        if message := refusal(layout.tp):
            raise ValueError(message)

    return ModelDescription(
        name=name,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=sizes.get("num_kv_heads", heads),
        head_dim=getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads,
        intermediate_size=sizes.get("intermediate_size", 4 * hidden),
        vocab_size=config.vocab_size,
        sequence_length=longest(config) or _LENGTH,
        layers=layers,
        outer=outer,
        head=_head(model),
        gated=any(_last(module) in _SECOND for module in modules),
        layer_norm=any(isinstance(module, nn.LayerNorm) for module in model.blocks[0].modules()),
        rotary=any(_last(module) == _ROTARY for module in modules),
        capabilities=capabilities_of(model),
        fits=fits,
    )


def _split(model: TrainableModel, ranks: int) -> Any:
    """Return a copy to which the tensor table is applied. On one rank nothing is refused, and all is split alike."""
    split = copy.deepcopy(model)
    table = find_table(split, None, 2)
    assert table is not None, type(model).__name__
    convert(split, table, ranks, sequence_parallel=False)
    return split


def _refusal(model: TrainableModel, ranks: int) -> str:
    """Return why the tensor table cannot split ``model`` over so many ranks; "" where it can."""
    try:
        _split(model, ranks)
    except ValueError as error:
        return str(error)
    return ""


def _parameters(model: TrainableModel) -> tuple[tuple[Layer, ...], tuple[Outer, ...]]:
    """Return layers and other parameters of a model that its table has been applied to.

    A parameter that other stages than its own block's hold, such as T5's biases of the first block, is none of a layer.
    """
    blocks = model.blocks
    last = len(blocks) - 1
    held: dict[int, list[int]] = {}
    for number in range(last + 1):
        for parameter in model.stage(range(number, number + 1), first=number == 0, last=number == last).parameters():
            held.setdefault(id(parameter), []).append(number)
    found: list[Layer] = []
    inside: set[int] = set()
    for number, block in enumerate(blocks):
        own = {w: id(block.get_parameter(w.name)) for w in weights_of(block)}
        own = {weight: key for weight, key in own.items() if held[key] == [number]}
        inside |= set(own.values())
        layer = Layer(tuple(own), **_sight(model, number))
        # Equal layers are one object.
        found.append(next((known for known in found if known == layer), layer))
    outer = [(weight, id(model.get_parameter(weight.name))) for weight in weights_of(model)]
    return tuple(found), tuple(Outer(weight, tuple(held[key])) for weight, key in outer if key not in inside)


def _sight(model: TrainableModel, number: int) -> dict[str, Any]:
    """Return which tokens block ``number`` sees, as arguments of :class:`Layer`."""
    config = model.config
    if model.border is not None:
        in_decoder = number >= model.border
        return {"causal": in_decoder, "with_memory": in_decoder}
    encodes = config.model_type in _ENCODERS and not getattr(config, "is_decoder", False)
    types, most = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    slides = types[number] == "sliding_attention" if types else True
    return {"causal": not encodes, "window": (most - 1, 0) if most and slides else None}


def _head(model: TrainableModel) -> Head:
    """Return the head: of classes and spans every rank of tp has it whole."""
    if model.kind == "class":
        return Head(model.config.num_labels, "texts", is_whole=True)
    if model.kind == "span":
        return Head(2, is_whole=True)
    return Head(vocabulary(model))


def _last(name: str) -> str:
    return name.rpartition(".")[2]
