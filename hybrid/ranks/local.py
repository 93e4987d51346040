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
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import compat
from ..outputs import UserError
from .failure import record
from .process import fork_ranks, serve
from .waiting import ranks_text, told

# Seconds that the ranks get to import what they are to run.
STARTING = 300.0
# Seconds between looks at whether a rank has been stopped.
_LOOK = 1.0


class RankError(RuntimeError):
    """One or more ranks failed.

    ``failures`` maps rank to its traceback, or to how its process ended, the first one first; ``unfinished`` maps the
    ranks that were ended to the their stacks; ``followed`` those that failed because another had, to their errors.
    """

    def __init__(
        self,
        failures: dict[int, str],
        unfinished: dict[int, str],
        ranks: int,
        followed: Mapping[int, str] | None = None,
    ) -> None:
        self.failures = failures
        self.unfinished = unfinished
        self.followed = dict(followed or {})
        parts = []
        if failures:
            first = next(iter(failures))
            parts.append(f"{len(failures)} of {ranks} ranks failed, rank {first} first")
            ended = {*self.followed, *unfinished} - failures.keys()
            if ended:
                parts.append(f"{ranks_text(ended)} ended because of that")
        elif unfinished:
            parts.append(f"ranks {sorted(unfinished)} did not finish and were ended")
        text = "; ".join(parts)
        for rank, reason in (failures or unfinished).items():
            text += f"\n--- rank {rank} ---\n{reason.rstrip()}"
        super().__init__(text)


@dataclass
class _Heard:
    """What ranks have told that did not return, as (time, rank, text); followed: with the rank that they name."""

    died: list[tuple[float, int, str]] = field(default_factory=list)
    raised: list[tuple[float, int, str]] = field(default_factory=list)
    followed: list[tuple[float, int, int | None, str]] = field(default_factory=list)
    refusals: dict[int, UserError] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.died or self.raised or self.followed)

    def add(self, kind: str, at: float, rank: int, answer: Any) -> None:
        """Take down what a rank tells: that it died, raised, refused, or failed because another had."""
        if kind in ("followed", "ended"):
            self.followed.append((at, rank, *answer))
        elif kind == "died":
            self.died.append((at, rank, answer))
        else:
            if kind == "refused":
                self.refusals[rank], answer = answer, f"{type(answer).__name__}: {answer}"
            self.raised.append((at, rank, answer))

    def refusal(self) -> UserError | None:
        """Return the error of the rank that failed first if it says everything, and no rank raised another such one."""
        texts = {str(error) for error in self.refusals.values()}
        if len(texts) != 1 or self.died:
            return None
        # Whatever the others do follows from it.
        return self.refusals.get(min(self.raised)[1])

    def verdict(
        self, unfinished: dict[int, str], returned: Collection[int], ranks: int
    ) -> tuple[dict[int, str], dict[int, str], int, dict[int, str]]:
        """Return the arguments of :class:`RankError`.

        Who died or was stopped first is to blame, alone: the others' errors follow from that, and are often told
        sooner. Else those are that raised an error of their own, and where nobody did, whom the others name.
        """
        followed = {rank: text for _, rank, _, text in sorted(self.followed, key=lambda told: told[0])}
        if self.died:
            _, first, reason = min(self.died)
            followed |= {rank: text for _, rank, text in self.raised + sorted(self.died)[1:]}
            return {first: reason}, unfinished, ranks, followed
        if self.raised or not self.followed:
            return {rank: text for _, rank, text in sorted(self.raised)}, unfinished, ranks, followed
        named = [(at, rank, text) for at, _, rank, text in self.followed if rank is not None and rank not in returned]
        _, first, text = min(named) if named else min((at, rank, text) for at, rank, _, text in self.followed)
        return {first: text}, unfinished, ranks, {rank: text for rank, text in followed.items() if rank != first}


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
        starting = set(range(count))
        with told(lambda: f"{ranks_text(starting)} of {count} local ones to start" if starting else ""):
            if not self._processes:
                self._start(fn.__module__)
            self._calls += 1
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
                with contextlib.suppress(OSError):  # a rank that is gone already is reported below
                    self._connections[rank].send_bytes(pickle.dumps({key: str(value) for key, value in place.items()}))
                    self._connections[rank].send_bytes(task)
            return self._collect(count, timeout, starting, compat.launcher_key(run))

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

        # Torch's own socket takes IPv6 too, and asks the name service for each peer's address in that form, while all
        # ranks wait.
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listening.getsockname()[1]
        self._store = TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
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

    def _collect(self, count: int, timeout: float | None, starting: set[int], key: str) -> list[Any]:
        """Hear from every rank; ``starting`` loses those that have begun, ``key`` is where they look for a death."""
        results: dict[int, Any] = {}
        heard = _Heard()
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
                    kind, at, answer = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, OSError):
                    dead, kind, at, answer = True, "died", time.time(), self._exit_reason(rank)
                    # Those whose collectives fail look there for the reason.
                    self._store.compare_set(key, "", record(rank, f"rank {rank} failed first: it {answer}"))
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
                limit = time.monotonic() + self.grace
                deadline = limit if deadline is None else min(deadline, limit)
        if not heard and not waiting:
            return [results[rank] for rank in range(count)]
        refusal = heard.refusal()
        if refusal is not None:
            if waiting or dead:
                self.close(kill=True)
            raise refusal
        unfinished = self._stacks_of(waiting)
        if waiting or dead:
            self.close(kill=True)
        raise RankError(*heard.verdict(unfinished, results.keys(), count))

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
