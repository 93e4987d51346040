"""The store where the ranks of a run meet, and the roll that is called there: who has come, and who has not."""

from __future__ import annotations

import collections
import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator

import torch.distributed as dist

from .. import compat
from .desk import Desk, ask, check_address, check_own_address, reach
from .environment import Place
from .waiting import first_line, ranks_text, told
from .watchdog import silent_ranks

# How often this process has joined a run: a later meeting finds nothing of an earlier one.
_joined: collections.Counter[str] = collections.Counter()
# Seconds to connect to a store that listens; and for which rank 0, if it serves the store, stays for those who have not
# left yet; after a failure no longer than they take to end.
_CONNECT, _LINGER, _LINGER_FAILED, _LINGER_REFUSED = 10.0, 60.0, 12.0, 3.0


def has_joined() -> bool:
    """Return whether this process has come to a meeting of its run."""
    return _joined[compat.run_id()] > 0


class Meeting:
    """The ranks of a run, from when they meet to when they part.

    torchrun and launch_local serve the store themselves, at MASTER_PORT. Otherwise rank 0 does, at a port that the
    others learn at its desk.

    Args:
        timeout: seconds that ranks wait for each other.

    Raises:
        ValueError: the address does not resolve, or the port is taken.
        RuntimeError: rank 0 has not come in time.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.place, self.timeout = place, timeout
        self.is_served = compat.agent_serves_store()
        self._desk: Desk | None = None
        check_address(place.master_addr, place.address_from)
        _joined[compat.run_id()] += 1
        self.prefix = f"{compat.run_id()}/{_joined[compat.run_id()]}"
        self._server: dist.TCPStore | None = None
        self.port = place.master_port if self.is_served else self._port_of_store()
        self._store = self._wait_for_launcher() if self.is_served else self._open()
        self.store = dist.PrefixStore(self.prefix, self._store)
        self._stages: collections.Counter[str] = collections.Counter()

    @property
    def where(self) -> str:
        """Return the address of the store, for messages."""
        return f"{self.place.master_addr}, port {self.port}"

    def _port_of_store(self) -> int:
        place = self.place
        who = f"rank 0, whom rank {place.rank} of {place.world_size} is to meet"
        run = f"{self.prefix}/{place.run}".replace("\n", " ")
        ports = place.ports or (place.master_port,)
        if place.rank > 0:
            return ask(place.master_addr, ports, run, who, self.timeout)
        self._desk = Desk(ports, run)
        try:
            return self._serve(self._desk, run)
        except BaseException:
            self._desk.close()
            raise

    def _serve(self, desk: Desk, run: str) -> int:
        place = self.place
        wait = datetime.timedelta(seconds=self.timeout)
        self._server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=wait, wait_for_workers=False)
        desk.answer(self._server.port)
        check_own_address(place.master_addr, place.address_from, desk.port, run)
        return self._server.port

    def _wait_for_launcher(self) -> dist.TCPStore:
        place, began = self.place, time.monotonic()
        last = ""

        def waiting() -> str:
            return (
                f"the store of {place.launcher} at {place.master_addr}, port {place.master_port} (rank {place.rank} of "
                f"{place.world_size}){last and ': '}{last}"
            )

        # What serves the ranks of one machine alone stands on it, and was there before them.
        is_there = place.local_world_size == place.world_size
        with told(waiting):
            while not is_there:
                try:
                    reach(place.master_addr, self.port).close()
                    break
                except RuntimeError as error:
                    last = first_line(error)
                if time.monotonic() - began > self.timeout:
                    raise RuntimeError(f"nobody came within {self.timeout:.0f} s: {waiting()}")
                time.sleep(0.1)
            return self._open()

    def store_of(self, name: str) -> dist.Store:
        """Return the store with a name in front of its keys."""
        return dist.PrefixStore(f"{self.prefix}/{name}", self._store)

    def connect(self, name: str = "") -> dist.Store:
        """Open one more connection to the store, with a name in front of its keys.

        Raises:
            RuntimeError: nobody serves it any more.
        """
        return dist.PrefixStore(f"{self.prefix}/{name}" if name else self.prefix, self._open())

    def _open(self) -> dist.TCPStore:
        """Connect to the store; if nobody serves it any more, torch tries again and again, here for 10 s."""
        host = self.place.master_addr
        soon = datetime.timedelta(seconds=min(self.timeout, _CONNECT))
        store = dist.TCPStore(host, self.port, None, is_master=False, timeout=soon, wait_for_workers=False)
        store.set_timeout(datetime.timedelta(seconds=self.timeout))
        return store

    def call_roll(self, gpu: str = "") -> None:
        """Wait until all ranks have come; those who refuse to start end the wait of all.

        Args:
            gpu: a name, unique in the world, of the GPU that this rank is to use.

        Raises:
            ValueError: a second process says that it is this rank, or uses the same GPU; or what another rank refused.
            RuntimeError: a rank has not come in time.
        """
        place, began = self.place, time.monotonic()
        own = f"{place.rank} {socket.gethostname()} {os.getpid()}"
        self._claim(f"rank/{place.rank}", own, f"two processes say that they are rank {place.rank}")
        if gpu:
            self._claim(f"gpu/{gpu}", own, f"two ranks of {socket.gethostname()} were given one GPU ({gpu})")
        self._come("roll")
        with told(lambda: self._missing("roll", f"to meet at {self.where}")):
            pause = 0.005
            while not self.store.check(["roll/all"]):
                if time.monotonic() - began > self.timeout:
                    raise RuntimeError(
                        f"not all came within {self.timeout:.0f} s: {self._missing('roll', f'to meet at {self.where}')}"
                    )
                time.sleep(pause)
                pause = min(0.5, 1.5 * pause)
        if self.store.check(["refused"]):
            raise ValueError(self.store.get("refused").decode())
        if self._desk is not None:
            self._desk.close()

    def _claim(self, key: str, own: str, message: str) -> None:
        found = self.store.compare_set(key, "", own).decode()
        if found == own:
            return
        rank, host, pid = found.split(" ")
        if self.is_served and not (host == socket.gethostname() and _is_alive(int(pid))):
            # torchrun has started another process in the place of one that ended.
            self.store.set(key, own)
            return
        raise ValueError(
            f"{message}: process {pid} of {host} (rank {rank}) and process {os.getpid()} of {socket.gethostname()} "
            f"(rank {self.place.rank}); give each rank its own, and each run its own MASTER_PORT"
        )

    def refuse(self, reason: str) -> None:
        """Tell all ranks, also those still to come, why this one does not start."""
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("refused", "", f"rank {self.place.rank} does not start: {reason}")
            self.store.set("roll/all", "1")
        self._part("leaving", _LINGER_REFUSED, self.place.world_size)

    def leave(self, *, failed: bool, lost: bool) -> None:
        """Leave at the end; rank 0, if it serves the store, stays for a while until all have left.

        Args:
            failed: whether the run has failed.
            lost: whether one rank will never leave, because it is dead.
        """
        self._part("left", _LINGER_FAILED if failed else _LINGER, self.place.world_size - lost)

    def _part(self, name: str, seconds: float, need: int) -> None:
        with contextlib.suppress(RuntimeError):
            if not self.is_served:
                self._come(name)
            if self._server is not None:
                began = time.monotonic()
                others = range(1, self.place.world_size)
                gone = silent_ranks(self.store_of("watchdog"), others)
                with told(lambda: self._missing(name, "to leave")):
                    while self.store.add(f"{name}/count", 0) < need and time.monotonic() - began < seconds:
                        time.sleep(0.02 if time.monotonic() - began < 1.0 else 0.2)
                        if all(rank in gone() or self.store.check([f"{name}/{rank}"]) for rank in others):
                            break
        if self._desk is not None:
            self._desk.close()

    def told_by_launcher(self) -> str | None:
        """Return the first failure that launch_local has seen, by the end of a rank's process; None so far."""
        key = compat.launcher_key()
        return self._store.get(key).decode() if self._store.check([key]) else None

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Say after 10 s which ranks have come to the block and which have not, or are not through it."""
        self._stages[name] += 1
        name = f"{name}/{self._stages[name]}"
        self._come(name)

        def missing() -> str:
            try:
                # The main thread may wait in the store itself, with its connection.
                store = self.connect()
                if store.check([f"{name}/all"]):
                    return self._missing(f"{name}/through", what, store, "all have come; through")
                return self._missing(name, what, store)
            except RuntimeError as error:
                return f"other ranks {what} (rank {self.place.rank} of {self.place.world_size}); {first_line(error)}"

        with told(missing):
            yield
        self.store.set(f"{name}/through/{self.place.rank}", "1")

    def _come(self, name: str) -> None:
        is_new = self.store.add(f"{name}/{self.place.rank}", 1) == 1
        if is_new and self.store.add(f"{name}/count", 1) == self.place.world_size:
            self.store.set(f"{name}/all", "1")

    def _missing(self, name: str, what: str, store: dist.Store | None = None, word: str = "come") -> str:
        """Return whom this rank waits for, and who has come; "" if all have."""
        store = store or self.store
        everyone = range(self.place.world_size)
        came = [rank for rank in everyone if store.check([f"{name}/{rank}"])]
        absent = set(everyone) - set(came)
        if not absent:
            return ""
        return f"{ranks_text(absent)} {what} (rank {self.place.rank} of {len(everyone)}); {word}: {ranks_text(came)}"


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
