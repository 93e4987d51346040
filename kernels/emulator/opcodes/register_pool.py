"""setmaxnreg: warps give registers to the CTA's pool, and take some."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..hazard import Hazard, UnknownInstruction
from ..ptx import Instruction, number
from ..state import WARP, Cta, Mask, Step
from . import opcode

MOST, MACHINE = 256, 65536  # registers of a thread by setmaxnreg, and of a multiprocessor


def at_launch(cta: Cta) -> int:
    """Return how many registers each thread has at first: what the kernel asks for, or all there are."""
    return cta.kernel.max_registers or min(MACHINE // cta.T, 255) // 8 * 8


@opcode("setmaxnreg inc|dec sync aligned u32")
def compile_setmaxnreg(cta: Cta, ins: Instruction, p: list[str], o: tuple[Any, ...]) -> Step:
    count, grows = number(o[0].text), p[1] == "inc"
    if count % 8 or not 24 <= count <= MOST:
        raise UnknownInstruction(f"{ins.text}: expected a multiple of 8 from 24 to {MOST}")

    def step(mask: Mask) -> None:
        held = cta.in_flight.held
        if not len(held):
            held = cta.in_flight.held = np.full(cta.W, at_launch(cta))
        warps = np.unique(cta.warp if mask is None else cta.warp[mask])
        wrong = held[warps] > count if grows else held[warps] < count
        if wrong.any():
            has = int(held[warps][np.argmax(wrong)])
            raise Hazard("registers", f"warp {warps[np.argmax(wrong)]} has {has} registers a thread")
        held[warps] = count
        cta.in_flight.over = ins if held.sum() * WARP > at_launch(cta) * cta.T else None

    return step


def check_pool(cta: Cta) -> None:
    """Check at the end of a CTA that nobody took registers which nobody gave: an increase waits for them.

    And that the warps of each warpgroup have as many: all of them must execute the same setmaxnreg.
    """
    flight = cta.in_flight
    for first in range(0, len(flight.held), 4):
        held = flight.held[first : first + 4]
        if (held != held[0]).any():
            raise Hazard("registers", f"warps {first} to {first + 3} of a warpgroup have {held.tolist()} registers")
    if flight.over is not None:
        cta.current = flight.over
        total, there = int(flight.held.sum()) * WARP, at_launch(cta) * cta.T
        raise Hazard("deadlock", f"threads ask for {total} registers in a CTA of {there}, and none are given back")
