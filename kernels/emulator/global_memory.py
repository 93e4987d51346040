"""Global memory: the storage of tensors, by address."""

from __future__ import annotations

import ctypes

import numpy as np

from .hazard import Hazard
from .under_way import UnderWay


class Global:
    """Tensors by address. An access must lie within one registered range."""

    def __init__(self) -> None:
        self._ranges: list[list] = []  # [first, end, name]
        self._stale = True
        self.cta = 0
        self.check_owner = True
        self.under_way = UnderWay()
        self.changes = 0  # of the bytes, so that waiting CTAs can tell whether there is hope

    def add(self, first: int, size: int, name: str) -> None:
        for r in self._ranges:
            if first < r[1] and r[0] < first + size:  # views of one storage
                r[0], r[1] = min(r[0], first), max(r[1], first + size)
                r[2] += "/" + name
                break
        else:
            self._ranges.append([first, first + size, name])
        self._stale = True

    def _build(self) -> None:
        self._ranges.sort()
        self._first = np.array([r[0] for r in self._ranges], np.uint64)
        self._end = np.array([r[1] for r in self._ranges], np.uint64)
        self._views = []
        for first, end, _ in self._ranges:
            low = first & ~15
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * (((end + 15) & ~15) - low)).from_address(low))
            self._views.append(
                (
                    low,
                    {
                        1: raw,
                        2: raw.view(np.uint16),
                        4: raw.view(np.uint32),
                        "owner": np.zeros(len(raw) // 2, np.int32),
                    },
                )
            )
        self._stale = False

    def _locate(self, addr: np.ndarray, size: int, threads: np.ndarray):
        if self._stale:
            self._build()
        if len(self._first) == 0:
            raise Hazard("address", "no global memory is registered")
        where = np.searchsorted(self._first, addr, "right") - 1
        bad = (where < 0) | (addr + np.uint64(size) > self._end[where])
        if bad.any():
            n = int(np.argmax(bad))
            a = int(addr[n])
            near = min(self._ranges, key=lambda r: min(abs(a - r[0]), abs(a - r[1])))
            raise Hazard(
                "address",
                f"thread {threads[n]}: {size} bytes at {a:#x} lie outside every tensor; the nearest "
                f"is {near[2]}, {near[0]:#x} to {near[1]:#x} (offset {a - near[0]}); {bad.sum()} threads",
            )
        if (addr & np.uint64(size - 1)).any():
            n = int(np.argmax((addr & np.uint64(size - 1)) != 0))
            raise Hazard("alignment", f"thread {threads[n]}: {size} bytes at {int(addr[n]):#x}")
        return where

    def _parts(self, addr: np.ndarray, where: np.ndarray):
        if (where == where[0]).all():
            yield slice(None), self._views[where[0]], addr
        else:
            for w in np.unique(where):
                pick = where == w
                yield pick, self._views[w], addr[pick]

    def load(self, addr: np.ndarray, width: int, count: int, threads: np.ndarray) -> np.ndarray:
        """[n, count] elements of `width` bytes (1, 2 or 4; 8 is two of 4)."""
        out = np.empty((len(addr), count), {1: np.uint8, 2: np.uint16, 4: np.uint32}[width])
        where = self._locate(addr, width * count, threads)
        if self.under_way.any_writes:
            self.under_way.check(addr, width * count, False)
        for pick, (low, view), a in self._parts(addr, where):
            at = ((a - np.uint64(low)) // np.uint64(width)).astype(np.int64)[:, None] + np.arange(count)
            out[pick] = view[width][at]
            if self.check_owner:
                self._own(view, at, width, threads, False)
        return out

    def store(self, addr: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        width, count = values.itemsize, values.shape[1]
        where = self._locate(addr, width * count, threads)
        if self.under_way.any:
            self.under_way.check(addr, width * count, True)
        for pick, (low, view), a in self._parts(addr, where):
            at = ((a - np.uint64(low)) // np.uint64(width)).astype(np.int64)[:, None] + np.arange(count)
            if self.check_owner:
                self._own(view, at, width, threads, True)
            self.changes += 1
            view[width][at] = values[pick]
            if (view[width][at] != values[pick]).any():
                raise Hazard("race", "two threads store different values to one global address")

    def _own(self, view: dict, at: np.ndarray, width: int, threads: np.ndarray, writes: bool) -> None:
        """No CTA may read or write what another CTA of the same launch wrote."""
        owner = view["owner"]
        halves = (at * 2)[..., None] + np.arange(2) if width == 4 else at if width == 2 else at // 2
        was = owner[halves]
        if ((was != 0) & (was != self.cta)).any():
            raise Hazard("race", f"CTA {self.cta - 1} touches global memory that another CTA wrote")
        if writes:
            owner[halves] = self.cta

    def next_launch(self) -> None:
        self.under_way.clear()
        if not self._stale:
            for _, view in self._views:
                view["owner"][:] = 0
