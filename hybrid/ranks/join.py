"""Rank and world from whatever started this process, the process group, and the mesh of devices.

torchrun, mpirun (Open MPI; MPICH and its relatives), srun, :func:`launch_local`, or nothing at all: the same program
runs under each.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .. import compat
from ..layout import AXES, Layout
from . import mpi
from .local import LocalRanks
from .watchdog import Watchdog


@dataclass(frozen=True)
class Place:
    """The place of a process among its peers, and the address at which they connect."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


# launcher: its variables for (rank, world size, rank on this machine, ranks on this machine). The first launcher whose
# rank and world size are both set is believed: torchrun may itself have been started by srun, and mpirun too.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPI (PMI)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # The variables of a job step, not of a job: a plain Python inside an allocation is one process.
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
_MPI = ("Open MPI", "MPI (PMI)")
# Variables that are equal on all ranks of one run and differ between runs: the port is drawn from them.
_RUN_IDS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_ID", "SLURM_JOB_ID")


def rank_from_environment(environ: Mapping[str, str] | None = None) -> Place | None:
    """Return the place that torchrun's, Open MPI's, PMI's or Slurm's variables give; None if none are set.

    MASTER_ADDR and MASTER_PORT always count if they are set. Otherwise Slurm's node list names the address, all ranks
    on one machine meet at 127.0.0.1, and the port follows from the run's id.

    Args:
        environ: the variables; None takes those of this process.

    Raises:
        ValueError: a variable that holds no number, ranks that do not fit together, or no address of rank 0.
    """
    environ = os.environ if environ is None else environ
    launcher = _launcher(environ)
    if launcher is None:
        return None
    rank_key, size_key, local_key, local_size_key = _LAUNCHERS[launcher]
    rank, world_size = _number(environ, rank_key), _number(environ, size_key)
    if not 0 <= rank < world_size:
        raise ValueError(f"{rank_key}: expected 0 to {size_key} - 1 = {world_size - 1}, received {rank}")
    if launcher == "Slurm":
        # "4(x2),3" lists the tasks of each node; only a single node's count can be told apart here.
        tasks = environ.get(local_size_key, str(world_size))
        local_world_size = int(tasks) if tasks.isdigit() else 0
    else:
        local_world_size = _number(environ, local_size_key, default=0)
    if local_key not in environ and world_size > 1 and local_world_size != world_size:
        raise ValueError(
            f"{local_key}: not set, so that this process cannot know its device among the {world_size} ranks; "
            f"set {local_key}, or start with torchrun"
        )
    local_rank = _number(environ, local_key, default=rank)
    return Place(
        launcher,
        rank,
        world_size,
        local_rank,
        local_world_size,
        _master_addr(environ, launcher, world_size, local_world_size),
        _master_port(environ, launcher),
    )


def find_place() -> Place | None:
    """Return the place of this process, whatever launcher started it; None for a process that none did.

    What the environment says (:func:`rank_from_environment`), and under mpirun, with mpi4py installed, what MPI says.

    Raises:
        ValueError: see :func:`rank_from_environment`.
    """
    launcher = _launcher(os.environ)
    if launcher in _MPI and mpi.is_available():
        found = mpi.ask()
        return Place(launcher, *found[:4], *mpi.meeting_point(os.environ, found))
    return rank_from_environment()


def _launcher(environ: Mapping[str, str]) -> str | None:
    found = [name for name, keys in _LAUNCHERS.items() if keys[0] in environ and keys[1] in environ]
    return found[0] if found else None


def _number(environ: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environ.get(key)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{key}: expected an integer, received {text!r}") from None


def _master_addr(environ: Mapping[str, str], launcher: str, world_size: int, local_world_size: int) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", ""))
    if launcher == "Slurm" and nodes:
        return first_node(nodes)
    if local_world_size == world_size or world_size == 1:
        return "127.0.0.1"
    raise ValueError(
        f"MASTER_ADDR: not set, and {launcher} started {world_size} ranks on several machines; set MASTER_ADDR to the "
        "address of rank 0's machine (mpirun -x MASTER_ADDR=...)"
    )


def _master_port(environ: Mapping[str, str], launcher: str) -> int:
    if "MASTER_PORT" in environ:
        return _number(environ, "MASTER_PORT")
    if launcher == "torchrun":
        raise ValueError("MASTER_PORT: not set although RANK and WORLD_SIZE are; set it, or start with torchrun")
    run = "/".join(environ.get(key, "") for key in _RUN_IDS)
    # Below 32768, where systems start handing out ports by themselves.
    return 20000 + zlib.crc32(run.encode()) % 10000


def first_node(nodes: str) -> str:
    """Return the first host of a Slurm node list: ``"gpu[003-006,9],login1"`` gives ``"gpu003"``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST: expected a node list such as gpu[003-006], received {nodes!r}")
    return match[1] + (match[2] or "") + (match[3] or "")


@dataclass(frozen=True)
class World:
    """This process among its peers, while their process group exists."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

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
        ValueError: an unknown device, or more ranks than GPUs on the machine; see also :func:`find_place`.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, received {device!r}")
    place = find_place()
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local_rank = place.local_rank if place else 0
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device: rank {local_rank} of this machine has no GPU, it has {torch.cuda.device_count()}; start at "
                "most as many ranks as GPUs, or use device=cpu"
            )
        torch.cuda.set_device(local_rank)
    where = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    wait = datetime.timedelta(seconds=timeout)
    watchdog = None
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=_store(place, wait),
        rank=place.rank if place else 0,
        world_size=place.world_size if place else 1,
        timeout=wait,
        device_id=where if kind == "cuda" else None,
    )
    try:
        if place is not None and place.world_size > 1 and lost_after is not None:
            watchdog = Watchdog(lambda: _client(place, wait), place.rank, place.world_size, limit=lost_after)
        _wait_for_connections()
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, where)
    except BaseException as error:
        # Leaving the group makes the others fail too, perhaps before this error is told: say when it came.
        error.failed_at = time.time()  # type: ignore[attr-defined]
        raise
    finally:
        if watchdog is not None:
            watchdog.stop()
        dist.destroy_process_group()


def _store(place: Place | None, timeout: datetime.timedelta) -> dist.Store:
    if place is None:
        return dist.HashStore()
    # torchrun and launch_local serve the store themselves; otherwise rank 0 does.
    served = compat.agent_serves_store()
    store = dist.TCPStore(
        place.master_addr,
        place.master_port,
        place.world_size,
        is_master=place.rank == 0 and not served,
        timeout=timeout,
        multi_tenant=not served,
    )
    return dist.PrefixStore(compat.run_id(), store)


def _client(place: Place, timeout: datetime.timedelta) -> dist.Store:
    """Open one more connection to the store, whoever serves it."""
    store = dist.TCPStore(place.master_addr, place.master_port, None, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"{compat.run_id()}/watchdog", store)


def build_mesh(layout: Layout, world: World) -> DeviceMesh:
    """Build the mesh of all ranks with the axes (pp, dp, fsdp, cp, tp), those of size 1 included; tp varies fastest.

    Raises:
        ValueError: the layout does not have as many ranks as the world, or has an axis that is not built yet.
    """
    layout.validate(world_size=world.world_size)
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
