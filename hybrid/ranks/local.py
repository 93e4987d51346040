"""Ranks as processes of this machine: run a function on all of them, report every failure, leave nothing behind.

The ranks find each other as torchrun's do, by the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...), and by a store that
the parent serves, so that no port is chosen twice.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import compat
from .failure import record
from .process import fork_ranks, lasting_thread, serve
from .verdict import Heard, RankError
from .waiting import ranks_text, told

__all__ = ["LocalRanks", "RankError"]

# Seconds that the ranks get to import what they are to run.
STARTING = 300.0
# Seconds between looks at whether a rank has been stopped; that idle ranks get to end; and, where ranks only say that
# another failed, for that one to say why.
_LOOK, _CLOSING, _SILENT = 1.0, 10.0, 10.0
# What a rank tells that failed by itself.
_OWN = ("died", "raised", "refused")


class LocalRanks:
    """``nproc`` processes that wait for functions to run. Use as a context manager; they end with it, or with Python.

    Args:
        nproc: number of ranks.
        env: environment variables of the ranks, in force before they import anything.
        grace: seconds that the others get to report and to end by themselves once a rank has failed.
        patience: seconds for which a rank may be stopped (by SIGSTOP, Ctrl-Z or a debugger) before it counts as failed.
    """

    def __init__(
        self, nproc: int, env: Mapping[str, str] | None = None, *, grace: float = 2.0, patience: float = 10.0
    ) -> None:
        if nproc < 1:
            raise ValueError(f"nproc: expected at least 1, received {nproc}")
        self.nproc = nproc
        # Ranks that share cores gain nothing from each using all of them.
        threads = max(1, (os.cpu_count() or 1) // nproc)
        self.env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **(env or {})}
        if sys.platform == "linux":
            # Without it gloo looks the host's name up, which fails or is slow on many a machine.
            self.env.setdefault("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
        self.grace, self.patience = grace, patience
        self._calls = 0
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._store: Any = None
        self._stacks: list[Any] = []

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(kill=kind is not None)

    def call(
        self, fn: Callable[..., Any], *args: Any, ranks: int | None = None, timeout: float | None = None
    ) -> list[Any]:
        """Run ``fn(*args)`` on every rank, or on the first ``ranks`` of them, and return their results in rank order.

        The processes stay for the next call unless one of them died or hung; then the next call starts new ones.

        Args:
            fn: a function that the ranks can import.
            timeout: seconds, from when every rank has imported ``fn``, after which unfinished ranks are ended and
                named, with the stacks they hung in. For the imports they get 300 seconds besides.

        Raises:
            RankError: a rank raised, died or hung; it holds what every rank has to say.
            UserError: the first rank to fail raised it, and no other rank another one.
            ValueError: ``fn`` or ``args`` cannot be sent to another process.
        """
        count = self.nproc if ranks is None else ranks
        if not 1 <= count <= self.nproc:
            raise ValueError(f"ranks: expected 1 to {self.nproc}, received {count}")
        try:
            task = pickle.dumps((fn, args))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"fn: expected a function and arguments that another process can import, received {fn!r}: {error}; "
                "define the function at the top level of a module"
            ) from error
        starting = set(range(count))
        self._calls += 1
        try:
            with (
                told(lambda: f"{ranks_text(starting)} of {count} local ones to start" if starting else ""),
                self._ended_by_signals(),
            ):
                results, failure = self._run(fn.__module__, task, count, timeout, starting)
        except BaseException:
            # Interrupted: the ranks still work on this call, whose results nobody waits for.
            self.close(kill=True)
            raise
        if failure is not None:
            raise failure
        return results

    def _run(
        self, module: str, task: bytes, count: int, timeout: float | None, starting: set[int]
    ) -> tuple[list[Any], Exception | None]:
        if not self._processes:
            self._start(module)
        run = compat.served_run(f"call{self._calls}")
        for rank in range(count):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self._store.port,
                **run,
            }
            variables = {key: str(value) for key, value in place.items()}
            with contextlib.suppress(OSError):  # a rank that is gone already is reported below
                self._connections[rank].send_bytes(pickle.dumps((self._calls, variables)))
                self._connections[rank].send_bytes(task)
        return self._collect(count, timeout, starting, compat.launcher_key(run))

    @contextlib.contextmanager
    def _ended_by_signals(self) -> Iterator[None]:
        """Within the block SIGTERM and SIGHUP, where nobody handles them, end the ranks and are told on stderr."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()

        def end(number: int, _: Any) -> None:
            signal.signal(number, signal.SIG_DFL)
            if os.getpid() == owner:
                name = signal.Signals(number).name
                with contextlib.suppress(OSError, RuntimeError):
                    print(f"fusemesh: ended by signal {number} ({name}), and its ranks", file=sys.stderr, flush=True)
                for process in self._processes:
                    process.kill()
            os.kill(os.getpid(), number)

        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
        for number in taken:
            signal.signal(number, end)
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, signal.SIG_DFL)

    def close(self, *, kill: bool = False) -> None:
        """End the processes: by asking them, and after 10 seconds, or at once with ``kill``, by force."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        deadline = time.monotonic() + (0 if kill else _CLOSING)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._store = [], [], None
        for stack in self._stacks:
            stack.close()
        self._stacks = []

    def _start(self, module: str) -> None:
        from torch.distributed import TCPStore

        # Torch's own socket takes IPv6 too, and asks the name service for each peer's address in that form, while all
        # ranks wait.
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listening.getsockname()[1]
        self._store = TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        if multiprocessing.current_process().daemon:
            raise ValueError(
                "ranks: expected a process that may start others, received a daemonic child of multiprocessing "
                f"({multiprocessing.current_process().name}); start it with daemon=False"
            )
        context = multiprocessing.get_context("spawn")
        # Files without a name, so that none is left however this process ends.
        self._stacks = [_shared_file() for _ in range(self.nproc)] if hasattr(signal, "SIGUSR1") else []
        stacks = self._stacks or [None] * self.nproc
        pipes = [context.Pipe() for _ in range(self.nproc)]
        self._connections = [ours for ours, _ in pipes]
        ends = [theirs for _, theirs in pipes]
        with _environment(self.env), lasting_thread() as run:
            if sys.platform == "linux":
                self._processes = run(fork_ranks, context, ends, stacks, module)
            else:
                for rank in range(self.nproc):
                    process = context.Process(target=serve, args=(ends[rank], stacks[rank]), name=f"rank {rank}")
                    run(process.start)
                    self._processes.append(process)
        for theirs in ends:
            theirs.close()

    def _collect(
        self, count: int, timeout: float | None, starting: set[int], key: str
    ) -> tuple[list[Any], Exception | None]:
        """Hear from every rank; ``starting`` loses those that have begun, ``key`` is where they look for a death."""
        results: dict[int, Any] = {}
        heard = Heard()
        dead = False
        deadline = None if timeout is None else time.monotonic() + timeout + STARTING
        waiting = set(range(count))
        stopped: dict[int, float] = {}
        while waiting:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            ready = multiprocessing.connection.wait(
                [self._connections[rank] for rank in waiting], _LOOK if left is None else min(left, _LOOK)
            )
            for rank in self._stopped_too_long(waiting, stopped):
                waiting.discard(rank)
                dead = True
                reason = f"was stopped by a signal (SIGSTOP) {self.patience:.0f} s ago"
                heard.died.append((time.time(), rank, reason))
                # The others wait for it as long as it is stopped.
                deadline = time.monotonic()
            for rank in sorted(waiting):
                if self._connections[rank] not in ready:
                    continue
                try:
                    number, kind, at, answer = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, OSError):
                    dead, kind, at, answer = True, "died", time.time(), self._exit_reason(rank)
                    # Those whose collectives fail look there for the reason.
                    self._store.compare_set(key, "", record(rank, f"rank {rank} failed first: it {answer}"))
                else:
                    if number != self._calls:
                        continue
                    kind, answer = _loaded(rank, kind, answer)
                starting.discard(rank)
                if kind == "started":
                    if not starting and not heard and timeout is not None:
                        deadline = time.monotonic() + timeout
                    continue
                waiting.discard(rank)
                dead = dead or kind == "ended"
                if kind == "returned":
                    results[rank] = answer
                    continue
                heard.add(kind, at, rank, answer)
                # The others may wait for this rank for ever.
                limit = time.monotonic() + (self.grace if kind in _OWN else max(self.grace, _SILENT))
                deadline = limit if deadline is None else min(deadline, limit)
        if not heard and not waiting:
            return [results[rank] for rank in range(count)], None
        error: Exception | None = heard.refusal()
        if error is None:
            error = RankError(*heard.verdict(self._stacks_of(waiting), results.keys(), count))
        if waiting or dead:
            self.close(kill=True)
        return [], error

    def _stopped_too_long(self, ranks: set[int], since: dict[int, float]) -> list[int]:
        """Return the ranks that have been stopped for longer than ``patience``; ``since`` is kept up to date."""
        now = time.monotonic()
        for rank in ranks:
            if _is_stopped(self._processes[rank].pid):
                since.setdefault(rank, now)
            else:
                since.pop(rank, None)
        return [rank for rank, at in since.items() if rank in ranks and now - at > self.patience]

    def _exit_reason(self, rank: int) -> str:
        """Return how a rank's process ended: its signal or its exit code."""
        process = self._processes[rank]
        process.join(_CLOSING)
        code = process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in iter(signal.Signals) else "of real time"
            hint = "; often the end of memory" if name == "SIGKILL" else ""
            return f"died by signal {-code} ({name}{hint})"
        return f"exited with code {code} before it returned"

    def _stacks_of(self, ranks: set[int]) -> dict[int, str]:
        """Return the stacks of the threads of each of ``ranks``, which its process writes itself on a signal."""
        if not self._stacks:
            return {rank: "unfinished" for rank in sorted(ranks)}
        if not ranks:
            return {}
        for rank in ranks:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = {}
        for rank in sorted(ranks):
            file = self._stacks[rank].fileno()
            text = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")
            stacks[rank] = "unfinished; it was at\n" + (text or "(no stack)")
        return stacks


def _loaded(rank: int, kind: str, answer: bytes) -> tuple[str, Any]:
    """Return what a rank tells, read; what cannot be read here is a failure of that rank."""
    try:
        return kind, pickle.loads(answer)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return "raised", (
            f"what rank {rank} {kind} cannot be read by the process that called it ({reason}); return and raise "
            "objects whose classes stand at the top level of a module"
        )


def _shared_file() -> Any:
    """Return a file without a name, as a Connection: multiprocessing gives the descriptor to the process it spawns."""
    with tempfile.TemporaryFile() as file:
        return multiprocessing.connection.Connection(os.dup(file.fileno()))


def _is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal; False where the system does not say (other than Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Let children that are started within the block inherit ``variables``."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
