"""What all ranks of a run must share: its configuration, its data and its folder, which no other run writes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fusemesh import __version__
from fusemesh import config as configuration
from fusemesh.config import Config
from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.outputs import UserError, make_folder
from fusemesh.kernels import env
from fusemesh.models.registry import maker_of
from fusemesh.run.fingerprint import changes, places_of
from fusemesh.run.metrics import OUT
from fusemesh.run.settings import Settings

# Machines may find the same files and the same folder by other paths, and have other numbers of cores; what is there is
# compared on its own.
_OF_A_MACHINE = ("model.pretrained", "data.path", "data.held_out", "run.directory", "run.device", "run.threads")
_LOCK = ".lock"
# In place of a fingerprint: the system's error.
_UNREADABLE = "unreadable"


class DifferentRanksError(UserError, ValueError):
    """Ranks were started with different arguments, data or versions; names what differs, and the ranks."""


def check_same(entries: Mapping[str, Any]) -> None:
    """Check that these entries, which can be written as JSON, are the same on all ranks; every rank calls it.

    Raises:
        DifferentRanksError: on every rank; names the first entry that differs, its values, and their ranks.
    """
    texts = {key: json.dumps(value, sort_keys=True, default=repr) for key, value in entries.items()}
    whole = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    if len(set(checkpoint.on_every_rank(lambda: whole))) == 1:
        return
    of_ranks: list[dict[str, str]] = checkpoint.on_every_rank(lambda: texts)
    for key in dict.fromkeys(key for found in of_ranks for key in found):
        ranks_with: dict[str, list[int]] = {}
        for rank, found in enumerate(of_ranks):
            ranks_with.setdefault(found.get(key, "nothing"), []).append(rank)
        if len(ranks_with) > 1:
            raise DifferentRanksError(
                f"{key}: expected the same on all ranks, received {_values(ranks_with)}; start all ranks with the same "
                "arguments and the same version"
            )


def _values(ranks_with: Mapping[str, list[int]]) -> str:
    """Return values and their ranks as text, the first few of each."""
    parts = []
    for text, ranks in list(ranks_with.items())[:4]:
        shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
        value = text if len(text) <= 60 else f"{text[:57]}..."
        parts.append(f"{value} on {'rank' if len(ranks) == 1 else 'ranks'} {shown}")
    return "; ".join(parts) + ("; ..." if len(ranks_with) > 4 else "")


def entries_of(settings: Settings, device: str, further: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same on all ranks before they build a model.

    Args:
        settings: of the run.
        device: the kind that this rank runs on.
        further: entries of the command.
    """
    keys = [key for key in configuration.fields_of(Config) if key not in _OF_A_MACHINE]
    return {
        "fusemesh.__version__": __version__,
        **{key: configuration.get(settings.config, key) for key in keys},
        "layout": str(settings.layout),
        "run.device": device,
        "FUSEMESH_BACKEND": env.BACKEND,
        **maker_of(settings.config).entries(),
        **further,
    }


def same_data(config: Config, fingerprint: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
    """Return the fingerprint of the data after all ranks were found to have the same; every rank calls it.

    A rank whose files are those of rank 0 themselves, by their places on the device and the times of their last change,
    does not read them. Files that no rank can read are left to the task's own error.

    Raises:
        DifferentRanksError: on every rank; names the first rank whose data differ, and the part.
        ValueError: on every rank, if rank 0 refuses its own.
    """

    def read() -> dict[str, Any]:
        try:
            return fingerprint(config)
        except OSError as error:
            return {_UNREADABLE: str(error)}

    own = places_of(config)
    places, found = checkpoint.on_first_rank(lambda: (own, read()))
    of_ranks = checkpoint.on_every_rank(lambda: found if own and own == places else read())
    if all(_UNREADABLE in other for other in of_ranks):
        return {}
    for rank, other in enumerate(of_ranks):
        if _UNREADABLE in other:
            raise DifferentRanksError(
                f"data: expected the same on all ranks, and rank {rank} cannot read them ({other[_UNREADABLE]}); give "
                "all ranks the same data"
            )
        if differ := changes(found, other, before="on rank 0", after=f"on rank {rank}"):
            raise DifferentRanksError(
                f"data: expected the same on all ranks, received {'; '.join(differ)}; give all ranks the same data"
            )
    return found


def check_free(folder: str | os.PathLike[str]) -> None:
    """Check that no other run writes a folder now.

    Raises:
        ValueError: one does; names its process.
    """
    if holder := checkpoint.holder_of(Path(folder) / _LOCK):
        raise _taken(folder, holder)


def _taken(folder: str | os.PathLike[str], holder: str) -> ValueError:
    return checkpoint.LockedError(
        f"{OUT}: expected a folder that no other run is writing, received {os.fspath(folder)!r}, which another run "
        f"writes ({holder}); wait for its end, or choose another run.directory. If that process has ended, remove "
        f"{str(Path(folder) / _LOCK)!r}"
    )


@contextlib.contextmanager
def own_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of the run's folder for the length of the block, and check that all ranks share it.

    Raises:
        ValueError: on every rank, if another run writes it.
        OutputError: on every rank, if one does not see it.
    """
    held: list[checkpoint.Lock] = []

    def take() -> None:
        path = make_folder(folder, what=OUT) / _LOCK
        try:
            held.append(checkpoint.Lock(path))
        except checkpoint.LockedError as error:
            raise _taken(folder, str(error)) from None

    try:
        checkpoint.on_first_rank(take)
        checkpoint.check_shared(folder, what=OUT)
        yield
    finally:
        for lock in held:
            lock.release()


def lines_entry(lines: list[str]) -> dict[str, Any]:
    """Return the entry of a command's standard input."""
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    return {"standard input": f"{len(lines)} lines of SHA-256 {digest[:12]}..."}


def options_entries(options: Any) -> dict[str, Any]:
    """Return the entries of a command's own options, a dataclass."""
    return {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(options).items()}
