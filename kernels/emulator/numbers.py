"""Types of PTX as numpy types, conversions, and arithmetic that rounds as the hardware does."""

from __future__ import annotations

import struct

import numpy as np

from .ptx import number

TYPES = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f16": np.float16,
    "bf16": np.uint16,
    "pred": np.bool_,
}
FILES = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest even; NaN becomes 0x7fff as PTX says."""
    b = x.view(np.uint32)
    out = ((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = x != x
    if nan.any():
        out[nan] = 0x7FFF
    return out


def flush(x: np.ndarray) -> np.ndarray:
    """ftz: subnormals become zero of the same sign."""
    small = np.abs(x) < np.float32(2.0**-126)
    if small.any():
        x = np.where(small, np.copysign(np.float32(0), x), x)
    return x


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp32 a * b + c with one rounding: exact product in fp64; a sum that fp64 rounds onto a tie is put off it."""
    p = a.astype(np.float64) * b
    s = p + c
    bits = s.view(np.uint64)
    tie = (bits & np.uint64(0x1FFFFFFF)) == 0x10000000
    if tie.any():
        c64 = np.broadcast_to(c, s.shape).astype(np.float64)
        z = s - p
        e = (p - (s - z)) + (c64 - z)  # what the fp64 sum lost
        fix = tie & (e != 0) & np.isfinite(s)
        if fix.any():
            s[fix] = np.nextafter(s[fix], np.where(e[fix] > 0, np.inf, -np.inf))
    return s.astype(np.float32)


def tf32(bits: np.ndarray) -> np.ndarray:
    """The tensor core reads the upper 19 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def pairs(kind: str, regs: np.ndarray) -> np.ndarray:
    """16-bit pairs in uint32 [..., T] as fp64 [..., T, 2]."""
    h = np.ascontiguousarray(regs).view(np.uint16).reshape(*regs.shape, 2)
    return (bf16_to_f32(h) if kind == "bf16" else h.view(np.float16)).astype(np.float64)


BINARY = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def constant(text: str, type_: str):
    if text.startswith("0f"):
        value = struct.unpack("<I", bytes.fromhex(text[2:])[::-1])[0]
        return np.array(value, np.uint32).view(TYPES[type_]) if type_ != "f64" else np.float64(0)
    if text.startswith("0d"):
        return struct.unpack(">d", bytes.fromhex(text[2:]))[0]
    v = number(text)
    if type_ == "pred":
        return bool(v)
    bits = np.dtype(TYPES[type_]).itemsize * 8
    return np.array(v & ((1 << bits) - 1), FILES[max(bits, 16)] if bits > 8 else np.uint8).view(TYPES[type_])
