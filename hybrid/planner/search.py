"""Every layout of a number of ranks: ranked by the time of a step, or refused with the reason.

Legality is the runtime's own: :meth:`Layout.validate`, the batch's rule of :class:`~fusemesh.hybrid.data.BatchOrder`,
and the pipeline's rules below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ..data import BatchOrder
from ..layout import Layout
from . import cost, memory
from .cost import Cost
from .hardware import Hardware
from .job import Job
from .memory import Memory
from .model import Model


@dataclass(frozen=True)
class Choice:
    """A layout that can run: into how many microbatches a replica's samples are cut, and the estimates."""

    layout: Layout
    microbatches: int
    cost: Cost
    memory: Memory


@dataclass(frozen=True)
class Rejected:
    """A layout that cannot run. short_by: bytes that a rank lacks, where memory is the reason."""

    layout: Layout
    why: str
    short_by: int | None = None


@dataclass(frozen=True)
class Plan:
    """layouts: the fastest first."""

    layouts: tuple[Choice, ...]
    rejected: tuple[Rejected, ...]

    @property
    def nearest_miss(self) -> Rejected | None:
        """Of the layouts that lack only memory, the one that lacks least."""
        missing = [r for r in self.rejected if r.short_by is not None]
        return min(missing, key=lambda r: r.short_by or 0) if missing else None


def layouts_of(world: int) -> Iterator[Layout]:
    """Every product of dp, fsdp, tp and pp that is ``world`` ranks."""

    def divisors(number: int) -> list[int]:
        return [d for d in range(1, number + 1) if number % d == 0]

    for pp in divisors(world):
        for tp in divisors(world // pp):
            for fsdp in divisors(world // pp // tp):
                yield Layout(dp=world // pp // tp // fsdp, fsdp=fsdp, tp=tp, pp=pp)


def plan(model: Model, job: Job, hardware: Hardware, world: int) -> Plan:
    """Try every layout of ``world`` ranks.

    Raises:
        ValueError: ``world`` is below 1.
    """
    if world < 1:
        raise ValueError(f"--world: expected at least 1 rank, received {world}")
    found = [consider(model, job, hardware, layout) for layout in layouts_of(world)]
    choices = [result for result in found if isinstance(result, Choice)]
    return Plan(
        tuple(sorted(choices, key=lambda c: (c.cost.seconds, c.memory.total))),
        tuple(result for result in found if isinstance(result, Rejected)),
    )


def consider(model: Model, job: Job, hardware: Hardware, layout: Layout) -> Choice | Rejected:
    """One layout, with the number of microbatches that makes it fastest of those that fit in memory."""
    try:
        check(model, job, hardware, layout)
        candidates = microbatches_of(job, layout)
    except ValueError as error:
        return Rejected(layout, str(error))
    best: Choice | None = None
    least: Memory | None = None
    for count in candidates:
        needed = memory.estimate(model, job, layout, hardware, count)
        if least is None or needed.total < least.total:
            least = needed
        if needed.total > hardware.memory:
            continue
        price = cost.estimate(model, job, layout, hardware, count)
        if best is None or price.seconds < best.cost.seconds:
            best = Choice(layout, count, price, needed)
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


def check(model: Model, job: Job, hardware: Hardware, layout: Layout) -> None:
    """Refuse a layout that cannot run this model, whatever the memory.

    Raises:
        ValueError: names the flag or key.
    """
    if layout.tp > hardware.ranks_per_node or hardware.ranks_per_node % layout.tp:
        raise ValueError(
            f"tp: tp{layout.tp} would leave a node of {hardware.ranks_per_node} ranks, whose links its collectives "
            f"need; use a tp that divides {hardware.ranks_per_node}, or --gpus-per-node"
        )
    # The pipeline's axis has its own rules; all others are the runtime's.
    dataclasses.replace(layout, pp=1).validate(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        sequence_length=job.sequence_length,
        global_batch=job.global_batch,
        sequence_parallel=job.sequence_parallel,
    )
    stages = layout.pp * job.virtual_stages
    if layout.pp > 1 and stages > model.num_layers:
        raise ValueError(
            f"num_layers: {model.num_layers} layers cannot fill {stages} stages of pp{layout.pp}"
            + (f" with {job.virtual_stages} virtual stages each" if job.virtual_stages > 1 else "")
            + f"; use pp up to {model.num_layers // job.virtual_stages}"
        )


def microbatches_of(job: Job, layout: Layout) -> list[int]:
    """Numbers of microbatches that a replica's samples can be cut into: at least as many as pipeline stages.

    Raises:
        ValueError: there are none, or ``job.microbatches`` is not one of them.
    """
    share = job.global_batch // layout.replicas
    if job.microbatches is not None:
        # Raises where the batch does not divide, in the words that training would use.
        BatchOrder(1, job.global_batch, replicas=layout.replicas, accumulation=job.microbatches)
        found = [job.microbatches]
    else:
        found = [count for count in range(1, share + 1) if share % count == 0]
    enough = [count for count in found if count >= layout.pp]
    if job.schedule == "interleaved" and job.virtual_stages > 1 and layout.pp > 1:
        enough = [count for count in enough if count % layout.pp == 0]
    if not enough:
        raise ValueError(
            f"microbatches: pp{layout.pp} needs at least {layout.pp} microbatches a step"
            + (" (a multiple of it, interleaved)" if job.schedule == "interleaved" else "")
            + f", and {share} samples a replica give {found[-1]}; use a larger --batch, more --microbatches, or a "
            "smaller pp"
        )
    return enough


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB"
