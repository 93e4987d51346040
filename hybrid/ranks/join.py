"""Rank and world from whatever started this process, the process group, and the mesh of devices.

torchrun, mpirun (Open MPI; MPICH and its relatives), srun, :func:`launch_local`, or nothing at all: the same program
runs under each.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..layout import AXES, Layout
from . import mpi
from .environment import (
    MPI,
    Place,
    device_index,
    given_address,
    launcher_of,
    ports_of,
    rank_and_size,
    rank_from_environment,
)
from .failure import let_first_end
from .hosts import first_node
from .local import LocalRanks
from .meeting import Meeting, has_joined
from .watchdog import Watchdog

__all__ = [
    "Place",
    "World",
    "build_mesh",
    "distributed",
    "find_place",
    "first_node",
    "launch_local",
    "rank_from_environment",
    "refuse_start",
]


def find_place() -> Place | None:
    """Return the place of this process, whatever launcher started it; None for a process that none did.

    What the environment says (:func:`rank_from_environment`), and under mpirun, with mpi4py installed, what MPI says.

    Raises:
        ValueError: see :func:`rank_from_environment`.
    """
    launcher = launcher_of(os.environ)
    if launcher not in MPI or not mpi.is_available():
        return rank_from_environment()
    rank, world_size = rank_and_size(os.environ, launcher)
    address, address_from = given_address(os.environ)
    found = mpi.ask()
    if (found.rank, found.world_size) != (rank, world_size):
        raise ValueError(
            f"mpi4py: it says rank {found.rank} of {found.world_size}, while the variables of {launcher} say rank "
            f"{rank} of {world_size}: it was built for another MPI than the mpirun that started this process; install "
            "mpi4py for this MPI, or take the mpirun of its MPI"
        )
    ports = ports_of(os.environ, found.run)
    return Place(
        launcher,
        rank,
        world_size,
        found.local_rank,
        found.local_world_size,
        address or found.address,
        ports[0],
        address_from if address else "the address of rank 0's machine, from mpi4py",
        found.run,
        tuple(ports),
    )


@dataclass(frozen=True)
class World:
    """This process among its peers, while their process group exists."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    meeting: Meeting | None = field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, the one that prints and writes."""
        return self.rank == 0


@contextlib.contextmanager
def distributed(device: str = "auto", *, timeout: float = 600.0, lost_after: float | None = 20.0) -> Iterator[World]:
    """Join the other ranks for the length of the block: ``with distributed() as world: ...``

    Initialises the default process group (gloo on CPU; NCCL on GPUs, with gloo beside it for CPU tensors) and always
    destroys it. A process that nobody launched is a world of one.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: the GPU of this rank's number on the machine if there is one.
        timeout: seconds that a collective waits for the other ranks before it raises.
        lost_after: seconds without a sign of life after which another rank counts as lost; this process then says
            which, and ends with status 1, whatever it waits for. None: ranks do not watch each other.

    Raises:
        ValueError: an unknown device, more ranks than GPUs on the machine, two ranks with one GPU, no such address or
            no free port, on all ranks; see also :func:`find_place`.
        PeerError: in place of the error of a collective that failed because another rank had failed: it names that one.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, received {device!r}")
    place = find_place()
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if place is None:
        where, _ = _device(kind, None)
        meeting = None
    else:
        meeting = Meeting(place, timeout)
        try:
            where, gpu = _device(kind, place)
            meeting.call_roll(gpu)
        except (ValueError, RuntimeError) as error:
            meeting.refuse(str(error))
            raise
    watchdog, failed, lost, is_grouped = None, False, False, False
    try:
        if meeting is not None and meeting.place.world_size > 1 and lost_after is not None:
            watchdog = Watchdog(
                meeting.store_of("watchdog"),
                lambda: meeting.connect("watchdog"),
                meeting.place.rank,
                meeting.place.world_size,
                server=None if meeting.is_served else 0,
                limit=lost_after,
                told=meeting.told_by_launcher,
            )
        with _stage(meeting, "group", f"to connect to the others ({_BACKENDS[kind]})"):
            dist.init_process_group(
                _BACKENDS[kind],
                store=dist.HashStore() if meeting is None else meeting.store,
                rank=place.rank if place else 0,
                world_size=place.world_size if place else 1,
                timeout=datetime.timedelta(seconds=timeout),
                device_id=where if kind == "cuda" else None,
            )
        is_grouped = True
        with _stage(meeting, "connections", "to be connected to every other"):
            _wait_for_connections()
        yield World(dist.get_rank(), dist.get_world_size(), place.local_rank if place else 0, where, meeting)
    except BaseException as error:
        # Leaving the group makes the others fail too, perhaps before this error is told: say when it came.
        failed_at = time.time()
        first = watchdog.explain(error) if watchdog is not None else None
        failed, lost = True, first is not None and first.lost
        if first is not None:
            let_first_end()
            raise first from error
        error.failed_at = failed_at  # type: ignore[attr-defined]
        raise
    finally:
        if watchdog is not None:
            watchdog.stop()
        if is_grouped:
            dist.destroy_process_group()
        if meeting is not None:
            meeting.leave(failed=failed, lost=lost)


def refuse_start(reason: str) -> None:
    """Tell the other ranks of a launcher why this process ends before it joins them, so that they do not wait for it.

    Does nothing in a process that no launcher started, or that has joined already; gives up where it cannot reach them
    within some seconds.
    """
    with contextlib.suppress(ValueError, RuntimeError):
        place = find_place()
        if place is not None and place.world_size > 1 and not has_joined():
            Meeting(place, _REFUSING).refuse(reason)


# Seconds for which a rank that does not start looks for the others.
_REFUSING = 5.0
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def _device(kind: str, place: Place | None) -> tuple[torch.device, str]:
    """Return this rank's device, and the name of its GPU that no other has, "" without one."""
    if kind == "cpu":
        return torch.device("cpu"), ""
    index = device_index(place, torch.cuda.device_count())
    torch.cuda.set_device(index)
    return torch.device("cuda", index), _gpu_name(index)


def _gpu_name(index: int) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if index < len(visible) and visible[index].startswith("MIG-"):
        return visible[index]
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))


def _stage(meeting: Meeting | None, name: str, what: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if meeting is None else meeting.stage(name, what)


def build_mesh(layout: Layout, world: World) -> DeviceMesh:
    """Build the mesh of all ranks with the axes (pp, dp, fsdp, cp, tp), those of size 1 included; tp varies fastest.

    Raises:
        ValueError: the layout does not have as many ranks as the world, or has an axis that is not built yet.
    """
    layout.validate(world_size=world.world_size)
    with _stage(world.meeting, "mesh", f"to make the mesh of layout {layout}"):
        mesh = init_device_mesh(world.device.type, layout.shape, mesh_dim_names=AXES)
        _wait_for_connections()
    return mesh


def _wait_for_connections() -> None:
    """Wait until every rank is connected to every other.

    A rank's group exists when its own connections stand. Left at once, before a collective (an argument refused, say),
    it breaks those that slower ranks still make, and what they then report is a crash of this one.
    """
    dist.all_reduce(torch.zeros(()))


def launch_local(nproc: int, fn: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None) -> list[Any]:
    """Run ``fn(*args)`` as ``nproc`` ranks on this machine and return their results in rank order.

    Each rank is a fresh process with torchrun's environment, so that ``fn`` calls :func:`distributed` as it would
    under torchrun. If one fails, the others are ended; none outlives this call, or this process.

    Args:
        fn: a function at the top level of a module.
        env: environment variables of the ranks, in force before they import anything.

    Raises:
        RankError: ranks failed; it shows their tracebacks, the first failure first.
        ValueError: ``fn`` or its arguments cannot be sent to another process.
    """
    with LocalRanks(nproc, env) as ranks:
        return ranks.call(fn, *args)
