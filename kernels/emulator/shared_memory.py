"""Shared memory of a CTA, with the state that finds races."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .clocks import Clocks, Lanes
from .hazard import Hazard

# What is known of a word. A word of which none of the bits that matter is set needs no further look.
UNWRITTEN, LANDING, STREAMING = 1, 2, 4  # a byte was never written; a copy is under way to it; something reads it
RECENT, READ = 8, 16  # written, or read, since the last barrier of all threads
BY_COPY = 32  # written by a copy that completes at an mbarrier
FINE, FINE_READ = 64, 128  # its bytes were written, or read, one by one


class Shared:
    """Shared memory by 4-byte words, with for each word who wrote and read it, and when by that warp's clock.

    A second write of the value that is already there is harmless and allowed. Words of which single bytes are written
    or read are watched byte by byte from then on. Lanes of one warp count as ordered while they run together; what
    they do after they branched is ordered by bar.warp.sync and by barriers alone.
    """

    BASE = 1024  # where Hopper starts a kernel's shared memory; swizzles repeat every 1024 bytes
    AGENTS = Clocks.AGENTS

    def __init__(self, size: int, warps: int) -> None:
        count = (self.BASE + size + 3) // 4
        self.raw = np.zeros(count * 4, np.uint8)
        self.words = self.raw.view(np.uint32)
        self.halves = self.raw.view(np.uint16)
        self.end = self.BASE + size
        self.warps = warps
        self.clocks = Clocks(warps)
        self.clock = self.clocks.known
        self.line: Callable[[], int] = lambda: 0  # of the instruction that runs
        self.check = True
        self.last_write = np.zeros(warps, np.int32)  # each warp's clock when it last wrote
        self.all_fenced = False  # all know that all that was written is fenced
        self.flags = np.full(count, UNWRITTEN, np.uint8)
        self.valid = np.zeros(count * 4, bool)
        self.streams = np.zeros(count, np.int16)  # so many operations under way read it
        self.was_atomic = np.zeros(count, bool)  # whether the last write was an atomic operation
        self.has_atomics = False
        self.objects, self.has_objects = np.zeros(count, bool), False  # words of mbarriers
        self.writer = np.zeros(count, np.int16)
        self.write_stamp = np.zeros(count, np.int32)  # the writer's clock at that time
        self.write_line = np.zeros(count, np.int32)
        self.read_stamp = np.zeros((warps, count), np.int32)  # each warp's clock when it last read
        # Of words written or read byte by byte; made when the first is.
        self.byte_mark = np.zeros(0, np.int32)  # of the last write: 256 stamp + writer
        self.step = 2  # bytes that are watched together
        self.byte_read = np.zeros((warps, 0), np.int32)
        self.split: np.ndarray | None = None  # [W], which warps' lanes do not run together now
        self.lanes = Lanes(count)

    def reset(self) -> None:
        """For the next CTA: memory is as undefined as at first (and filled with NaN)."""
        self.words[:] = 0xFFFFFFFF
        self.clocks.reset()
        self.flags[:] = UNWRITTEN
        self.valid[:] = False
        self.streams[:] = 0
        self.objects[:] = self.has_objects = False
        self.was_atomic[:] = self.has_atomics = False
        self.split, self.lanes.watches = None, False

    def release(self, warps: np.ndarray) -> np.ndarray:
        """Return what these warps have done and seen; their later accesses are not part of it."""
        return self.clocks.release(warps)

    def acquire(self, warps: np.ndarray, known: np.ndarray) -> None:
        """Let warps know what others released."""
        self.clocks.acquire(warps, known)

    def barrier(self) -> None:
        """Let all warps know everything."""
        self.clocks.barrier()
        self.flags &= 0xFF ^ (RECENT | READ)
        self._look_for_fences()

    def fence(self, warps: np.ndarray, whole: bool) -> None:
        """Fence between the proxies what these warps know; of their own, if lanes are missing, what the lanes share."""
        self.clocks.fence(warps, whole)
        self._look_for_fences()

    def _look_for_fences(self) -> None:
        fenced = self.clock[:, self.clocks.agents : self.clocks.agents + self.warps].min(0)
        self.all_fenced = bool((fenced >= self.last_write).all())

    def index(self, addr: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Return byte addresses as int64, after the check that ``size`` bytes there exist and are aligned."""
        a = addr.astype(np.int64)
        if a.min() < self.BASE or a.max() + size > self.end:
            bad = (a < self.BASE) | (a + size > self.end)
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

    # --- by words

    def read(self, words: np.ndarray, warp: np.ndarray, threads: np.ndarray | None = None) -> None:
        """Check and note a read of ``words`` by ``warp``, arrays that broadcast."""
        if not self.check:
            return
        flags = self.flags[words]
        suspect = int(np.bitwise_or.reduce(flags, axis=None))
        if suspect & (UNWRITTEN | LANDING | RECENT | BY_COPY | FINE):
            self._check_read(words, warp, flags, suspect)
        self.flags[words] = flags | READ
        self.read_stamp[warp, words] = self.clock[warp, warp]
        if self.lanes.watches or self.split is not None:
            self._lanes(words, warp, threads, False)

    def _check_proxy(self, words: np.ndarray, warp: np.ndarray, does: str) -> None:
        """Check that what the generic proxy wrote is fenced, to the knowledge of ``warp``."""
        writer = self.writer[words]
        bad = (writer < self.warps) & (self.write_stamp[words] > self.clock[warp, writer + self.clocks.agents])
        if bad.any():
            what = f"{does} what st.shared or cp.async wrote with no fence.proxy.async between"
            self._fail("proxy", what, words, bad, warp)

    def write_async(self, words: np.ndarray, warp: np.ndarray) -> None:
        """Check a write through the async proxy, before it happens."""
        self.write(words, warp, None)
        if self.check and not self.all_fenced:
            self._check_proxy(words, warp, "overwrites")

    def _check_read(self, words: np.ndarray, warp: np.ndarray, flags: np.ndarray, suspect: int) -> None:
        if suspect & LANDING:
            self._fail("async", "reads what a copy under way writes", words, (flags & LANDING) > 0, warp)
        if suspect & UNWRITTEN:
            self._fail("uninitialised", "reads shared memory that nothing wrote", words, (flags & UNWRITTEN) > 0, warp)
        bad = self._unordered_write(words, warp, flags, suspect)
        if bad.any():
            self._fail("race", "reads what another warp wrote with no barrier between", words, bad, warp)

    def _unordered_write(self, words: np.ndarray, warp: np.ndarray, flags: np.ndarray, suspect: int) -> np.ndarray:
        """Return where the last write is not known to ``warp``."""
        late = self.write_stamp[words] > self.clock[warp, self.writer[words]]
        bad = late & ((flags & (RECENT | BY_COPY)) > 0)
        if suspect & FINE:
            mark = self.byte_mark[words[..., None] * 4 + np.arange(0, 4, self.step)]
            late = mark >> 8 > self.clock[np.asarray(warp)[..., None], mark & 255]
            bad = np.where(flags & FINE, late.any(-1), bad)
        return bad

    def _unordered_read(self, words: np.ndarray, warp: np.ndarray, flags: np.ndarray, suspect: int) -> np.ndarray:
        """Return where a read by another warp is not known to ``warp``."""
        known = np.moveaxis(self.clock[warp], -1, 0)[: self.warps]
        bad = (self.read_stamp[:, words] > known).any(0) & ((flags & READ) > 0)
        if suspect & FINE_READ:
            at = words[..., None] * 4 + np.arange(0, 4, self.step)
            bad = bad | (((flags & FINE_READ) > 0) & (self.byte_read[:, at] > known[..., None]).any((0, -1)))
        return bad

    def write(
        self,
        words: np.ndarray,
        warp: np.ndarray,
        values: np.ndarray | None,
        threads: np.ndarray | None = None,
    ) -> None:
        """Check a write of ``values`` (None: not known yet) to ``words`` by ``warp``, before it happens."""
        if not self.check:
            return
        flags = self.flags[words]
        suspect = int(np.bitwise_or.reduce(flags, axis=None))
        if suspect & (STREAMING | LANDING):
            self._check_under_way(words, warp, flags)
        if suspect & (RECENT | READ | BY_COPY | FINE | FINE_READ):
            bad = reads = np.zeros((), bool)
            if suspect & (READ | FINE_READ):
                bad = reads = self._unordered_read(words, warp, flags, suspect)
            if suspect & (RECENT | BY_COPY | FINE):
                bad = bad | self._unordered_write(words, warp, flags, suspect)
            if values is not None:
                bad &= self.words[words] != values
            if bad.any():
                self._fail_write(words, warp, bad, reads)
        if self.lanes.watches or self.split is not None:
            self._lanes(words, warp, threads, True, None if values is None else self.words[words] == values)

    def _check_under_way(self, words: np.ndarray, warp: np.ndarray, flags: np.ndarray) -> None:
        if (flags & STREAMING).any():
            self._fail("async", "writes what a copy or wgmma under way reads", words, (flags & STREAMING) > 0, warp)
        self._fail("async", "writes what a copy under way writes", words, (flags & LANDING) > 0, warp)

    def _fail_write(self, words: np.ndarray, warp: np.ndarray, bad: np.ndarray, reads: np.ndarray) -> None:
        what = "reads" if (bad & reads).any() else "wrote"
        self._fail("race", f"writes what another warp {what} with no barrier between", words, bad, warp)

    def wrote(self, words: np.ndarray, warp: np.ndarray) -> None:
        """Note a write that has happened."""
        if self.check:
            self.valid.view(np.uint32)[words] = 0x01010101
            self.flags[words] = RECENT
            self.writer[words] = warp
            self.write_stamp[words] = self.clock[warp, warp]
            self.write_line[words] = self.line()
            self._note_writers(warp)
            if self.has_atomics:
                self.was_atomic[words] = False

    def atomic(self, words: np.ndarray, warp: np.ndarray, threads: np.ndarray) -> None:
        """Check an atomic operation, which may meet others: it is a read and a write."""
        self.has_atomics = True
        if not self.check:
            return
        flags = self.flags[words]
        if (flags & (STREAMING | LANDING)).any():
            self._check_under_way(words, warp, flags)
        if (flags & UNWRITTEN).any():
            self._fail("uninitialised", "reads shared memory that nothing wrote", words, (flags & UNWRITTEN) > 0, warp)
        suspect = int(np.bitwise_or.reduce(flags, axis=None))
        bad = self._unordered_write(words, warp, flags, suspect) & ~self.was_atomic[words]
        reads = self._unordered_read(words, warp, flags, suspect)
        if (bad | reads).any():
            self._fail_write(words, warp, bad | reads, reads)

    # --- by bytes, of elements of 1 or 2 bytes at byte addresses ``at``

    def read_bytes(self, at: np.ndarray, size: int, warp: np.ndarray, threads: np.ndarray | None = None) -> None:
        """Check and note a read of elements smaller than a word."""
        if not self.check:
            return
        words, part = at >> 2, self._parts(at, size)
        flags = self.flags[words]
        suspect = int(np.bitwise_or.reduce(flags, axis=None))
        if suspect & LANDING:
            self._fail("async", "reads what a copy under way writes", words, (flags & LANDING) > 0, warp)
        if suspect & UNWRITTEN and not self.valid[at + (size - 1)].all():
            bad = ~self.valid[at]
            self._fail("uninitialised", "reads shared memory that nothing wrote", words, bad, warp)
        if suspect & (RECENT | BY_COPY | FINE):
            bad = self._unordered_bytes(words, part, warp, flags)
            if bad.any():
                self._fail("race", "reads what another warp wrote with no barrier between", words, bad, warp)
        self.flags[words] = flags | FINE_READ
        self.byte_read[warp[..., None], part] = self.clock[warp, warp][..., None]
        if self.lanes.watches or self.split is not None:
            self._lanes(words, warp, threads, False)

    def _parts(self, at: np.ndarray, size: int) -> np.ndarray:
        """Return which bytes stand for elements [n, k, ...]: one of each two until single bytes are accessed."""
        if not len(self.byte_mark):
            self.byte_mark = np.zeros(len(self.raw), np.int32)
            self.byte_read = np.zeros((self.warps, len(self.raw)), np.int32)
        if size < self.step:
            self.step = 1
            self.byte_mark[1::2], self.byte_read[:, 1::2] = self.byte_mark[::2], self.byte_read[:, ::2]
        return at[..., None] + np.arange(0, size, self.step)

    def _unordered_bytes(self, words: np.ndarray, part: np.ndarray, warp: np.ndarray, flags: np.ndarray) -> np.ndarray:
        mark = self.byte_mark[part]
        bad = (mark >> 8 > self.clock[warp[..., None], mark & 255]).any(-1)
        if not (flags & FINE).all():
            coarse = self.write_stamp[words] > self.clock[warp, self.writer[words]]
            coarse &= (flags & (RECENT | BY_COPY)) > 0
            bad = np.where(flags & FINE, bad, coarse)
        return bad

    def write_bytes(
        self, at: np.ndarray, size: int, warp: np.ndarray, values: np.ndarray, threads: np.ndarray | None = None
    ) -> None:
        """Check a write of elements smaller than a word, before it happens."""
        if not self.check:
            return
        words, part = at >> 2, self._parts(at, size)
        flags = self.flags[words]
        suspect = int(np.bitwise_or.reduce(flags, axis=None))
        if suspect & (STREAMING | LANDING):
            self._check_under_way(words, warp, flags)
        reads = bad = np.zeros(words.shape, bool)
        if suspect & (READ | FINE_READ):
            known = np.moveaxis(self.clock[warp], -1, 0)[: self.warps]
            late = (self.byte_read[:, part] > known[..., None]).any((0, -1)) & ((flags & FINE_READ) > 0)
            bad = reads = late | ((self.read_stamp[:, words] > known).any(0) & ((flags & READ) > 0))
        if suspect & (RECENT | BY_COPY | FINE):
            bad = bad | self._unordered_bytes(words, part, warp, flags)
        if bad.any() or self.lanes.watches or self.split is not None:
            same = (self.halves if size == 2 else self.raw)[at // size] == values
            if (bad & ~same).any():
                self._fail_write(words, warp, bad & ~same, reads)
            if self.lanes.watches or self.split is not None:
                self._lanes(words, warp, threads, True, same)

    def wrote_bytes(self, at: np.ndarray, size: int, warp: np.ndarray) -> None:
        """Note a write of elements smaller than a word that has happened."""
        if not self.check:
            return
        words, part = at >> 2, self._parts(at, size)
        flags, now = self.flags[words], self.clock[warp, warp]
        if not (flags & FINE).all():
            coarse = words[(flags & FINE) == 0]
            # Where nothing was written since all knew of it, the time before time.
            known = (self.flags[coarse] & (RECENT | BY_COPY)) == 0
            mark = np.where(known, 0, self.write_stamp[coarse]) << 8 | self.writer[coarse]
            self.byte_mark[coarse[..., None] * 4 + np.arange(0, 4, self.step)] = mark[..., None]
        if size == 2:
            self.valid.view(np.uint16)[at >> 1] = 0x0101
        else:
            self.valid[at] = True
        self.byte_mark[part] = (now << 8 | warp)[..., None]
        unwritten = (self.valid.view(np.uint32)[words] != 0x01010101).view(np.uint8)
        self.flags[words] = (flags & (READ | FINE_READ)) | (RECENT | FINE) | unwritten
        self.writer[words] = warp
        self.write_stamp[words] = now
        self.write_line[words] = self.line()
        self._note_writers(warp)

    def _note_writers(self, warp: np.ndarray) -> None:
        self.all_fenced = False
        self.last_write[warp] = self.clock[warp, warp]

    # --- what is asynchronous

    def begin_copy(self, words: np.ndarray) -> None:
        """Note that a copy to words is under way."""
        if self.check:
            self.flags[words] |= LANDING

    def end_copy(self, words: np.ndarray) -> None:
        """Note that it has taken effect."""
        self.flags[words] &= 0xFF ^ LANDING

    def landed(self, words: np.ndarray, values: np.ndarray, agent: int, stamp: int) -> None:
        """Put in place what a copy of mbarrier ``agent`` wrote; those who wait for its phase ``stamp`` may read."""
        self.words[words] = values
        self.valid.view(np.uint32)[words] = 0x01010101
        self.flags[words] = BY_COPY
        self.writer[words] = self.warps + agent
        self.write_stamp[words] = stamp
        self.write_line[words] = self.line()

    def begin_stream(self, words: np.ndarray, warps: np.ndarray) -> None:
        """Check that ``warps`` may let something asynchronous read words, each once, which it does from now on."""
        flags = self.flags[words]
        if self.check:
            suspect = int(np.bitwise_or.reduce(flags, axis=None))
            if suspect & (UNWRITTEN | LANDING | RECENT | BY_COPY | FINE):
                self._check_read(words, warps, flags, suspect)
            if not self.all_fenced:
                self._check_proxy(words, warps, "reads")
            if self.lanes.watches or self.split is not None:
                self._lanes(words, warps, None, False)
        self.streams[words] += 1
        self.flags[words] = flags | STREAMING

    def end_stream(self, words: np.ndarray, warps: np.ndarray) -> None:
        """Note that it has read them, to the knowledge of ``warps``, which broadcast with words."""
        left = self.streams[words] - 1
        self.streams[words] = left
        flags = (self.flags[words] & (0xFF ^ STREAMING)) | (READ if self.check else 0)
        if left.any():
            flags |= np.where(left > 0, STREAMING, 0).astype(np.uint8)
        self.flags[words] = flags
        if self.check:
            self.read_stamp[warps, words] = self.clock[warps, warps]

    def _lanes(
        self,
        words: np.ndarray,
        warp: np.ndarray,
        threads: np.ndarray | None,
        writes: bool,
        same: np.ndarray | None = None,
    ) -> None:
        """Check an access against those of other lanes of the warp; ``same``: where it changes nothing."""
        found = self.lanes.access(words, warp, threads, self.clock[warp, warp], self.split, writes, same)
        if found is not None:
            self._fail("race", found[1], words, found[0], warp)

    def _fail(self, kind: str, message: str, words: np.ndarray, bad: np.ndarray, warp: np.ndarray) -> None:
        words, bad, warp = np.broadcast_arrays(words, bad, warp)
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        word, who = int(words[at]), int(warp[at])
        text = f"warp {who} {message}: shared byte {word * 4 - self.BASE} ({int(bad.sum())} words)"
        if kind in ("race", "proxy"):
            by = int(self.writer[word])
            text += f", last written by {f'warp {by}' if by < self.warps else f'a copy of mbarrier {by - self.warps}'}"
            text += f" (PTX line {int(self.write_line[word])})"
            readers = [w for w in range(self.warps) if w != who and self.read_stamp[w, word] > self.clock[who, w]]
            text += f", read since by warps {readers}" if readers and "read" in message else ""
        raise Hazard(kind, text)
