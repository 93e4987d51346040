"""Work on files that ranks share: one acts and all hear of it, or each does its part; without a group, this process."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..outputs import OutputError, UserError, writing

_T = TypeVar("_T")


def distributed() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank, 0 without a group."""
    return dist.get_rank() if distributed() else 0


def _outcome(action: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """Return the action's result, or its error as one that can be sent to other ranks."""
    try:
        return action(), None
    except UserError as error:
        return None, type(error)(str(error))
    except ValueError as error:
        return None, ValueError(str(error))
    except OSError as error:
        return None, OSError(str(error)) if error.errno is None else OSError(
            error.errno, error.strerror, error.filename
        )


def on_first_rank(action: Callable[[], _T]) -> _T:
    """Run ``action`` on rank 0 and return its result on every rank; if it raises there, every rank raises."""
    if not distributed():
        return action()
    box: list[Any] = list(_outcome(action)) if rank() == 0 else [None, None]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: _T = box[0]
    return result


def on_every_rank(action: Callable[[], _T]) -> list[_T]:
    """Run ``action`` on every rank and return all results on each; if one raises, every rank raises the first error."""
    if not distributed():
        return [action()]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _outcome(action))
    for _, error in found:
        if error is not None:
            raise error
    return [result for result, _ in found]


# Seconds for which a rank waits for what another machine has written: network file systems show it late.
PATIENCE = 5.0


def seen_in_time(is_there: Callable[[], bool], folder: Path) -> bool:
    """Return whether ``is_there``, of something in the folder, becomes true in time; an OSError counts as false."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if is_there():
                return True
            # To list it makes a network file system look anew.
            os.listdir(folder)
        except OSError:
            pass
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)


def check_shared(folder: str | os.PathLike[str], *, what: str) -> None:
    """Check that all ranks see one folder: that each finds there what rank 0 writes; every rank calls it.

    Args:
        folder: the path on this rank; it exists on rank 0.
        what: the key that names the folder, first in the message.

    Raises:
        OutputError: on every rank; names those that do not see it, and their machines.
    """
    if not distributed() or dist.get_world_size() == 1:
        return
    here = Path(folder)

    def write() -> tuple[str, str]:
        name, text = f".shared-{secrets.token_hex(8)}", secrets.token_hex(8)
        with writing(here, what=what):
            (here / name).write_text(text, encoding="utf-8")
        return name, text

    name, text = on_first_rank(write)
    path = here / name

    def look() -> tuple[bool, str]:
        found = seen_in_time(lambda: path.read_text(encoding="utf-8") == text, here)
        return found, f"{str(here.absolute())!r} on {socket.gethostname()}"

    try:
        seen = on_every_rank(look)
    finally:
        if rank() == 0:
            path.unlink(missing_ok=True)
    blind = [number for number, (found, _) in enumerate(seen) if not found]
    if blind:
        shown = "; ".join(f"rank {number}: {seen[number][1]}" for number in blind[:8])
        raise OutputError(
            f"{what}: expected one folder that all ranks share, received {seen[0][1]}, and {len(blind)} of {len(seen)} "
            f"ranks do not see what rank 0 writes there ({shown}{'; ...' if len(blind) > 8 else ''}); give a folder "
            "on a file system that all machines share"
        )
