"""Who accessed global memory when: races between warps, of one CTA or of several."""

from __future__ import annotations

import numpy as np

from .clocks import Clocks
from .hazard import Hazard


class Shadow:
    """The last write and the last reads by two warps of each unit of a range of memory, in one launch.

    A warp goes by a number over all CTAs, above 0, and below 0 where its access was strong: an atomic operation, or a
    load or store that is volatile, relaxed, acquire or release. Strong accesses may meet each other. Any other order
    comes from barriers of the CTA, or from a release that an acquire has seen.
    """

    def __init__(self, units: int) -> None:
        self.writer = np.zeros(units, np.int32)
        self.write_stamp = np.zeros(units, np.int32)
        self.write_line = np.zeros(units, np.int32)
        self.reader = np.zeros(units, np.int32)
        self.read_stamp = np.zeros(units, np.int32)
        self.reader_before = np.zeros(units, np.int32)  # the last one that is another
        self.stamp_before = np.zeros(units, np.int32)
        self.written = self.was_read = False

    def clear(self) -> None:
        """Forget all, before a launch."""
        self.writer[:] = 0
        self.reader[:] = 0
        self.reader_before[:] = 0
        self.written = self.was_read = False


class Order:
    """What the CTA whose turn it is knows of other accesses; ``number`` counts CTAs from 1."""

    def __init__(self) -> None:
        self.number, self.grid = 0, (1, 1, 1)
        self.clocks = Clocks(1)

    def read(self, shadow: Shadow, units: np.ndarray, threads: np.ndarray, strong: bool) -> tuple | None:
        """Note a read of units [n, k] by threads [n]; return the first race, or None."""
        warp = (threads // 32)[:, None]
        if shadow.written:
            writer = shadow.writer[units]
            bad = self._unordered(writer, shadow.write_stamp[units], warp, strong)
            if bad is not None:
                return self._first(bad, units, threads, shadow, writer, "wrote")
        me = self.number * self.clocks.warps + warp
        me = np.broadcast_to(-me if strong else me, units.shape)
        prior = shadow.reader[units]
        another = (prior != me) & (prior != 0)
        if another.any():
            at = units[another]
            shadow.reader_before[at], shadow.stamp_before[at] = prior[another], shadow.read_stamp[at]
        shadow.reader[units] = me
        shadow.read_stamp[units] = self.clocks.known[warp, warp]
        shadow.was_read = True
        return None

    def write(
        self, shadow: Shadow, units: np.ndarray, threads: np.ndarray, strong: bool, same: np.ndarray | None, line: int
    ) -> tuple | None:
        """Note a write; ``same`` says where it changes nothing, which is harmless within a CTA."""
        warp = (threads // 32)[:, None]
        for what, has, who, when in (
            ("wrote", shadow.written, shadow.writer, shadow.write_stamp),
            ("read", shadow.was_read, shadow.reader, shadow.read_stamp),
            ("read", shadow.was_read, shadow.reader_before, shadow.stamp_before),
        ):
            if not has:
                continue
            prior = who[units]
            bad = self._unordered(prior, when[units], warp, strong)
            if bad is not None and same is not None:
                bad &= ~same | (np.abs(prior) // self.clocks.warps != self.number)
            if bad is not None and bad.any():
                return self._first(bad, units, threads, shadow, prior, what)
        me = self.number * self.clocks.warps + warp
        shadow.writer[units] = -me if strong else me
        shadow.write_stamp[units] = self.clocks.known[warp, warp]
        shadow.write_line[units] = line
        shadow.written = True
        return None

    def _unordered(self, prior: np.ndarray, stamp: np.ndarray, warp: np.ndarray, strong: bool) -> np.ndarray | None:
        """Return where an earlier access is not known to ``warp``, or None if nowhere."""
        warps = self.clocks.warps
        who = np.abs(prior)
        other = (prior > 0) if strong else (prior != 0)
        other &= who != self.number * warps + warp
        if not other.any():
            return None
        cta, its = who // warps, who % warps
        foreign = other & (cta != self.number)
        bad = other & ~foreign & (stamp > self.clocks.known[warp, its])
        if foreign.any():
            bad |= foreign & ~self._heard(foreign, cta, its, stamp, np.broadcast_to(warp, prior.shape))
        return bad if bad.any() else None

    def _heard(
        self, foreign: np.ndarray, cta: np.ndarray, its: np.ndarray, stamp: np.ndarray, warp: np.ndarray
    ) -> np.ndarray:
        """Return where a warp has heard of an access by another CTA."""
        known = np.zeros(foreign.shape, bool)
        if not any(self.clocks.heard):
            return known
        for mine in np.unique(warp[foreign]):
            for other, times in self.clocks.foreign(int(mine)).items():
                known |= (warp == mine) & (cta == other) & (stamp <= times[its])
        return known

    def place(self, number: int) -> tuple[int, int, int]:
        """Return the coordinates of a CTA by its number."""
        at = number - 1
        return at % self.grid[0], at // self.grid[0] % self.grid[1], at // (self.grid[0] * self.grid[1])

    def _first(
        self,
        bad: np.ndarray,
        units: np.ndarray,
        threads: np.ndarray,
        shadow: Shadow,
        prior: np.ndarray,
        what: str,
    ) -> tuple[int, str]:
        """Return the first unit of a race, and a text of who takes part."""
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        who, unit = abs(int(prior[at])), int(units[at])
        cta, warp = divmod(who, self.clocks.warps)
        other = f"warp {warp}" + ("" if cta == self.number else f" of CTA {self.place(cta)}")
        line = f" (PTX line {shadow.write_line[unit]})" if what == "wrote" else ""
        return unit, f"warp {int(threads[at[0]]) // 32}|which {other} {what}{line} with nothing that orders them"


def race(found: tuple, does: str, name: str) -> Hazard:
    """Return the error of a race that was found; ``name``: of the element."""
    warp, rest = found[1].split("|")
    return Hazard("race", f"{warp} {does} {name}, {rest}")
