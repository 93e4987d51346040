"""Global memory: the storage of tensors, by address."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .clocks import Clocks, History
from .global_races import Order, Shadow, race
from .hazard import Hazard
from .under_way import UnderWay

if TYPE_CHECKING:
    import torch

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Elements of 16 bytes are copied as pairs of fp64, which changes no bit.
_WIDE = {**UNSIGNED, 16: np.complex128}


@dataclass(frozen=True)
class Part:
    """A tensor, or bytes of it; strides in bytes."""

    name: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int  # of an element

    @property
    def end(self) -> int:
        """Return the address after the last element."""
        return self.first + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + self.size

    def dense(self) -> bool:
        """Return whether every byte between the first element and the last is the tensor's."""
        count = int(np.prod([n for n, s in zip(self.shape, self.strides, strict=True) if s]))
        return count * self.size == self.end - self.first

    def units(self, low: int, unit: int) -> np.ndarray:
        """Return the units of all elements, counted from an address."""
        at = np.array([(self.first - low) // unit])
        for n, s in zip(self.shape, self.strides, strict=True):
            at = np.unique((at[:, None] + np.arange(n if s else 1) * (s // unit)).ravel())
        return (at[:, None] + np.arange(self.size // unit)).ravel()

    def index(self, address: int) -> str:
        """Return the element at an address by name and index."""
        left, index = address - self.first, [0] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda a: -self.strides[a]):
            if self.strides[axis] and self.shape[axis] > 1:
                index[axis], left = divmod(left, self.strides[axis])
        return f"{self.name}[{', '.join(map(str, index))}]" + (f" byte {left}" if left else "")


@dataclass(eq=False)
class Region:
    """Memory that tensors cover, of which several may share a storage."""

    parts: list[Part]
    first: int
    end: int
    defined: bool  # before anything writes to it
    unit: int = 1  # bytes that are watched together
    low: int = 0
    views: dict[int, np.ndarray] = field(default_factory=dict)
    own: np.ndarray | None = None  # [units], where not every unit belongs to a tensor
    written: np.ndarray | None = None  # [units], where the tensors are undefined before
    shadow: Shadow | None = None  # once something may write to it

    def build(self) -> None:
        """Take hold of the memory."""
        self.low = self.first & ~15
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * (((self.end + 15) & ~15) - self.low)).from_address(self.low))
        self.views = {size: raw.view(kind) for size, kind in _WIDE.items()}
        aligned = self.first - self.low
        for part in self.parts:
            aligned |= part.size | (part.first - self.low)
            for stride in part.strides:
                aligned |= stride
        self.unit = min(aligned & -aligned, 4)
        units = len(raw) // self.unit
        if not (any(p.dense() and (p.first, p.end) == (self.first, self.end) for p in self.parts)):
            self.own = np.zeros(units, bool)
            for part in self.parts:
                self.own[part.units(self.low, self.unit)] = True
            if self.own[(self.first - self.low) // self.unit : (self.end - self.low) // self.unit].all():
                self.own = None
        self.written = None if self.defined else np.zeros(units, bool)

    def units(self, addr: np.ndarray, size: int) -> np.ndarray:
        """Return the units [n, k] of ``size`` bytes at each address."""
        first = (addr - np.uint64(self.low)).astype(np.int64) // self.unit
        return first[:, None] + np.arange(max(size // self.unit, 1))

    def watch(self) -> Shadow:
        """Return the memory's shadow, made when it is first asked for."""
        if self.shadow is None:
            self.shadow = Shadow(len(self.views[1]) // self.unit)
        return self.shadow

    def name(self, address: int) -> str:
        """Return the element at an address by its tensor's name and its index, or by the nearest tensor."""
        for part in self.parts:
            if part.first <= address < part.end:
                return part.index(address)
        return f"{self.parts[0].name} {address - self.first:+} bytes"


class Global:
    """Tensors by address. An access must lie within one of them, and meet no other that nothing orders.

    Attributes:
        order: the CTA whose turn it is, and what it knows of other accesses.
        changes: how often bytes changed, so that waiting CTAs can tell whether there is hope.
        told: address -> what those know who acquire what was last released there.
        under_way: the asynchronous copies that read or write global memory now.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Part, bool]] = []
        self._regions: list[Region] | None = None
        self._firsts: list[int] = []
        self._near: Region | None = None
        self.order = Order()
        self.check_owner = True
        self.changes = 0
        self.told: dict[int, History] = {}
        self.scoped: dict[int, int] = {}  # address -> the CTA to which the last access with .cta scope belongs
        self.under_way = UnderWay()
        self.line: Callable[[], int] = lambda: 0

    @property
    def cta(self) -> int:
        """Return the number of the CTA whose turn it is, from 1."""
        return self.order.number

    def add(self, first: int, size: int, name: str, element: int = 1) -> None:
        """Add bytes, as elements of so many of them."""
        self._add(Part(name, first, (size // element,), (element,), element), True)

    def add_tensor(self, tensor: torch.Tensor, name: str, *, defined: bool = True) -> None:
        """Add the elements of a tensor, and no bytes between them; without ``defined`` they are to be written first."""
        if tensor.numel():
            size = tensor.element_size()
            strides = tuple(s * size for s in tensor.stride())
            self._add(Part(name, tensor.data_ptr(), tuple(tensor.shape), strides, size), defined)

    def _add(self, part: Part, defined: bool) -> None:
        self._parts.append((part, defined))
        self._regions = None

    def enter(self, number: int, clocks: Clocks, grid: tuple[int, int, int]) -> None:
        """Let a CTA have its turn."""
        self.order.number, self.order.clocks, self.order.grid = number, clocks, grid

    def next_launch(self) -> None:
        """Forget who accessed what."""
        self.under_way.clear()
        self.told, self.scoped = {}, {}
        for region in self._regions or ():
            if region.shadow is not None:
                region.shadow.clear()

    def watch(self, addresses: list[int] | None) -> None:
        """Watch the tensors at these addresses for races from now on (None: all), as something may write to them."""
        for region in self._built():
            if addresses is None or any(region.first <= a < region.end for a in addresses):
                region.watch()

    def name(self, address: int) -> str:
        """Return the element at an address."""
        regions = self._built()
        near = min(regions, key=lambda r: max(r.first - address, address - r.end + 1, 0), default=None)
        return hex(address) if near is None else near.name(address)

    def _built(self) -> list[Region]:
        if self._regions is None:
            regions: list[Region] = []
            for part, defined in sorted(self._parts, key=lambda x: x[0].first):
                if regions and part.first < regions[-1].end:  # views of one storage
                    last = regions[-1]
                    last.parts.append(part)
                    last.end, last.defined = max(last.end, part.end), last.defined or defined
                else:
                    regions.append(Region([part], part.first, part.end, defined))
            for region in regions:
                region.build()
            self._regions, self._firsts, self._near = regions, [r.first for r in regions], None
        return self._regions

    def _locate(self, addr: np.ndarray, size: int, threads: np.ndarray) -> Iterator[tuple[Any, Region, np.ndarray]]:
        """Yield the regions of addresses, each with which of them lie there."""
        if (addr & np.uint64(size - 1)).any():
            n = int(np.argmax((addr & np.uint64(size - 1)) != 0))
            raise Hazard("alignment", f"thread {threads[n]}: {size} bytes at {self.name(int(addr[n]))}, {addr[n]:#x}")
        regions = self._built()
        low, high = int(addr.min()), int(addr.max()) + size
        near = self._near
        if near is None or low < near.first or high > near.end:
            at = bisect.bisect_right(self._firsts, low) - 1
            if at < 0 or high > regions[at].end:
                yield from self._split(addr, size, threads)
                return
            near = self._near = regions[at]
        if near.own is not None and not near.own[near.units(addr, size)].all():
            self._outside(addr, size, threads, ~near.own[near.units(addr, size)].all(1))
        yield slice(None), near, addr

    def _split(self, addr: np.ndarray, size: int, threads: np.ndarray) -> Iterator[tuple[Any, Region, np.ndarray]]:
        regions = self._built()
        if not regions:
            raise Hazard("address", "no global memory is registered")
        where = np.searchsorted(np.array(self._firsts, np.uint64), addr, "right") - 1
        ends = np.array([r.end for r in regions], np.uint64)
        bad = (where < 0) | (addr + np.uint64(size) > ends[where])
        if bad.any():
            self._outside(addr, size, threads, bad)
        for each in np.unique(where):
            pick, region = where == each, regions[each]
            if region.own is not None and not region.own[region.units(addr[pick], size)].all():
                inside = region.own[region.units(addr[pick], size)].all(1)
                self._outside(addr[pick], size, threads[pick], ~inside)
            yield pick, region, addr[pick]

    def _outside(self, addr: np.ndarray, size: int, threads: np.ndarray, bad: np.ndarray) -> None:
        n = int(np.argmax(bad))
        a = int(addr[n])
        near = min(self._built(), key=lambda r: min(abs(a - r.first), abs(a - r.end)))
        names = "/".join(p.name for p in near.parts)
        gap = "between the elements of" if near.first <= a < near.end else "outside every tensor; the nearest is"
        raise Hazard(
            "address",
            f"thread {threads[n]}: {size} bytes at {a:#x} lie {gap} {names}, {near.first:#x} to {near.end:#x} "
            f"(offset {a - near.first}); {int(bad.sum())} threads",
        )

    def load(
        self, addr: np.ndarray, width: int, count: int, threads: np.ndarray, *, strong: bool = False
    ) -> np.ndarray:
        """Return [n, count] elements of ``width`` bytes, 1 to 8, that threads [n] read at ``addr``."""
        if self.under_way.any_writes:
            self.under_way.check(addr, width * count, False)
        out = None
        for pick, region, a in self._locate(addr, width * count, threads):
            if region.written is not None and not region.written[region.units(a, width * count)].all():
                bad = ~region.written[region.units(a, width * count)].all(1)
                self._undefined(region, a, threads[pick], bad)
            if region.shadow is not None and self.check_owner:
                found = self.order.read(region.shadow, region.units(a, width * count), threads[pick], strong)
                if found is not None:
                    raise race(found, "reads", region.name(region.low + found[0] * region.unit))
            values = self._peek(region, a, width, count)
            if isinstance(pick, slice):
                return values
            if out is None:
                out = np.empty((len(addr), count), UNSIGNED[width])
            out[pick] = values
        assert out is not None
        return out

    @staticmethod
    def _peek(region: Region, addr: np.ndarray, width: int, count: int) -> np.ndarray:
        step = min(width * count, 16)
        first = ((addr - np.uint64(region.low)) // np.uint64(step)).astype(np.int64)
        if width * count > 16:
            first = first[:, None] + np.arange(width * count // 16)
        return region.views[step][first].view(UNSIGNED[width]).reshape(-1, count)

    def _undefined(self, region: Region, addr: np.ndarray, threads: np.ndarray, bad: np.ndarray) -> None:
        n = int(np.argmax(bad))
        name = region.name(int(addr[n]))
        raise Hazard(
            "uninitialised", f"thread {threads[n]} reads {name}, which nothing wrote ({int(bad.sum())} threads)"
        )

    def store(self, addr: np.ndarray, values: np.ndarray, threads: np.ndarray, *, strong: bool = False) -> None:
        """Write the ``values`` [n, count] of threads [n] at ``addr``."""
        width, count = values.itemsize, values.shape[1]
        if self.under_way.any:
            self.under_way.check(addr, width * count, True)
        for pick, region, a in self._locate(addr, width * count, threads):
            part = values[pick]
            at = ((a - np.uint64(region.low)) // np.uint64(width)).astype(np.int64)[:, None] + np.arange(count)
            view = region.views[width]
            shadow = region.watch()
            if self.check_owner:
                units = region.units(a, width * count)
                same = None
                if shadow.written or shadow.was_read:
                    equal = view[at] == part
                    same = equal.all(1)[:, None] if units.shape != equal.shape else equal
                found = self.order.write(shadow, units, threads[pick], strong, same, self.line())
                if found is not None:
                    raise race(found, "writes", region.name(region.low + found[0] * region.unit))
            if region.written is not None:
                region.written[region.units(a, width * count)] = True
            if strong and (view[at] == part).all():
                continue
            self.changes += 1
            view[at] = part
            if (view[at] != part).any():
                n = int(np.argmax((view[at] != part).any(1)))
                name = region.name(int(a[n]))
                raise Hazard("race", f"two threads of one instruction store different values to {name}")

    def update(
        self,
        addr: np.ndarray,
        width: int,
        count: int,
        threads: np.ndarray,
        function: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Replace [n, count] elements, at addresses that all differ, by a function of them, as one; return the old."""
        old = self.load(addr, width, count, threads, strong=True).copy()
        self.store(addr, function(old).reshape(old.shape), threads, strong=True)
        return old
