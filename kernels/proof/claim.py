"""A claim on a piece of work: one thread of one process does it, others wait for it, but never for ever (leaf).

A claim is the file system's lock (flock) on a file that is removed afterwards; it ends with its process, however that
ends. Where there are no locks (some NFS and Lustre mounts, Windows) the existence of a file is the claim; it is stale
after ``LONGEST`` seconds, or when it names a process of this machine that has ended. Two that work at once do no harm,
so that whatever goes wrong with a claim ends in working without one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LONGEST = 120.0  # seconds: no proof takes longer, compilation included, and nobody waits longer
SHORTEST_PAUSE, LONGEST_PAUSE = 0.005, 0.1

Release = Callable[[], None]
_held: set[int] = set()  # the open files by which this process holds locks
_threads: dict[str, threading.RLock] = {}  # type: ignore[valid-type]
_changing = threading.Lock()


def _after_fork() -> None:
    """Let a forked child hold nothing: its copies of open files would keep the parent's locks beyond its end."""
    global _changing
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()
    _threads.clear()
    _changing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def claimed(path: str, on_disk: bool, is_done: Callable[[], bool], wait: float = LONGEST) -> Iterator[bool]:
    """Within the block this thread has the claim on ``path``; yields whether it has it against other processes, too.

    Args:
        path: names the work. Its folder exists if ``on_disk``.
        on_disk: whether other processes count.
        is_done: whether another thread or process has done the work meanwhile; then no claim is needed.
        wait: seconds after which the block begins without the claim.
    """
    end = time.monotonic() + wait
    with _changing:
        lock = _threads.setdefault(path, threading.RLock())
    taken = lock.acquire(timeout=wait)
    try:
        release = _wait_for(Path(path), is_done, end) if on_disk else None
        try:
            yield release is not None
        finally:
            if release is not None:
                release()
    finally:
        if taken:
            lock.release()


def _wait_for(path: Path, is_done: Callable[[], bool], end: float) -> Release | None:
    pause = SHORTEST_PAUSE
    while not is_done():
        try:
            release = _lock(path)
        except OSError:  # a folder in which nothing can be written, or not any more
            return None
        if release is not None or time.monotonic() >= end:
            return release
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)
    return None


def _lock(path: Path) -> Release | None:
    """Return how to release the claim, or None while another process holds it.

    Raises:
        OSError: nothing can be written here.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(file)
    keep = False
    try:
        try:
            _flock(file)
        except BlockingIOError:
            return None
        except OSError:
            path.unlink(missing_ok=True)
            return _create(path.with_suffix(".claim"))
        try:
            if not os.path.samestat(os.fstat(file), os.stat(path)):
                return None  # its last holder has removed it in the meantime
        except FileNotFoundError:
            return None
        try:
            _write(file, _holder())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        keep = True
    finally:
        if not keep:
            _close(file)

    def release() -> None:
        if file in _held:  # not in a child that was forked meanwhile
            with contextlib.suppress(OSError):
                path.unlink()
            _close(file)

    return release


def _flock(file: int) -> None:
    """Take the file system's lock; raise BlockingIOError where another holds it, OSError where there are none."""
    if fcntl is None:
        raise OSError("no flock")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write(file: int, text: bytes) -> None:
    """Write all of a claim; raise OSError where there is no room, so that nobody waits where no verdict can be kept."""
    if os.pwrite(file, text, 0) < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _close(file: int) -> None:
    _held.discard(file)
    with contextlib.suppress(OSError):
        os.close(file)


def _create(path: Path) -> Release | None:
    """Return what :func:`_lock` does, by a file that only one process can create.

    Raises:
        OSError: nothing can be written here.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        if _is_stale(path):
            path.unlink(missing_ok=True)
        return None
    holder, process = _holder(), os.getpid()
    try:
        _write(file, holder)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)

    def release() -> None:
        with contextlib.suppress(OSError):
            if os.getpid() == process and path.read_bytes() == holder:  # else it was taken for a stale one
                path.unlink()

    return release


def _holder() -> bytes:
    own = {"host": socket.gethostname(), "pid": os.getpid(), "id": os.urandom(8).hex()}
    return json.dumps(own).encode()


def _is_stale(path: Path) -> bool:
    """Return whether a claim that is a file's existence is old, or of a process of this machine that has ended."""
    try:
        if abs(time.time() - path.stat().st_mtime) > LONGEST:
            return True
        holder = json.loads(path.read_bytes())
        if holder["host"] != socket.gethostname():
            return False
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return False
    return False
