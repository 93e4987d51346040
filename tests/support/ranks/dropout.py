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
from fusemesh.hybrid.dropout import dropout_of
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.integrations.transformers import interface as ours
from tests.support.hugging_face import keep_double
from tests.support.pretrained.folders import CLASSES, PAIRS, PRETRAINED, SPANS, VOCABULARY, make_model

BATCH, LENGTH, TARGETS = 4, 9, 7
LENGTHS = torch.tensor([9, 5, 7, 9])
SEED, STEP = 7, 5


def rates(name: str, p: float = 0.1) -> dict[str, float]:
    """Every rate of the family's config that drops elements."""
    config = PRETRAINED[name].make_config()
    return {key: p for key in vars(config) if "drop" in key and "layerdrop" not in key}


def build(name: str, kind: str, changed: dict[str, Any], p: float = 0.1) -> Any:
    ours.register()
    model = make_model(name, kind, attn_implementation="fusemesh", **{**rates(name, p), **changed}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # With weights as small as new ones, attention is alike everywhere, and its gradients are roundings.
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter *= 5
    return model.train()


def batch(kind: str, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded behind to ``length``, each with one end-of-text token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    seen = torch.arange(LENGTH) < LENGTHS[:, None]
    ids[torch.arange(BATCH), LENGTHS - 1] = 2
    found = {"input_ids": ids.where(seen, 0), "attention_mask": seen.long()}
    found = {key: nn.functional.pad(x, (0, length - LENGTH)) for key, x in found.items()}
    if kind == PAIRS:
        found["decoder_input_ids"] = ids.flip(1)[:, :TARGETS].contiguous()
    return found


def loss(model: Any, kind: str, inputs: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    """A sum over every logit that is not padding's, whose weights say which sample of all and which token it is of."""
    output = model(**inputs, **({} if kind in (CLASSES, SPANS) else {"use_cache": False}))
    logits = torch.stack([output.start_logits, output.end_logits], -1) if kind == SPANS else output.logits
    assert logits.dtype == torch.float64
    if logits.dim() == 2:
        logits = logits[:, None]
    samples, width, classes = logits.shape
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(BATCH, max(LENGTH, TARGETS), classes, generator=generator, dtype=torch.float64)
    if kind != CLASSES:
        ends = torch.full((BATCH,), TARGETS) if kind == PAIRS else LENGTHS
        weights *= (torch.arange(weights.shape[1]) < ends[:, None])[..., None]
        weights = nn.functional.pad(weights, (0, 0, 0, max(0, width - weights.shape[1])))
    own = weights[first : first + samples, :width]
    return torch.where(own != 0, logits * own, torch.zeros_like(own)).sum()


def learned(
    model: Any, kind: str, inputs: dict[str, torch.Tensor], first: int = 0, parts: int = 1
) -> dict[str, torch.Tensor]:
    """The loss of samples from ``first`` on and every gradient, whole, in parts that are accumulated."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    samples = len(inputs["input_ids"]) // parts
    dropout = dropout_of(model)
    for part in range(parts):
        at = part * samples
        dropout.at(STEP, first + at, SEED)
        with dropout.forward(samples):
            value = loss(model, kind, {key: x[at : at + samples] for key, x in inputs.items()}, first + at)
        value.backward()
        total += value.detach()
    return {"loss": total, **gradients(model)}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return found


def on_one(
    name: str, kind: str, changed: dict[str, Any], parts: int = 1, p: float = 0.1, length: int = LENGTH
) -> dict[str, torch.Tensor]:
    """One process, without a mesh."""
    with keep_double(), fusemesh.use_backend("reference"):
        return learned(build(name, kind, changed, p), kind, batch(kind, length), parts=parts)


def on_layout(
    world: World,
    text: str,
    name: str,
    kind: str,
    changed: dict[str, Any],
    parts: int = 1,
    recompute: str = "none",
    bug: str = "",
) -> dict[str, torch.Tensor]:
    """The same on a mesh."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    inputs = batch(kind)
    first = layout.replica_of(world.rank) * BATCH // layout.replicas
    own = {key: x[first : first + BATCH // layout.replicas] for key, x in inputs.items()}
    torch.manual_seed(world.rank)  # nothing is drawn from torch's generators
    with keep_double(), fusemesh.use_backend("reference"), BUGS[bug]() if bug else contextlib.nullcontext():
        model = fusemesh.parallelize(build(name, kind, changed), mesh, layout, recompute=recompute)
        found = learned(model, kind, own, first, parts)
    return {**found, "loss": sum_over_replicas(found["loss"], mesh)}


@contextlib.contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


def _features_alike() -> contextlib.AbstractContextManager[None]:
    """A rank drops the first rank's features and heads in its own."""
    return _replaced(dropout_calls.Forward, "_origin", lambda self, x: (0, 0, 0))


def _samples_alike() -> contextlib.AbstractContextManager[None]:
    return _replaced(dropout_calls.Forward, "__post_init__", lambda self: setattr(self, "first_sample", 0))


def _count_goes_on() -> contextlib.AbstractContextManager[None]:
    """What is computed again counts on from the first time."""
    return _replaced(dropout_calls.Forward, "copy", lambda self: self)


BUGS = {"features": _features_alike, "samples": _samples_alike, "count": _count_goes_on}
