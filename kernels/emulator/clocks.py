"""What each warp of a CTA knows of the others' accesses: vector clocks; and what lanes of one warp did apart."""

from __future__ import annotations

import numpy as np

History = dict[int, np.ndarray]  # CTA -> the time of each of its warps


class Clocks:
    """Vector clocks of the warps of one CTA.

    The order of two accesses by different warps is known only through what synchronises them. Each warp counts its own
    time, which goes on whenever it releases what it did; an access at time t of warp w is before those of warp v that
    knows t of w. An mbarrier is one more agent, whose time is its phase.

    The same is kept of fences between proxies: up to which time of each agent a warp knows the accesses fenced.

    Attributes:
        known: [W, 2 (W + AGENTS)]; known[v, w] is what v knows of w's time, known[v, W + AGENTS + w] up to when v
            knows w's accesses to be fenced.
    """

    AGENTS = 64

    def __init__(self, warps: int) -> None:
        self.warps, self.agents = warps, warps + self.AGENTS
        self.known = np.zeros((warps, 2 * self.agents), np.int32)
        self._own = np.eye(*self.known.shape, dtype=np.int32)
        self.reset()

    def reset(self) -> None:
        """Begin a CTA, at a time after all that was: what earlier ones did is known to all."""
        now = int(self.known[:, : self.warps].max())
        self.known[:] = self._own
        self.known[:, : self.warps] += now
        self.known[:, self.agents : self.agents + self.warps] = now
        # Of other CTAs each warp hears through atomics: (its own time then, what it heard).
        self.heard: list[list[tuple[int, History]]] = [[] for _ in range(self.warps)]
        self.unfenced: list[History] = [{} for _ in range(self.warps)]  # heard by relaxed reads since its last fence
        self.at_fence: list[History] = [{} for _ in range(self.warps)]  # what it had done and heard then

    def nothing(self) -> np.ndarray:
        """Return the knowledge of one who knows nothing."""
        return np.zeros(self.known.shape[1], np.int32)

    def release(self, warps: np.ndarray) -> np.ndarray:
        """Return what these warps have done and seen; their later accesses are not part of it."""
        known = self.known[warps].max(0)
        self.known[warps, warps] += 1
        return known

    def acquire(self, warps: np.ndarray, known: np.ndarray) -> None:
        """Let warps know what others released."""
        self.known[warps] = np.maximum(self.known[warps], known)

    def barrier(self) -> None:
        """Let all warps know everything."""
        self.known[:] = self.known.max(0)
        self.known += self._own

    def fence(self, warps: np.ndarray, whole: bool) -> None:
        """Fence between proxies what these warps know; of their own, if lanes are missing, what the lanes share."""
        seen = self.known[warps, : self.agents]
        if not whole:
            seen[np.arange(len(warps)), warps] -= 1
        fenced = self.known[:, self.agents :]
        fenced[warps] = np.maximum(fenced[warps], seen)
        self.known[warps, warps] += 1

    # --- through global memory, where CTAs meet

    def history(self, warp: int, cta: int) -> History:
        """Return what a warp of this CTA, number ``cta``, has done and heard, as of now."""
        history = self.foreign(warp)
        history[cta] = self.known[warp, : self.warps].copy()
        return history

    def foreign(self, warp: int) -> History:
        """Return what a warp knows of other CTAs: what it heard itself, or what another did before it released."""
        history: History = {}
        for other, events in enumerate(self.heard):
            for time, heard in events:
                if time <= self.known[warp, other]:
                    merge(history, heard)
        return history

    def publish(self, warp: int, cta: int, releases: bool) -> History:
        """Return what a write by a warp tells those that acquire it: all, or what came before its last fence."""
        if not releases:
            return self.at_fence[warp]
        history = self.history(warp, cta)
        self.known[warp, warp] += 1
        return history

    def hear(self, warp: int, cta: int, history: History, acquires: bool) -> None:
        """Take what a read by a warp found; a relaxed one counts from the warp's next fence on."""
        if not acquires:
            merge(self.unfenced[warp], history)
            return
        own = history.get(cta)
        if own is not None:
            self.known[warp, : self.warps] = np.maximum(self.known[warp, : self.warps], own)
        others = {other: times for other, times in history.items() if other != cta}
        if others:
            self.heard[warp].append((int(self.known[warp, warp]), others))

    def fence_threads(self, warps: np.ndarray, cta: int) -> None:
        """Do a fence of acquire and release by these warps."""
        for warp in warps:
            self.hear(warp, cta, self.unfenced[warp], True)
            self.unfenced[warp] = {}
            self.at_fence[warp] = self.publish(warp, cta, True)


def merge(into: History, history: History) -> None:
    """Add what one history knows to another."""
    for cta, times in history.items():
        into[cta] = np.maximum(into[cta], times) if cta in into else times


class Lanes:
    """Who accessed each word of shared memory last in a branch: thread + 1, and its warp's clock then.

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
