"""mma: matrix products of a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..numbers import pairs, tf32
from ..ptx import Vec
from . import opcode
from .warp import whole_warps


def indices(vec: Vec) -> np.ndarray:
    return np.array([r.index for r in vec.registers()])


@opcode("mma ...")
def compile_mma(cta, ins, p, o):
    shape = next(x for x in p if x[0] == "m" and "k" in x and x != "mma")
    d_type, a_type = p[-4], p[-3]
    if "row" not in p or "col" not in p or d_type != "f32":
        raise NotImplementedError(ins.opcode)
    d, a, b, c = (indices(x) for x in o[:4])
    R, W = cta.files[32], cta.W
    if (shape, a_type) in (("m16n8k16", "bf16"), ("m16n8k16", "f16")):

        def operands():
            x = pairs(a_type, R[a]).reshape(2, 2, W, 8, 4, 2)  # k half, row half, warp, g, t, h
            y = pairs(a_type, R[b]).reshape(2, W, 8, 4, 2)  # k half, warp, g, t, h
            return (x.transpose(2, 1, 3, 0, 4, 5).reshape(W, 16, 16), y.transpose(1, 0, 3, 4, 2).reshape(W, 16, 8))

    elif (shape, a_type) == ("m16n8k8", "tf32"):

        def operands():
            x = tf32(R[a]).astype(np.float64).reshape(2, 2, W, 8, 4)  # k half, row half, warp, g, t
            y = tf32(R[b]).astype(np.float64).reshape(2, W, 8, 4)
            return (x.transpose(2, 1, 3, 0, 4).reshape(W, 16, 8), y.transpose(1, 0, 3, 2).reshape(W, 8, 8))

    else:
        raise NotImplementedError(ins.opcode)

    def f(m):
        whole_warps(cta, m)
        x, y = operands()
        z = R[c].view(np.float32).astype(np.float64).reshape(2, 2, W, 8, 4)  # row half, h, warp, g, t
        r = np.matmul(x, y)
        r = r.reshape(W, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3) + z
        bits = r.astype(np.float32).reshape(4, -1).view(np.uint32)
        if m is None:
            R[d] = bits
        else:
            R[np.ix_(d, np.flatnonzero(m))] = bits[:, m]

    return f


def register_names(x: Any) -> list[str]:
    return [r.name for r in x.registers()] if isinstance(x, Vec) else []
