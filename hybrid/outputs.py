"""Errors that a user reads in one line: an output that cannot be written, a checkpoint that cannot be used."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """An error whose text says everything: where all ranks raise the same, it is shown once and without tracebacks."""


class OutputError(UserError, OSError):
    """An output cannot be written; the text names it, the cause and the remedy."""


_ANOTHER = "choose another place"
# errno: (cause, remedy); a cause of None is the system's own text.
_CAUSES: dict[int, tuple[str | None, str]] = {
    errno.ENOSPC: ("no space is left on the device", "make room, or choose another place"),
    errno.EFBIG: ("the file would exceed the limit on the size of files", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", _ANOTHER),
    errno.EACCES: ("permission denied", "choose a place where you may write"),
    errno.EPERM: ("not permitted", "choose a place where you may write"),
    errno.ENOENT: ("its folder is not there and cannot be made", _ANOTHER),
    errno.ENOTDIR: ("a file stands where a folder is needed", _ANOTHER),
    errno.EEXIST: ("a file stands where a folder is needed", _ANOTHER),
    errno.EISDIR: ("it is a folder, and a file is needed", "name a file"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
}
if hasattr(errno, "EDQUOT"):
    _CAUSES[errno.EDQUOT] = ("the disk quota is used up", "make room, or choose another place")
# Those of them that more room would mend.
_FULL = {code for code in _CAUSES if "room" in _CAUSES[code][1]} | {errno.EFBIG}


def size_text(size: float) -> str:
    """Return a number of bytes for people: "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def free_bytes(path: str | os.PathLike[str]) -> int | None:
    """Return how many bytes this user may still write at a place, which need not exist; None if nobody knows."""
    place = Path(path).absolute()
    for folder in (place, *place.parents):
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        # The kernel's own file systems (/proc) say 0 of 0.
        return usage.free if usage.total else None
    return None


def cannot_write(
    path: str | os.PathLike[str], error: OSError, *, what: str = "", needed: int | None = None, kept: str = ""
) -> OutputError:
    """Return the error for an output that the system refuses to write.

    Args:
        path: the file or folder.
        error: the system's.
        what: the option or key that names the path, first in the message; "": the path alone stands there.
        needed: bytes to be written, if known.
        kept: what is still whole, at the end of the message.
    """
    cause, remedy = _CAUSES.get(error.errno or 0, (None, _ANOTHER))
    text = cause or error.strerror or str(error)
    if error.errno in _FULL:
        numbers = [] if needed is None else [f"{size_text(needed)} needed"]
        free = free_bytes(path)
        numbers += [] if free is None else [f"{size_text(free)} free"]
        limit = _file_size_limit() if error.errno == errno.EFBIG else None
        numbers += [] if limit is None else [f"a limit of {size_text(limit)} a file"]
        text += f" ({', '.join(numbers)})" if numbers else ""
    begin = f"{what}: cannot write" if what else "cannot write"
    made = OutputError(f"{begin} {os.fspath(path)!r}: {text}; {remedy}{f'. {kept}' if kept else ''}")
    made.errno = error.errno
    return made


@contextmanager
def writing(
    path: str | os.PathLike[str], *, what: str = "", needed: int | None = None, kept: str = ""
) -> Iterator[None]:
    """Turn any OSError of the block, which writes ``path``, into :func:`cannot_write`'s; same arguments."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(path, error, what=what, needed=needed, kept=kept) from error


def make_folder(path: str | os.PathLike[str], *, what: str = "") -> Path:
    """Make a folder, and those above it, and check that files can be written in it; return it.

    Raises:
        OutputError: it cannot be.
    """
    folder = Path(path)
    with writing(folder, what=what):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)
    return folder


def _file_size_limit() -> int | None:
    """Return the limit on the size of a file that this process writes; None without one."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
