"""cp.async.bulk: copies of boxes of tensors, or of bytes, that an mbarrier or a group of the thread waits for.

Missing: clusters (multicast, other CTAs' shared memory), im2col, gather and scatter, byte masks; and the check that
what st.global wrote is fenced before a bulk copy of the same launch reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..hazard import Hazard, UnknownInstruction
from ..ptx import Addr, Instruction, Operand, Vec, number
from ..shared_memory import Shared
from ..state import Cta, Mask, Step
from ..tensor_maps import TensorMap
from . import opcode
from .mbarrier import Transfer, complete, expect, issue, mbarrier_at
from .reductions import combine
from .tensormap import tensor_map_at

_HINT = "(L2::cache_hint)?"
_TILE = "tile?"


@dataclass(eq=False)
class Load(Transfer):
    """Data on its way to shared memory."""

    words: np.ndarray
    values: np.ndarray
    addresses: np.ndarray
    piece: int
    writes: bool = False
    reduces: bool = False

    def land(self, cta: Cta) -> None:
        """Put the data in place, and tell the mbarrier; until somebody waits for it, nobody knows."""
        self.bar.unseen.append((self.bar.phase, self))
        cta.shared.end_copy(self.words)
        cta.shared.landed(self.words, self.values, self.bar.agent, self.bar.land())
        self.bar.open = np.maximum(self.bar.open, self.known)
        expect(self.bar, -self.values.nbytes)
        complete(cta, self.bar)


@dataclass
class Place:
    """A range of shared memory, and where it belongs in global memory: pieces of equal size."""

    words: np.ndarray  # of shared memory, in the order of the bytes
    piece: int  # bytes
    numbers: np.ndarray  # which pieces of the words lie inside the tensor
    addresses: np.ndarray  # of those
    fill: np.ndarray | None = None  # bytes of what lies outside
    element: str = ""


@dataclass(eq=False)
class Store:
    """A copy or reduction from shared to global memory, of one thread."""

    ins: Instruction
    thread: int
    warp: int
    place: Place
    late: bool
    operation: str | None  # of a reduction
    element: str
    data: np.ndarray | None = None  # once it is read
    reading: bool = True  # until its thread knows that it was read
    written: bool = False
    writes: bool = True

    @property
    def addresses(self) -> np.ndarray:
        """Return the addresses of its pieces."""
        return self.place.addresses

    @property
    def piece(self) -> int:
        """Return the bytes of each."""
        return self.place.piece

    @property
    def reduces(self) -> bool:
        """Return whether it may meet others of its kind."""
        return self.operation is not None

    def read(self, cta: Cta) -> None:
        """Take the data from shared memory, once."""
        if self.data is None:
            self.data = np.ascontiguousarray(cta.shared.words[self.place.words])

    def done_reading(self, cta: Cta) -> None:
        """Let shared memory be written again, by those who know of this."""
        if self.reading:
            self.read(cta)
            self.reading = False
            cta.shared.end_stream(self.place.words, np.array(self.warp))

    def write(self, cta: Cta) -> None:
        """Put the data into global memory, once."""
        if self.written or not len(self.addresses):
            return
        self.read(cta)
        assert self.data is not None
        self.written = True
        kind = {16: "<u4", 8: "<u4", 4: "<u4", 2: "<u2", 1: "<u1"}[self.piece]
        values = self.data.reshape(-1).view(np.uint8).reshape(-1, self.piece)[self.place.numbers].view(kind)
        threads = np.full(len(values), self.thread)
        if self.operation is None:
            cta.memory.store(self.addresses, values, threads)
            return
        operation, element = self.operation, self.element
        width, count = values.itemsize, values.shape[1]
        with cta.memory.under_way.reduction(self.addresses, self.piece):
            cta.memory.update(
                self.addresses, width, count, threads, lambda old: combine(operation, element, old, values)
            )

    def done(self, cta: Cta) -> None:
        """Let its thread know that it is done."""
        self.done_reading(cta)
        cta.memory.under_way.end(self)
        self.write(cta)


@dataclass
class Stores:
    """The stores of one thread: since its last commit, and its committed groups."""

    open: list[Store]
    groups: list[list[Store]]


def _value(cta: Cta, operand: Operand, thread: int, kind: str = "s32") -> int:
    return int(np.broadcast_to(cta.src(operand, kind), cta.T)[thread])


def _check_within(cta: Cta, start: int, size: int) -> None:
    s = cta.shared
    if start < s.BASE or start + size > s.end:
        raise Hazard("address", f"a copy of {size} bytes at shared byte {start - s.BASE} of {s.end - s.BASE}")
    if s.has_objects and s.objects[start >> 2 : (start + size) >> 2].any():
        raise Hazard("mbarrier", f"a copy of {size} bytes at shared byte {start - s.BASE} meets an mbarrier")


def _threads(cta: Cta, mask: Mask) -> Iterator[int]:
    return iter(cta.tid.tolist() if mask is None else np.flatnonzero(mask).tolist())


def _box(cta: Cta, rank: int, tensor: Operand, thread: int) -> tuple[TensorMap, list[int]]:
    """Return the tensor map and the origin that ``[map, {coordinates}]`` names."""
    base, coordinates = tensor.items if isinstance(tensor, Vec) else (tensor, None)
    if not isinstance(coordinates, Vec):
        raise UnknownInstruction(f"operand {tensor}: expected a tensor map and coordinates")
    address = cta.address(base, 64)() if isinstance(base, Addr) else cta.src(base, "u64")
    box = tensor_map_at(cta, int(np.broadcast_to(address, cta.T)[thread]), thread)
    origin = [_value(cta, x, thread) for x in coordinates.items]
    if len(origin) != rank or len(box.shape) != rank:
        raise Hazard("address", f"a copy of rank {rank} by a tensor map of rank {len(box.shape)}")
    return box, origin


def _tensor_place(cta: Cta, rank: int, tensor: Operand, start: int, thread: int) -> Place:
    box, origin = _box(cta, rank, tensor, thread)
    if start % 128:
        raise Hazard("alignment", f"a box of a tensor at shared byte {start - Shared.BASE}, no multiple of 128")
    _check_within(cta, start, box.nbytes)
    piece, row, column, addresses = box.pieces(origin)
    numbers = row * (box.box[0] * box.size // piece) + column
    return Place(box.words(start), piece, numbers, addresses, box.fill(), box.element)


def _bytes_place(cta: Cta, start: int, address: int, size: int) -> Place:
    if start % 16 or address % 16 or size % 16:
        raise Hazard("alignment", f"{size} bytes, {address:#x}, shared byte {start - Shared.BASE}: multiples of 16")
    _check_within(cta, start, size)
    addresses = np.uint64(address) + np.arange(0, size, 16, dtype=np.uint64)
    return Place(np.arange(start >> 2, (start + size) >> 2), 16, np.arange(len(addresses)), addresses)


def _fetch(cta: Cta, place: Place, thread: int) -> np.ndarray:
    """Return the words that a place holds in global memory, and its fill where there is none."""
    raw = np.zeros(place.words.size * 4, np.uint8) if place.fill is None else place.fill.reshape(-1)
    if len(place.addresses):
        width = min(place.piece, 4)
        threads = np.full(len(place.addresses), thread)
        data = cta.memory.load(place.addresses, width, place.piece // width, threads)
        raw.reshape(-1, place.piece)[place.numbers] = np.ascontiguousarray(data).view(np.uint8)
    return raw.view(np.uint32).reshape(place.words.shape)


@opcode(
    f"cp async bulk tensor [1-5]d shared::(cluster|cta) global {_TILE} mbarrier::complete_tx::bytes {_HINT}",
    f"cp async bulk shared::(cluster|cta) global mbarrier::complete_tx::bytes {_HINT}",
)
def compile_load(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    rank = int(p[4][0]) if p[3] == "tensor" else 0
    target, bar_at = cta.address(o[0], 32), cta.address(o[2] if rank else o[3], 32)
    source = None if rank else cta.address(o[1], 64)

    def step(mask: Mask) -> None:
        s = cta.shared
        for t in _threads(cta, mask):
            bar = mbarrier_at(cta, int(np.broadcast_to(bar_at(), cta.T)[t]))
            warp = cta.warp[t : t + 1]
            bar.use(cta, warp, "async")
            start = int(np.broadcast_to(target(), cta.T)[t])
            if source is None:
                place = _tensor_place(cta, rank, o[1], start, t)
            else:
                place = _bytes_place(cta, start, int(source()[t]), _value(cta, o[2], t, "u32"))
            values = _fetch(cta, place, t)
            s.write_async(place.words, warp.reshape((1,) * place.words.ndim))
            s.begin_copy(place.words)
            known = s.clock[cta.warp[t]].copy()
            load = Load(ins, bar, known, place.words, values, place.addresses, place.piece)
            cta.memory.under_way.begin(load)
            issue(cta, load)

    return step


_OPERATIONS = "add|min|max|and|or|xor"


@opcode(
    f"cp async bulk tensor [1-5]d global shared::cta {_TILE} bulk_group {_HINT}",
    f"cp async bulk global shared::cta bulk_group {_HINT}",
    f"cp reduce async bulk tensor [1-5]d global shared::cta {_OPERATIONS} {_TILE} bulk_group {_HINT}",
    f"cp reduce async bulk global shared::cta bulk_group {_HINT} {_OPERATIONS} noftz? "
    "f16|bf16|f32|f64|u32|s32|u64|s64|b32|b64",
)
def compile_store(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    rank = next((int(x[0]) for x in p if x in ("1d", "2d", "3d", "4d", "5d")), 0)
    operation = next((x for x in p if x in _OPERATIONS.split("|")), None)
    source = cta.address(o[1], 32)
    target = None if rank else cta.address(o[0], 64)

    def step(mask: Mask) -> None:
        s, flight = cta.shared, cta.in_flight
        for t in _threads(cta, mask):
            start = int(np.broadcast_to(source(), cta.T)[t])
            if target is None:
                place = _tensor_place(cta, rank, o[0], start, t)
            else:
                place = _bytes_place(cta, start, int(target()[t]), _value(cta, o[2], t, "u32"))
            s.begin_stream(place.words, cta.warp[t].reshape((1,) * place.words.ndim))
            element = place.element or p[-1]
            store = Store(ins, t, int(cta.warp[t]), place, flight.late(), operation, element)
            if not store.late:
                store.write(cta)
            cta.memory.under_way.begin(store)
            flight.stores.setdefault(t, Stores([], [])).open.append(store)

    return step


@opcode(
    f"cp async bulk prefetch tensor [1-5]d L2 global {_TILE} {_HINT}",
    f"cp async bulk prefetch L2 global {_HINT}",
    "prefetch tensormap",
    "prefetch (param|const) tensormap",
)
def compile_prefetch(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Nothing is kept in L2 here; a box may lie where it will."""
    return lambda mask: None


@opcode("cp async bulk commit_group")
def compile_commit(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    def step(mask: Mask) -> None:
        # A thread's empty groups before its first store change nothing.
        for thread, stores in cta.in_flight.stores.items():
            if mask is None or mask[thread]:
                stores.groups.append(stores.open)
                stores.open = []

    return step


@opcode("cp async bulk wait_group read?")
def compile_wait(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    keep, only_reads = number(o[0].text), "read" in p

    def step(mask: Mask) -> None:
        for thread, stores in cta.in_flight.stores.items():
            if mask is not None and not mask[thread]:
                continue
            count = max(len(stores.groups) - keep, 0)
            for store in (x for group in stores.groups[:count] for x in group):
                if only_reads:
                    store.done_reading(cta)
                else:
                    store.done(cta)
            if not only_reads:
                del stores.groups[:count]

    return step


def finish(cta: Cta) -> None:
    """Write at the end of a CTA what its threads stored and need not wait for, if shared memory has been read."""
    for stores in cta.in_flight.stores.values():
        for store in (x for group in [*stores.groups, stores.open] for x in group):
            cta.current = store.ins
            if store.reading:
                raise Hazard("async", "the CTA ends while a bulk store may still read its shared memory")
            store.done(cta)
