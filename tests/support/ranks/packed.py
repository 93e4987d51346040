"""What ranks do with rows of several documents."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fusemesh import use_backend
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.hugging_face import families
from fusemesh.hybrid.hugging_face.stages import as_trainable
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.placed import whole_state_dict
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.integrations.transformers import register
from tests.support.hugging_face import KeepDouble
from tests.support.pretrained import training
from tests.support.pretrained.folders import CAUSAL

LENGTH = 24
# Of each row the documents' lengths; what is left is filled up.
ROWS = ((9, 1, 14), (24,), (5, 5, 5, 5), (17, 6))


def build(name: str, **changed: Any) -> Any:
    """A language model in fp64 whose attention is ours, without dropout."""
    register()
    model = training.build(name, CAUSAL, torch.float64, **changed)
    model.set_attn_implementation("fusemesh")
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, targets and positions [4, 24]; each document's last token has no target, nor has a first one of each."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50, (len(ROWS), LENGTH), generator=g)
    targets, positions = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for row, sizes in enumerate(ROWS):
        at = 0
        for size in (*sizes, LENGTH - sum(sizes)):
            positions[row, at : at + size] = torch.arange(size)
            if at < sum(sizes):
                targets[row, at + 1 : at + size - 1] = tokens[row, at + 2 : at + size]
            at += size
    return tokens, targets, positions


def alone(name: str, **changed: Any) -> dict[str, Any]:
    """The summed loss of each document by itself, by plain transformers, and the gradients of their sum."""
    with KeepDouble():
        model = training.build(name, CAUSAL, torch.float64, **changed)
        tokens, targets, _ = rows()
        losses = []
        for row, sizes in enumerate(ROWS):
            at = 0
            for size in sizes:
                logits = model(tokens[row : row + 1, at : at + size]).logits[0]
                losses.append(
                    torch.nn.functional.cross_entropy(
                        logits, targets[row, at : at + size], reduction="sum", ignore_index=-100
                    )
                    if (targets[row, at : at + size] >= 0).any()
                    else logits.sum() * 0
                )
                at += size
        loss = torch.stack(losses).sum()
        (loss / (targets >= 0).sum()).backward()
        return {
            "loss": loss.detach(),
            "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        }


def learned(world: World, text: str, name: str, recompute: str, changed: dict[str, Any]) -> dict[str, Any] | None:
    """The summed loss of all rows in a layout, and on rank 0 all gradients, whole."""
    layout = Layout.parse(text)
    with KeepDouble():
        model = build(name, **changed)
        families.prepare(model)
        as_trainable(model)
        model.train()
        mesh = build_mesh(layout, world)
        pipeline = PipelineOptions(2) if layout.pp > 1 else None
        options: dict[str, Any] = {"recompute": recompute} | ({} if pipeline is None else {"pipeline": pipeline})
        parallelize(model, mesh, layout, **options)
        tokens, targets, positions = rows()
        size = len(tokens) // layout.replicas
        own = slice(layout.replica_of(world.rank) * size, (layout.replica_of(world.rank) + 1) * size)
        with use_backend("reference"):
            count = int((targets >= 0).sum())
            loss = model.loss_and_gradients(tokens[own], targets[own], count, positions=positions[own])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    to = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                    to.copy_(grad)
        found = whole_state_dict(model)
        return {"loss": loss, "gradients": found}
