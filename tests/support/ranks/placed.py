"""Functions that ranks run for tests/hybrid/test_placed.py. Imported by the ranks, so it holds no tests."""

from __future__ import annotations

import copy
import functools
import io
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import fusemesh
from fusemesh.hybrid import checkpoint, compat, placed
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.transformer import Transformer
from tests.support.ranks.plan import PLAN, Plain, plain
from tests.support.ranks.planner import CONFIGS


def model_of(kind: str, seed: int) -> nn.Module:
    """One of our models, or the plain one with tied weights and a buffer, with weights by the seed."""
    if kind != "plain":
        return Transformer(CONFIGS[kind], seed=seed)
    model = plain(seed, tied=True)
    model.register_buffer("scale", torch.full((3,), float(seed)))
    return model


def through_whole(world: World, text: str, kind: str) -> tuple[dict[str, torch.Tensor], bool]:
    """What whole_state_dict gives of a model, and whether one that loads whole tensors holds this rank's parts."""
    # What DTensor remembers of other calls' meshes names groups that a pipeline numbers otherwise.
    compat.clear_dtensor_caches()
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    plan = PLAN if kind == "plain" else None
    model = fusemesh.parallelize(model_of(kind, 1), mesh, layout, plan=plan)
    found = fusemesh.whole_state_dict(model)
    other = fusemesh.parallelize(model_of(kind, 2), mesh, layout, plan=plan)
    other.load_state_dict(model_of(kind, 1).state_dict())
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return found, all(torch.equal(_local(x), _local(y)) for x, y in pairs)


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def refused(world: World) -> dict[str, str]:
    """What is said by copying, pickling, transforming and placing again a model on a mesh, or loading another shape."""
    layout = Layout(dp=world.world_size)
    mesh = build_mesh(layout, world)
    model = fusemesh.parallelize(plain(), mesh, layout)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    named = dict(model.named_parameters())
    parts: dict[str, Any] = {"layer": model.layers[0], "attention": model.layers[0].attention, "norm": model.norm}

    def forward() -> None:
        with torch.autograd.forward_ad.dual_level():
            model(ids)

    calls: dict[str, Any] = {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.dumps(model),
        "save": lambda: torch.save(model, io.BytesIO()),
        "load": lambda: model.load_state_dict({**model.state_dict(), "norm.bias": torch.ones(3)}),
        "again": lambda: fusemesh.parallelize(model, mesh, layout),
        "inside": lambda: fusemesh.parallelize(nn.ModuleDict({"layers": model.layers[0]}), mesh, layout),
        "grad": lambda: torch.func.grad(lambda p: torch.func.functional_call(model, p, (ids,)).sum())(named),
        "jvp": lambda: torch.func.jvp(lambda x: model(ids) * x, (torch.ones(()),), (torch.ones(()),)),
        "vmap": lambda: torch.vmap(model)(ids[:, None]),
        "forward_ad": forward,
        **{f"deepcopy of {name}": functools.partial(copy.deepcopy, part) for name, part in parts.items()},
        **{f"save of {name}": functools.partial(torch.save, part, io.BytesIO()) for name, part in parts.items()},
        "different": lambda: model.load_state_dict(plain(world.rank).state_dict()),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found


def filled(world: World, folder: str) -> tuple[str, torch.Tensor, dict[str, str]]:
    """What to_empty() says of a buffer on meta; one that had its values; and what asks for values before it."""
    layout = Layout(fsdp=world.world_size)
    mesh = build_mesh(layout, world)

    def placed_with(scale: torch.Tensor) -> nn.Module:
        with torch.device("meta"):
            model = Plain()
        model.layers[0].attention.register_buffer("scale", scale, persistent=False)
        return fusemesh.parallelize(model, mesh, layout)

    model = placed_with(torch.arange(3.0))
    calls: dict[str, Callable[[], Any]] = {
        "to_empty": lambda: placed_with(torch.empty(3, device="meta")).to_empty(device="cpu"),
        "whole_state_dict": lambda: fusemesh.whole_state_dict(model),
        "load_state_dict": lambda: model.load_state_dict(Plain().state_dict()),
        "checkpoint.save": lambda: checkpoint.save(folder, model, None, {}, step=1),
        "checkpoint.load": lambda: checkpoint.load(folder, model),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    model.to_empty(device="cpu")
    return said.pop("to_empty"), model.get_buffer("layers.0.attention.scale"), said


def alone(world: World, said: str) -> list[str]:
    """What the first rank logs that waits for the other, which comes when the file ``said`` says that it has."""
    layout = Layout(dp=world.world_size)
    model = fusemesh.parallelize(plain(), build_mesh(layout, world), layout)
    told: list[str] = []

    patience = placed._PATIENCE

    def emit(record: logging.LogRecord) -> None:
        told.append(record.getMessage())
        placed._PATIENCE = patience
        Path(said).touch()

    handler = logging.Handler()
    handler.emit = emit  # type: ignore[method-assign]
    logger = logging.getLogger(placed.__name__)
    if world.is_first:
        logger.addHandler(handler)
        placed._PATIENCE = 0.05
    try:
        while not world.is_first and not Path(said).exists():
            time.sleep(0.01)
        fusemesh.whole_state_dict(model)
    finally:
        placed._PATIENCE = patience
        logger.removeHandler(handler)
    return told
