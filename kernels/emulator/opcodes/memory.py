"""Loads and stores, global, shared and local, and ldmatrix and stmatrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..global_memory import UNSIGNED
from ..hazard import Hazard, UnknownInstruction
from ..numbers import FILES, TYPES
from ..ptx import Addr, Instruction, Reg, Sym, Vec
from ..state import WARP, Cta, Mask, Step, as_register
from . import opcode
from .atomics import strong_load, strong_store, within_cta

_TYPES = "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64"
_SPACE = "(global|shared(::cta)?|local)"
_CACHE = "(ca|cg|cs|cv|lu|wb|wt)?"
_HINTS = "(L1::(evict_(normal|unchanged|first|last)|no_allocate))? (L2::evict_(normal|first|last))? (L2::cache_hint)?"
_VECTOR = "(v2|v4|v8)?"
_SCOPE = "(cta|cluster|gpu|sys)"
_PREFETCH = "(L2::(64|128|256)B)?"

Fetch = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (addresses, threads) -> [n, count] of unsigned numbers
Put = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # (addresses, values, threads)


def _space(p: list[str]) -> str:
    return next(x.split("::")[0] for x in p[1:] if x.split("::")[0] in ("param", "global", "shared", "local"))


def _count(p: list[str], items: tuple[Any, ...]) -> int:
    wanted = next((int(x[1:]) for x in p if x in ("v2", "v4", "v8")), 1)
    if len(items) != wanted:
        raise UnknownInstruction(f"{len(items)} registers in a vector of {wanted}")
    return wanted


@opcode(f"ld weak? param|param::entry {_VECTOR} {_TYPES}")
def compile_ld_param(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    items = o[0].items if isinstance(o[0], Vec) else (o[0],)
    type_, name, offset = TYPES[p[-1]], o[1].base.name, o[1].offset
    size = np.dtype(type_).itemsize
    rows = [(cta.row(x), FILES[x.bits]) for x in items if isinstance(x, Reg)]
    assert len(rows) == _count(p, items)

    def step(mask: Mask) -> None:
        for k, (row, kind) in enumerate(rows):
            raw = cta.param[name][offset + k * size : offset + (k + 1) * size]
            value = np.array(np.frombuffer(raw, type_)[0])
            value = value.view(UNSIGNED[size]) if value.dtype.kind == "f" else value
            np.copyto(row, value.astype(kind), where=True if mask is None else mask)

    return step


@opcode(
    f"ld weak? {_SPACE} {_CACHE} {_HINTS} {_PREFETCH} {_VECTOR} {_TYPES}",
    f"ld global {_CACHE} nc {_HINTS} {_PREFETCH} {_VECTOR} {_TYPES}",
    f"ld volatile {_SPACE} {_VECTOR} {_TYPES}",
    f"ld (relaxed|acquire) {_SCOPE} {_SPACE} {_HINTS} {_PREFETCH} {_VECTOR} {_TYPES}",
    f"ld global (relaxed|acquire) {_SCOPE} {_HINTS} {_PREFETCH} {_VECTOR} {_TYPES}",
)
def compile_ld(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    type_, space = p[-1], _space(p)
    size = np.dtype(TYPES[type_]).itemsize
    items = o[0].items if isinstance(o[0], Vec) else (o[0],)
    fetch = _fetch(cta, ins, p, space, size, _count(p, items))
    addr = cta.address(o[1], 32 if space != "global" else 64) if space != "local" else _local_address(cta, o[1])
    kept = [None if isinstance(x, Sym) else as_register(x) for x in items]
    rows = [None if reg is None else (cta.row(reg), FILES[reg.bits]) for reg in kept]
    signed = TYPES[type_] if type_[0] == "s" else None

    def step(mask: Mask) -> None:
        if mask is None:
            values = fetch(addr(), cta.tid)
        else:
            threads = np.flatnonzero(mask)
            values = fetch(addr()[threads], threads)
        if signed is not None:
            values = values.view(signed)
        for k, target in enumerate(rows):
            if target is not None:
                row, kind = target
                column = values[:, k] if signed is None else values[:, k].astype(kind)
                row[... if mask is None else threads] = column

    return step


def _local_address(cta: Cta, op: Any) -> Callable[[], np.ndarray]:
    """Return a function of addresses in local memory, which begins at 0."""
    if isinstance(op, Addr) and isinstance(op.base, Reg):
        return cta.address(op, op.base.bits)
    return cta.address(op, 32)


def _fetch(cta: Cta, ins: Instruction, p: list[str], space: str, size: int, count: int) -> Fetch:
    """Return the function that reads ``count`` elements of ``size`` bytes for each thread."""
    if space == "local":
        return lambda addr, threads: cta.local.load(addr, size, count, threads)
    if space == "shared":
        return lambda addr, threads: load_shared(cta, addr, threads, size, count)
    order = next((x for x in p if x in ("relaxed", "acquire", "volatile")), None)
    if order is not None:
        return strong_load(cta, ins, order == "acquire", within_cta(p), size, count)

    def fetch(addr: np.ndarray, threads: np.ndarray) -> np.ndarray:
        if cta.count_stats:
            sectors(cta, addr, threads, size * count)
        return cta.memory.load(addr, size, count, threads)

    return fetch


def load_shared(cta: Cta, addr: np.ndarray, threads: np.ndarray, size: int, count: int) -> np.ndarray:
    """Return [n, count] elements of ``size`` bytes that threads [n] read from shared memory."""
    s = cta.shared
    at = s.index(addr, size * count, threads)
    if cta.count_stats:
        banks(cta, at, threads, size * count)
    who, warp = threads[:, None], cta.warp[threads][:, None]
    if size * count >= 4:
        words = (at >> 2)[:, None] + np.arange(size * count // 4)
        s.read(words, warp, threads=who)
        return s.words[words].view(UNSIGNED[size])
    index = at[:, None] + np.arange(0, size * count, size)
    s.read_bytes(index, size, warp, who)
    return (s.halves if size == 2 else s.raw)[index // size]


@opcode(
    f"st weak? {_SPACE} {_CACHE} {_HINTS} {_VECTOR} {_TYPES}",
    f"st volatile {_SPACE} {_VECTOR} {_TYPES}",
    f"st (relaxed|release) {_SCOPE} {_SPACE} {_HINTS} {_VECTOR} {_TYPES}",
    f"st global (relaxed|release) {_SCOPE} {_HINTS} {_VECTOR} {_TYPES}",
)
def compile_st(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    space, size = _space(p), np.dtype(TYPES[p[-1]]).itemsize
    items = o[1].items if isinstance(o[1], Vec) else (o[1],)
    count = _count(p, items)
    wide = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}[size]
    sources = [cta.low(x, wide) if isinstance(x, Reg) and x.bits > size * 8 else cta.src(x, wide) for x in items]
    addr = cta.address(o[0], 32 if space != "global" else 64) if space != "local" else _local_address(cta, o[0])
    put = _put(cta, ins, p, space)

    def step(mask: Mask) -> None:
        threads = cta.tid if mask is None else np.flatnonzero(mask)
        values = np.empty((len(threads), count), UNSIGNED[size])
        for k, source in enumerate(sources):
            values[:, k] = source if mask is None or source.ndim == 0 else source[threads]
        put(addr() if mask is None else addr()[threads], values, threads)

    return step


def _put(cta: Cta, ins: Instruction, p: list[str], space: str) -> Put:
    """Return the function that writes the elements of each thread."""
    if space == "local":
        return lambda addr, values, threads: cta.local.store(addr, values, threads)
    if space == "shared":
        return lambda addr, values, threads: store_shared(cta, addr, threads, values)
    order = next((x for x in p if x in ("relaxed", "release", "volatile")), None)
    if order is not None:
        return strong_store(cta, ins, order == "release", within_cta(p))

    def put(addr: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        if cta.count_stats:
            sectors(cta, addr, threads, values.itemsize * values.shape[1])
        cta.memory.store(addr, values, threads)

    return put


def store_shared(cta: Cta, addr: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
    """Write the ``values`` [n, count] of threads [n] to shared memory."""
    s, size, count = cta.shared, values.itemsize, values.shape[1]
    at = s.index(addr, size * count, threads)
    if cta.count_stats:
        banks(cta, at, threads, size * count)
    who, warp = threads[:, None], cta.warp[threads][:, None]
    view: np.ndarray
    if size * count >= 4:
        values = values.view(np.uint32)
        where = (at >> 2)[:, None] + np.arange(values.shape[1])
        view = s.words
        s.write(where, warp, values, who)
    else:
        index = at[:, None] + np.arange(0, size * count, size)
        where, view = index // size, s.halves if size == 2 else s.raw
        s.write_bytes(index, size, warp, values, who)
    view[where] = values
    if (view[where] != values).any():
        n = int(np.argmax((view[where] != values).any(1)))
        byte = int(at[n]) - s.BASE
        raise Hazard("race", f"two threads of one instruction store different values to shared byte {byte}")
    if size * count >= 4:
        s.wrote(where, warp)
    else:
        s.wrote_bytes(index, size, warp)


# --- counts


def _phases(threads: np.ndarray, size: int) -> np.ndarray:
    """Return for each thread the part of its warp that is served at a time: 128 bytes at most."""
    lanes = min(WARP, max(128 // max(size, 4), 1))
    return threads // lanes


def count_passes(cta: Cta, group: np.ndarray, words: np.ndarray) -> None:
    """Count the passes over the 32 banks for words of shared memory, arrays that broadcast; one a group at best."""
    group, words = np.broadcast_arrays(group, words)
    number = np.unique(group, return_inverse=True)[1].reshape(-1)
    pairs = np.unique((number.astype(np.int64) << 32) | words.reshape(-1))
    of, bank = pairs >> 32, pairs & 31
    hits = np.bincount(of * 32 + bank, minlength=(int(of.max()) + 1) * 32).reshape(-1, 32)
    cta.stats["bank"] += int(hits.max(1).sum())
    cta.stats["bank_ideal"] += int((-(-hits.sum(1) // 32)).sum())


def banks(cta: Cta, at: np.ndarray, threads: np.ndarray, size: int) -> None:
    """Count the passes of an access by threads to ``size`` bytes of shared memory each, at byte addresses."""
    words = (at >> 2)[:, None] + np.arange(max(size // 4, 1))
    count_passes(cta, _phases(threads, size)[:, None], words)


def sectors(cta: Cta, addr: np.ndarray, threads: np.ndarray, size: int) -> None:
    """Count the sectors of 32 bytes that an access to global memory touches, by warp, and those it would at best."""
    warp = (threads // WARP).astype(np.int64) << 48
    a = addr.astype(np.int64)
    first, last = a >> 5, (a + size - 1) >> 5
    touched = np.unique(np.concatenate([warp | first, warp | last] if size <= 32 else [warp | first]))
    distinct = np.unique(warp | a) >> 48
    cta.stats["sectors"] += len(touched)
    cta.stats["sectors_ideal"] += int((-(-np.bincount(distinct) * size // 32)).sum())


# --- matrices of 8 x 8 elements of 16 bits


def _rows(cta: Cta, addr: np.ndarray, mask: Mask, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the warps that execute, and the addresses [warp, matrix, row] that their lanes name."""
    cta.whole_warps(mask)
    warps = np.arange(cta.W) if mask is None else np.flatnonzero(mask.reshape(-1, WARP)[:, 0])
    lanes = np.broadcast_to(addr, cta.T).reshape(cta.W, WARP)[warps][:, : 8 * n]
    threads = (warps[:, None] * WARP + np.arange(8 * n)).reshape(-1)
    at = cta.shared.index(lanes.reshape(-1), 16, threads).reshape(len(warps), n, 8)
    if cta.count_stats:
        group = (warps[:, None] * n + np.arange(n))[..., None, None]
        count_passes(cta, group, (at >> 2)[..., None] + np.arange(4))
    return warps, at


@opcode("ldmatrix sync aligned m8n8 (x1|x2|x4) trans? shared|shared::cta b16")
def compile_ldmatrix(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    items = o[0].items if isinstance(o[0], Vec) else (o[0],)
    n, trans = len(items), "trans" in p
    addr = cta.address(o[1], 32)
    rows = [cta.row(as_register(x)) for x in items]
    row, col = cta.matrix_row, cta.matrix_col

    def step(mask: Mask) -> None:
        warps, at = _rows(cta, addr(), mask, n)
        s = cta.shared
        if not trans:
            words = (at[:, :, row] >> 2) + col
            s.read(words.reshape(len(warps), -1), warps[:, None])
            values = s.words[words]
        else:
            halves = np.stack([at[:, :, 2 * col + h] + 2 * row for h in (0, 1)], -1) >> 1
            s.read((halves >> 1).reshape(len(warps), -1), warps[:, None])
            values = np.ascontiguousarray(s.halves[halves]).view(np.uint32)[..., 0]
        for k, out in enumerate(rows):
            if mask is None:
                out[...] = values[:, k].reshape(-1)
            else:
                out.reshape(cta.W, WARP)[warps] = values[:, k]

    return step


@opcode("stmatrix sync aligned m8n8 (x1|x2|x4) trans? shared|shared::cta b16")
def compile_stmatrix(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    items = o[1].items if isinstance(o[1], Vec) else (o[1],)
    n, trans = len(items), "trans" in p
    addr = cta.address(o[0], 32)
    rows = [cta.row(as_register(x)) for x in items]
    row, col = cta.matrix_row, cta.matrix_col

    def step(mask: Mask) -> None:
        warps, at = _rows(cta, addr(), mask, n)
        s, count = cta.shared, len(warps)
        values = np.stack([r.reshape(cta.W, WARP)[warps] for r in rows], 1)  # [warps, n, 32]
        if trans:
            halves = np.ascontiguousarray(values).view(np.uint16).reshape(count, n, 8, 4, 2)  # lane (g, t), half
            turned = halves.transpose(0, 1, 3, 4, 2).reshape(count, n, 8, 8)
            values = np.ascontiguousarray(turned).view(np.uint32)
            words = (at[..., None] >> 2) + np.arange(4)
        else:
            words = (at[:, :, row] >> 2) + col
        flat, data, warp = words.reshape(count, -1), values.reshape(count, -1), warps[:, None]
        s.write(flat, warp, data)
        s.words[flat] = data
        s.wrote(flat, warp)

    return step


@opcode(
    "createpolicy fractional L2::evict_\\w+ (L2::evict_\\w+)? b64",
    "createpolicy range global? L2::evict_\\w+ (L2::evict_\\w+)? b64",
)
def compile_createpolicy(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Caches are not modelled: any number will do for a policy."""
    return cta.put(o[0], "u64", lambda: np.uint64(0))
