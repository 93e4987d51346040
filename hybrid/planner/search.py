"""Every layout of a number of ranks: ranked by the time of a step, or refused with the reason.

Legality is the runtime's own: :meth:`Layout.validate`, the batch's rule of :class:`~fusemesh.hybrid.data.BatchOrder`,
and the pipeline's of :class:`~fusemesh.hybrid.pipeline_options.PipelineOptions`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ..layout import Layout
from ..pipeline_options import check_holders, deal_blocks
from . import cost, memory
from .cost import Cost
from .hardware import Hardware
from .job import BatchSplit, TrainingJob
from .memory import Memory
from .model import ModelDescription


@dataclass(frozen=True)
class Choice:
    """A layout that can run: how it splits a replica's samples, and the estimates."""

    layout: Layout
    split: BatchSplit
    cost: Cost
    memory: Memory


@dataclass(frozen=True)
class Rejected:
    """A layout that cannot run. short_by: bytes that a rank lacks, where memory is the reason."""

    layout: Layout
    why: str
    short_by: int | None = None


@dataclass(frozen=True)
class RankedLayouts:
    """Every layout of a number of ranks. layouts: those that can run, the fastest first."""

    layouts: tuple[Choice, ...]
    rejected: tuple[Rejected, ...]

    @property
    def nearest_miss(self) -> Rejected | None:
        """The layout that lacks least memory, of those that lack nothing else."""
        missing = [r for r in self.rejected if r.short_by is not None]
        return min(missing, key=lambda r: r.short_by or 0) if missing else None


def layouts_of(world: int) -> Iterator[Layout]:
    """Yield every product of dp, fsdp, tp and pp that is ``world`` ranks."""

    def divisors(number: int) -> list[int]:
        return [d for d in range(1, number + 1) if number % d == 0]

    for pp in divisors(world):
        for tp in divisors(world // pp):
            for fsdp in divisors(world // pp // tp):
                yield Layout(dp=world // pp // tp // fsdp, fsdp=fsdp, tp=tp, pp=pp)


def plan(model: ModelDescription, job: TrainingJob, hardware: Hardware, world: int) -> RankedLayouts:
    """Rank every layout of ``world`` ranks.

    Raises:
        ValueError: ``world`` is below 1.
    """
    if world < 1:
        raise ValueError(f"--world: expected at least 1 rank, received {world}")
    found = [consider(model, job, hardware, layout) for layout in layouts_of(world)]
    choices = [result for result in found if isinstance(result, Choice)]
    return RankedLayouts(
        tuple(sorted(choices, key=lambda c: (c.cost.seconds, c.memory.total))),
        tuple(result for result in found if isinstance(result, Rejected)),
    )


def consider(model: ModelDescription, job: TrainingJob, hardware: Hardware, layout: Layout) -> Choice | Rejected:
    """Return one layout with the split of the batch that makes it fastest of those that fit in memory."""
    if job.sequence_parallel and not model.capabilities.sequence_parallel:
        job = dataclasses.replace(job, sequence_parallel=False)
    try:
        check(model, job, hardware, layout)
        candidates = job.splits(layout)
    except ValueError as error:
        return Rejected(layout, str(error))
    best: Choice | None = None
    least: Memory | None = None
    for split in candidates:
        needed = memory.estimate(model, job, layout, hardware, split)
        if least is None or needed.total < least.total:
            least = needed
        if needed.total > hardware.memory:
            continue
        price = cost.estimate(model, job, layout, hardware, split)
        if best is None or price.seconds < best.cost.seconds:
            best = Choice(layout, split, price, needed)
    if best is not None:
        return best
    assert least is not None
    short = least.total - hardware.memory
    largest = max(least.parts, key=lambda name: least.parts[name])
    return Rejected(
        layout,
        f"memory: needs {gib(least.total)} a rank, most of it {largest} ({gib(least.parts[largest])}), and --memory "
        f"allows {gib(hardware.memory)}: {gib(short)} too much",
        short,
    )


def check(model: ModelDescription, job: TrainingJob, hardware: Hardware, layout: Layout) -> None:
    """Refuse a layout that cannot run this model, whatever the memory.

    Raises:
        ValueError: names the flag or key.
    """
    model.capabilities.check(layout)
    if layout.tp > hardware.ranks_per_node or hardware.ranks_per_node % layout.tp:
        raise ValueError(
            f"tp: tp{layout.tp} would leave a node of {hardware.ranks_per_node} ranks, whose links its collectives "
            f"need; use a tp that divides {hardware.ranks_per_node}, or --gpus-per-node"
        )
    if model.fits is not None:
        model.fits(layout, job.pipeline.virtual_stages)
    layout.validate(
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        sequence_length=job.sequence_length,
        global_batch=job.global_batch,
        sequence_parallel=job.sequence_parallel,
        virtual_stages=job.pipeline.virtual_stages,
    )
    if layout.pp > 1:
        spans = deal_blocks(model.num_layers, layout.pp * job.pipeline.virtual_stages)
        for outer in model.outer:
            stages = [number for number, span in enumerate(spans) if set(span) & set(outer.layers)]
            check_holders(outer.weight.name, stages, layout.pp, job.pipeline.virtual_stages)


def gib(size: float) -> str:
    """Return bytes as text."""
    return f"{size / 2**30:.2f} GiB"
