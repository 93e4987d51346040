"""Conversions between types."""

from __future__ import annotations

import numpy as np

from ..numbers import TYPES, bf16_to_f32, f32_to_bf16
from ..ptx import Reg
from ..state import Cta
from . import opcode


@opcode("cvt ...")
def compile_cvt(cta, ins, p, o):
    to, of = p[-2], p[-1]
    if to == "tf32":  # to nearest, ties away from zero
        a = cta.src(o[1], "u32")
        return cta.put(o[0], "u32", lambda: (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if to in ("bf16x2", "f16x2"):
        hi, lo, T = cta.src(o[1], "f32"), cta.src(o[2], "f32"), cta.T
        conv = f32_to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        return cta.put(
            o[0],
            "u32",
            lambda: (
                (conv(np.broadcast_to(hi, T).copy()).astype(np.uint32) << np.uint32(16))
                | conv(np.broadcast_to(lo, T).copy())
            ),
        )
    if to == "bf16" and of == "f32":
        a = cta.src(o[1], "f32")
        return cta.put(o[0], "u16", lambda: f32_to_bf16(a))
    if to == "f32" and of == "bf16":
        a = cta.src(o[1], "u16")
        return cta.put(o[0], "f32", lambda: bf16_to_f32(a))
    a = cta.src(o[1], of) if not isinstance(o[1], Reg) else narrow(cta, o[1], of)
    dt = TYPES[to]
    if to[0] == "f" or (of[0] == "f" and to[0] in "us"):
        if to[0] in "us":
            rnd = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[
                next(x for x in p if x in ("rzi", "rni", "rmi", "rpi"))
            ]
            info = np.iinfo(dt)
            return cta.put(
                o[0], to, lambda: np.where(a != a, 0, np.clip(rnd(a.astype(np.float64)), info.min, info.max)).astype(dt)
            )
        if any(x in ("rni", "rzi", "rmi", "rpi") for x in p):
            rnd = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[
                next(x for x in p if x in ("rzi", "rni", "rmi", "rpi"))
            ]
            return cta.put(o[0], to, lambda: rnd(a).astype(dt))
        return cta.put(o[0], to, lambda: a.astype(dt))
    # whole numbers: through the source's sign to the destination register's width
    wide = {16: np.uint16, 32: np.uint32, 64: np.uint64}[o[0].bits]
    return cta.put(o[0], None, lambda: a.astype(dt).astype(wide))


def narrow(cta: Cta, reg: Reg, type_: str) -> np.ndarray:
    """Return the low bits of a register as a type no wider than it."""
    return cta.low(reg, type_)
