"""cp.async.bulk: copies of boxes of tensors, or of bytes, that an mbarrier or a group of the thread waits for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..hazard import Hazard
from ..ptx import Addr, Instruction, Vec, number
from ..shared_memory import Shared
from ..tensor_maps import TensorMap
from .mbarrier import Transfer, complete, expect, issue, mbarrier_at

REFUSED = ("multicast", "cta_group", "im2col", "tile::", "shared::cluster.shared")


@dataclass
class Load(Transfer):
    """Data on its way to shared memory."""

    words: np.ndarray
    values: np.ndarray

    def land(self, cta) -> None:
        cta.shared.landed(self.words, self.values, self.bar.agent, self.bar.stamp())
        self.bar.open = np.maximum(self.bar.open, self.known)
        expect(self.bar, -self.values.nbytes)
        complete(cta, self.bar)


@dataclass
class Store:
    """A copy from shared to global memory, of one thread."""

    ins: Instruction
    thread: int
    warp: int
    words: np.ndarray  # of shared memory, in the order of the bytes
    addresses: np.ndarray  # of the pieces in global memory
    pieces: np.ndarray  # which those are of the words, in pieces
    piece: int  # bytes
    late: bool
    data: np.ndarray | None = None  # once it is read
    reading: bool = True  # until its thread knows that it was read
    written: bool = False

    def read(self, cta) -> None:
        """Take the data from shared memory, which may be written again from now on."""
        if self.data is None:
            self.data = np.ascontiguousarray(cta.shared.words[self.words])

    def done_reading(self, cta) -> None:
        """Let shared memory be written again, by those who know of this."""
        if not self.reading:
            return
        self.read(cta)
        self.reading, s = False, cta.shared
        s.streaming[self.words] -= 1
        if s.check:
            s.read_stamp[self.warp, self.words] = s.clock[self.warp, self.warp]

    def write(self, cta) -> None:
        if self.written:
            return
        self.read(cta)
        assert self.data is not None
        cta.current = self.ins
        kind = {16: "<u4", 8: "<u4", 4: "<u4", 2: "<u2", 1: "<u1"}[self.piece]
        values = self.data.reshape(-1).view(np.uint8).reshape(-1, self.piece)[self.pieces].view(kind)
        if len(values):
            cta.memory.store(self.addresses, values, np.full(len(values), self.thread))
        self.written = True


@dataclass
class Stores:
    """The stores of one thread: since its last commit, and its committed groups."""

    open: list[Store]
    groups: list[list[Store]]


def compile_bulk(cta, ins, p, o):
    text = ins.opcode
    if p[3] == "commit_group":
        return lambda m: _commit(cta, m)
    if p[3] == "wait_group":
        return lambda m: _wait(cta, m, number(o[0].text), "read" in p)
    if any(x in text for x in REFUSED) or p[0] != "cp" or p[2] != "bulk":
        raise NotImplementedError(text)
    rank = int(p[4][0]) if p[3] == "tensor" else 0
    if "mbarrier::complete_tx::bytes" in text:
        return _load(cta, ins, rank, o)
    if "bulk_group" in p:
        return _store(cta, ins, rank, o)
    raise NotImplementedError(text)


def tensor_map_at(cta, address: int) -> TensorMap:
    """Return the tensor map at a generic address: a parameter's."""
    for name, _ in cta.kernel.params:
        if cta.map_address(name) == address:
            return _unpacked(cta.param[name])
    raise Hazard("address", f"no parameter lies at {address:#x}, where a tensor map should be")


@functools.cache
def _unpacked(raw: bytes) -> TensorMap:
    return TensorMap.unpack(raw)


def _number_of(cta, operand, thread: int, kind: str = "s32") -> int:
    return int(np.broadcast_to(cta.src(operand, kind), cta.T)[thread])


def _box(cta, rank: int, tensor: Vec, thread: int, start: int):
    """Return a box's map and origin, and its words in shared memory."""
    base = tensor.items[0]
    address = cta.src(base, "u64") if not isinstance(base, Addr) else cta.address(base, 64)()
    box = tensor_map_at(cta, int(np.broadcast_to(address, cta.T)[thread]))
    origin = [_number_of(cta, x, thread) for x in tensor.items[1].items]
    if len(origin) != rank or len(box.shape) != rank:
        raise Hazard("address", f"a copy of rank {rank} by a tensor map of rank {len(box.shape)}")
    if start % 128:
        raise Hazard("alignment", f"a box of a tensor at shared byte {start - Shared.BASE}, no multiple of 128")
    _within(cta, start, box.bytes)
    return box, origin, box.words(start)


def _within(cta, start: int, size: int) -> None:
    s = cta.shared
    if start < s.BASE or start + size > s.end:
        raise Hazard("address", f"{size} bytes at shared byte {start - s.BASE} of {s.end - s.BASE}")


def _bytes(cta, ins, start: int, address: int, size: int) -> np.ndarray:
    """Check a copy of bytes; return its words in shared memory."""
    if start % 16 or address % 16 or size % 16:
        raise Hazard(
            "alignment", f"{size} bytes at {address:#x} and shared byte {start - Shared.BASE}: multiples of 16"
        )
    _within(cta, start, size)
    return np.arange(start >> 2, (start + size) >> 2)


def _fetch(cta, box: TensorMap, origin: list[int], thread: int) -> np.ndarray:
    """Return a box's words, [rows, words of a row]."""
    raw = box.fill()
    piece, row, column, addresses = box.pieces(origin)
    if len(row):
        width = min(piece, 4)
        data = cta.memory.load(addresses, width, piece // width, np.full(len(row), thread))
        raw.reshape(len(raw), -1, piece)[row, column] = np.ascontiguousarray(data).view(np.uint8)
    return raw.view(np.uint32)


def _load(cta, ins, rank: int, o):
    target = cta.address(o[0], 32)
    bar_at = cta.address(o[2] if rank else o[3], 32)
    source = None if rank else cta.address(o[1], 64)

    def f(m):
        s = cta.shared
        for t in cta.tid if m is None else np.flatnonzero(m):
            bar = mbarrier_at(cta, int(np.broadcast_to(bar_at(), cta.T)[t]))
            start = int(np.broadcast_to(target(), cta.T)[t])
            if source is None:
                box, origin, words = _box(cta, rank, o[1], t, start)
                values = _fetch(cta, box, origin, t)
            else:
                address, size = int(source()[t]), _number_of(cta, o[2], t, "u32")
                words = _bytes(cta, ins, start, address, size)
                at = np.uint64(address) + np.arange(0, size, 16, dtype=np.uint64)
                values = cta.memory.load(at, 4, 4, np.full(len(at), t)).reshape(-1)
            warp = np.full((1,) * words.ndim, cta.warp[t])
            s.write(words, warp, None)
            if s.check:
                s.landing[words] = True
            issue(cta, Load(ins, bar, s.clock[cta.warp[t]].copy(), words, values))

    return f


def _store(cta, ins, rank: int, o):
    source = cta.address(o[1], 32)
    target = None if rank else cta.address(o[0], 64)

    def f(m):
        s, flight = cta.shared, cta.in_flight
        for t in cta.tid if m is None else np.flatnonzero(m):
            start = int(np.broadcast_to(source(), cta.T)[t])
            if target is None:
                box, origin, words = _box(cta, rank, o[0], t, start)
                piece, row, column, addresses = box.pieces(origin)
                pieces = row * (words.shape[1] * 4 // piece) + column
            else:
                address, size = int(target()[t]), _number_of(cta, o[2], t, "u32")
                words, piece = _bytes(cta, ins, start, address, size), 16
                addresses = np.uint64(address) + np.arange(0, size, 16, dtype=np.uint64)
                pieces = np.arange(len(addresses))
            s.read(words, np.full((1,) * words.ndim, cta.warp[t]), generic=False)
            s.streaming[words] += 1
            s.any_streaming = True
            store = Store(ins, int(t), int(cta.warp[t]), words, addresses, pieces, piece, flight.late())
            if not store.late:
                store.write(cta)
            flight.stores.setdefault(int(t), Stores([], [])).open.append(store)

    return f


def _commit(cta, m) -> None:
    # A thread's empty groups before its first store change nothing.
    for thread, stores in cta.in_flight.stores.items():
        if m is None or m[thread]:
            stores.groups.append(stores.open)
            stores.open = []


def _wait(cta, m, keep: int, reads_only: bool) -> None:
    """Complete the groups of each thread but its last ``keep``, or only their reads of shared memory."""
    for thread, stores in cta.in_flight.stores.items():
        if m is None or m[thread]:
            for group in stores.groups[: max(len(stores.groups) - keep, 0)]:
                for store in group:
                    store.done_reading(cta)
                    if not reads_only:
                        store.write(cta)
            if not reads_only:
                del stores.groups[: max(len(stores.groups) - keep, 0)]
    cta.in_flight.update_streaming(cta)


def finish(cta) -> None:
    """Write at the end of a CTA what its threads stored and need not wait for, if shared memory has been read."""
    for stores in cta.in_flight.stores.values():
        for store in (x for group in [*stores.groups, stores.open] for x in group):
            cta.current = store.ins
            if store.reading:
                raise Hazard("async", "the CTA ends while a bulk store may still read its shared memory")
            store.write(cta)
