"""mbarriers, and bulk copies by tensor maps."""

from __future__ import annotations

import numpy as np

from ..hazard import Hazard
from ..shared_memory import Shared
from . import opcode


def bulk(cta, ins, p, o):
    """cp.async.bulk.tensor.2d: loads land when their mbarrier is waited for (or at once); stores are at once."""
    if p[3] in ("commit_group", "wait_group"):
        return lambda m: None
    if p[3] != "tensor" or p[4] != "2d":
        raise NotImplementedError(ins.opcode)
    load = "mbarrier::complete_tx::bytes" in ins.opcode
    tensor, smem = (o[1], o[0]) if load else (o[0], o[1])
    maps, at = cta.row(tensor.items[0], "u64"), cta.address(smem, 32)
    where = [cta.src(x, "s32") for x in tensor.items[1].items]
    bar = cta.address(o[2], 32) if load else None

    def f(m):
        for t in cta.tid if m is None else np.flatnonzero(m):
            box = cta.tensor_maps[int(maps[t])]
            x, y = (int(np.broadcast_to(c, cta.T)[t]) for c in where)
            rows, cols = box["box"]
            start, width = int(at()[t]), cols * box["size"]
            if start % 128:
                raise Hazard("alignment", f"a tensor copy to shared byte {start - Shared.BASE}")
            byte = start + np.arange(rows)[:, None] * width + np.arange(0, width, 4)
            byte ^= ((byte >> 7) & {128: 7, 64: 3, 32: 1, 0: 0}[box["swizzle"]]) << 4
            words, warp = byte >> 2, np.full((rows, 1), cta.warp[t])
            array, s = box["array"], cta.shared  # [rows, cols] of uint16
            inside = [max(0, -y), min(rows, array.shape[0] - y), max(0, -x), min(cols, array.shape[1] - x)]
            a, b, c, d = inside
            if load:
                value = np.zeros((rows, cols), array.dtype)
                if b > a and d > c:
                    value[a:b, c:d] = array[y + a : y + b, x + c : x + d]
                s.write(words, warp, None)
                if s.check:
                    s.landing[words] = True
                cta.transfers.append(
                    (
                        words,
                        value.view(np.uint32),
                        mbarrier_at(cta, int(bar()[t])),
                        value.nbytes,
                        s.clock[cta.warp[t]].copy(),
                    )
                )
                if not cta.late:
                    transfer_lands(cta, cta.transfers.pop())
            else:
                s.read(words, warp, generic=False)
                value = np.ascontiguousarray(s.words[words]).view(array.dtype)
                if b > a and d > c:
                    array[y + a : y + b, x + c : x + d] = value[a:b, c:d]

    return f


def mbarrier_at(cta, addr: int) -> dict:
    if addr not in cta.mbarriers:
        raise Hazard("mbarrier", f"none was initialised at shared byte {addr - Shared.BASE}")
    return cta.mbarriers[addr]


def arrive_at(cta, bar: dict, count: int, known: np.ndarray) -> None:
    bar["left"] -= count
    bar["open"] = np.maximum(bar["open"], known)
    if bar["left"] < 0:
        raise Hazard("mbarrier", "more arrivals than it counts")
    complete(cta, bar)


def complete(cta, bar: dict) -> None:
    if bar["left"] == 0 and bar["bytes"] == 0:
        bar["phase"] += 1
        bar["left"] = bar["count"]
        bar["known"] = np.maximum(bar["known"], bar["open"])
        bar["known"][cta.W + bar["agent"]] = bar["phase"]


@opcode("mbarrier ...")
def compile_mbarrier(cta, ins, p, o):
    if p[1] == "init":
        addr, count = cta.address(o[0], 32), cta.src(o[1], "u32")

        def init(m):
            for t in cta.tid if m is None else np.flatnonzero(m):
                n, zero = int(np.broadcast_to(count, cta.T)[t]), np.zeros(cta.W + Shared.AGENTS, np.int32)
                cta.mbarriers[int(addr()[t])] = {
                    "count": n,
                    "left": n,
                    "bytes": 0,
                    "phase": 0,
                    "open": zero,
                    "known": zero,
                    "agent": len(cta.mbarriers),
                }

        return init
    if p[1] == "arrive":
        addr = cta.address(o[1], 32)
        extra = cta.src(o[2], "u32") if len(o) > 2 else np.array(1)

        def arrive(m):
            for t in cta.tid if m is None else np.flatnonzero(m):
                bar, n = mbarrier_at(cta, int(addr()[t])), int(np.broadcast_to(extra, cta.T)[t])
                if "expect_tx" in p:
                    bar["bytes"] += n
                    n = 1
                arrive_at(cta, bar, n, cta.shared.release(cta.warp[t : t + 1]))

        return arrive
    if p[1] == "inval":
        return lambda m: None
    raise NotImplementedError(ins.opcode)


def transfer_lands(cta, transfer) -> None:
    words, value, bar, size, known = transfer
    cta.shared.landed(words, value, bar["agent"], bar["phase"] + 1)
    bar["bytes"] -= size
    bar["open"] = np.maximum(bar["open"], known)
    complete(cta, bar)
