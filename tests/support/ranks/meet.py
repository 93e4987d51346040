"""Functions that ranks run for tests/hybrid/test_meeting.py: they meet as if another launcher had started them."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks import desk, join, meeting, waiting

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def slurm(step: str, rank: int, size: int, **others: str) -> dict[str, str]:
    """Variables of a task of a job step on one machine."""
    return {
        "SLURM_JOB_ID": f"test-{os.getppid()}",
        "SLURM_STEP_ID": step,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_STEP_NODELIST": "localhost",
        **others,
    }


def _variables(places: list[dict[str, str]]) -> dict[str, str]:
    """The environment of this rank, whose own launcher is out of sight."""
    own = places[int(os.environ["RANK"])]
    hidden = {key: value for key, value in os.environ.items() if key not in _TORCHRUN and "TORCHELASTIC" not in key}
    return {**hidden, **own}


def meet(places: list[dict[str, str]], patience: float = 0.5, devices: dict[int, str] | None = None) -> Any:
    """Return the sum over the ranks met, or the error.

    Args:
        patience: seconds for which a port may be taken.
        devices: what each process finds when it looks for its device: an error, or the name of its GPU.
    """
    found = (devices or {}).get(int(os.environ["RANK"]), "")

    def device(*_: Any) -> tuple[torch.device, str]:
        if found.startswith("device:"):
            raise ValueError(found)
        return torch.device("cpu"), found

    meeting._joined.clear()
    with (
        mock.patch.dict(os.environ, _variables(places), clear=True),
        mock.patch.multiple(desk, _TAKEN=patience, _ANSWER=patience),
        mock.patch.object(join, "_device", device),
    ):
        try:
            with join.distributed("cpu") as world:
                total = torch.tensor([world.rank + 1.0])
                dist.all_reduce(total)
                return total.item()
        except ValueError as error:
            return str(error)


def leave_by_exit(places: list[dict[str, str]], code: int) -> str:
    """Return the error of this rank; rank 1 calls sys.exit while the others wait for it."""
    meeting._joined.clear()
    with mock.patch.dict(os.environ, _variables(places), clear=True):
        try:
            with join.distributed("cpu") as world:
                if world.rank == 1:
                    sys.exit(code)
                dist.all_reduce(torch.ones(1))
        except SystemExit as error:
            return f"sys.exit({error.code})"
        except RuntimeError as error:
            return str(error)
    return "no error"


def refuse_before(places: list[dict[str, str]], refusing: int, reason: str) -> str:
    """Return the error of this rank; one finds before it joins the others that it cannot start."""
    if int(os.environ["RANK"]) != refusing:
        return str(meet(places))
    meeting._joined.clear()
    with mock.patch.dict(os.environ, _variables(places), clear=True):
        join.refuse_start(reason)
    return reason


class _Noted(io.StringIO):
    """A stderr; a file tells that a text with the given piece was written to it."""

    def __init__(self, file: Path, piece: str) -> None:
        super().__init__()
        self.file, self.piece = file, piece

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.piece in text:
            self.file.touch()
        return written


def wait_for(late: int, where: str, folder: str, places: list[dict[str, str]] | None = None) -> str:
    """Return what a rank says while it waits for the late one, which comes when that has been said.

    Args:
        where: "store", "group", "connections" or "mesh", to which one comes late.
        places: variables of another launcher.
    """
    rank = int(os.environ["RANK"])
    noted = Path(folder) / f"{where}-{late}"

    def come_late() -> None:
        deadline = time.monotonic() + 60
        while rank == late and not noted.exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def new_meeting(*args: Any) -> meeting.Meeting:
        if where == "store":
            come_late()
        return meeting.Meeting(*args)

    stage = meeting.Meeting.stage

    def late_stage(self: meeting.Meeting, name: str, what: str) -> Any:
        if name == where:
            come_late()
        return stage(self, name, what)

    meeting._joined.clear()
    environ = dict(os.environ) if places is None else _variables(places)
    said = {
        "store": " to meet ",
        "group": " to connect ",
        "connections": " to be connected ",
        "mesh": " to make the mesh ",
    }
    piece = f" s for rank {late}{', whom' if late == 0 else said[where]}"
    stderr = _Noted(noted, piece) if rank != late else io.StringIO()
    with (
        mock.patch.dict(os.environ, environ, clear=True),
        mock.patch.multiple(waiting, FIRST=0.05 if rank != late else 60.0, AGAIN=0.05),
        mock.patch.object(sys, "stderr", stderr),
        mock.patch.object(join, "Meeting", new_meeting),
        mock.patch.object(meeting.Meeting, "stage", late_stage),
        join.distributed("cpu") as world,
    ):
        if where == "mesh":
            join.build_mesh(Layout.parse(f"dp{world.world_size}"), world)
    return stderr.getvalue()


def lose(places: list[dict[str, str]], victim: int, limit: float) -> None:
    """Reduce until the victim is killed, as a job step whose launcher says nothing."""
    meeting._joined.clear()
    with (
        mock.patch.dict(os.environ, _variables(places), clear=True),
        join.distributed("cpu", lost_after=limit) as world,
    ):
        for turn in range(10**9):
            if turn == 20 and world.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(4))
            time.sleep(0.01)
