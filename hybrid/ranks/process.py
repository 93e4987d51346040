"""The process of a local rank (:mod:`fusemesh.hybrid.ranks.local`), and the fork server that starts it.

On Linux one process, the fork server, imports the code of the ranks and forks them, so that all start within the time
of one's imports (5 s of a core for torch and its distributed parts). It runs no thread and touches no GPU. Elsewhere,
where a fork is not safe, each rank is a new process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .. import compat
from ..outputs import UserError
from .failure import PeerError, before_end, is_aborted_collective

_PR_SET_PDEATHSIG = 1


class ForkedRank:
    """A rank that the fork server forked and waits for, with the methods of multiprocessing's Process used here."""

    def __init__(self, server: _ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid

    @property
    def exitcode(self) -> int | None:
        """None while it runs; below 0 the signal that ended it."""
        self._server.receive(0)
        return self._server.exits.get(self.pid)

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.exitcode is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            self._server.receive(left)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self._server.close(self.pid)


class _ForkServer:
    """The parent's end of the process that forks the ranks; it reports how each of them ended."""

    def __init__(self, process: Any, connection: Any, pids: list[int]) -> None:
        self.process, self.connection = process, connection
        self.exits: dict[int, int] = {}
        self._open = set(pids)

    def receive(self, timeout: float | None) -> None:
        """Read the reports that have arrived; wait for the first at most ``timeout`` seconds, or for ever (None)."""
        while self.connection is not None and self.connection.poll(timeout):
            try:
                pid, code = self.connection.recv()
            except (EOFError, OSError):
                # Its ranks end with it.
                self.exits.update(dict.fromkeys(self._open - self.exits.keys(), -signal.SIGKILL))
                return
            self.exits[pid] = code
            timeout = 0

    def close(self, pid: int) -> None:
        """Forget a rank; after the last one the process ends."""
        self._open.discard(pid)
        if not self._open:
            self.process.join()
            self.process.close()
            self.connection.close()
            self.connection = None


@contextlib.contextmanager
def lasting_thread() -> Iterator[Callable[..., Any]]:
    """Yield a function that calls another in a thread as long-lived as this process.

    Linux ends the children of a thread with it (:func:`_die_with`), not with its process.
    """
    global _starter
    if threading.current_thread() is threading.main_thread():
        yield lambda function, *arguments: function(*arguments)
        return
    with _starting:
        if _starter is None or _starter[0] != os.getpid():  # a fork has none of its parent's threads
            _starter = os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="fusemesh: starts ranks")
    yield lambda function, *arguments: _starter[1].submit(function, *arguments).result()


_starter: tuple[int, ThreadPoolExecutor] | None = None
_starting = threading.Lock()


def fork_ranks(context: Any, ends: list[Any], stacks: list[Any], module: str) -> list[ForkedRank]:
    """Start the fork server, and with it the ranks."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_forks, args=(theirs, ends, stacks, module), name="fork server")
    process.start()
    theirs.close()
    try:
        pids = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"ranks: the process that was to start them exited with code {process.exitcode}; see what it printed"
        ) from None
    server = _ForkServer(process, ours, pids)
    return [ForkedRank(server, pid) for pid in pids]


def _serve_forks(control: Any, ends: list[Any], stacks: list[Any], module: str) -> None:
    """Import ``module``, fork a rank for each of ``ends``, and report how each of them ended."""
    parent = multiprocessing.parent_process()
    _die_with(None if parent is None else parent.pid)
    # Ctrl-C reaches every process; the ranks are ended by their parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What cannot be imported is reported by the ranks, which try again.
    with contextlib.suppress(BaseException):
        importlib.import_module(module)
        compat.import_before_fork()
    # What is imported stays for good: collections need not look at it, nor write into its pages, which ranks share.
    gc.freeze()
    own, pids = os.getpid(), []
    for rank, (end, stack) in enumerate(zip(ends, stacks, strict=True)):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            control.close()
            for other in ends[rank + 1 :]:
                other.close()
            serve(end, stack, own)
        pids.append(pid)
        # A rank's end is seen by its connection's, so nobody else holds that.
        end.close()
    control.send(pids)
    for _ in pids:
        pid, status = os.waitpid(-1, 0)
        with contextlib.suppress(OSError):
            control.send((pid, os.waitstatus_to_exitcode(status)))
    os._exit(0)


def serve(connection: Any, stacks: Any, forked_by: int | None = None) -> None:
    """Run the calls that the parent sends, until it sends an empty message or is gone."""
    try:
        _run_calls(connection, stacks, forked_by)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        # Taking torch down module by module costs a second of every rank and frees nothing that the system does not.
        os._exit(0)


def _die_with(parent: int | None) -> None:
    """Ask Linux to kill this process when its parent is gone, also while it is stopped and no thread of it runs."""
    if sys.platform == "linux" and parent is not None:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)


def _run_calls(connection: Any, stacks: Any, forked_by: int | None) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _die_with(parent.pid if forked_by is None else forked_by)

    number = 0

    def send(kind: str, at: float, answer: bytes) -> None:
        connection.send_bytes(pickle.dumps((number, kind, at, answer)))

    def tell(failure: PeerError) -> None:
        with contextlib.suppress(OSError):
            send("ended", time.time(), pickle.dumps((failure.rank, str(failure))))

    before_end.append(tell)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=stacks.fileno())
    while True:
        try:
            place = connection.recv_bytes()
        except (EOFError, KeyboardInterrupt):
            return
        if not place:
            return
        number, variables = pickle.loads(place)
        os.environ.update(variables)
        try:
            fn, args = pickle.loads(connection.recv_bytes())
            send("started", time.time(), pickle.dumps(None))
            kind, at, answer = "returned", time.time(), pickle.dumps(fn(*args))
        except BaseException as error:
            kind, at, answer = _told(error)
        send(kind, at, answer)
        # Models, meshes and process groups refer to each other in cycles, and a group that lives on has threads.
        del answer
        fn = args = None
        gc.collect()


def _told(error: BaseException) -> tuple[str, float, bytes]:
    """Return what the parent is told of an error: its kind, when it came, and the rest as a pickle."""
    at = getattr(error, "failed_at", time.time())
    if isinstance(error, UserError):
        try:
            answer = pickle.dumps(error)
            pickle.loads(answer)
        except Exception:  # an __init__ that takes other arguments than the text
            answer = pickle.dumps(UserError(str(error)))
        return "refused", at, answer
    if isinstance(error, PeerError):
        return "followed", at, pickle.dumps((error.rank, str(error)))
    if is_aborted_collective(error):
        return "followed", at, pickle.dumps((None, traceback.format_exc()))
    return "raised", at, pickle.dumps(traceback.format_exc())
