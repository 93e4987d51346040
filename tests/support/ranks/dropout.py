"""Functions that ranks run for test_dropout.py and test_recompute.py: models that drop, in parts. It holds no tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import fusemesh
from fusemesh.hybrid import dropout_calls
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.dropout import DropoutByPosition, dropout_of
from fusemesh.hybrid.hugging_face import families
from fusemesh.hybrid.hugging_face.stages import as_trainable
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.integrations.transformers import interface as ours
from tests.support.hugging_face import keep_double
from tests.support.pretrained import training
from tests.support.pretrained.folders import PRETRAINED

SEED, STEP = 7, 5
Learned = dict[str, torch.Tensor]


def rates(name: str, p: float = 0.1) -> dict[str, float]:
    """Every rate of the family's config that drops elements."""
    return {key: p for key in vars(PRETRAINED[name].make_config()) if "drop" in key and "layerdrop" not in key}


def build(name: str, kind: str, changed: dict[str, Any], p: float = 0.1) -> Any:
    """A trainable model in fp64 and in training, with our attention; its names are those of all layouts."""
    ours.register()
    options = {"attn_implementation": "fusemesh", **rates(name, p), **changed}
    model = training.build(name, kind, torch.float64, **options)
    families.prepare(model)
    return as_trainable(model).train()


def learned(model: Any, rows: range, parts: int, *, wider: int = 0) -> Learned:
    """The loss of these samples of the batch and every gradient, whole, in parts that are accumulated.

    Args:
        wider: more padding.
    """
    tokens, targets, inputs = training.batch(model)
    count = training.count(targets)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    size = len(rows) // parts
    if wider:
        tokens, inputs = nn.functional.pad(tokens, (0, wider)), dict(inputs)
        if "segments" in inputs:
            inputs["segments"] = nn.functional.pad(inputs["segments"], (0, wider))
        if model.kind == "tokens":
            targets = nn.functional.pad(targets, (0, wider), value=-100)
    for first in rows[::size]:
        own = slice(first, first + size)
        dropout_of(model).at(STEP, first, SEED)
        total += model.loss_and_gradients(
            tokens[own], targets[own], count, **{key: x[own] for key, x in inputs.items()}
        )
    return {"loss": total, **gradients(model)}


def gradients(model: nn.Module) -> Learned:
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return found


def on_one(
    name: str, kind: str, changed: dict[str, Any], parts: int = 1, *, p: float = 0.1, wider: int = 0, bug: str = ""
) -> Learned:
    """One process, without a mesh."""
    with keep_double(), fusemesh.use_backend("reference"), planted(bug):
        return learned(build(name, kind, changed, p), range(training.BATCH), parts, wider=wider)


def on_layout(
    world: World, text: str, name: str, kind: str, changed: dict[str, Any], options: dict[str, Any]
) -> Learned:
    """The same on a mesh; of a pipeline the rank's own gradients.

    Args:
        options: parts, recompute, schedule, virtual_stages, bug, with the defaults of each.
    """
    options = dict(options)
    bug, parts, recompute = options.pop("bug", ""), options.pop("parts", 1), options.pop("recompute", "none")
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    size = training.BATCH // layout.replicas
    first = layout.replica_of(world.rank) * size
    torch.manual_seed(world.rank)  # nothing is drawn from torch's generators
    with keep_double(), fusemesh.use_backend("reference"), planted(bug):
        model = build(name, kind, changed)
        model = fusemesh.parallelize(model, mesh, layout, recompute=recompute, pipeline=PipelineOptions(**options))
        found = learned(model, range(first, first + size), parts)
    return {**found, "loss": sum_over_replicas(found["loss"], mesh)}


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    """Let dropout forget something within the block."""
    if not bug:
        yield
        return
    holder, name, value = BUGS[bug]
    original = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


_at = DropoutByPosition.at
# By what is forgotten: a rank's features and heads, a part's samples, who calls, and that the second time is no second
# call.
BUGS: dict[str, tuple[Any, str, Any]] = {
    "place": (dropout_calls.Forward, "_origin", lambda self, x: (0, 0, 0)),
    "samples": (DropoutByPosition, "at", lambda self, step, first, seed: _at(self, step, 0, seed)),
    "name": (dropout_calls.Forward, "caller", property(lambda self: "")),
    "again": (dropout_calls.Forward, "copy", lambda self: self),
}
