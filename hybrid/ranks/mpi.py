"""Ask MPI itself, through mpi4py, for the place of this process under mpirun; collectives are torch's all the same.

MPI knows what the environment of a process does not tell for certain: which ranks share a machine (a rank modulo the
number of GPUs is wrong as soon as ranks are spread in turn), and rank 0's address.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import socket
import uuid
from dataclasses import dataclass

from .waiting import told


@dataclass(frozen=True)
class Found:
    """This process's place as MPI says it, rank 0's address, and a name of the run that no other has."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    run: str


def is_available() -> bool:
    """Return whether mpi4py is installed."""
    return importlib.util.find_spec("mpi4py") is not None


@functools.cache
def ask() -> Found:
    """Return what MPI says of this process; every rank calls it. MPI starts here, and ends at exit."""
    with told(lambda: "all ranks of mpirun to start MPI (mpi4py), which tells rank 0's address"):
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        local = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
        meeting = None
        if world.rank == 0:
            meeting = "127.0.0.1" if local.size == world.size else _own_address(), uuid.uuid4().hex
        address, run = world.bcast(meeting)
        return Found(world.rank, world.size, local.rank, local.size, address, run)


def _own_address() -> str:
    """Return this machine's address; its name where that stands for the loopback here, which other machines know."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return address
    return name
