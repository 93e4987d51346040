"""Functions that ranks run for tests/hybrid/test_launch.py. Imported by the ranks, so it holds no tests.

torch is imported only where it is needed: most of what can befall a process does not need it, and starts sooner.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

from fusemesh.hybrid.outputs import UserError
from fusemesh.hybrid.ranks.local import LocalRanks


def describe(argument: str) -> dict[str, Any]:
    """Who this rank is, a sum over the ranks, and what reached it."""
    import torch
    import torch.distributed as dist

    from fusemesh.hybrid.ranks.join import distributed
    from fusemesh.kernels import env

    with distributed("cpu") as world:
        total = torch.tensor([world.rank + 1.0])
        dist.all_reduce(total)
        return {
            "rank": world.rank,
            "world_size": world.world_size,
            "sum": total.item(),
            "argument": argument,
            "backend": env.BACKEND,
        }


def own_rank() -> int:
    """This rank, by its environment."""
    return int(os.environ["RANK"])


def fail_on(ranks: tuple[int, ...]) -> None:
    """Raise on some ranks."""
    if own_rank() in ranks:
        raise ZeroDivisionError(f"rank {own_rank()} fails")


def refuse_on(ranks: tuple[int, ...], differently: bool = False) -> None:
    """Some ranks meet an error whose text says everything, each the same or each another."""
    if own_rank() in ranks:
        raise UserError(f"refused by {own_rank()}" if differently else "refused")


class TwoArguments(UserError):
    """An error that pickle cannot make again from its text."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def refuse_by_two_arguments() -> None:
    """Some error that says everything."""
    raise TwoArguments("this", "that")


def unreadable_on(rank: int) -> Any:
    """One rank returns an object whose class the caller cannot import, the others their number."""
    if own_rank() != rank:
        return own_rank()
    module = types.ModuleType("only_in_a_rank")
    sys.modules["only_in_a_rank"] = module
    exec("class Thing: pass", module.__dict__)
    return module.Thing()  # type: ignore[attr-defined]


def late(seconds: float) -> str:
    """Return after some seconds."""
    time.sleep(seconds)
    return "late"


def fail_while_another_sleeps(world: Any, rank: int, folder: str) -> None:
    """One rank raises; the others compute for some seconds, and say that they could finish."""
    if world.rank == rank:
        raise ZeroDivisionError
    time.sleep(8.0)
    (Path(folder) / f"{world.rank}.finished").touch()


def die_on(rank: int) -> None:
    """One rank is killed."""
    if own_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_on(rank: int) -> None:
    """One rank does not return."""
    if own_rank() == rank:
        time.sleep(600)


def world_of(world: Any) -> tuple[int, int]:
    """Rank and world size, after a collective over this call's group."""
    import torch.distributed as dist

    dist.barrier()
    return world.rank, world.world_size


def fail_in_group(world: Any, rank: int) -> None:
    """One rank raises, the others return."""
    if world.rank == rank:
        raise ZeroDivisionError


def fail_before_a_collective(rank: int) -> None:
    """One rank raises while the others wait for it."""
    import torch.distributed as dist

    from fusemesh.hybrid.ranks.join import distributed

    with distributed("cpu") as world:
        if world.rank == rank:
            raise ZeroDivisionError
        dist.barrier()


def joined(slow: int) -> tuple[list[float], list[float]]:
    """When this rank was connected, in the default group and a mesh, and when it went on; one rank takes longer."""
    from fusemesh.hybrid.layout import Layout
    from fusemesh.hybrid.ranks import join as launch

    connected, went_on = [], []

    def late(connect: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            group = connect(*args, **kwargs)
            if own_rank() == slow:
                time.sleep(0.5)
            connected.append(time.time())
            return group

        return wrapper

    with (
        mock.patch.multiple(
            launch,
            init_device_mesh=late(launch.init_device_mesh),
            dist=mock.Mock(wraps=launch.dist, init_process_group=late(launch.dist.init_process_group)),
        ),
        launch.distributed("cpu") as world,
    ):
        went_on.append(time.time())
        launch.build_mesh(Layout.parse("dp2"), world)
        went_on.append(time.time())
    return connected, went_on


def parent(folder: str) -> None:
    """Start two ranks that never end."""
    with LocalRanks(2) as ranks:
        ranks.call(sleep, folder)


def sleep(folder: str) -> None:
    """Say that this process exists, then sleep."""
    file = Path(folder) / f"{os.environ['RANK']}.pid"
    part = file.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.rename(file)
    time.sleep(600)
