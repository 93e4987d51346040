"""Local memory: an array of bytes for each thread, which begins at address 0."""

from __future__ import annotations

import numpy as np

from .hazard import Hazard


class Local:
    """Local memory of all threads, undefined until it is written."""

    def __init__(self, size: int, threads: int) -> None:
        self.raw = np.zeros((threads, (size + 7) & ~7), np.uint8)
        self.valid = np.zeros(self.raw.shape, bool)
        self.size = size

    def reset(self) -> None:
        """Forget all, for the next CTA."""
        if self.size:
            self.raw[:] = 0xFF
            self.valid[:] = False

    def _bytes(self, addr: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        a = addr.astype(np.int64)
        bad = (a < 0) | (a + size > self.size)
        if bad.any():
            n = int(np.argmax(bad))
            raise Hazard("address", f"thread {threads[n]}: {size} local bytes at {a[n]} of {self.size}")
        if (a & (size - 1)).any():
            n = int(np.argmax((a & (size - 1)) != 0))
            raise Hazard("alignment", f"thread {threads[n]}: {size} local bytes at {a[n]}")
        return a[:, None] + np.arange(size)

    def load(self, addr: np.ndarray, size: int, count: int, threads: np.ndarray) -> np.ndarray:
        """Return [n, count] elements of ``size`` bytes that threads [n] read."""
        at = self._bytes(addr, size * count, threads)
        bad = ~self.valid[threads[:, None], at].all(1)
        if bad.any():
            n = int(np.argmax(bad))
            raise Hazard("uninitialised", f"thread {threads[n]} reads local bytes at {int(addr[n])} that nothing wrote")
        return self.raw[threads[:, None], at].view(f"<u{size}")

    def store(self, addr: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Write the ``values`` [n, count] of threads [n]."""
        raw = np.ascontiguousarray(values).view(np.uint8)
        at = self._bytes(addr, raw.shape[1], threads)
        self.raw[threads[:, None], at] = raw
        self.valid[threads[:, None], at] = True
