"""The state of one CTA: registers of all its threads, memory, and its instructions as closures over numpy."""

from __future__ import annotations

from collections import Counter

import numpy as np

from . import opcodes
from .global_memory import Global
from .hazard import Hazard
from .in_flight import InFlight
from .numbers import FILES, TYPES, constant
from .opcodes.wgmma import check_fence
from .ptx import Addr, Imm, Instruction, Kernel, Reg, Sym
from .schedule import execute
from .shared_memory import Shared


class Machine:
    """A kernel ready to run. `asynchrony` and `seed` say when what is asynchronous takes effect (InFlight)."""

    def __init__(
        self,
        kernel: Kernel,
        shared_bytes: int,
        memory: Global,
        *,
        asynchrony: str = "late",
        seed: int = 0,
        check: bool = True,
        stats: bool = False,
        most_steps: int = 10_000_000,
    ) -> None:
        self.most_steps = most_steps
        self.table = opcodes.load()
        self.kernel, self.memory, self.check, self.count_stats = kernel, memory, check, stats
        self.asynchrony, self.seed = asynchrony, seed
        self.T = T = kernel.threads
        self.W = T // 32
        self.tid = np.arange(T)
        self.warp = self.tid // 32
        self.lane = self.tid % 32
        self.files = {b: np.zeros((max(n, 1), T), FILES[b]) for b, n in kernel.counts.items()}
        self.shared = Shared(shared_bytes, self.W)
        self.shared.check = check
        self.stats = {"bank": 0, "bank_ideal": 0, "sectors": 0, "sectors_ideal": 0, "instructions": 0, "ctas": 0}
        self.ran = np.zeros(len(kernel.blocks), np.int64)  # how often each block ran
        self.ctaid = [np.zeros(T, np.uint32) for _ in range(3)]
        self.nctaid = [np.zeros(T, np.uint32) for _ in range(3)]
        self.param: dict[str, bytes] = {}
        self.current: Instruction | None = None
        self.descriptors: dict = {}
        lane_pairs = np.arange(32)
        self.matrix_row, self.matrix_col = lane_pairs >> 2, lane_pairs & 3
        self.blocks = []
        self.before: list[set[int]] = [set() for _ in range(len(kernel.blocks) + 1)]
        for at, block in enumerate(kernel.blocks):
            end = block.end
            if end is not None and end.opcode.startswith("bra"):
                self.before[kernel.labels[end.operands[0].name]].add(at)
            if end is not None and end.opcode.startswith("brx"):
                for to in kernel.tables[end.operands[1].name]:
                    self.before[to].add(at)
            if end is None or end.guard is not None or end.opcode.startswith(("bar", "mbar")):
                self.before[at + 1].add(at)
        for at, block in enumerate(kernel.blocks):
            body = []
            for n, ins in enumerate(block.body):
                self.current = ins
                try:
                    body.append((self._guarded(ins), ins, ins.reads | ins.writes))
                    if ins.opcode.startswith("wgmma.mma_async"):
                        check_fence(self, at, n)
                except (KeyError, NotImplementedError, IndexError, AssertionError) as error:
                    raise NotImplementedError(f"PTX line {ins.line}: {ins.text}: {error!r}") from error
            self.blocks.append((body, block.end))

    def run(self, params: dict[str, bytes], cta: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """One CTA from its first instruction to its last."""
        for axis in range(3):
            self.ctaid[axis][:] = cta[axis]
            self.nctaid[axis][:] = grid[axis]
        self.param = params
        for b, file in self.files.items():
            file[:] = 0xFFFFFFFF if b == 32 else 0
        self.shared.reset()
        self.in_flight = InFlight(self.T, self.asynchrony, self.seed)
        self.memory.cta = cta[0] + grid[0] * (cta[1] + grid[1] * cta[2]) + 1
        try:
            with np.errstate(all="ignore"):
                execute(self)
        except Hazard as error:
            ins = self.current
            raise Hazard(
                error.kind,
                f"{str(error).split(': ', 1)[1]} | PTX line {ins.line}: {ins.text[:90]} | {ins.source} | CTA {cta}",
            ) from None
        self.stats["ctas"] += 1

    def executed(self) -> dict[str, int]:
        """How often each opcode ran, over all CTAs."""
        count: Counter = Counter()
        for n, (body, end) in zip(self.ran, self.blocks, strict=True):
            for ins in [i for _, i, _ in body] + ([end] if end else []):
                count[ins.opcode] += int(n)
        return {k: v for k, v in count.items() if v}

    @staticmethod
    def map_address(name: str) -> int:
        return 0x7E0000000000 + 128 * int(name.rsplit("_", 1)[1])

    def row(self, r: Reg, type_: str | None = None) -> np.ndarray:
        row = self.files[r.bits][r.index]
        return row if type_ is None or r.bits == 1 else row.view(TYPES[type_])

    def src(self, op, type_: str):
        """An array [T] or a numpy scalar array, of the type."""
        if isinstance(op, Reg):
            bits = np.dtype(TYPES[type_]).itemsize * 8 if type_ != "pred" else 1
            if op.bits != bits:
                raise NotImplementedError(f"{op} as {type_}")
            return self.row(op, type_)
        if isinstance(op, Imm):
            return np.array(constant(op.text, type_), TYPES[type_])
        if isinstance(op, Sym):
            n = op.name
            if n.startswith("%tid."):
                return (self.tid if n[5] == "x" else np.zeros(self.T)).astype(np.uint32).view(TYPES[type_])
            if n.startswith("%ctaid."):
                return self.ctaid["xyz".index(n[-1])].view(TYPES[type_])
            if n.startswith("%nctaid."):
                return self.nctaid["xyz".index(n[-1])].view(TYPES[type_])
            if n.startswith("%ntid."):
                return np.array(self.T if n[6] == "x" else 1, TYPES[type_])
            if n == "%laneid":
                return self.lane.astype(TYPES[type_])
            if n == "%warpid":
                return self.warp.astype(TYPES[type_])
            if "_param_" in n:  # the address of a parameter that is a tensor map
                return np.array(self.map_address(n), np.uint64)
            if n == "global_smem":
                return np.array(Shared.BASE, TYPES[type_])
        raise NotImplementedError(f"operand {op}")

    def _guarded(self, ins: Instruction):
        fn = self._compile(ins)
        if ins.guard is None:
            return fn
        p, negated = self.row(ins.guard), ins.guard.negated

        def guarded(m):
            t = ~p if negated else p
            if m is not None:
                t = t & m
            if t.all():
                fn(None)
            elif t.any():
                fn(t.copy())

        return guarded

    def put(self, dst: Reg, type_: str | None, value):
        """A closure that computes value() for all threads and keeps those of the mask."""
        out = self.row(dst, type_)

        def f(m):
            if m is None:
                out[...] = value()
            else:
                np.copyto(out, value(), where=m)

        return f

    def ufunc(self, uf, dst: Reg, type_: str, *sources):
        out = self.row(dst, type_)
        if len(sources) == 1:
            (a,) = sources
            return lambda m: uf(a, out=out) if m is None else uf(a, out=out, where=m)
        a, b = sources
        return lambda m: uf(a, b, out=out) if m is None else uf(a, b, out=out, where=m)

    def _compile(self, ins: Instruction):
        compile_ = self.table.get(ins.parts[0])
        if compile_ is None:
            raise NotImplementedError(f"opcode {ins.opcode}")
        return compile_(self, ins, ins.parts, ins.operands)

    def address(self, op: Addr, bits: int):
        if isinstance(op.base, Reg):
            a = self.row(op.base, "u64" if bits == 64 else "u32")
        else:
            a = np.full(self.T, Shared.BASE, np.uint32)
            assert op.base is None or op.base.name == "global_smem"
        if op.offset:
            k = np.array(op.offset).astype(a.dtype)
            return lambda: a + k
        return lambda: a
