"""Ranks watch each other: one that was killed or stopped, or whose machine is gone, ends the run soon, and by name.

A collective waits for a missing rank until its timeout, ten minutes by default, and then names nobody; or it fails at
once, on every rank, with an error that says no more than that a connection is closed. Here each rank counts a heartbeat
up in the store where the ranks met, on a connection and threads of its own, and reads that of the next rank. The first
failure, whether a rank found it in itself or in another, is written to the store once, and is what all ranks report.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import torch.distributed as dist

from .failure import PeerError, end_process, failure_of, is_aborted_collective, own_record, record

# Seconds between heartbeats; without one after a collective has failed, for a rank to count as the one that failed
# first; and for a rank whose peer has failed to end by itself.
_INTERVAL, _SILENCE, _GRACE = 1.0, 5.0, 2.0


class Watchdog:
    """Heartbeats of this rank, and an eye on the next one, from construction to :meth:`stop`.

    Args:
        store: where the ranks met, for the main thread.
        connect: a new connection to it, used by one thread alone.
        rank, world_size: of this process.
        server: the rank that serves the store, None if the launcher does.
        limit: seconds without a sign of life after which a rank counts as lost.
        told: the first failure that the launcher of the ranks has seen, if it has a way to tell; None so far.
        on_lost: called, in a thread of this object, with the first failure.
    """

    def __init__(
        self,
        store: dist.Store,
        connect: Callable[[], dist.Store],
        rank: int,
        world_size: int,
        *,
        server: int | None = None,
        limit: float = 20.0,
        told: Callable[[], str | None] = lambda: None,
        on_lost: Callable[[PeerError], None] = end_process,
    ) -> None:
        self.connect, self.rank, self.world_size, self.next = connect, rank, world_size, (rank + 1) % world_size
        self.limit, self.told, self.on_lost = limit, told, on_lost
        self.store, self.server = store, server
        self._stopped, self._connected = threading.Event(), threading.Event()
        self._failing, self._gone = threading.Event(), threading.Event()
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._guard)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Tell the others that this rank ends as it should, and watch no longer."""
        self._stopped.set()
        for thread in self._threads:
            # Connecting may take long where the name service is slow.
            thread.join(5.0 if self._connected.is_set() else 0.2)

    def explain(self, error: BaseException) -> PeerError | None:
        """Return the failure of another rank that an error of this one follows from; None if it is this rank's own.

        An error that is this rank's own is recorded, for the others to report. For a collective that failed, the rank
        is named that has recorded an error, or gives no sign of life any more, which takes 5 s to see.
        """
        self._failing.set()
        if isinstance(error, GeneratorExit):
            return None
        try:
            store = self.store
            if isinstance(error, SystemExit) and error.code in (None, 0):
                # All ranks may leave so. Those that still wait for this one find it here.
                store.set(f"exit/{self.rank}", own_record(self.rank, error))
                return None
            if not is_aborted_collective(error):
                store.compare_set("first", "", own_record(self.rank, error))
                return None
            # Whose collective failed is alive.
            store.set(f"failing/{self.rank}", "1")
            first = self._first(store) or self._find(store)
            if first is None:
                first = store.compare_set("first", "", own_record(self.rank, error)).decode()
        except RuntimeError:
            if not is_aborted_collective(error):
                return None
            return self._store_gone("is gone")
        found = failure_of(first)
        return None if found.rank == self.rank else found

    def _first(self, store: dist.Store) -> str | None:
        told = self.told()
        if told is not None:
            return told
        return store.get("first").decode() if store.check(["first"]) else None

    def _find(self, store: dist.Store) -> str | None:
        """Return the first failure once it is known; one rank looks for it, the others wait for what it finds."""
        looks = store.compare_set("looks", "", str(self.rank)).decode() == str(self.rank)
        others = [rank for rank in range(self.world_size) if rank != self.rank] if looks else []
        before = {rank: store.add(f"heartbeat/{rank}", 0) for rank in others}
        deadline = time.monotonic() + (_SILENCE if looks else 2 * _SILENCE)
        while time.monotonic() < deadline:
            first = self._first(store)
            if first is not None:
                return first
            for rank in others:
                if store.check([f"exit/{rank}"]):
                    return store.compare_set("first", "", store.get(f"exit/{rank}").decode()).decode()
            time.sleep(0.1)
        for rank, count in before.items():
            excused = store.check([f"failing/{rank}"]) or store.add(f"ended/{rank}", 0)
            if not excused and store.add(f"heartbeat/{rank}", 0) == count:
                reason = f"rank {rank} failed first: it was killed or stopped, or its machine is gone"
                return store.compare_set("first", "", record(rank, reason)).decode()
        return None

    def _store_gone(self, how: str) -> PeerError:
        who = "the launcher" if self.server is None else f"rank {self.server}"
        return failure_of(
            record(self.server, f"{who} failed first: the store where the ranks met, which it served, {how}")
        )

    def _beat(self) -> None:
        try:
            store = self.connect()
            self._connected.set()
            self._watch(store)
            # Those who watch this rank are to expect no more heartbeats.
            store.add(f"ended/{self.rank}", 1)
        except RuntimeError:
            # The store is gone. If the run is not over, the guard says so.
            self._gone.set()

    def _watch(self, store: dist.Store) -> None:
        seen, since = -1, time.monotonic()
        failed_at: float | None = None
        # In a process that joins the ranks a second time, this is left from the first.
        store.set(f"ended/{self.rank}", "0")
        while not self._stopped.is_set():
            store.add(f"heartbeat/{self.rank}", 1)
            # Adding nothing reads a number, also one that is not there yet, without waiting for it.
            count, now = store.add(f"heartbeat/{self.next}", 0), time.monotonic()
            late = now - self._answered
            if count != seen or late > self.limit / 2:
                # A rank that has itself been stopped for a while is no judge of the others.
                seen, since = count, now
            self._answered = now
            if now - since > self.limit and not store.add(f"ended/{self.next}", 0):
                reason = (
                    f"rank {self.next} has given no sign of life for {self.limit:.0f} s: it was killed or stopped, or "
                    "its machine is gone"
                )
                store.compare_set("first", "", record(self.next, reason))
            if store.check(["first"]) and not self._failing.is_set():
                first = failure_of(store.get("first").decode())
                failed_at = failed_at or now
                # Who was lost may end no collective; who has failed ends its peers', and they say so themselves.
                if first.lost or now - failed_at > _GRACE:
                    # Who serves the store need not wait for this rank to leave.
                    store.set(f"gone/{self.rank}", "1")
                    self.on_lost(first)
                    return
            self._stopped.wait(_INTERVAL)

    def _guard(self) -> None:
        """A store that does not answer leaves :meth:`_watch` waiting; rank 0, or what launched the ranks, serves it."""
        last = time.monotonic()
        gone_at: float | None = None
        while not self._stopped.wait(_INTERVAL):
            now = time.monotonic()
            if self._gone.is_set() and not self._failing.is_set():
                gone_at = gone_at or now
                if now - gone_at > _SILENCE:
                    self.on_lost(self._store_gone("is gone"))
                    return
            if now - last > 5 * _INTERVAL:
                # This process was stopped itself, and what it did not hear meanwhile says nothing.
                self._answered = now
            last = now
            patience = self.limit + (2 * _SILENCE if self._failing.is_set() else 0)
            if now - self._answered > patience:
                self.on_lost(self._store_gone(f"has not answered for {self.limit:.0f} s"))
                return


def silent_ranks(store: dist.Store, ranks: Iterable[int]) -> Callable[[], set[int]]:
    """Return a function that says which of ``ranks`` are gone: ended by their watchdogs, or without heartbeats for 5 s.

    Args:
        store: of the watchdogs.
    """
    seen: dict[int, tuple[int, float]] = {}

    def gone(rank: int) -> bool:
        if store.check([f"gone/{rank}"]):
            return True
        count, now = store.add(f"heartbeat/{rank}", 0), time.monotonic()
        if rank not in seen or seen[rank][0] != count:
            seen[rank] = count, now
        # Without any it does not watch; after the last one it leaves by itself.
        return count > 0 and now - seen[rank][1] > _SILENCE and not store.add(f"ended/{rank}", 0)

    return lambda: {rank for rank in ranks if gone(rank)}
