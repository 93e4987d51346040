"""Functions that ranks run for tests/hybrid/test_compat.py. Imported by the ranks, so it holds no tests."""

from __future__ import annotations

import gc
import logging
import os

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fusemesh.hybrid import compat
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh, distributed

LOGGER = "torch.distributed.tensor._redistribute"


def threads() -> int:
    """Return the number of threads of this process."""
    return len(os.listdir("/proc/self/task"))


def plan_on(world: World) -> None:
    """Let DTensor plan an operation and a redistribution on a mesh of this world."""
    mesh = build_mesh(Layout(fsdp=world.world_size), world)["fsdp", "tp"]
    x = DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0), Partial()])
    (x + x).redistribute(mesh, [Replicate(), Replicate()])
    nn.utils.get_total_norm([x])


def free_meshes() -> tuple[int, int, int]:
    """Return the number of threads before a mesh, after its group is gone, and after DTensor's caches are cleared."""
    compat.clear_dtensor_caches()
    gc.collect()
    before = threads()
    with distributed("cpu") as world:
        plan_on(world)
    gc.collect()
    kept = threads()
    compat.clear_dtensor_caches()
    gc.collect()
    return before, kept, threads()


def advice(world: World) -> tuple[list[str], list[str]]:
    """Return what DTensor logs when a tensor on two axes is reduced, without our filter and with it."""
    logger = logging.getLogger(LOGGER)
    filters, told = list(logger.filters), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.filters.clear()
    found = []
    mesh = build_mesh(Layout(fsdp=2, tp=2), world)["fsdp", "tp"]
    try:
        for silence in (lambda: None, compat.silence_redistribute_advice):
            silence()
            told.clear()
            compat.clear_dtensor_caches()  # it is given once for each plan
            x = DTensor.from_local(torch.ones(4), mesh, [Partial(), Partial()])
            x.redistribute(mesh, [Replicate(), Replicate()])
            found.append(list(told))
    finally:
        logger.removeHandler(handler)
        logger.filters[:] = filters
    return found[0], found[1]
