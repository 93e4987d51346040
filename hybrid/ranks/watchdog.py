"""Ranks watch each other: one that was killed or stopped, or whose machine is gone, ends the run soon, and by name.

A collective waits for a missing rank until its timeout, ten minutes by default, and then names nobody. Here each rank
counts a heartbeat up in the store where the ranks met, on a connection and threads of its own, and reads that of the
next rank. What the first to miss one finds is written to the store, so that all end within seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

# Seconds between heartbeats.
_INTERVAL = 1.0


def end_process(message: str) -> None:
    """Say why on stderr and end this process: the main thread waits in a collective that nothing else can end."""
    print(f"fusemesh: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class Watchdog:
    """Heartbeats of this rank, and an eye on the next one, from construction to :meth:`stop`.

    Args:
        connect: a new connection to the store, used by this object's thread alone.
        rank, world_size: of this process.
        limit: seconds without a sign of life after which a rank counts as lost.
        on_lost: called, in a thread of this object, with the reason.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        world_size: int,
        *,
        limit: float = 20.0,
        on_lost: Callable[[str], None] = end_process,
    ) -> None:
        self.connect, self.rank, self.next = connect, rank, (rank + 1) % world_size
        self.limit, self.on_lost = limit, on_lost
        self._stopped = threading.Event()
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._guard)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Tell the others that this rank ends as it should, and watch no longer."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(5.0)

    def _beat(self) -> None:
        try:
            store = self.connect()
            self._watch(store)
            # Those who watch this rank are to expect no more heartbeats.
            store.add(f"ended/{self.rank}", 1)
        except RuntimeError:
            # The store is gone. If the run is not over, the guard says so.
            pass

    def _watch(self, store: dist.Store) -> None:
        seen, since = -1, time.monotonic()
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
            is_late = now - since > self.limit and not store.add(f"ended/{self.next}", 0)
            if is_late or store.check(["lost"]):
                lost = store.compare_set("lost", "", str(self.next)).decode()
                self.on_lost(
                    f"rank {lost} has given no sign of life for {self.limit:.0f} s: it was killed or stopped, or its "
                    "machine is gone. This run ends; go on from its last checkpoint with --resume"
                )
                return
            self._stopped.wait(_INTERVAL)

    def _guard(self) -> None:
        """A store that does not answer leaves :meth:`_watch` waiting; rank 0, or what launched the ranks, serves it."""
        last = time.monotonic()
        while not self._stopped.wait(_INTERVAL):
            now = time.monotonic()
            if now - last > 5 * _INTERVAL:
                # This process was stopped itself, and what it did not hear meanwhile says nothing.
                self._answered = now
            last = now
            if now - self._answered > self.limit:
                self.on_lost(
                    f"the store where the ranks met has not answered for {self.limit:.0f} s: rank 0, or the launcher "
                    "that serves it, was killed or stopped. This run ends; go on from its last checkpoint with --resume"
                )
                return
