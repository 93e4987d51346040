"""Accesses to shared memory by lanes of one warp that branched (leaf)."""

from __future__ import annotations

import numpy as np


class Lanes:
    """Who accessed each word last in a branch: thread + 1, and its warp's clock then.

    Lanes that run together count as ordered; what they do apart is ordered with what the others do later by whatever
    puts the warp's clock on, bar.warp.sync at least.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._write = self._read = np.zeros((2, 0), np.int32)
        self.watches = False  # there are such accesses in this CTA

    def access(
        self,
        words: np.ndarray,
        warp: np.ndarray,
        threads: np.ndarray | None,
        now: np.ndarray,
        split: np.ndarray | None,
        writes: bool,
        same: np.ndarray | None,
    ) -> tuple[np.ndarray, str] | None:
        """Note an access and return where it races, with a text, or None.

        Args:
            words: [n, k], which are accessed.
            warp, now: by whom, and its clock; they broadcast with ``words``.
            threads: the threads, or None for whole warps.
            split: [W], which warps' lanes do not run together now.
            writes: whether it is a write.
            same: where a write changes nothing.
        """
        if not self.watches:
            if not self._write.shape[1]:
                self._write = np.zeros((2, self._count), np.int32)
                self._read = np.zeros((2, self._count), np.int32)
            self._write[:] = self._read[:] = 0
            self.watches = True
        me = np.asarray(-1 if threads is None else threads + 1)
        for what, (who, when) in (("wrote", self._write), ("read", self._read))[: 2 if writes else 1]:
            other = who[words]
            bad = (other != 0) & (other != me) & ((other - 1) // 32 == warp) & (when[words] == now)
            if same is not None:
                bad &= ~same
            if bad.any():
                does = "writes" if writes else "reads"
                return bad, f"{does} what another lane of it {what} in a branch, with no bar.warp.sync between"
        if split is not None and threads is not None:
            apart = np.broadcast_to(split[warp], words.shape)
            if apart.any():
                who, when = self._write if writes else self._read
                who[words[apart]] = np.broadcast_to(me, words.shape)[apart]
                when[words[apart]] = np.broadcast_to(now, words.shape)[apart]
        return None
