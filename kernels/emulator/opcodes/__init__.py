"""The opcodes of PTX, a file for each family; each registers the functions that turn an instruction into a closure.

A function of this table takes the state of a CTA, the instruction, its opcode's parts and its operands, and returns a
function of one argument: the threads that execute it, as a mask [threads], or None where all of them do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

Step = Callable[[Any], None]
Compile = Callable[..., Step]

OPCODES: dict[str, Compile] = {}
_FAMILIES = ("arithmetic", "bulk", "conversions", "copies", "matrix", "memory", "sync", "warp", "wgmma")


def opcode(*names: str) -> Callable[[Compile], Compile]:
    """Register a function for opcodes whose first part is one of ``names``."""

    def register(function: Compile) -> Compile:
        for name in names:
            assert name not in OPCODES, name
            OPCODES[name] = function
        return function

    return register


def load() -> dict[str, Compile]:
    """Return the table, with every family imported."""
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
    return OPCODES
