"""The state of one CTA while its kernel runs, and the operands of its instructions as arrays over threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .global_memory import Global
from .hazard import Hazard, UnknownInstruction
from .in_flight import InFlight
from .local_memory import Local
from .numbers import FILES, TYPES, constant
from .ptx import Addr, Imm, Instruction, Kernel, Operand, Reg, Sym
from .shared_memory import Shared

Mask = Any  # the threads that execute: a boolean array [T], or None for all of them
Step = Callable[[Mask], None]
Values = Callable[[], Any]
WARP = 32
TEXTS = 0x7D000000  # the address of the module's texts, which no other memory has
# Registers that differ whenever they are read, and the bits that they show.
CLOCKS = {
    **{name: 0xFFFFFFFF for name in ("%clock", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi")},
    **{name: 0xFFFFFFFFFFFFFFFF for name in ("%clock64", "%globaltimer")},
}


class Cta:
    """Registers, memory and asynchronous work of one CTA.

    The arrays of registers are views that stay the same from CTA to CTA, so an instruction's closure takes them once.

    Attributes:
        T, W: how many threads and warps it has.
        tid, warp, lane: [T], each thread's number in the CTA, its warp's, and its number there.
        files: width in bits -> registers [register, T] as unsigned numbers; width 1 are predicates.
        ctaid, nctaid: the CTA's place in the grid and the grid's size, x y z.
        param: name -> bytes of a kernel's parameter.
        current: the instruction that runs (or, before anything runs, that is compiled).
        in_flight: what is asynchronous and under way; ``asynchrony`` and ``seed`` say when it takes effect.
        check: whether accesses to shared memory are checked.
        strict: demand a fence between an mbarrier's initialisation and copies that complete at it. PTX does; Triton
            issues none, and on every GPU so far its kernels run.
    """

    strict = False

    def __init__(
        self,
        kernel: Kernel,
        shared_bytes: int,
        memory: Global,
        *,
        asynchrony: str = "late",
        seed: int | None = None,
        check: bool = True,
    ) -> None:
        self.kernel, self.memory, self.check = kernel, memory, check
        self.asynchrony, self.seed = asynchrony, seed
        self.T = kernel.threads
        self.W = self.T // WARP
        self.tid = np.arange(self.T)
        self.warp, self.lane = self.tid // WARP, self.tid % WARP
        # Of 32 bits two rows more, for checks that run an instruction on flags.
        rows = {bits: max(n, 1) + 2 * (bits == 32) for bits, n in kernel.counts.items()}
        self.files: dict[int, np.ndarray] = {bits: np.zeros((n, self.T), FILES[bits]) for bits, n in rows.items()}
        self.shared = Shared(shared_bytes, self.W)
        self.shared.check = check
        self.shared.line = lambda: 0 if self.current is None else self.current.line
        self.ctaid = [np.zeros((), np.uint32) for _ in range(3)]
        self.nctaid = [np.zeros((), np.uint32) for _ in range(3)]
        self.param: dict[str, bytes] = {}
        self.arguments: dict[str, np.ndarray] = {}  # of a call
        self.current: Instruction | None = None
        self.stats = {"bank": 0, "bank_ideal": 0, "sectors": 0, "sectors_ideal": 0, "instructions": 0, "ctas": 0}
        self.stats["float_atomics"] = 0  # sums whose bits depend on an order that a GPU leaves open
        self.count_stats = False
        self.most_steps = 10_000_000
        self.ticks = 0
        self.polled = ""  # what an instruction of the current block read again and found unchanged
        self.place_in_grid = (0, 0, 0)
        self.ran = np.zeros(len(kernel.blocks), np.int64)  # how many warps ran each block
        self.number = 0  # of the CTA, from 1
        self.local = Local(kernel.size("local"), self.T)
        self.chance: np.random.Generator | None = None  # what is left open happens by it, where there is a seed
        self.before: list[set[int]] = kernel.predecessors()
        self.matrix_row, self.matrix_col = np.arange(WARP) >> 2, np.arange(WARP) & 3
        self.in_flight = InFlight(self.T, asynchrony, (seed or 0, 0))
        self.descriptors: dict[Any, Any] = {}  # of wgmma, once understood

    def start(self, params: dict[str, bytes], cta: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Make this the state at the first instruction of CTA ``cta`` of ``grid``."""
        for axis in range(3):
            self.ctaid[axis][...] = cta[axis]
            self.nctaid[axis][...] = grid[axis]
        self.param = params
        for bits, file in self.files.items():
            file[:] = 0xFFFFFFFF if bits == 32 else 0
        self.shared.reset()
        self.local.reset()
        self.place_in_grid = cta
        self.number = cta[0] + grid[0] * (cta[1] + grid[1] * cta[2]) + 1
        self.in_flight = InFlight(self.T, self.asynchrony, (self.seed or 0, self.number))
        self.chance = None if self.seed is None else np.random.default_rng((self.seed, self.number))
        self.memory.enter(self.number, self.shared.clocks, grid)

    @staticmethod
    def map_address(name: str) -> int:
        """Return the address, of 32 bits as some versions of Triton keep it, of a parameter that is a tensor map."""
        return 0x7E000000 + 128 * int(name.rsplit("_", 1)[1])

    def row(self, reg: Reg, type_: str | None = None) -> np.ndarray:
        """Return a register as an array [T], of PTX's type ``type_`` or of unsigned numbers; not its negation."""
        row = self.files[reg.bits][reg.index]
        return row if type_ is None or reg.bits == 1 else row.view(TYPES[type_])

    def low(self, reg: Reg, type_: str) -> np.ndarray:
        """Return the low bits of a register as an array [T] of a type that is no wider."""
        bits = np.dtype(TYPES[type_]).itemsize * 8
        if reg.bits < bits:
            raise UnknownInstruction(f"register {reg.name} of {reg.bits} bits as {type_}")
        return self.files[reg.bits][reg.index].view(TYPES[type_])[:: reg.bits // bits]

    def src(self, op: Operand, type_: str) -> np.ndarray:
        """Return a source operand as ``type_``: [T] of a register, of no dimensions where all threads share it."""
        if isinstance(op, Reg):
            bits = np.dtype(TYPES[type_]).itemsize * 8 if type_ != "pred" else 1
            if op.bits != bits or op.negated:
                raise UnknownInstruction(f"register {op.name} of {op.bits} bits{' negated' * op.negated} as {type_}")
            return self.row(op, type_)
        if isinstance(op, Imm):
            return np.array(constant(op.text, type_), TYPES[type_])
        if isinstance(op, Sym):
            value = self._symbol(op.name)
            if value is not None and op.name in self.kernel.variables:  # whose addresses may be widened
                return value.astype(TYPES[type_])
            if value is not None:
                return value.astype(TYPES[type_]) if value.dtype != np.uint32 else value.view(TYPES[type_])
        raise UnknownInstruction(f"operand {op}")

    def _symbol(self, name: str) -> np.ndarray | None:
        """Return a special register or an address; of numbers that change from CTA to CTA a view of them."""
        first, _, axis = name.partition(".")
        if axis in ("x", "y", "z"):
            if first == "%tid":
                return (self.tid if axis == "x" else np.zeros(self.T)).astype(np.uint32)
            if first in ("%ctaid", "%nctaid"):
                return (self.ctaid if first == "%ctaid" else self.nctaid)["xyz".index(axis)]
            ones = {"%ntid": self.T if axis == "x" else 1, "%cluster_nctaid": 1, "%cluster_ctaid": 0}
            return np.array(ones[first], np.uint32) if first in ones else None
        numbers: dict[str, Any] = {
            "%laneid": self.lane,
            "%warpid": self.warp,
            "%nwarpid": self.W,
            "%smid": 0,
            "%nsmid": 1,
            "%gridid": 0,
            "%cluster_ctarank": 0,
            "%cluster_nctarank": 1,
            "%lanemask_eq": 1 << self.lane,
            "%lanemask_lt": (1 << self.lane) - 1,
            "%lanemask_le": (2 << self.lane) - 1,
            "%lanemask_gt": 0xFFFFFFFF - ((2 << self.lane) - 1),
            "%lanemask_ge": 0xFFFFFFFF - ((1 << self.lane) - 1),
            "WARP_SZ": WARP,
        }
        if name in numbers:
            return np.asarray(numbers[name]).astype(np.uint32)
        if any(name == param for param, _ in self.kernel.params):
            return np.array(self.map_address(name), np.uint64)
        variable = self.kernel.variables.get(name)
        if variable is not None and variable.space in ("shared", "local"):
            return np.array(variable.offset + (Shared.BASE if variable.space == "shared" else 0), np.uint32)
        if name in self.kernel.texts:
            return np.array(TEXTS + self.kernel.texts[name][0], np.uint64)
        return None

    def clock(self, name: str) -> np.ndarray:
        """Return a clock, which is further on whenever it is read."""
        self.ticks += WARP
        return np.array(self.ticks >> 32 if name.endswith("_hi") else self.ticks & CLOCKS[name], np.uint64)

    def predicate(self, op: Operand) -> Values:
        """Return a function of a predicate that may be negated."""
        if isinstance(op, Reg):
            row = self.src(replace(op, negated=False), "pred")
            return (lambda: ~row) if op.negated else (lambda: row)
        value = self.src(op, "pred")
        return lambda: value

    def address(self, op: Operand, bits: int) -> Values:
        """Return a function of the addresses [T] that ``[register + offset]`` names."""
        if not isinstance(op, Addr):
            raise UnknownInstruction(f"operand {op}: expected an address")
        if isinstance(op.base, Reg):
            base = self.row(op.base, "u64" if bits == 64 else "u32")
        else:
            base = np.zeros(self.T, np.uint64 if bits == 64 else np.uint32)
            if op.base is not None:
                base = base + self.src(op.base, "u64" if bits == 64 else "u32")
        if not op.offset:
            return lambda: base
        offset = np.array(op.offset).astype(base.dtype)
        return lambda: base + offset

    def put(self, dst: Operand, type_: str | None, value: Values) -> Step:
        """Return a step that computes ``value()`` for all threads and keeps that of those which execute."""
        out = self.row(as_register(dst), type_)

        def step(mask: Mask) -> None:
            if mask is None:
                out[...] = value()
            else:
                np.copyto(out, value(), where=mask, casting="unsafe")

        return step

    def ufunc(self, function: np.ufunc, dst: Operand, type_: str, *sources: np.ndarray) -> Step:
        """Return a step that applies a ufunc to one or two sources, straight into a register."""
        out = self.row(as_register(dst), type_)
        if len(sources) == 1:
            (a,) = sources
            return lambda mask: function(a, out=out) if mask is None else function(a, out=out, where=mask)
        a, b = sources
        return lambda mask: function(a, b, out=out) if mask is None else function(a, b, out=out, where=mask)

    def guarded(self, guard: Reg | None, step: Step) -> Step:
        """Return ``step`` for the threads whose guard holds."""
        if guard is None:
            return step
        predicate, negated = self.row(guard), guard.negated

        def under_guard(mask: Mask) -> None:
            taken = ~predicate if negated else predicate
            if mask is not None:
                taken = taken & mask
            if taken.all():
                step(None)
            elif taken.any():
                step(taken.copy())

        return under_guard

    def ended(self) -> np.ndarray:
        """Return which threads have ended [T]: no instruction waits for them."""
        return np.zeros(self.T, bool)

    def whole_warps(self, mask: Mask) -> None:
        """Check that of each warp all lanes execute, or none."""
        if mask is not None and (mask.reshape(-1, WARP).all(1) != mask.reshape(-1, WARP).any(1)).any():
            raise Hazard("convergence", "an instruction of whole warps runs with lanes missing")


def as_register(op: Operand) -> Reg:
    """Return an operand that must be a register."""
    if not isinstance(op, Reg):
        raise UnknownInstruction(f"operand {op}: expected a register")
    return op
