"""Functions that ranks run in the tests of faults: they end, stop or spoil themselves at a given place."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fusemesh.hybrid import consistency
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh, distributed
from fusemesh.transformer import Transformer, TransformerConfig


def nothing() -> None:
    """Called first, so that what is timed afterwards holds no imports."""


def reduce_for_ever(victim: int, number: int, limit: float) -> None:
    """All-reduce until the victim, after a few rounds, sends itself the signal ``number``."""
    with distributed("cpu", lost_after=limit) as world:
        for turn in range(10**9):
            if turn == 20 and world.rank == victim:
                os.kill(os.getpid(), number)
            dist.all_reduce(torch.ones(4))
            time.sleep(0.01)


def pause_and_go_on(victim: int, seconds: float, limit: float) -> int:
    """Reduce while one rank computes alone for longer than the limit without touching a collective."""
    with distributed("cpu", lost_after=limit) as world:
        dist.all_reduce(torch.ones(4))
        if world.rank == victim:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                torch.ones(64, 64) @ torch.ones(64, 64)
        total = torch.ones(4)
        dist.all_reduce(total)
        return int(total[0])


def stop_then_continue(victim: int, limit: float) -> int:
    """One rank is stopped for longer than half the limit, and goes on."""
    with distributed("cpu", lost_after=limit) as world:
        if world.rank == victim:
            pid = os.getpid()
            if os.fork() == 0:
                time.sleep(0.7 * limit)
                os.kill(pid, signal.SIGCONT)
                os._exit(0)
            os.kill(pid, signal.SIGSTOP)
        total = torch.ones(4)
        dist.all_reduce(total)
        return int(total[0])


def small_model(world: World, layout: str) -> Transformer:
    """Two blocks, one kv head, tied embeddings, parallelized."""
    config = TransformerConfig(31, 32, 2, 4, 1, 48, 8, tie_embeddings=True)
    parsed = Layout.parse(layout)
    return parallelize(Transformer(config, "reference"), build_mesh(parsed, world), parsed)


def drift(layout: str, spoilt: dict[int, str]) -> str:
    """The message about replicas after the ranks of ``spoilt`` have changed one element of the parameter named."""
    with distributed("cpu") as world:
        model = small_model(world, layout)
        consistency.check_replicas(model, step=1)
        if world.rank in spoilt:
            parameter = dict(model.named_parameters())[spoilt[world.rank]]
            assert isinstance(parameter, DTensor)
            with torch.no_grad():
                parameter.to_local().flatten()[-1] *= 1 + 2**-20
        try:
            consistency.check_replicas(model, step=7)
        except consistency.DriftError as error:
            return str(error)
        return "none"


def not_finite(layout: str, rank: int, where: str, name: str) -> str:
    """Return where a NaN is found that ``rank`` alone puts into a parameter, a module's output or a gradient."""
    with distributed("cpu") as world:
        model = small_model(world, layout)
        if world.rank == rank:
            spoil(model, where, name)
        parsed = Layout.parse(layout)
        generator = torch.Generator().manual_seed(parsed.replica_of(world.rank))
        tokens, targets = (torch.randint(0, 31, (2, 8), generator=generator) for _ in range(2))
        stage = world.rank // (parsed.world_size // parsed.pp)
        return consistency.find_non_finite(model, lambda: model.loss_and_gradients(tokens, targets, 16), stage=stage)


def spoil(model: nn.Module, where: str, name: str) -> None:
    """A NaN in one element, from now on."""
    nan = float("nan")
    if where == "parameter":
        with torch.no_grad():
            dict(model.named_parameters())[name].to_local().flatten()[3] = nan  # type: ignore[attr-defined]
        return
    owner, _, own = name.rpartition(".")
    module = dict(model.named_modules())[name if where == "output" else owner]

    def spoil_first(x: torch.Tensor) -> torch.Tensor:
        flags = torch.zeros(x.shape, dtype=torch.bool)
        flags.flatten()[0] = True
        return x.masked_fill(flags, nan)

    if where == "output":
        module.register_forward_hook(lambda _, __, output: spoil_first(output))
        return

    def local(gradient: torch.Tensor) -> torch.Tensor:
        if not isinstance(gradient, DTensor):
            return spoil_first(gradient)
        spoilt = spoil_first(gradient.to_local())
        return DTensor.from_local(
            spoilt,
            gradient.device_mesh,
            gradient.placements,
            shape=gradient.shape,
            stride=gradient.stride(),
            run_check=False,
        )

    def hook(module: nn.Module, _: object) -> None:
        dict(module.named_parameters(recurse=False))[own].register_hook(local)

    module.register_forward_pre_hook(hook)
