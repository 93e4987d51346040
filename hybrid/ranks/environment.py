"""The variables of torchrun, MPI and Slurm: read and checked here, all of them, and nowhere else.

:func:`rank_from_environment` is a function of the variables alone. Whether a variable is set, holds a number within its
limits, and agrees with the others is checked before anything waits for another rank.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from .. import compat
from .hosts import first_node


@dataclass(frozen=True)
class Place:
    """The place of a process among its peers, and the address at which they connect.

    ``local_world_size`` is 0 where it is not known. ``run`` is equal on all ranks of a run and differs between runs,
    as far as the launcher tells them apart. A port that nobody gave is the first of ``ports``.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    address_from: str = field(default="MASTER_ADDR", compare=False)
    run: str = field(default="", compare=False)
    ports: tuple[int, ...] = field(default=(), compare=False)


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
    # MPICH, Intel MPI and their relatives
    "MPI (PMI)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # The variables of a job step, not of a job: a plain Python inside an allocation is one process.
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
MPI = ("Open MPI", "MPI (PMI)")
# Variables that are equal on all ranks of one run and differ between runs. Steps of one job share its id.
_RUN_IDS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID")
_STEP_IDS = ("SLURM_STEP_ID", "SLURM_STEPID")
# Set by srun --pty, and inherited by what is started in that shell.
_TERMINAL = ("SLURM_PTY_PORT", "SLURM_PTY_WIN_COL")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_BOUND = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_BY_HAND = (
    "start with torchrun, or set MASTER_ADDR to the address of rank 0's machine and MASTER_PORT to a free port there, "
    "or unset RANK and WORLD_SIZE if this process is no rank"
)
# Large enough for any machine; what is larger is a mistake.
_MOST_RANKS = 2**24
# Ports are drawn below 32768, where systems start handing them out by themselves.
_PORTS = range(20000, 30000)
_TRIED = 16


def rank_from_environment(environ: Mapping[str, str] | None = None) -> Place | None:
    """Return the place that torchrun's, Open MPI's, PMI's or Slurm's variables give; None if none are set.

    MASTER_ADDR and MASTER_PORT always count if they are set. Otherwise Slurm's node list names the address, all ranks
    on one machine meet at 127.0.0.1, and the port follows from the ids of the run: job and step. A Slurm step of one
    task, and the shell of ``srun --pty``, are single processes like any other, hence None.

    Args:
        environ: the variables; None takes those of this process.

    Raises:
        ValueError: a variable that holds no number or one beyond its limits, ranks that do not fit together, launchers
            that contradict each other, or no address of rank 0.
    """
    environ = os.environ if environ is None else environ
    launcher = launcher_of(environ)
    if launcher is None:
        return None
    local_key = _LAUNCHERS[launcher][2]
    rank, world_size = rank_and_size(environ, launcher)
    local_world_size = _local_world_size(environ, launcher, world_size)
    if local_key not in environ and world_size > 1 and local_world_size != world_size:
        raise ValueError(
            f"{local_key}: not set, so that this process cannot know its device among the {world_size} ranks; "
            f"set {local_key}, or start with torchrun"
        )
    address, address_from = _master_addr(environ, launcher, world_size, local_world_size)
    local_rank = _number(environ, local_key, 0, (local_world_size or world_size) - 1, default=rank)
    run = _run(environ, launcher, world_size)
    if launcher == "torchrun" and "MASTER_PORT" not in environ:
        raise ValueError(f"MASTER_PORT: not set although RANK and WORLD_SIZE are; {_BY_HAND}")
    ports = ports_of(environ, run)
    return Place(
        launcher, rank, world_size, local_rank, local_world_size, address, ports[0], address_from, run, tuple(ports)
    )


def launcher_of(environ: Mapping[str, str]) -> str | None:
    """Return the launcher whose variables give this process its place, None where it is nobody's rank.

    Raises:
        ValueError: half of a launcher's variables are set, or two launchers contradict each other.
    """
    whole = [name for name, keys in _LAUNCHERS.items() if keys[0] in environ and keys[1] in environ]
    for name in whole:
        rank_and_size(environ, name)
    if "Slurm" in whole:
        mpi = rank_and_size(environ, "MPI (PMI)") if "MPI (PMI)" in whole else None
        if _is_single(environ):
            whole.remove("Slurm")
        # srun --mpi=pmi2 sets PMI's variables too, of which Slurm's say more; others are left from a step around this.
        slurm = rank_and_size(environ, "Slurm")
        if mpi in ((0, 1), slurm):
            whole.remove("MPI (PMI)")
        elif mpi is not None and mpi[1] == slurm[1]:
            # Another size is that of an mpiexec which srun started on each node.
            raise ValueError(
                f"PMI_RANK: expected {slurm[0]}, as SLURM_PROCID says of the same {slurm[1]} ranks, received {mpi[0]}; "
                "unset PMI_RANK and PMI_SIZE, or those of Slurm's step"
            )
    _check_agreement(environ, whole)
    return whole[0] if whole else None


def _check_agreement(environ: Mapping[str, str], whole: list[str]) -> None:
    """Check that variables set by hand are complete and fit the launcher's."""
    for name, (rank_key, size_key, *_) in _LAUNCHERS.items():
        half = {rank_key, size_key} & environ.keys()
        if len(half) != 1 or name == "Slurm":
            continue
        (key,) = half
        (other,) = {rank_key, size_key} - half
        low, high = (0, _MOST_RANKS - 1) if key == rank_key else (1, _MOST_RANKS)
        value = _number(environ, key, low, high)
        if not whole and (key == rank_key or value > 1):
            raise ValueError(f"{key}: set to {value} while {other} is not; unset {key}, or set both as torchrun does")
        told = rank_and_size(environ, whole[0])[key == size_key] if whole else value
        if name == "torchrun" and value != told:
            raise ValueError(
                f"{key}: expected {told}, as {_LAUNCHERS[whole[0]][key == size_key]} of {whole[0]} says, or not set, "
                f"received {value}; unset {key}"
            )
    if whole[:1] != ["torchrun"] or compat.run_id(environ) != compat.run_id({}):
        return
    own = rank_and_size(environ, "torchrun")
    for name in whole[1:]:
        other_place = rank_and_size(environ, name)
        if other_place != own and other_place[1] > 1 and own[1] in (1, other_place[1]):
            raise ValueError(
                f"RANK, WORLD_SIZE: they say rank {own[0]} of {own[1]}, while {_LAUNCHERS[name][0]} and "
                f"{_LAUNCHERS[name][1]} of {name} say rank {other_place[0]} of {other_place[1]}; unset RANK and "
                "WORLD_SIZE, or set them to the same"
            )


def rank_and_size(environ: Mapping[str, str], launcher: str) -> tuple[int, int]:
    """Return rank and world size, of which the first is below the second, as a launcher's variables say them."""
    rank_key, size_key = _LAUNCHERS[launcher][:2]
    size = _number(environ, size_key, 1, _MOST_RANKS)
    return _number(environ, rank_key, 0, size - 1, f"0 to {size_key} - 1 = {size - 1}"), size


def _is_single(environ: Mapping[str, str]) -> bool:
    """Return whether this process is alone in its Slurm step, or belongs to the shell of ``srun --pty``.

    Of ``srun --pty`` task 0 alone goes on; what srun starts in that shell has the shell's variables, but no terminal.
    """
    rank, size = rank_and_size(environ, "Slurm")
    return size == 1 or (rank == 0 and any(key in environ for key in _TERMINAL) and has_terminal())


def has_terminal() -> bool:
    """Return whether this process belongs to a terminal, also where its input and output are redirected."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | getattr(os, "O_NOCTTY", 0)))
    except OSError:
        return False
    return True


def _local_world_size(environ: Mapping[str, str], launcher: str, world_size: int) -> int:
    key = _LAUNCHERS[launcher][3]
    if launcher != "Slurm":
        return _number(environ, key, 1, world_size, default=0)
    # "4(x2),3": the tasks of each node
    counts: list[int] = []
    for part in environ.get(key, str(world_size)).split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part.strip())
        if match is None or not 1 <= int(match[2] or 1) <= _MOST_RANKS:
            raise ValueError(f"{key}: expected tasks by node such as 4(x2),3, received {environ[key]!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    if key in environ and sum(counts) != world_size:
        raise ValueError(
            f"{key}: expected the SLURM_STEP_NUM_TASKS = {world_size} tasks of the step, received {sum(counts)} in "
            f"{environ[key]!r}"
        )
    if len(set(counts)) == 1:
        return counts[0]
    node = _number(environ, "SLURM_NODEID", 0, len(counts) - 1, default=-1)
    return counts[node] if node >= 0 else 0


def given_address(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return MASTER_ADDR, "" where it is not set, and the variable's name.

    Raises:
        ValueError: it is set and empty.
    """
    address = environ.get("MASTER_ADDR")
    if address is not None and not address.strip():
        raise ValueError("MASTER_ADDR: expected the name or address of rank 0's machine, received ''; or unset it")
    return (address or "").strip(), "MASTER_ADDR"


def _master_addr(environ: Mapping[str, str], launcher: str, world_size: int, local_world_size: int) -> tuple[str, str]:
    """Return the address, and the variable or launcher that it comes from."""
    given, came_from = given_address(environ)
    if given:
        return given, came_from
    for key in ("SLURM_STEP_NODELIST", "SLURM_NODELIST"):
        if launcher == "Slurm" and environ.get(key):
            return first_node(environ[key]), key
    if local_world_size == world_size or world_size == 1:
        return "127.0.0.1", launcher
    if launcher == "torchrun":
        raise ValueError(f"MASTER_ADDR: not set although RANK and WORLD_SIZE = {world_size} are; {_BY_HAND}")
    raise ValueError(
        f"MASTER_ADDR: not set, and {launcher} started {world_size} ranks on several machines; set MASTER_ADDR to the "
        "address of rank 0's machine (mpirun -x MASTER_ADDR=...)"
    )


def _run(environ: Mapping[str, str], launcher: str, world_size: int) -> str:
    """Return a name of this run, equal on all its ranks: its job and step, torchrun's id and restart, the user."""
    ids = [environ.get(key, "") for key in _RUN_IDS]
    ids.append(next((environ[key] for key in _STEP_IDS if key in environ), "") if launcher == "Slurm" else "")
    user = os.getuid() if hasattr(os, "getuid") else 0
    return "/".join([*ids, compat.run_id(environ), str(user), str(world_size)])


def ports_of(environ: Mapping[str, str], run: str) -> list[int]:
    """Return the ports at which the ranks of a run may meet: MASTER_PORT, or some that are drawn from its name.

    Raises:
        ValueError: MASTER_PORT is no port.
    """
    if "MASTER_PORT" in environ:
        return [_number(environ, "MASTER_PORT", 1, 65535)]
    first = zlib.crc32(run.encode())
    return [_PORTS[(first + number) % len(_PORTS)] for number in range(_TRIED)]


def device_index(place: Place | None, count: int, environ: Mapping[str, str] | None = None) -> int:
    """Return the number of this rank's GPU among the ``count`` that it sees.

    A rank takes the GPU of its number on the machine. Where it sees fewer than the machine has ranks, and its launcher
    or a variable such as CUDA_VISIBLE_DEVICES decides which it sees, those are its own and it takes the first.

    Raises:
        ValueError: there is none for it.
    """
    environ = os.environ if environ is None else environ
    local_rank, ranks = (place.local_rank, place.local_world_size) if place else (0, 1)
    by_task = any(environ.get(key) for key in (*_VISIBLE, *_BOUND)) or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
    if count >= 1 and by_task and (local_rank >= count or count < ranks):
        return 0
    if local_rank >= count:
        raise ValueError(
            f"device: rank {local_rank} of this machine has no GPU, it has {count}; start at most as many ranks as "
            "GPUs, or use device=cpu"
        )
    return local_rank


def _number(
    environ: Mapping[str, str], key: str, low: int, high: int, limits: str = "", default: int | None = None
) -> int:
    """Return the integer of a variable, or ``default`` where it is not set and there is one."""
    text = environ.get(key)
    if text is None and default is not None:
        return default
    limits = limits or f"{low} to {high}"
    text = (text or "").strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text) is None:
        raise ValueError(f"{key}: expected an integer, {limits}, received {text!r}")
    if not low <= int(text) <= high:
        raise ValueError(f"{key}: expected {limits}, received {int(text)}")
    return int(text)
