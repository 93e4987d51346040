"""Functions that ranks run for test_recompute.py. It holds no tests."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

import fusemesh
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.transformer import Transformer, TransformerConfig
from tests.support.ranks.planner import sample


def both_ways(
    world: World, text: str, config: TransformerConfig, dtype: torch.dtype | None
) -> list[dict[str, torch.Tensor]]:
    """The loss and this rank's parts of all gradients, without and with blocks that are computed again."""
    layout, found = Layout.parse(text), []
    for recompute in ("none", "full"):
        model = Transformer(config, seed=1)
        model = parallelize(model, build_mesh(layout, world), layout, dtype=dtype, recompute=recompute)
        tokens, targets, inputs = sample(config, 4)
        tokens = torch.arange(tokens.numel()).view_as(tokens) * 7 % config.vocab_size
        with fusemesh.use_backend("reference"):
            loss = model.loss_and_gradients(tokens, targets, targets.numel(), **inputs)
        own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        parts = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in own.items()}
        found.append({"loss": loss, **parts})
    return found
