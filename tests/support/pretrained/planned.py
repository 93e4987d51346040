"""The ranks' part of tests/app/pretrained/test_planned.py: transformers' models on a mesh, and what they hold."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor

from fusemesh.config import TrainingConfig
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.hugging_face.families import prepare
from fusemesh.hybrid.hugging_face.stages import as_trainable
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.run.optimizer import build_optimizer
from tests.support.pretrained.folders import CAUSAL, PAIRS, PRETRAINED

LENGTH = 16
Case = tuple[str, str]
CASES: list[Case] = [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]


def build(name: str, kind: str, device: str = "meta", **changed: Any) -> Any:
    """Return a family's model of a kind as a run builds it."""
    if kind == CAUSAL and name in ("bert", "roberta"):
        changed["is_decoder"] = True
    config = PRETRAINED[name].make_config(**changed)
    with torch.device(device):
        model = getattr(transformers, kind).from_config(config)
    prepare(model)
    return as_trainable(model)


def placed(world: World, text: str, cases: list[Case], changed: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return this rank's place, and of each model what it holds, or the message with which it is refused.

    On meta: bytes of parameters, and of the gradients and AdamW's states of those that are trained.
    """
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    found: list[Any] = []
    for name, kind in cases:
        try:
            model = parallelize(build(name, kind, **changed), mesh, layout)
        except ValueError as error:
            found.append(str(error))
            continue
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = sum(_bytes(parameter) for parameter in trained)
        held = sum(_bytes(parameter) for parameter in model.parameters())
        found.append((held, gradients, 2 * gradients + 4 * len(trained)))
    return layout.coordinates(world.rank), found


def _inputs(kind: str, samples: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.full((samples, LENGTH), 3)
    tokens[:, -1] = 2  # off which BART and T5 read a class
    columns = {CAUSAL: LENGTH, PAIRS: LENGTH}.get(kind, 2 if kind.endswith("QuestionAnswering") else 1)
    return tokens, torch.ones(samples, columns, dtype=torch.long), {"target_tokens": tokens} if kind == PAIRS else {}


def stepped(world: World, text: str, name: str, kind: str) -> tuple[Any, tuple[int, int, int]]:
    """Return this rank's place, and the bytes of parameters, gradients and optimizer states after a step."""
    layout = Layout.parse(text)
    # Without dropout, which transformers' own attention does not have by position.
    model = parallelize(build(name, kind, "cpu").eval(), build_mesh(layout, world), layout)
    optimizer = build_optimizer(model, TrainingConfig())
    tokens, targets, inputs = _inputs(kind, 4)
    model.loss_and_gradients(tokens, targets, targets.numel(), **inputs)
    optimizer.step()
    parameters = list(model.parameters())
    gradients = sum(_bytes(p.grad) for p in parameters if p.grad is not None)
    states = sum(_bytes(x) for p in parameters for x in optimizer.state[p].values())
    return layout.coordinates(world.rank), (sum(map(_bytes, parameters)), gradients, states)


def saved(world: World, text: str, name: str, kind: str, samples: int, changed: dict[str, Any]) -> int:
    """Return the bytes of tensors, parameters left out, that autograd keeps of one forward pass on this rank."""
    layout = Layout.parse(text)
    model = parallelize(build(name, kind, "cpu", **changed), build_mesh(layout, world), layout)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens, targets, inputs = _inputs(kind, samples)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.loss(tokens, targets, **inputs)
        locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        parameters = {p.untyped_storage().data_ptr() for p in locals_}
    del loss
    return sum(size for place, size in kept.items() if place not in parameters)


def _bytes(x: torch.Tensor) -> int:
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.numel() * local.element_size()
