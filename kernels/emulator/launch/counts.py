"""Counts of what launches did: instructions by class, sectors of global memory, passes over shared memory's banks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# class -> opcodes; an opcode is of the first class that names it.
CLASSES: dict[str, str] = {
    "matrix": r"wgmma\.mma_async|mma\b|tcgen05\.mma",
    "sync": r"bar\b|barrier|mbarrier|fence|membar|wgmma|griddepcontrol|setmaxnreg|nanosleep|"
    r"cp\.async\.(bulk\.)?(commit|wait)|cp\.async\.mbarrier",
    "copy": r"cp\b|prefetch",
    "shared": r"(ld|st|atom|red)\.(\w+\.)*shared|ldmatrix|stmatrix",
    "global": r"(ld|st|atom|red)\.(?!param|const)",
    "warp": r"shfl|vote|redux|elect|match|activemask",
    "special": r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\b|div\.(\w+\.)*f(32|64)",
    "float": r"[a-z]\w*\.(\w+\.)*(f16|f16x2|bf16|bf16x2|f32|f64|f32x2)$",
    "control": r"bra|brx|ret|exit|trap",
    "integer": r"",
}
_PATTERNS = {name: re.compile(text) for name, text in CLASSES.items()}
# Floats that are moved, chosen or compared take no multiplier.
_NOT_FLOAT = re.compile(r"mov|ld|st|selp|setp|cvt|min|max")


def class_of(opcode: str) -> str:
    """Return the class of an opcode with its modifiers."""
    for name, pattern in _PATTERNS.items():
        if pattern.match(opcode) and not (name == "float" and _NOT_FLOAT.match(opcode)):
            return name
    raise AssertionError("the last class takes every opcode")


@dataclass(frozen=True)
class LaunchCounts:
    """What one launch did.

    Instructions are counted once for each warp that runs them, whichever of its lanes do. Sectors are the 32-byte parts
    of global memory that warps' loads and stores touch, passes the turns that accesses to shared memory take because
    two lanes want one bank; ideal is the least for as many bytes. All four are 0 unless they were asked for.
    """

    kernel: str
    grid: tuple[int, int, int]
    ctas: int  # how many ran
    threads: int  # of a CTA
    opcodes: dict[str, int]
    sectors: int
    sectors_ideal: int
    passes: int
    passes_ideal: int
    seconds: float  # of this machine, without compilation

    @property
    def instructions(self) -> int:
        """Return how many instructions all warps ran."""
        return sum(self.opcodes.values())

    @property
    def classes(self) -> dict[str, int]:
        """Return the instructions by class, each class of :data:`CLASSES`."""
        found = Counter({name: 0 for name in CLASSES})
        for opcode, count in self.opcodes.items():
            found[class_of(opcode)] += count
        return dict(found)


def table(counts: Sequence[LaunchCounts]) -> str:
    """Return one line for each launch, under a head."""
    rows = [("kernel", "CTAs", "threads", "instr", *CLASSES, "sectors (ideal)", "passes (ideal)", "s")]
    for each in counts:
        sizes = ((each.sectors, each.sectors_ideal), (each.passes, each.passes_ideal))
        rows.append(
            (
                each.kernel,
                str(each.ctas),
                str(each.threads),
                str(each.instructions),
                *(str(n) for n in each.classes.values()),
                *(f"{n} ({ideal})" if n else "-" for n, ideal in sizes),
                f"{each.seconds:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
