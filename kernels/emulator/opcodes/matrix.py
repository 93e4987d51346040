"""mma: matrix products of a warp, whose operands lie in registers.

Products are exact, summed with the addend in fp64, and rounded once. A GPU's tensor core shifts the products to the
largest exponent and cuts what lies below a few extra bits, so the last bits of fp32 and fp16 results differ, and of
fp8 products on Hopper more (about 14 bits of a sum are kept). Integers are equal to the bit.

Missing: fp64, 4-bit and 1-bit operands, sparse operands, m8n8 shapes, block scales (kind::).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import numbers
from ..hazard import UnknownInstruction
from ..numbers import pairs, tf32
from ..ptx import Instruction, Operand, Vec
from ..state import Cta, Mask, Step, as_register
from . import opcode

WIDTHS = {"tf32": 32, "bf16": 16, "f16": 16, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}  # bits of an element


def elements(kind: str, words: np.ndarray) -> np.ndarray:
    """Return the elements of each word [...], as fp64 [..., elements in a word]."""
    if WIDTHS[kind] == 16:
        return pairs(kind, words)
    if kind == "tf32":
        return tf32(words).astype(np.float64)[..., None]
    return decode(kind, np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4))


def decode(kind: str, codes: np.ndarray) -> np.ndarray:
    """Return elements, given as unsigned numbers of their width, as fp64."""
    if kind in ("s8", "u8"):
        return codes.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    return tf32(codes).astype(np.float64) if kind == "tf32" else numbers.decode(codes, kind)


def fragment_a(words: np.ndarray, kind: str) -> np.ndarray:
    """Return the first operand, [W, 16, K], that registers [2 or 4, W * 32] hold: row half, then half of K."""
    e = 32 // WIDTHS[kind]
    x = elements(kind, words).reshape(len(words) // 2, 2, -1, 8, 4, e)  # half of k, row half, warp, g, t, element
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(x.shape[2], 16, len(words) * 2 * e)


def fragment_b(words: np.ndarray, kind: str) -> np.ndarray:
    """Return the second operand, [W, K, 8], that registers [1 or 2, W * 32] hold."""
    e = 32 // WIDTHS[kind]
    x = elements(kind, words).reshape(len(words), -1, 8, 4, e)  # half of k, warp, g, t, element
    return x.transpose(1, 0, 3, 4, 2).reshape(x.shape[1], len(words) * 4 * e, 8)


def unpack_sum(words: np.ndarray, kind: str) -> np.ndarray:
    """Return accumulators of registers [n, T] (f16: two in each) as fp64 [n or 2 n, T], neighbours in a row in turn."""
    if kind == "f16":
        x = words.view(np.float16).reshape(*words.shape, 2).astype(np.float64)
        return np.moveaxis(x, -1, 1).reshape(-1, words.shape[1])
    return words.view(np.float32 if kind == "f32" else np.int32).astype(np.float64)


def pack_sum(values: np.ndarray, kind: str, saturate: bool = False) -> np.ndarray:
    """Return the registers of accumulators [n, T], rounded once."""
    if kind == "f16":
        x = values.astype(np.float16).reshape(-1, 2, values.shape[1])
        return np.ascontiguousarray(np.moveaxis(x, 1, -1)).view(np.uint32)[..., 0]
    if kind == "f32":
        return values.astype(np.float32).view(np.uint32)
    whole = np.clip(values, -(1 << 31), (1 << 31) - 1) if saturate else values
    return whole.astype(np.int64).astype(np.uint32)


@opcode(
    "mma sync aligned m16n8k8|m16n8k16 row col f32 bf16 bf16 f32",
    "mma sync aligned m16n8k8|m16n8k16 row col f32|f16 f16 f16 f32|f16",
    "mma sync aligned m16n8k4|m16n8k8 row col f32 tf32 tf32 f32",
    "mma sync aligned m16n8k32 row col f32|f16 e4m3|e5m2 e4m3|e5m2 f32|f16",
    "mma sync aligned m16n8k16|m16n8k32 row col satfinite? s32 s8|u8 s8|u8 s32",
)
def compile_mma(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    d_kind, a_kind, b_kind, c_kind = p[-4:]
    k = int(p[3].split("k")[1])
    d, a, b, c = (registers(x) for x in o)
    sums = 2 if d_kind == "f16" else 4
    words = k * WIDTHS[a_kind] // 128  # of the second operand
    if d_kind != c_kind or [len(x) for x in (d, a, b, c)] != [sums, 2 * words, words, sums]:
        raise UnknownInstruction(f"{ins.text}: operands")
    R, W, saturate = cta.files[32], cta.W, "satfinite" in p

    def step(mask: Mask) -> None:
        cta.whole_warps(mask)
        x = np.matmul(fragment_a(R[a], a_kind), fragment_b(R[b], b_kind))
        # [warp, row half, g, t, column of two] to registers [row half, column] of threads [warp, g, t]
        x = x.reshape(W, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        bits = pack_sum(x + unpack_sum(R[c], c_kind), d_kind, saturate)
        if mask is None:
            R[d] = bits
        else:
            R[np.ix_(d, np.flatnonzero(mask))] = bits[:, mask]

    return step


def registers(operand: Operand) -> np.ndarray:
    """Return the rows of the 32-bit registers of a vector operand, or of one."""
    each = [as_register(x) for x in (operand.items if isinstance(operand, Vec) else (operand,))]
    if any(x.bits != 32 for x in each):
        raise UnknownInstruction("a matrix operand in registers that are not of 32 bits")
    return np.array([x.index for x in each])


def register_names(operand: Operand) -> list[str]:
    """Return the names of the registers of a vector operand, none for a descriptor's."""
    return [as_register(x).name for x in operand.items] if isinstance(operand, Vec) else []
