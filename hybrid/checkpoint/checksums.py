"""Sizes and SHA-256 of a checkpoint's files: each rank takes its part of them, when they are written and when read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .folders import WRITER, damaged
from .together import distributed, on_every_rank, rank, seen_in_time

_BLOCK = 1 << 20


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _own(names: list[str]) -> list[str]:
    """Return the files that this rank takes: those it wrote, if their names say so; the rest fall to rank 0."""
    ranks = dist.get_world_size() if distributed() else 1
    prefixes = tuple(f"__{number}_" for number in range(ranks))
    mine = [name for name in names if name.startswith(f"__{rank()}_")]
    return mine + ([name for name in names if not name.startswith(prefixes)] if rank() == 0 else [])


def checksums_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return ``bytes`` and ``sha256`` of each of a folder's files that falls to this rank, by name.

    Raises:
        OSError: one cannot be read.
    """
    # A rank lists its own files itself: another machine may see those that were just made a moment later.
    names = _own(sorted(path.name for path in folder.iterdir() if path.name != WRITER))
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": digest_of(folder / name)} for name in names}


def check_all_there(folder: Path, parts: list[dict[str, dict[str, Any]]]) -> None:
    """Check that this process sees all files that the ranks say they have written.

    Args:
        folder: where.
        parts: of each rank, as :func:`checksums_of` returns them.

    Raises:
        OSError: it does not; names the first rank, and its file.
    """
    for number, part in enumerate(parts):
        for name, entry in part.items():

            def is_whole(path: Path = folder / name, size: int = entry["bytes"]) -> bool:
                with path.open("rb") as file:
                    return os.fstat(file.fileno()).st_size == size

            if not seen_in_time(is_whole, folder):
                raise OSError(
                    f"rank 0 does not see {name}, the {entry['bytes']:,} bytes that rank {number} wrote, or sees "
                    "another size; all ranks must share the folder"
                )


def merged(parts: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the entries of all ranks in one dictionary, by name."""
    return dict(sorted((name, entry) for part in parts for name, entry in part.items()))


def check_files(checkpoint: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check that the files are those that were written; every rank calls it and reads its part of them.

    Raises:
        CheckpointError: on every rank, naming the first file that differs.
    """
    names = sorted(files)
    ranks = dist.get_world_size() if distributed() else 1

    def check() -> None:
        for name in names[rank() :: ranks]:
            path, expected = checkpoint / name, files[name]
            try:
                size = path.stat().st_size
                if size != expected["bytes"]:
                    raise damaged(checkpoint, f"{name} has {size:,} bytes, and {expected['bytes']:,} were written")
                if digest_of(path) != expected["sha256"]:
                    raise damaged(checkpoint, f"{name} has changed since it was written (its SHA-256 differs)")
            except FileNotFoundError:
                raise damaged(checkpoint, f"{name} is missing") from None
            except OSError as error:
                raise damaged(checkpoint, f"{name} cannot be read ({error.strerror})") from error

    on_every_rank(check)
