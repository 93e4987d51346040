"""Work on files that ranks share: one acts and all hear of it, or each does its part; without a group, this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..outputs import OutputError
from .folders import CheckpointError

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
    except (OutputError, CheckpointError) as error:
        return None, type(error)(str(error))
    except (OSError, ValueError) as error:
        return None, (ValueError if isinstance(error, ValueError) else OSError)(str(error))


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
