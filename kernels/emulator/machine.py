"""A kernel ready to run: the state of its CTAs, and each instruction as a closure over that state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from . import opcodes
from .definedness import Definedness
from .global_memory import Global
from .hazard import Hazard, UnknownInstruction
from .opcodes.sync import Barrier, compile_barrier
from .opcodes.wgmma import check_fence
from .pointers import written_parameters
from .ptx import Block, Instruction, Kernel, meeting, synchronises
from .schedule import ENDED, Code, Leave, Threads, compile_end, execute
from .state import Cta, Step


class Machine(Cta):
    """A kernel ready to run, one CTA at a time.

    Attributes:
        seed: by which threads take turns (see Threads) and CTAs (see run_grid); None runs them in step.
        resident: how many CTAs run side by side where they may hear of each other.
        threads, barriers: where the threads of the CTA are, and its barriers at which some have arrived.
    """

    def __init__(
        self,
        kernel: Kernel,
        shared_bytes: int,
        memory: Global,
        *,
        asynchrony: str = "late",
        seed: int | None = None,
        resident: int = 2,
        check: bool = True,
        stats: bool = False,
        most_steps: int = 10_000_000,
    ) -> None:
        super().__init__(kernel, shared_bytes, memory, asynchrony=asynchrony, seed=seed, check=check)
        self.count_stats, self.most_steps = stats, most_steps
        self.shared_bytes, self.resident = shared_bytes, resident
        self.blocks: list[Code] = []
        self.threads = Threads(self, seed)
        self.barriers: dict[int, Barrier] = {}
        self.written = written_parameters(kernel)
        opcodes.load()
        self.definedness = Definedness(self)
        for at, block in enumerate(kernel.blocks):
            body = []
            for n, ins in enumerate(block.body):
                body.append((self._compile(ins), ins, ins.reads | ins.writes))
                if ins.opcode.startswith("wgmma.mma_async"):
                    check_fence(self, at, n)
            all_ = [*block.body, *([block.end] if block.end else [])]
            meets = next((x for x in map(meeting, all_) if x is not None), None)
            talks = any(synchronises(x) for x in block.body)
            self.blocks.append(Code(body, self._compile_end(at, block), block.end, meets, talks))

    def _compile_end(self, at: int, block: Block) -> Leave | None:
        if block.end is None:
            return None
        self.current = block.end
        try:
            opcodes.check_end(block.end)
            compile_ = compile_barrier if block.end.parts[0] in ("bar", "barrier") else compile_end
            return self.definedness.wrap_guard(block.end, compile_(self, at, block))
        except Exception as error:
            reason = error if isinstance(error, UnknownInstruction) else repr(error)
            raise UnknownInstruction(f"{self.kernel.name}, {self.place()}: {reason}") from error

    def _compile(self, ins: Instruction) -> Step:
        self.current = ins
        try:
            step = opcodes.find(ins.opcode)(self, ins, ins.parts, ins.operands)
        except Hazard:
            raise
        except Exception as error:
            reason = error if isinstance(error, UnknownInstruction) else repr(error)
            raise UnknownInstruction(f"{self.kernel.name}, {self.place()}: {reason}") from error
        step = self.guarded(ins.guard, self.definedness.wrap(ins, step))
        return self.definedness.wrap_guard(ins, step)

    def ended(self) -> np.ndarray:
        """Return which threads have ended [T]: no instruction waits for them."""
        return self.threads.state == ENDED

    def place(self) -> str:
        """Return the current instruction, and where it stands in the PTX and in the kernel's source."""
        ins = self.current
        assert ins is not None
        return f"PTX line {ins.line}: {ins.text[:90]} | {ins.source}"

    def twin(self) -> Machine:
        """Return another machine for the same kernel and memory, whose counts go into this one's."""
        twin = Machine(
            self.kernel,
            self.shared_bytes,
            self.memory,
            asynchrony=self.asynchrony,
            seed=self.seed,
            resident=self.resident,
            check=self.check,
            stats=self.count_stats,
            most_steps=self.most_steps,
        )
        twin.stats, twin.ran, twin.strict = self.stats, self.ran, self.strict
        return twin

    def begin(self, params: dict[str, bytes], cta: tuple[int, int, int], grid: tuple[int, int, int]) -> Iterator[bool]:
        """Run one CTA from its first instruction to its last; yields where another may have its turn (``execute``)."""
        self.start(params, cta, grid)
        self.definedness.start()
        written = None if self.written is None else [int.from_bytes(params[x][:8], "little") for x in self.written]
        self.memory.watch(written)
        self.threads = Threads(self, None if self.seed is None else self.seed * 1_000_003 + self.number)
        self.barriers = {}
        steps = execute(self, self.threads)
        while True:
            self.memory.enter(self.number, self.shared.clocks, grid)
            self.memory.line = self.shared.line
            try:
                with np.errstate(all="ignore"):
                    spins = next(steps, None)
            except Hazard as error:
                raise Hazard(error.kind, error.message, f"{self.place()} | CTA {cta}") from None
            if spins is None:
                break
            yield spins
        self.stats["ctas"] += 1

    def run(self, params: dict[str, bytes], cta: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Run one CTA by itself."""
        for _ in self.begin(params, cta, grid):
            pass

    def executed(self) -> dict[str, int]:
        """Return how often each opcode ran, once for each warp, over all CTAs."""
        count: Counter[str] = Counter()
        for n, code in zip(self.ran, self.blocks, strict=True):
            for ins in [i for _, i, _ in code.body] + ([code.end] if code.end else []):
                count[ins.opcode] += int(n)
        return {opcode: n for opcode, n in count.items() if n}
