"""tensormap: tensor maps that a kernel makes itself, in shared memory, and copies to global memory.

Their encoding is the emulator's own (tensor_maps.py); a GPU's is not published.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..hazard import Hazard, UnknownInstruction
from ..ptx import Addr, Instruction, Operand, Reg, number
from ..state import Cta, Mask, Step, Values
from ..tensor_maps import FIELDS, MAGIC, TensorMap
from . import opcode

SIZE = 128


@functools.cache
def _unpacked(raw: bytes) -> TensorMap:
    return TensorMap.unpack(raw)


def tensor_map_at(cta: Cta, address: int, thread: int) -> TensorMap:
    """Return the tensor map at a generic address: a parameter's, or one in global memory that the thread acquired."""
    for name, _ in cta.kernel.params:
        if cta.map_address(name) == address:
            return _checked(cta.param[name], name)
    at = np.uint64(address) + np.arange(0, SIZE, 16, dtype=np.uint64)
    raw = cta.memory.load(at, 4, 4, np.full(len(at), thread)).tobytes()
    found = _checked(raw, f"the tensor map at {address:#x}")
    acquired = cta.in_flight.tensor_maps.get(address)
    if acquired is None or cta.shared.clock[cta.warp[thread], acquired[0]] < acquired[1]:
        raise Hazard("proxy", f"a copy by the tensor map at {address:#x} with no fence.proxy.tensormap before it")
    return found


def _checked(raw: bytes, name: str) -> TensorMap:
    try:
        return _unpacked(raw)
    except ValueError as error:
        raise Hazard("address", f"{name}: {error}") from None


def _shared_address(cta: Cta, operand: Operand) -> Values:
    """Return the addresses of ``[register + offset]`` in shared memory, whose register may have 64 bits."""
    if not isinstance(operand, Addr):
        raise UnknownInstruction(f"operand {operand}: expected an address")
    if isinstance(operand.base, Reg) and operand.base.bits == 64:
        wide = cta.address(operand, 64)
        return lambda: wide().astype(np.int64)
    narrow = cta.address(operand, 32)
    return lambda: narrow().astype(np.int64)


@opcode(rf"tensormap replace tile {'|'.join(FIELDS)} shared::cta b1024 b32|b64")
def compile_replace(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    first, size, count = FIELDS[p[3]]
    ordinal = number(o[1].text) if count > 1 else 0
    if ordinal >= count:
        raise UnknownInstruction(f"{ins.text}: {p[3]} {ordinal} of {count}")
    where, value = _shared_address(cta, o[0]), cta.src(o[-1], f"u{p[-1][1:]}")

    def step(mask: Mask) -> None:
        s = cta.shared
        for t in cta.tid if mask is None else np.flatnonzero(mask):
            at = np.broadcast_to(where(), cta.T)[t : t + 1]
            if at[0] % SIZE:
                raise Hazard("alignment", f"a tensor map at shared byte {at[0] - s.BASE}, no multiple of {SIZE}")
            s.index(at, SIZE, np.array([t]))
            words, warp = (at[0] >> 2) + np.arange(SIZE // 4), cta.warp[t : t + 1]
            s.read(words, warp)
            s.write(words, warp, None)
            raw = s.raw[at[0] : at[0] + SIZE]
            raw[:4] = np.frombuffer(MAGIC, np.uint8)
            low = first + ordinal * size
            bits = int(np.broadcast_to(value, cta.T)[t]) & ((1 << 8 * size) - 1)
            raw[low : low + size] = np.frombuffer(bits.to_bytes(size, "little"), np.uint8)
            s.wrote(words, warp)

    return step


@opcode("tensormap cp_fenceproxy global shared::cta tensormap::generic release (cta|gpu|sys) sync aligned")
def compile_copy(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    target, source = cta.address(o[0], 64), _shared_address(cta, o[1])

    def step(mask: Mask) -> None:
        cta.whole_warps(mask)
        s = cta.shared
        for warp in np.unique(cta.warp if mask is None else cta.warp[mask]):
            t = int(warp) * 32
            at, to = int(np.broadcast_to(source(), cta.T)[t]), int(np.broadcast_to(target(), cta.T)[t])
            s.index(np.array([at]), SIZE, np.array([t]))
            words = (at >> 2) + np.arange(SIZE // 4)
            s.read(words, cta.warp[t : t + 1])
            pieces = np.uint64(to) + np.arange(0, SIZE, 16, dtype=np.uint64)
            cta.memory.store(pieces, s.words[words].reshape(-1, 4), np.full(len(pieces), t))
            cta.in_flight.tensor_maps.pop(to, None)

    return step


@opcode("fence proxy tensormap::generic acquire (cta|gpu|sys)")
def compile_acquire(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    where = cta.address(o[0], 64)

    def step(mask: Mask) -> None:
        clock = cta.shared.clock
        for warp in np.unique(cta.warp if mask is None else cta.warp[mask]):
            address = int(np.broadcast_to(where(), cta.T)[int(warp) * 32])
            cta.in_flight.tensor_maps[address] = (int(warp), int(clock[warp, warp]))
            clock[warp, warp] += 1

    return step


@opcode("fence proxy tensormap::generic release (cta|gpu|sys)")
def compile_release(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """What it makes known is checked at the acquire."""
    return lambda mask: None
