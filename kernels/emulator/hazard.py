"""The errors of the emulator (leaf): a kernel that a GPU may run wrongly, and one that the emulator cannot run."""

from __future__ import annotations


class Hazard(Exception):
    """A kernel does what a GPU forbids, or what it may run wrongly.

    Attributes:
        kind: in one word: race, address, uninitialised, ...
        message: the fault itself.
        place: the instruction, its line of the PTX and of the kernel's source, the CTA and the warp; "" while unknown.
    """

    def __init__(self, kind: str, message: str, place: str = "") -> None:
        super().__init__(f"{kind}: {message}" + (f" | {place}" if place else ""))
        self.kind, self.message, self.place = kind, message, place


class UnknownInstruction(NotImplementedError):
    """The emulator has no such opcode, modifier, type or operand; raised before anything runs."""
