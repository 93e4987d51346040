"""Global memory that asynchronous copies under way read or write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from .hazard import Hazard
from .ptx import Instruction


class Access(Protocol):
    """A copy under way."""

    ins: Instruction

    @property
    def addresses(self) -> np.ndarray:
        """Return the addresses of its pieces in global memory."""

    @property
    def piece(self) -> int:
        """Return the bytes of each."""

    @property
    def writes(self) -> bool:
        """Return whether it writes into global memory."""

    @property
    def reduces(self) -> bool:
        """Return whether it does so by atomic operations, which may meet."""


class UnderWay:
    """The copies under way of all CTAs, against which other accesses are checked."""

    def __init__(self) -> None:
        self._all: dict[int, Access] = {}
        self.any = self.any_writes = False

    def begin(self, access: Access) -> None:
        """Note that a copy is under way; it is checked against the others."""
        if self._all:
            self.check(access.addresses, access.piece, access.writes, access.reduces)
        self._all[id(access)] = access
        self._look()

    def end(self, access: Access) -> None:
        """Note that a copy is done."""
        self._all.pop(id(access), None)
        self._look()

    def clear(self) -> None:
        """Forget all, before a launch."""
        self._all.clear()
        self._look()

    def _look(self) -> None:
        self.any, self.any_writes = bool(self._all), any(x.writes for x in self._all.values())

    @contextlib.contextmanager
    def reduction(self, addresses: np.ndarray, size: int) -> Iterator[None]:
        """Within the block accesses go unchecked; they are those of a reduction at addresses, checked as a whole."""
        self.check(addresses, size, True, True)
        saved, self.any, self.any_writes = (self.any, self.any_writes), False, False
        yield
        self.any, self.any_writes = saved

    def check(self, addresses: np.ndarray, size: int, writes: bool, reduces: bool = False) -> None:
        """Check that no copy under way writes ``size`` bytes at addresses, nor, if these are written, reads them."""
        for access in self._all.values():
            if not (writes or access.writes) or (reduces and access.reduces) or not len(access.addresses):
                continue
            first = np.sort(access.addresses)
            below = np.searchsorted(first, addresses + np.uint64(size - 1), "right") - 1
            bad = (below >= 0) & (first[np.maximum(below, 0)] + np.uint64(access.piece) > addresses)
            if bad.any():
                does = f"{'writes' if writes else 'reads'} global memory at {int(addresses[np.argmax(bad)]):#x}"
                what = f"which a copy under way {'writes' if access.writes else 'reads'}"
                raise Hazard("async", f"{does}, {what} (PTX line {access.ins.line}: {access.ins.text[:60]})")
