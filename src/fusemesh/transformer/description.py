"""A Transformer as the planner sees it, read from its own modules."""

from __future__ import annotations

import torch

from fusemesh.hybrid.apply import capabilities_of
from fusemesh.hybrid.planner.model import Layer, ModelDescription, Outer, weights_of

from .config import TransformerConfig
from .heads import OUTPUTS
from .model import Transformer

_BLOCKS = "blocks."


def describe(config: TransformerConfig, name: str = "the configured model") -> ModelDescription:
    """Return the planner's description of the Transformer of ``config``.

    It is built on meta, without memory. The modules say which parameters there are and how tp splits them;
    :meth:`Transformer.stage` says which stages of a pipeline hold those of no block.
    """
    with torch.device("meta"):
        model = Transformer(config)
    layers: list[Layer] = []
    for index, block in enumerate(model.blocks):
        at = config.memory_at
        layer = Layer(
            weights_of(block),
            causal=config.is_causal(index),
            window=config.window_of(index),
            with_memory=at is not None and index >= at,
        )
        # Equal layers are one object.
        layers.append(next((known for known in layers if known == layer), layer))
    last = len(layers) - 1
    held = [
        {id(p) for p in model.stage(range(i, i + 1), first=i == 0, last=i == last).parameters()}
        for i in range(last + 1)
    ]
    outer = tuple(
        Outer(weight, tuple(i for i, ids in enumerate(held) if id(model.get_parameter(weight.name)) in ids))
        for weight in weights_of(model)
        if not weight.name.startswith(_BLOCKS)
    )
    return ModelDescription(
        name=name,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        sequence_length=config.max_sequence_length,
        layers=tuple(layers),
        outer=outer,
        head=OUTPUTS[config.output].planned(config),
        capabilities=capabilities_of(model),
    )
