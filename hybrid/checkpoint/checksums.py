"""Sizes and SHA-256 of a checkpoint's files: each rank takes its part of them, when they are written and when read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .folders import damaged
from .together import distributed, on_every_rank, rank

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
    """Return ``bytes`` and ``sha256`` of each file of a folder, by name, on every rank; every rank calls it.

    Raises:
        OSError: on every rank, if one cannot read its files.
    """

    def measure() -> dict[str, dict[str, Any]]:
        # A rank lists its own files itself: another machine may see those that were just made a moment later.
        names = _own(sorted(path.name for path in folder.iterdir()))
        return {name: {"bytes": (folder / name).stat().st_size, "sha256": digest_of(folder / name)} for name in names}

    merged = {name: entry for part in on_every_rank(measure) for name, entry in part.items()}
    return dict(sorted(merged.items()))


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
