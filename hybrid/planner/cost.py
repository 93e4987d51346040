"""Seconds of one step, by what they are spent on: a roofline for every operation, alpha-beta for every message.

step = a * (m + (p - 1) / v) * slowest stage's microbatch + what data parallelism does not hide + update, with a
accumulations of m microbatches, p stages and v virtual stages: the bubble is (p - 1) / (v m) of the work (Narayanan et
al., 2021, section 2.2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ..layout import Layout
from .hardware import Hardware
from .job import Cut, Job
from .memory import stage_weights
from .model import Model, Weight
from .operations import Operation, block_operations, first_operations, last_operations


@dataclass(frozen=True)
class Item:
    """Seconds of a step on one thing. kind: ``compute``, ``memory``, ``communication``, ``host`` or ``idle``."""

    name: str
    kind: str
    seconds: float


@dataclass(frozen=True)
class Cost:
    """One step of the slowest stage. ``items`` sum to ``seconds``."""

    seconds: float
    items: tuple[Item, ...]
    stage: int = 0

    def by_kind(self) -> dict[str, float]:
        """Seconds of each kind."""
        found: dict[str, float] = defaultdict(float)
        for item in self.items:
            found[item.kind] += item.seconds
        return dict(found)


# Bytes; glibc's malloc keeps no freed tensor of more than 32 MiB.
_BEYOND_HEAPS = 1 << 26
_KINDS = {"matmul": "compute", "attention": "compute", "elementwise": "memory", "tp": "communication"}


def estimate(model: Model, job: Job, layout: Layout, hardware: Hardware, cut: Cut) -> Cost:
    """The seconds of one step."""
    pricing = _Pricing(model, job, layout, hardware, cut)
    stages = sorted({0, layout.pp - 1, min(1, layout.pp - 1)})
    return max((pricing.stage(stage) for stage in stages), key=lambda cost: cost.seconds)


class _Pricing:
    """The seconds of operations in one layout."""

    def __init__(self, model: Model, job: Job, layout: Layout, hardware: Hardware, cut: Cut) -> None:
        self.model, self.job, self.layout, self.hardware, self.cut = model, job, layout, hardware, cut
        self.samples, self.virtual = job.samples(layout, cut), job.pipeline.virtual_stages
        self.world = layout.world_size
        # Ranks that share cores compute one after the other; idle ones leave theirs to the others.
        self.busy = hardware.slowdown(self.world) if hardware.device == "cpu" else 1.0
        self.busy_memory = hardware.memory_slowdown(self.world) if hardware.device == "cpu" else 1.0
        self.strides = {"tp": 1, "fsdp": layout.cp * layout.tp}
        self.strides["dp"] = self.strides["fsdp"] * layout.fsdp
        self.strides["pp"] = self.strides["dp"] * layout.dp

    def stage(self, stage: int) -> Cost:
        """The step as the ranks of one pipeline stage see it."""
        layers, rest = stage_weights(self.model, self.layout, stage, self.virtual)
        work: dict[tuple[str, str], float] = defaultdict(float)
        for operation, times in self._operations(stage, layers):
            seconds = times * self._seconds(operation)
            work[operation.name.split(".")[0], _KINDS[operation.kind]] += seconds
            if operation.name == "attention.core":
                work["attention", "compute"] -= seconds
                work["attention core", "compute"] += seconds
        work["layers", "host"] += layers * self.hardware.block_s * self.busy
        if self.layout.pp > 1:
            work["stages", "communication"] += self._send()
        compute = sum(seconds for (_, kind), seconds in work.items() if kind in ("compute", "memory", "host"))
        per_microbatch = sum(work.values())
        items = {key: self.cut.parts * seconds for key, seconds in work.items()}
        bubble = self._bubble(per_microbatch, compute)
        if bubble:
            items["bubble", "idle"] = bubble
        exposed, hidden, copies = self._data_parallel(layers, rest, compute)
        items["data parallel", "communication"] = exposed + self.hardware.contention * hidden
        items["shards", "memory"] = copies
        items["update", "memory"] = self._update(layers, rest)
        items["step", "host"] = self.hardware.step_s * self.busy
        found = tuple(Item(name, kind, s) for (name, kind), s in items.items() if s > 0)
        return Cost(sum(item.seconds for item in found), found, stage)

    def _operations(self, stage: int, layers: int) -> Iterable[tuple[Operation, float]]:
        model, job, tp, device = self.model, self.job, self.layout.tp, self.hardware.device
        for operation in block_operations(model, job, tp, self.samples, device):
            again = job.recompute == "full" or (
                job.recompute == "selective" and operation.name in ("attention.core", "attention.scores")
            )
            yield operation, layers * (2 if again and not operation.backward else 1)
        if stage == 0:
            yield from ((operation, 1) for operation in first_operations(model, job, tp, self.samples))
        if stage == self.layout.pp - 1:
            yield from ((operation, 1) for operation in last_operations(model, job, tp, self.samples, device))

    def _seconds(self, operation: Operation) -> float:
        hardware, job = self.hardware, self.job
        if operation.kind == "tp":
            return self._collective(operation.collective, operation.size, "tp")
        if operation.kind == "matmul":
            seconds = hardware.matmul_s(operation.flops, operation.size, job.dtype)
        elif operation.kind == "attention":
            seconds = hardware.attention_s(operation.flops, job.dtype)
        else:
            seconds = hardware.memory_s(operation.size, operation.tensor, operation.calls)
        return seconds * self.busy

    def _collective(self, collective: str, size: float, axis: str) -> float:
        ranks = getattr(self.layout, axis)
        return self.hardware.collective_s(collective, size, ranks, self.strides[axis], self.world)

    def _send(self) -> float:
        """Activations to the next stage and gradients to the one before, once for each virtual stage."""
        tokens = self.samples * self.job.sequence_length
        if self.job.sequence_parallel:
            tokens //= self.layout.tp
        size = tokens * self.model.hidden_size * self.job.item
        return 2 * self.virtual * self._collective("send", size, "pp")

    def _bubble(self, per_microbatch: float, compute: float) -> float:
        """Seconds in which a stage waits for others, over the step."""
        waits = (self.layout.pp - 1) / self.virtual
        m, idle = self.cut.microbatches, waits * per_microbatch
        if self.hardware.device == "cpu" and self.world > self.hardware.cores:
            # While some stages wait, the others have more of the cores; only what then lies idle is lost.
            alone = compute / self.busy * self.hardware.slowdown(min(self.hardware.cores, self.world))
            idle = max(0.0, (m + waits) * (per_microbatch - compute + alone) - m * per_microbatch)
        return self.cut.accumulation * idle

    def _data_parallel(self, layers: int, rest: list[Weight], compute: float) -> tuple[float, float, float]:
        """Seconds of messages that are waited for, of those that computing hides, and of copies into and out of shards.

        Each accumulated part reduces its gradients; a pipeline gathers once for all its microbatches, and torch's
        schedules reduce after the last.
        """
        layout, job, rounds = self.layout, self.job, self.cut.accumulation
        messages, edges, copies = 0.0, 0.0, 0.0
        for count, weights, again in ((layers, self.model.block_weights(), True), (1, tuple(rest), False)):
            elements = sum(w.local(layout.tp) for w in weights)
            if not elements or not count:
                continue
            gather = self._collective("all_gather", elements * job.item, "fsdp")
            reduce = self._collective("reduce_scatter", elements * job.master, "fsdp")
            reduce += self._collective("all_reduce", elements / layout.fsdp * job.master, "dp")
            gathers = rounds * (2 if again and layout.fsdp > 1 and layout.pp == 1 else 1)
            messages += count * (gathers * gather + rounds * reduce)
            edges = max(edges, gather + reduce)
            copies += count * gathers * self._copy(2 * elements * job.item)
            # Into the buffer that is reduced; where there is one shard it is divided and copied to its result.
            passes = 2 if layout.fsdp > 1 else 6
            copies += count * rounds * self._copy(passes * elements * job.master)
            # Every gradient but the first is added to what is there: whole ones in a pipeline, else shards.
            added = rounds * (self.cut.microbatches - 1) * elements + (rounds - 1) * elements / layout.fsdp
            copies += 0.0 if job.fused_accumulation else count * self._stream(3 * added * job.master)
        hidden = min(max(0.0, messages - edges), self.hardware.overlap * self.cut.parts * compute)
        return messages - hidden, hidden, copies

    def _update(self, layers: int, rest: list[Weight]) -> float:
        """Clipping reads the gradients and scales them; AdamW reads four tensors and writes three."""
        split = (self.layout.tp, self.layout.fsdp)
        elements = layers * sum(w.local(*split) for w in self.model.block_weights()) + sum(
            w.local(*split) for w in rest
        )
        return self._stream((7 + (3 if self.job.clip else 0)) * elements * self.job.master)

    def _copy(self, size: float) -> float:
        """Seconds of reading and writing ``size`` bytes of a group's parameters or gradients into new tensors.

        They are freed after use, so that a CPU's system takes their pages and must give them again: the rate is that
        of tensors beyond any heap.
        """
        return self.hardware.memory_s(size, max(size, _BEYOND_HEAPS)) * self.busy_memory

    def _stream(self, size: float) -> float:
        """Seconds of reading and writing ``size`` bytes in place."""
        return self.hardware.stream_s(size) * self.busy_memory
