"""Calls of the device's runtime: ``__assertfail`` of tl.device_assert, and ``vprintf`` of tl.device_print."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..hazard import Hazard, UnknownInstruction
from ..ptx import Addr, Instruction, Sym
from ..state import TEXTS, Cta, Mask, Step
from . import opcode
from .moves import compile_mov

_CONVERSION = re.compile(r"%([-+ #0-9.]*)(hh|h|ll|l|)([diuxXfeEgGscp%])")


@opcode("st param b8|b16|b32|b64")
def compile_argument(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    target = o[0]
    if not (isinstance(target, Addr) and isinstance(target.base, Sym) and target.offset == 0):
        raise UnknownInstruction(f"operand {target}: expected an argument of a call")
    name, value = target.base.name, cta.src(o[1], p[-1])

    def step(mask: Mask) -> None:
        cta.arguments.setdefault(name, np.zeros(cta.T, np.uint64))
        np.copyto(cta.arguments[name], value, where=True if mask is None else mask, casting="unsafe")

    return step


@opcode("call uni?")
def compile_call(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    names = [x.name.strip("() ") for x in o if isinstance(x, Sym)]
    if names[0] == "__assertfail":
        return lambda mask: _fail(cta, mask, *names[1:4])
    if names[1:2] == ["vprintf"]:
        return lambda mask: _print(cta, mask, *names[2:4])
    raise UnknownInstruction(f"call of {names}: expected __assertfail or vprintf, which alone are emulated")


@opcode("cvta local u64|u32")
def compile_cvta_local(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    """Generic addresses of local memory are for vprintf alone, which finds its arguments there."""
    if not any(x.parts[0] == "call" and "vprintf" in x.text for x in cta.kernel.instructions):
        raise UnknownInstruction("generic addresses of local memory: expected a call of vprintf")
    return compile_mov(cta, ins, ["mov", p[-1]], o)


def _text(cta: Cta, argument: str, thread: int) -> str:
    """Return the text that a call's argument points at."""
    offset = int(cta.arguments[argument][thread]) - TEXTS
    return next((text for at, text in cta.kernel.texts.values() if at == offset), "?")


def _fail(cta: Cta, mask: Mask, message: str, file: str, line: str) -> None:
    threads = np.arange(cta.T) if mask is None else np.flatnonzero(mask)
    first = int(threads[0])
    where = f"{_text(cta, file, first).split('/')[-1]}:{int(cta.arguments[line][first])}"
    said = _text(cta, message, first)
    raise Hazard("trap", f"tl.device_assert at {where} fails in {len(threads)} threads, first in {first}: {said}")


def _print(cta: Cta, mask: Mask, text: str, values: str) -> None:
    for thread in range(cta.T) if mask is None else np.flatnonzero(mask):
        at = int(cta.arguments[values][thread])

        def convert(m: re.Match[str], thread: int = int(thread)) -> str:
            nonlocal at
            flags, length, kind = m.groups()
            if kind == "%":
                return "%"
            size = 8 if kind in "feEgGsp" or length in ("l", "ll") else 4
            at = -(-at // size) * size
            raw = cta.local.load(np.array([at]), size, 1, np.array([thread]))
            at += size
            if kind == "s":
                offset = int(raw[0, 0]) - TEXTS
                return next((text for where, text in cta.kernel.texts.values() if where == offset), "?")
            number = raw.view(
                {"d": f"<i{size}", "i": f"<i{size}"}.get(kind, "<f8" if kind in "feEgG" else raw.dtype.str)
            )
            return f"%{flags}{'x' if kind == 'p' else kind}" % number[0, 0].item()

        print(_CONVERSION.sub(convert, _text(cta, text, thread)), end="")
