"""A kernel ready to run: the state of its CTAs, and each instruction as a closure over that state."""

from __future__ import annotations

from collections import Counter

import numpy as np

from . import opcodes
from .global_memory import Global
from .hazard import Hazard, UnknownInstruction
from .opcodes.wgmma import check_fence
from .ptx import Instruction, Kernel
from .schedule import execute
from .state import Cta, Step


class Machine(Cta):
    """A kernel whose CTAs run one after the other. `asynchrony` and `seed`: see InFlight."""

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
        super().__init__(kernel, shared_bytes, memory, asynchrony=asynchrony, seed=seed, check=check)
        self.count_stats, self.most_steps = stats, most_steps
        opcodes.load()
        for at, block in enumerate(kernel.blocks):
            body = []
            for n, ins in enumerate(block.body):
                body.append((self._compile(ins), ins, ins.reads | ins.writes))
                if ins.opcode.startswith("wgmma.mma_async"):
                    check_fence(self, at, n)
            if block.end is not None:
                opcodes.check_end(block.end)
            self.blocks.append((body, block.end))

    def _compile(self, ins: Instruction) -> Step:
        self.current = ins
        try:
            step = opcodes.find(ins)(self, ins, ins.parts, ins.operands)
        except Hazard:
            raise
        except Exception as error:
            reason = error if isinstance(error, UnknownInstruction) else repr(error)
            raise UnknownInstruction(f"{self.kernel.name}, {self.place()}: {reason}") from error
        return self.guarded(ins.guard, step)

    def place(self) -> str:
        """Return the current instruction, and where it stands in the PTX and in the kernel's source."""
        ins = self.current
        assert ins is not None
        return f"PTX line {ins.line}: {ins.text[:90]} | {ins.source}"

    def run(self, params: dict[str, bytes], cta: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Run one CTA from its first instruction to its last."""
        self.start(params, cta, grid)
        try:
            with np.errstate(all="ignore"):
                execute(self)
        except Hazard as error:
            raise Hazard(error.kind, error.message, f"{self.place()} | CTA {cta}") from None
        self.stats["ctas"] += 1

    def executed(self) -> dict[str, int]:
        """Return how often each opcode ran, over all CTAs."""
        count: Counter[str] = Counter()
        for n, (body, end) in zip(self.ran, self.blocks, strict=True):
            for ins in [i for _, i, _ in body] + ([end] if end else []):
                count[ins.opcode] += int(n)
        return {opcode: n for opcode, n in count.items() if n}
