"""Which rank failed first, as its peers and the launcher tell each other. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable

from .waiting import first_line

# What the errors of a collective say whose other ranks are gone: gloo's by its files, NCCL's by its name.
_ABORTED = re.compile(r"\bgloo/|Connection (closed|reset) by peer|Broken pipe|\bNCCL\b|ncclRemoteError")
# Seconds that a rank which failed because of another stays, for that one's process to end.
_YIELD = 2.0


class PeerError(RuntimeError):
    """This rank cannot go on because another failed first.

    ``rank`` is that one, None if it is the launcher that is gone; ``lost`` whether it ended without a word.
    """

    def __init__(self, rank: int | None, message: str, lost: bool = True) -> None:
        super().__init__(message)
        self.rank, self.lost = rank, lost

    def __reduce__(self) -> tuple[type[PeerError], tuple[int | None, str, bool]]:
        return type(self), (self.rank, str(self), self.lost)


# Called with the failure before a thread ends this process: a local rank tells its parent so.
before_end: list[Callable[[PeerError], None]] = []
# Called with it, too: what a program prints in place of its result.
on_end: list[Callable[[PeerError], None]] = []


def end_process(failure: PeerError) -> None:
    """Say why on stderr and end this process: the main thread waits in a collective that nothing else can end."""
    for tell in (*before_end, *on_end):
        with contextlib.suppress(Exception):  # whatever it is, this process ends
            tell(failure)
    print(f"fusemesh: {failure}", file=sys.stderr, flush=True)
    os._exit(1)


def let_first_end() -> None:
    """Wait until the process of the rank that failed first has ended, so that torchrun or mpirun sees that one first.

    The parent of local ranks orders what it hears by itself.
    """
    if not before_end:
        time.sleep(_YIELD)


def is_aborted_collective(error: BaseException | None) -> bool:
    """Return whether an error, or one that it follows from, is a collective's whose other ranks are gone."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "DistError" in kinds or ("RuntimeError" in kinds and _ABORTED.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


_ENDS = "This run ends; go on from its last checkpoint with --resume"


def record(rank: int | None, reason: str, *, lost: bool = True) -> str:
    """Return the text under which a first failure stands in the store."""
    return json.dumps([rank, f"{reason}. {_ENDS}", lost])


def failure_of(text: str) -> PeerError:
    """Return the error for the other ranks of a recorded first failure."""
    return PeerError(*json.loads(text))


def own_record(rank: int, error: BaseException) -> str:
    """Return the record of a rank's own error."""
    if isinstance(error, SystemExit):
        return record(rank, f"rank {rank} failed first: it left by sys.exit({error.code!r})", lost=False)
    return record(rank, f"rank {rank} failed first: {type(error).__name__}: {first_line(error)[:500]}", lost=False)
