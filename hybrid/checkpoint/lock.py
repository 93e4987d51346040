"""A lock on a path: one process at a time holds it, and it ends with the process, however that ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from ..outputs import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Who asks whether a lock is held holds it for an instant.
_ATTEMPTS, _PAUSE = 5, 0.05


class LockedError(UserError, ValueError):
    """Another process holds what this one needs; names it."""


class Lock:
    """A lock that this process holds until :meth:`release`, or its own end.

    It is the file system's (flock), on a file that says who holds it. Where there is no flock, the file alone counts:
    it is stale if it names a process of this machine that has ended.

    Raises:
        LockedError: another process holds it; the text says which.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for attempt in range(_ATTEMPTS):
            self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if self._take():
                    return
                holder = _read(self.file)
            except BaseException:
                os.close(self.file)
                raise
            os.close(self.file)
            if attempt < _ATTEMPTS - 1:
                time.sleep(_PAUSE)
        raise LockedError(_text(holder))

    def _take(self) -> bool:
        free = _flock(self.file)
        if free is False or (free is None and _lives(_read(self.file))):
            return False
        try:
            if not os.path.samestat(os.fstat(self.file), os.stat(self.path)):
                # Its last holder has removed it in the meantime.
                return False
        except FileNotFoundError:
            return False
        own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "id": uuid.uuid4().hex,
        }
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(own).encode(), 0)
        if free is None:
            # Of two that write at once the later one holds it.
            time.sleep(_PAUSE)
            return _read(self.file) == own
        return True

    def release(self) -> None:
        """Remove the file and let others hold the lock."""
        self.path.unlink(missing_ok=True)
        os.close(self.file)


def holder_of(path: Path) -> str:
    """Return who holds the lock on a path; "" if nobody does, or nobody can know."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return ""
    try:
        free = _flock(file)
        holder = _read(file)
        held = _lives(holder) if free is None else not free
        return _text(holder) if held else ""
    finally:
        os.close(file)


def _flock(file: int) -> bool | None:
    """Return whether this process holds the lock now; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK) else None
    return True


def _read(file: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _lives(holder: dict[str, Any]) -> bool:
    """Return whether the process may live: one of another machine, or one of this machine that does."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _text(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
