"""The folder of an export while it is written, and how it takes its name: nobody meets half of it.

It is written beside its place, under a name that says it is unfinished, and renamed when it is whole. In a folder that
is there already and may hold other files (``into``), it is written inside, and its files are moved, the one by which
the weights are found last.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ...checkpoint.folders import UNFINISHED, WRITER, CheckpointError, is_being_written
from ...checkpoint.lock import Lock
from ...checkpoint.together import on_every_rank, on_first_rank, seen_in_time
from ...outputs import free_bytes, writing
from .placing import write_all, write_box
from .shards import Shard, index_name, weights_name
from .slices import Box

# In a folder that an export has made: its files and their sizes.
MARKER = "fusemesh.json"
_FORMAT = 1


class Files:
    """The files of an export as one rank writes them."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self._opened: dict[str, int] = {}
        self._places = {name: (shard, at) for shard in shards for name, at in shard.offsets().items()}

    def write(self, name: str, box: Box, values: torch.Tensor) -> int:
        """Write a part of a tensor in its place; return the number of bytes.

        Raises:
            ValueError: a finite value is too large for the tensor's dtype in the file.
        """
        shard, at = self._places[name]
        if shard.file not in self._opened:
            path = self.folder / shard.file
            seen_in_time(path.is_file, self.folder)
            self._opened[shard.file] = os.open(path, os.O_WRONLY)
        entry = shard.entries[name]
        try:
            return write_box(self._opened[shard.file], at, entry.shape, box, values, entry.dtype)
        except ValueError as error:
            raise ValueError(f"export: {name!r}: {error}") from None

    def close(self, *, sync: bool) -> None:
        """Close the files, when what was written is on the disk if ``sync`` says so."""
        while self._opened:
            _, file = self._opened.popitem()
            try:
                if sync:
                    os.fsync(file)
            finally:
                os.close(file)


def write_folder(
    target: Path,
    shards: Sequence[Shard],
    write: Callable[[Files], int],
    documents: Callable[[Path], None],
    *,
    into: bool = False,
    variant: str | None = None,
) -> None:
    """Make a folder of these files, whole or not at all; every rank calls it.

    Args:
        target: the folder; it may be there if it is empty, or if an export made it and nobody put others in.
        write: writes this rank's parts of the tensors, and returns the number of bytes.
        documents: on rank 0, writes all other files into a folder.
        into: the folder may hold other files, which stay.
        variant: of the files' names, which ``into`` removes where they are of an earlier save.

    Raises:
        OutputError: on every rank, it cannot be written; nothing of it is left.
        ValueError: something else is at ``target``.
    """
    target = Path(os.path.realpath(target))
    needed = sum(shard.nbytes for shard in shards)
    lock: Lock | None = None
    inside = False

    def prepare() -> tuple[str, bool]:
        nonlocal lock, inside
        inside = into and target.is_dir()
        with writing(target, needed=needed):
            root = target if inside else target.parent
            root.mkdir(parents=True, exist_ok=True)
            if not inside:
                restore_replaced(target)
                check_replaceable(target)
            remove_leftovers(root, target.name)
            free = free_bytes(root)
            if free is not None and free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            made = root / f"{UNFINISHED}{secrets.token_hex(4)}-{target.name}"
            made.mkdir()
            try:
                lock = Lock(made / WRITER)
                for shard in shards:
                    _preallocate(made / shard.file, shard)
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise
        return made.name, inside

    def act() -> int:
        files = Files(unfinished, shards)
        done = False
        try:
            with writing(target, needed=needed):
                seen_in_time(unfinished.is_dir, unfinished.parent)
                written = write(files)
                done = True
                return written
        finally:
            with writing(target, needed=needed):
                files.close(sync=done)

    def finish() -> None:
        with writing(target, needed=needed):
            documents(unfinished)
            if not inside:
                # What somebody has put there in the meantime stays, too.
                check_replaceable(target)
            if inside:
                _move_into(unfinished, target, variant)
            else:
                if not into:
                    _write_marker(unfinished)
                _take_name(unfinished, target)

    made = False
    try:
        name, inside = on_first_rank(prepare)
        unfinished, made = (target if inside else target.parent) / name, True
        total = sum(on_every_rank(act))
        expected = sum(entry.nbytes for shard in shards for entry in shard.entries.values())
        assert total == expected, (total, expected)
        on_first_rank(finish)
    except BaseException:
        if lock is not None and made:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()


def _preallocate(path: Path, shard: Shard) -> None:
    """Make a file of its full size, with room on the disk where the system can promise it, and write its header."""
    with path.open("xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, shard.nbytes)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(file.fileno(), shard.nbytes)
        write_all(file.fileno(), shard.header(), 0)


def check_replaceable(target: Path) -> None:
    """Check that nothing is at ``target`` but an empty folder, or one that an export made and nobody has added to.

    Raises:
        CheckpointError: something else is.
    """
    if not os.path.lexists(target):
        return
    found = f"received {str(target)!r}, which"
    if not target.is_dir():
        found += " is a file"
    else:
        there = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}
        if not there:
            return
        own: set[str] = set()
        with suppress(OSError, ValueError, KeyError, TypeError):
            own = {MARKER, *json.loads((target / MARKER).read_text(encoding="utf-8"))["files"]}
        others = sorted(there - own)
        if not others:
            return
        found += f" holds something else ({others[0]})"
    raise CheckpointError(
        f"output: expected a new folder, an empty one, or one that an export of fusemesh made, {found}; choose another "
        "name, or remove it first"
    )


def _replaced(target: Path) -> Path:
    return target.parent / f"{UNFINISHED}old-{target.name}"


def restore_replaced(target: Path) -> None:
    """Rename back a folder that was about to be replaced when its export died."""
    old = _replaced(target)
    if old.is_dir() and not target.exists():
        old.rename(target)


def remove_leftovers(root: Path, name: str) -> None:
    """Remove what dead exports of this name have left unfinished."""
    pattern = re.compile(rf"{re.escape(UNFINISHED)}([0-9a-f]{{8}}|old)-{re.escape(name)}")
    for path in list(root.iterdir()):
        if pattern.fullmatch(path.name) and path.is_dir() and not is_being_written(path):
            shutil.rmtree(path)


def _write_marker(folder: Path) -> None:
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(WRITER, None)
    (folder / MARKER).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=2) + "\n", encoding="utf-8")


def _take_name(unfinished: Path, target: Path) -> None:
    """Rename a folder that is whole to its name."""
    _sync_all(unfinished)
    (unfinished / WRITER).unlink(missing_ok=True)
    old = _replaced(target)
    if target.is_dir() and any(target.iterdir()):
        # A folder cannot be replaced in one move. If the process dies here, the next export puts it back.
        target.rename(old)
    unfinished.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _move_into(unfinished: Path, target: Path, variant: str | None) -> None:
    """Move the files of a folder that is whole into another one; the weights are found there when all is there."""
    _sync_all(unfinished)
    (unfinished / WRITER).unlink(missing_ok=True)
    single, index = weights_name(variant), index_name(variant)
    cut = re.compile(rf"{re.escape(single.removesuffix('.safetensors'))}-\d{{5}}-of-\d{{5}}\.safetensors")
    names = sorted(str(path.relative_to(unfinished)) for path in unfinished.rglob("*") if path.is_file())
    # By these from_pretrained finds weights: as long as none is there, none are.
    finders = (index, single)
    for name in finders:
        (target / name).unlink(missing_ok=True)
    for path in list(target.iterdir()):
        if cut.fullmatch(path.name) and path.name not in names:
            path.unlink()
    for name in sorted(names, key=lambda name: name in finders):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).replace(target / name)
    shutil.rmtree(unfinished)
    _sync(target)


def _sync_all(folder: Path) -> None:
    """Wait until the files of a folder, except those that ranks have synced, and its names are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some file systems have no fsync of a folder.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(file)
