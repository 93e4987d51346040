"""Conversions, against rational numbers rounded once and PyTorch's fp8."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from bench.gpu.programs import Program, every, exact
from bench.gpu.programs.floats import DTYPES, special
from bench.gpu.programs.integers import edges, signed

_WHOLE = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_ROUNDING = {"rni": "rn", "rzi": "rz", "rmi": "rm", "rpi": "rp"}


def _register(bits: int) -> str:
    return f"u{max(bits, 16) // 8}"


def _one(opcode: str, inputs: np.ndarray, want: list[int], bits: int, *, nan: str = "", least: int = 80) -> Program:
    outputs = np.array([x & ((1 << max(bits, 16)) - 1) for x in want], _register(bits))
    return Program(opcode, f"{opcode} %d0, %a0;", (inputs,), (outputs,), nan=nan, least=least)


def _whole() -> Iterator[Program]:
    """Between whole numbers; one of 8 bits lies in a register of 16, extended by its sign."""
    for of in _WHOLE:
        width = int(of[1:])
        (inputs,) = every((*edges(max(width, 16)), 0x7F, 0x80, 0xFF, 0x1234), dtype=_register(width))
        values = [signed(int(x) & ((1 << width) - 1), of) for x in inputs]
        for to in _WHOLE:
            bits = int(to[1:])
            low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
            if of != to:
                chopped = [signed(x & ((1 << bits) - 1), to) for x in values]
                yield _one(f"cvt.{to}.{of}", inputs, chopped, bits)
            if min(values) < low or max(values) > high:
                yield _one(f"cvt.sat.{to}.{of}", inputs, [min(max(x, low), high) for x in values], bits)


def _between_whole_and_float() -> Iterator[Program]:
    halfway = (
        0x01000001,
        0x01000003,
        0x81000080,
        0xFFFFFF7F,
        0xFFFFFF80,
        0x7FFFFFBF,
        2049,
        2051,
        65519,
        65520,
        257,
        259,
    )
    long = (0x0020000000000001, 0x7FFFFFFFFFFFFDFF, 0x8000008000000001, 0x0100000080000000, 0x0100000080000001)
    for of in _WHOLE:
        width = int(of[1:])
        more = [x & ((1 << width) - 1) for x in (*halfway, *(long if width == 64 else ()))]
        (inputs,) = every((*edges(max(width, 16)), *more), dtype=_register(width))
        values = [signed(int(b) & ((1 << width) - 1), of) for b in inputs]
        numbers = [(int(x < 0), exact.Fraction(abs(x))) for x in values]
        for to in ("f32", "f16", "bf16", "f64"):
            for mode in ("rn", "rz", "rm", "rp"):
                if to == "f64" and (width == 64 and mode != "rn"):
                    continue
                if to == "bf16" and width == 8:  # which ptxas refuses
                    continue
                want = [exact.write(x, to, mode) for x in numbers]
                least = 90 if to == "bf16" else 80
                yield _one(f"cvt.{mode}.{to}.{of}", inputs, want, exact.FORMATS[to].bits, least=least)
    for of in ("f32", "f16", "f64", "bf16"):
        form, dtype = exact.FORMATS[of], DTYPES[of]
        near = [0.5, 1.5, 2.5, -0.5, -1.5, -0.75, 127.5, 255.5, 32767.5, 65503.0, -128.5, 2.0**31, 2.0**32, -(2.0**31)]
        near += [2.0**63, 2.0**64, -(2.0**63), 1e10, 3e18]
        bits = [exact.write((int(x < 0), abs(exact.Fraction(x))), of, "rz") for x in near]
        (inputs,) = every((*special(of), *bits), dtype=dtype)
        numbers = [exact.read(int(x), of) for x in inputs]
        for to in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
            if of == "bf16" and to in ("u8", "s8"):
                continue
            for irnd, mode in _ROUNDING.items():
                want = [_to_whole(x, to, mode, of) for x in numbers]
                least = 90 if of == "bf16" else 80
                yield _one(f"cvt.{irnd}.{to}.{of}", inputs, want, int(to[1:]), least=least)
        if of == "f32":
            want = [_to_whole(exact.flushed(x), "s32", "rp", of) for x in numbers]
            yield _one("cvt.rpi.ftz.s32.f32", inputs, want, 32)
            want = [exact.write(_integral(exact.flushed(x), "rp"), of) for x in numbers]
            yield _one("cvt.rpi.ftz.f32.f32", inputs, want, 32, nan=of)
        if of in ("f32", "f64", "f16"):
            for irnd, mode in _ROUNDING.items():
                want = [exact.write(_integral(x, mode), of) for x in numbers]
                yield _one(f"cvt.{irnd}.{of}.{of}", inputs, want, form.bits, nan=of)


def _integral(x: exact.Number, mode: str) -> exact.Number:
    if x is None or x[1] == exact.INF:
        return x
    low = x[1].numerator // x[1].denominator
    rest = x[1] - low
    half = exact.Fraction(1, 2)
    up = {
        "rn": rest > half or (rest == half and low % 2 == 1),
        "rz": False,
        "rm": bool(x[0]) and rest > 0,
        "rp": not x[0] and rest > 0,
    }[mode]
    return x[0], exact.Fraction(low + up)


def _to_whole(x: exact.Number, to: str, mode: str, of: str) -> int:
    """Return a number clamped to a type; NaN is 0, or the highest bit alone where either type has 64 bits."""
    bits = int(to[1:])
    if x is None:
        return signed(1 << (bits - 1), to) if of == "f64" or bits == 64 else 0
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    sign, size = _integral(x, mode)
    if size == exact.INF:
        return low if sign else high
    return min(max(int(-size if sign else size), low), high)


def _between_floats() -> Iterator[Program]:
    ties = {
        # Halfway between neighbours of the narrower formats, and next to it; the borders of their ranges.
        "f32": (
            *(0x3F801000, 0x3F803000, 0x3F801001, 0x3F808000, 0x3F818000, 0x3F808001, 0x477FEFFF, 0x477FF000),
            *(
                0x33000000,
                0x33000001,
                0x387FC000,
                0x387FE000,
                0x7F7F8000,
                0x7F7F7FFF,
                0x43E00000,
                0x43E80000,
                0x43E80001,
            ),
            *(
                0x3A800000,
                0x3B000000,
                0x3AC00000,
                0x3F880000,
                0x3F980000,
                0x47600000,
                0x47700000,
                0x37000000,
                0x37800001,
            ),
            *(
                0xC3F00000,
                0xBF880000,
                0xB8000000,
                0x7F7FFFFF,
                0x00400000,
                0x00010000,
                0x80018000,
                0x3F801FFF,
                0xBF801000,
            ),
        ),
        "f64": (
            *(0x3FF0000010000000, 0x3FF0000030000000, 0x3FF0000010000001, 0x47EFFFFFEFFFFFFF, 0x47EFFFFFF0000000),
            *(0x3690000000000000, 0x3690000000000001, 0x380FFFFFE0000000),
        ),
        "f16": (),
        "bf16": (),
    }
    columns = {name: every((*special(name), *ties[name]), dtype=DTYPES[name])[0] for name in ties}
    narrower = (("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64"), ("tf32", "f32"))
    for to, of in narrower:
        modes = {"bf16": ("rn", "rz"), "tf32": ("rn", "rz", "rna")}.get(to, ("rn", "rz", "rm", "rp"))
        for mode in modes:
            least = 90 if to == "tf32" and mode != "rna" else 80
            yield _float(f"cvt.{mode}.{to}.{of}", columns[of], to, of, mode, least=least)
    for to in ("f16", "bf16"):
        for mode in ("rn", "rz"):
            yield _float(f"cvt.{mode}.relu.{to}.f32", columns["f32"], to, "f32", mode, "relu")
            yield _float(f"cvt.{mode}.satfinite.{to}.f32", columns["f32"], to, "f32", mode, "satfinite", least=90)
    yield _float("cvt.rna.satfinite.tf32.f32", columns["f32"], "tf32", "f32", "rna", "satfinite", least=90)
    yield _float("cvt.rn.satfinite.relu.tf32.f32", columns["f32"], "tf32", "f32", "rn", "satfinite.relu", least=100)
    yield _float("cvt.rn.ftz.f16.f32", columns["f32"], "f16", "f32", "rn", "ftz")
    yield _float("cvt.rn.sat.f16.f32", columns["f32"], "f16", "f32", "rn", "sat")
    yield _float("cvt.rn.ftz.sat.f32.f64", columns["f64"], "f32", "f64", "rn", "ftz.sat")
    yield _float("cvt.ftz.f32.f32", columns["f32"], "f32", "f32", "rn", "ftz")
    yield _float("cvt.sat.f32.f32", columns["f32"], "f32", "f32", "rn", "sat")
    yield _float("cvt.sat.f32.f16", columns["f16"], "f32", "f16", "rn", "sat")
    for to, of in (("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16"), ("f64", "bf16")):
        yield _float(f"cvt.{to}.{of}", columns[of], to, of, "rn")
    yield _float("cvt.rn.bf16.f16", columns["f16"], "bf16", "f16", "rn", least=90)
    yield _float("cvt.rn.sat.f32.f64", columns["f64"], "f32", "f64", "rn", "sat")
    yield _float("cvt.rn.ftz.f32.f64", columns["f64"], "f32", "f64", "rn", "ftz")


def _convert(number: exact.Number, to: str, mode: str, modifiers: str) -> int:
    flush = "ftz" in modifiers
    if "sat" in modifiers.split("."):
        number = exact.clamped(number)
    bits = exact.write(number, to, mode, satfinite="satfinite" in modifiers, flush=flush and to == "f32")
    if "relu" in modifiers:
        bits = exact.write(exact.relu(exact.read(bits, to)), to)
    return bits


def _float(
    opcode: str, inputs: np.ndarray, to: str, of: str, mode: str, modifiers: str = "", least: int = 80
) -> Program:
    want = []
    for x in inputs:
        number = exact.read(int(x), of)
        if "ftz" in modifiers and of == "f32":
            number = exact.flushed(number)
        want.append(_convert(number, to, mode, modifiers))
    return _one(opcode, inputs, want, exact.FORMATS[to].bits, nan=to, least=least)


def _pairs() -> Iterator[Program]:
    """Yield conversions of two numbers into one register, the first into its upper half."""
    ties = (0x3F801000, 0x3F808000, 0x43E80000, 0x47700000, 0x3A800000, 0xC3F00000, 0x37000001)
    base = (*special("f32"), *ties)
    a, b = every(base, base, dtype="u4")
    for to in ("f16", "bf16", "e4m3", "e5m2"):
        bits = exact.FORMATS[to].bits
        for mode in ("rn", "rz") if bits == 16 else ("rn",):
            for relu, finite in itertools.product(("", ".relu"), ("", ".satfinite")):
                if bits == 8 and not finite:
                    continue
                order = f"{finite}{relu}" if bits == 8 else f"{relu}{finite}"
                opcode = f"cvt.{mode}{order}.{to}x2.f32"
                want = exact.each(
                    lambda x, y, to=to, mode=mode, how=order, n=bits: (
                        (_convert(x, to, mode, how) << n) | _convert(y, to, mode, how)
                    ),
                    *(a, b),
                    dtype=f"u{bits // 4}",
                    formats=("f32", "f32"),
                )
                least = 90 if bits == 16 and finite else 80 if bits == 16 else 89
                yield Program(opcode, f"{opcode} %d0, %a0, %a1;", (a, b), (want,), least=least)
    halves = every(special("f16"), special("f16"), dtype="u4")
    packed = halves[0] | (halves[1] << np.uint32(16))
    for to in ("e4m3", "e5m2"):
        for relu in ("", ".relu"):
            opcode = f"cvt.rn.satfinite{relu}.{to}x2.f16x2"
            want = exact.each(
                lambda x, to=to, how=f"satfinite{relu}": (
                    (_convert(exact.read(x >> 16, "f16"), to, "rn", how) << 8)
                    | _convert(exact.read(x & 0xFFFF, "f16"), to, "rn", how)
                ),
                packed,
                dtype="u2",
            )
            yield Program(opcode, f"{opcode} %d0, %a0;", (packed,), (want,), least=89)


def _bytes() -> Iterator[Program]:
    """Yield fp8 to f16 for every byte, against PyTorch."""
    lower = np.arange(256, dtype=np.uint16)
    inputs = lower | (np.roll(lower, 77) << np.uint16(8))
    types = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    for of, dtype in types.items():
        table = torch.arange(256, dtype=torch.uint8).view(dtype).float().half().numpy()
        for relu in ("", ".relu"):
            half = np.where(table < 0, np.float16(0), table) if relu else table
            if relu:
                half = np.where(np.signbit(half) & (half == 0), np.float16(0), half)
            bits = np.where(np.isnan(half), np.uint16(0x7FFF), np.asarray(half, np.float16).view(np.uint16))
            want = bits[inputs & 255].astype(np.uint32) | (bits[inputs >> 8].astype(np.uint32) << np.uint32(16))
            opcode = f"cvt.rn{relu}.f16x2.{of}x2"
            yield Program(opcode, f"{opcode} %d0, %a0;", (inputs,), (want,), nan="f16x2", least=89)


def programs() -> Iterator[Program]:
    """Yield the programs of this table."""
    yield from _whole()
    yield from _between_whole_and_float()
    yield from _between_floats()
    yield from _pairs()
    yield from _bytes()
