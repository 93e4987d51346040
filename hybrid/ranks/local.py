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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import compat
from ..outputs import UserError
from .process import fork_ranks, serve

# Seconds that the ranks get to import what they are to run.
STARTING = 300.0
# Seconds between looks at whether a rank has been stopped.
_LOOK = 1.0


class RankError(RuntimeError):
    """One or more ranks failed.

    ``failures`` maps rank to its traceback, or to how its process ended, the first one first; ``unfinished`` maps the
    ranks that were ended to the stacks they were in.
    """

    def __init__(self, failures: dict[int, str], unfinished: dict[int, str], ranks: int) -> None:
        self.failures = failures
        self.unfinished = unfinished
        parts = []
        if failures:
            first = next(iter(failures))
            parts.append(f"{len(failures)} of {ranks} ranks failed, rank {first} first")
        if unfinished:
            parts.append(f"ranks {sorted(unfinished)} did not finish and were ended")
        text = "; ".join(parts)
        for rank, reason in {**failures, **unfinished}.items():
            text += f"\n--- rank {rank} ---\n{reason.rstrip()}"
        super().__init__(text)


class LocalRanks:
    """``nproc`` processes that wait for functions to run. Use as a context manager; they end with it, or with Python.

    Args:
        nproc: number of ranks.
        env: environment variables of the ranks, in force before they import anything.
        grace: seconds that the others get to end by themselves once a rank has failed.
        patience: seconds for which a rank may be stopped (by SIGSTOP, Ctrl-Z or a debugger) before it counts as failed.
    """

    def __init__(
        self, nproc: int, env: Mapping[str, str] | None = None, *, grace: float = 10.0, patience: float = 10.0
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
        self._stacks: tempfile.TemporaryDirectory[str] | None = None

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
        if not self._processes:
            self._start(fn.__module__)
        self._calls += 1
        for rank in range(count):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self._store.port,
                **compat.served_run(f"call{self._calls}"),
            }
            with contextlib.suppress(OSError):  # a rank that is gone already is reported below
                self._connections[rank].send_bytes(pickle.dumps({key: str(value) for key, value in place.items()}))
                self._connections[rank].send_bytes(task)
        return self._collect(count, timeout)

    def close(self, *, kill: bool = False) -> None:
        """End the processes: by asking them, and after ``grace`` seconds, or at once with ``kill``, by force."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        deadline = time.monotonic() + (0 if kill else self.grace)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._store = [], [], None
        if self._stacks is not None:
            self._stacks.cleanup()
            self._stacks = None

    def _start(self, module: str) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stacks = tempfile.TemporaryDirectory(prefix="fusemesh-ranks-")
        files = [str(Path(self._stacks.name) / f"{rank}.txt") for rank in range(self.nproc)]
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(self.nproc)]
        self._connections = [ours for ours, _ in pipes]
        ends = [theirs for _, theirs in pipes]
        with _environment(self.env):
            if sys.platform == "linux":
                self._processes = list(fork_ranks(context, ends, files, module))
            else:
                for rank in range(self.nproc):
                    process = context.Process(target=serve, args=(ends[rank], files[rank]), name=f"rank {rank}")
                    process.start()
                    self._processes.append(process)
        for theirs in ends:
            theirs.close()

    def _collect(self, count: int, timeout: float | None) -> list[Any]:
        results: dict[int, Any] = {}
        refusals: dict[int, UserError] = {}
        # Who died or was stopped comes first: the others' errors follow from that, and are often told sooner.
        failed: list[tuple[bool, float, int, str]] = []
        dead = False
        deadline = None if timeout is None else time.monotonic() + timeout + STARTING
        starting, waiting = set(range(count)), set(range(count))
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
                failed.append(
                    (False, time.time(), rank, f"was stopped by a signal (SIGSTOP) {self.patience:.0f} s ago")
                )
                # The others wait for it as long as it is stopped.
                deadline = time.monotonic()
            for rank in sorted(waiting):
                if self._connections[rank] not in ready:
                    continue
                try:
                    kind, at, answer = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, OSError):
                    dead, kind, at, answer = True, "died", time.time(), self._exit_reason(rank)
                starting.discard(rank)
                if kind == "started":
                    if not starting and not failed and timeout is not None:
                        deadline = time.monotonic() + timeout
                    continue
                waiting.discard(rank)
                if kind == "returned":
                    results[rank] = answer
                else:
                    if kind == "refused":
                        refusals[rank], answer = answer, f"{type(answer).__name__}: {answer}"
                    failed.append((kind != "died", at, rank, answer))
                    # The others may wait for this rank for ever.
                    limit = time.monotonic() + self.grace
                    deadline = limit if deadline is None else min(deadline, limit)
        if not failed and not waiting:
            return [results[rank] for rank in range(count)]
        # Whatever the others do follows from a refusal that came first.
        first = min(failed, key=lambda failure: failure[1])[2] if failed else None
        if first in refusals and not dead and len({str(error) for error in refusals.values()}) == 1:
            if waiting:
                self.close(kill=True)
            raise refusals[first]
        failures = {rank: reason for *_, rank, reason in sorted(failed)}
        unfinished = self._stacks_of(waiting)
        if waiting or dead:
            self.close(kill=True)
        raise RankError(failures, unfinished, count)

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
        process.join(self.grace)
        code = process.exitcode
        if code is not None and code < 0:
            return f"died by signal {-code} ({signal.Signals(-code).name}; SIGKILL is often the end of memory)"
        return f"exited with code {code} before it returned"

    def _stacks_of(self, ranks: set[int]) -> dict[int, str]:
        """Return the stacks of the threads of each of ``ranks``, which its process writes itself on a signal."""
        if not ranks or self._stacks is None:
            return {}
        if not hasattr(signal, "SIGUSR1"):
            return {rank: "unfinished" for rank in sorted(ranks)}
        for rank in ranks:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = {}
        for rank in sorted(ranks):
            file = Path(self._stacks.name) / f"{rank}.txt"
            text = file.read_text() if file.exists() else ""
            stacks[rank] = "unfinished; it was at\n" + (text or "(no stack)")
        return stacks


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
