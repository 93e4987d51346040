"""Ask MPI itself, through mpi4py, for the place of this process under mpirun; collectives are torch's all the same.

MPI knows what the environment of a process does not tell for certain: which ranks share a machine (a rank modulo the
number of GPUs is wrong as soon as ranks are spread in turn), and rank 0's address.
"""

from __future__ import annotations

import functools
import importlib.util
import socket
from collections.abc import Mapping

# rank, world size, rank on this machine, ranks on this machine, rank 0's address and a free port there
Found = tuple[int, int, int, int, str, int]


def is_available() -> bool:
    """Return whether mpi4py is installed."""
    return importlib.util.find_spec("mpi4py") is not None


@functools.cache
def ask() -> Found:
    """Return this process's place and rank 0's address; every rank calls it. MPI starts here, and ends at exit."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    meeting = None
    if world.rank == 0:
        address = "127.0.0.1" if local.size == world.size else socket.gethostbyname(socket.gethostname())
        with socket.socket() as free:
            free.bind(("", 0))
            meeting = address, free.getsockname()[1]
    address, port = world.bcast(meeting)
    return world.rank, world.size, local.rank, local.size, address, port


def meeting_point(environ: Mapping[str, str], found: Found) -> tuple[str, int]:
    """Return rank 0's address and port: MASTER_ADDR and MASTER_PORT where they are set, else MPI's."""
    return environ.get("MASTER_ADDR", found[4]), int(environ.get("MASTER_PORT", found[5]))
