"""Shared memory of a CTA, with the state that finds races."""

from __future__ import annotations

import numpy as np

from .clocks import Clocks
from .hazard import Hazard


class Shared:
    """Shared memory by 4-byte words, with for each word who wrote and read it, and when by that warp's clock.

    The order of two accesses by different warps is known only through barriers: each warp has a vector clock.
    A second write of the value that is already there is harmless and allowed.
    """

    BASE = 1024  # where Hopper starts a kernel's shared memory; swizzles repeat every 1024 bytes
    AGENTS = Clocks.AGENTS

    def __init__(self, size: int, warps: int) -> None:
        words = (self.BASE + size + 3) // 4
        self.raw = np.zeros(words * 4, np.uint8)
        self.words = self.raw.view(np.uint32)
        self.halves = self.raw.view(np.uint16)
        self.end = self.BASE + size
        self.warps = warps
        self.valid = np.zeros(words, bool)
        self.writer = np.full(words, -1, np.int16)
        self.write_stamp = np.zeros(words, np.int32)  # the writer's clock at that time
        self.write_half = np.zeros(words, np.uint8)
        self.read_stamp = np.zeros((warps, words), np.int32)  # each warp's clock when it last read
        self.clocks = Clocks(warps)
        self.clock = self.clocks.known
        self.landing = np.zeros(words, bool)  # a cp.async is under way to it
        self.streaming = np.zeros(words, np.int16)  # so many wgmma under way read it
        self.any_streaming = False
        self.objects = np.zeros(words, bool)  # words of mbarriers
        self.has_objects = False
        self.check = True

    def reset(self) -> None:
        """For the next CTA: memory is as undefined as at first (and filled with NaN)."""
        self.words[:] = 0xFFFFFFFF
        self.valid[:] = False
        self.writer[:] = -1
        self.write_stamp[:] = 0
        self.read_stamp[:] = 0
        self.clocks.reset()
        self.landing[:] = False
        self.streaming[:] = 0
        self.any_streaming = False
        self.objects[:] = self.has_objects = False

    def release(self, warps: np.ndarray) -> np.ndarray:
        """Return what these warps have done and seen; their later accesses are not part of it."""
        return self.clocks.release(warps)

    def acquire(self, warps: np.ndarray, known: np.ndarray) -> None:
        """Let warps know what others released."""
        self.clocks.acquire(warps, known)

    def barrier(self) -> None:
        """Let all warps know everything."""
        self.clocks.barrier()

    def index(self, addr: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Byte addresses, checked, as int64."""
        a = addr.astype(np.int64)
        bad = (a < self.BASE) | (a + size > self.end)
        if bad.any():
            n = int(np.argmax(bad))
            raise Hazard(
                "address",
                f"thread {threads[n]}: {size} shared bytes at {a[n] - self.BASE}, which has {self.end - self.BASE}",
            )
        if (a & (size - 1)).any():
            n = int(np.argmax((a & (size - 1)) != 0))
            raise Hazard("alignment", f"thread {threads[n]}: {size} shared bytes at {a[n] - self.BASE}")
        if self.has_objects:
            bad = self.objects[a >> 2] | self.objects[(a + size - 1) >> 2]
            if bad.any():
                n = int(np.argmax(bad))
                raise Hazard("mbarrier", f"thread {threads[n]} accesses shared byte {a[n] - self.BASE} of an mbarrier")
        return a

    def begin_copy(self, words: np.ndarray) -> None:
        """Note that a copy to words is under way."""
        if self.check:
            self.landing[words] = True

    def end_copy(self, words: np.ndarray) -> None:
        """Note that it has taken effect."""
        self.landing[words] = False

    def begin_stream(self, words: np.ndarray) -> None:
        """Note that something asynchronous reads words (each once) from now on."""
        self.streaming[words] += 1
        self.any_streaming = True

    def end_stream(self, words: np.ndarray, warps: np.ndarray) -> None:
        """Note that it has read them, to the knowledge of ``warps``, which broadcast with words."""
        self.streaming[words] -= 1
        if self.check:
            self.read_stamp[warps, words] = self.clock[warps, warps]

    def read(self, words: np.ndarray, warp: np.ndarray, generic: bool = True) -> None:
        """Warps `warp` [n] (or broadcast) read `words` [n, k]."""
        if not self.check:
            return
        if not self.valid[words].all():
            if self.landing[words].any():
                self._fail("async", "reads what a cp.async under way writes", words, self.landing[words], warp)
            self._fail("uninitialised", "reads shared memory that nothing wrote", words, ~self.valid[words], warp)
        if self.landing[words].any():
            self._fail("async", "reads what a cp.async under way writes", words, self.landing[words], warp)
        bad = self.write_stamp[words] > self.clock[warp, self.writer[words]]
        if bad.any():
            self._fail("race", "reads what another warp wrote with no barrier between", words, bad, warp)
        if not generic:
            self._check_proxy(words, warp, "reads")
        self.read_stamp[warp, words] = self.clock[warp, warp]

    def _check_proxy(self, words: np.ndarray, warp: np.ndarray, does: str) -> None:
        """Check that what the generic proxy wrote is fenced, to the knowledge of ``warp``."""
        writer = self.writer[words]
        late = self.write_stamp[words] > self.clock[warp, writer + self.clocks.agents]
        bad = (writer >= 0) & (writer < self.warps) & late
        if bad.any():
            what = f"{does} what st.shared or cp.async wrote with no fence.proxy.async between"
            self._fail("proxy", what, words, bad, warp)

    def write_async(self, words: np.ndarray, warp: np.ndarray) -> None:
        """Check a write through the async proxy, before it happens."""
        self.write(words, warp, None)
        if self.check:
            self._check_proxy(words, warp, "overwrites")

    def write(self, words: np.ndarray, warp: np.ndarray, values: np.ndarray | None, half: int = 3) -> None:
        """Before a write of `values` [n, k] (None: not known yet) to `words` [n, k]."""
        if not self.check:
            return
        if self.any_streaming and self.streaming[words].any():
            self._fail("async", "writes what a wgmma under way reads", words, self.streaming[words] > 0, warp)
        if self.landing[words].any():
            self._fail("async", "writes what a cp.async under way writes", words, self.landing[words], warp)
        fresh = self.write_stamp[words] > self.clock[warp, self.writer[words]]
        reads = (self.read_stamp[:, words] > np.moveaxis(self.clock[warp], -1, 0)[: self.warps]).any(0)
        if fresh.any() or reads.any():
            if half != 3:
                fresh &= (self.write_half[words] & half) != 0
            bad = fresh | reads
            if values is not None and half == 3:
                bad &= self.words[words] != values
            if bad.any():
                what = "reads" if (bad & reads).any() else "writes"
                self._fail("race", f"writes what another warp {what} with no barrier between", words, bad, warp)

    def landed(self, words: np.ndarray, values: np.ndarray, agent: int, stamp: int) -> None:
        """A bulk copy of mbarrier `agent` has written; those who wait for its phase `stamp` may read."""
        self.landing[words] = False
        self.words[words] = values
        self.valid[words] = True
        self.writer[words] = self.warps + agent
        self.write_stamp[words] = stamp

    def wrote(self, words: np.ndarray, warp: np.ndarray, half: int = 3) -> None:
        """After a write."""
        self.valid[words] = True
        if self.check:
            self.writer[words] = warp
            self.write_stamp[words] = self.clock[warp, warp]
            self.write_half[words] = half

    def _fail(self, kind: str, message: str, words: np.ndarray, bad: np.ndarray, warp: np.ndarray) -> None:
        words, bad, warp = np.broadcast_arrays(words, bad, warp)
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        word, who = int(words[at]), int(warp[at])
        readers = [w for w in range(self.warps) if self.read_stamp[w, word] > self.clock[who, w]]
        raise Hazard(
            kind,
            f"warp {who} {message}: shared byte {word * 4 - self.BASE} ({int(bad.sum())} words; last "
            f"writer warp {int(self.writer[word])}, unordered readers {readers})",
        )
