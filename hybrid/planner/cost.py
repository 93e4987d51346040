"""Seconds of one step, by their use: a roofline for every operation, alpha-beta for every message.

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
from .job import BatchSplit, TrainingJob
from .model import ModelDescription, Share
from .operations import Operation, layer_operations, outer_operations


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


def estimate(model: ModelDescription, job: TrainingJob, layout: Layout, hardware: Hardware, split: BatchSplit) -> Cost:
    """Return the seconds of one step."""
    pricing = _Pricing(model, job, layout, hardware, split)
    return max((pricing.stage(stage) for stage in model.distinct_stages(layout)), key=lambda cost: cost.seconds)


class _Pricing:
    """The seconds of operations in one layout."""

    def __init__(
        self, model: ModelDescription, job: TrainingJob, layout: Layout, hardware: Hardware, split: BatchSplit
    ) -> None:
        self.model, self.job, self.layout, self.hardware, self.split = model, job, layout, hardware, split
        self.samples, self.virtual = job.samples(layout, split), job.pipeline.virtual_stages
        self.world = layout.world_size
        # Ranks that share cores compute one after the other; idle ones leave theirs to the others.
        self.busy = hardware.slowdown(self.world) if hardware.device == "cpu" else 1.0
        self.busy_memory = hardware.memory_slowdown(self.world) if hardware.device == "cpu" else 1.0
        self.strides = {"tp": 1, "fsdp": layout.cp * layout.tp}
        self.strides["dp"] = self.strides["fsdp"] * layout.fsdp
        self.strides["pp"] = self.strides["dp"] * layout.dp

    def stage(self, stage: int) -> Cost:
        """Return the step as the ranks of one pipeline stage see it."""
        share = self.model.share(self.layout, stage, self.virtual)
        work: dict[tuple[str, str], float] = defaultdict(float)
        for operation, times in self._operations(share):
            seconds = times * self._seconds(operation)
            group, _, part = operation.name.partition(".")
            if part == "core":
                name, kind = f"{group} core".replace("_", " "), "compute"
            else:
                name, kind = group, _KINDS[operation.kind]
            work[name, kind] += seconds
        # The host's time was measured of a layer of two parts, attention and feed-forward; memory adds a third.
        parts = sum(count * (3 if layer.with_memory else 2) / 2 for layer, count in share.layers)
        work["layers", "host"] += parts * self.hardware.block_s * self.busy
        if self.layout.pp > 1:
            work["stages", "communication"] += self._send(share)
        compute = sum(seconds for (_, kind), seconds in work.items() if kind in ("compute", "memory", "host"))
        per_microbatch = sum(work.values())
        items = {key: self.split.parts * seconds for key, seconds in work.items()}
        bubble = self._bubble(per_microbatch, compute)
        if bubble:
            items["bubble", "idle"] = bubble
        exposed, hidden, copies = self._data_parallel(share, compute)
        items["data parallel", "communication"] = exposed + self.hardware.contention * hidden
        items["shards", "memory"] = copies
        items["update", "memory"] = self._update(share)
        items["step", "host"] = self.hardware.step_s * self.busy
        found = tuple(Item(name, kind, s) for (name, kind), s in items.items() if s > 0)
        return Cost(sum(item.seconds for item in found), found, stage)

    def _operations(self, share: Share) -> Iterable[tuple[Operation, float]]:
        model, job, tp, device = self.model, self.job, self.layout.tp, self.hardware.device
        for layer, count in share.layers:
            for operation in layer_operations(model, layer, job, tp, self.samples, device):
                again = job.recompute == "full" or (
                    job.recompute == "selective" and operation.name.endswith((".core", ".scores"))
                )
                yield operation, count * (2 if again and not operation.backward else 1)
        yield from ((op, 1) for op in outer_operations(model, share, job, tp, self.samples, device))

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

    def _send(self, share: Share) -> float:
        """Return the seconds of hidden states to the next stage and gradients back, once for each virtual stage."""
        tokens = self.samples * self.job.sequence_length
        if self.job.sequence_parallel:
            tokens //= self.layout.tp
        size = tokens * self.model.hidden_size * self.job.item
        return 2 * self.virtual * share.states * self._collective("send", size, "pp")

    def _bubble(self, per_microbatch: float, compute: float) -> float:
        """Return the seconds in which a stage waits for others, over the step."""
        waits = (self.layout.pp - 1) / self.virtual
        m, idle = self.split.microbatches, waits * per_microbatch
        if self.hardware.device == "cpu" and self.world > self.hardware.cores:
            # While some stages wait, the others have more of the cores; only what then lies idle is lost.
            alone = compute / self.busy * self.hardware.slowdown(min(self.hardware.cores, self.world))
            idle = max(0.0, (m + waits) * (per_microbatch - compute + alone) - m * per_microbatch)
        return self.split.accumulation * idle

    def _data_parallel(self, share: Share, compute: float) -> tuple[float, float, float]:
        """Return the seconds of messages that are waited for, of hidden ones, and of copies into and out of shards.

        Each accumulated part reduces its gradients; a pipeline gathers once for all its microbatches, and torch's
        schedules reduce after the last.
        """
        layout, job, rounds = self.layout, self.job, self.split.accumulation
        messages, edges, copies = 0.0, 0.0, 0.0
        for weights, count in share.groups:
            elements = sum(w.local(layout.tp) for w in weights)
            if not elements:
                continue
            gather = self._collective("all_gather", elements * job.item, "fsdp")
            reduce = self._collective("reduce_scatter", elements * job.master, "fsdp")
            reduce += self._collective("all_reduce", elements / layout.fsdp * job.master, "dp")
            again = weights is not share.weights
            gathers = rounds * (2 if again and layout.fsdp > 1 and layout.pp == 1 else 1)
            messages += count * (gathers * gather + rounds * reduce)
            edges = max(edges, gather + reduce)
            copies += count * gathers * self._copy(2 * elements * job.item)
            # Into the buffer that is reduced; where there is one shard it is divided and copied to its result.
            passes = 2 if layout.fsdp > 1 else 6
            copies += count * rounds * self._copy(passes * elements * job.master)
            # Every gradient but the first is added to what is there: whole ones in a pipeline, else shards.
            added = rounds * (self.split.microbatches - 1) * elements + (rounds - 1) * elements / layout.fsdp
            copies += 0.0 if job.fused_accumulation else count * self._stream(3 * added * job.master)
        hidden = min(max(0.0, messages - edges), self.hardware.overlap * self.split.parts * compute)
        return messages - hidden, hidden, copies

    def _update(self, share: Share) -> float:
        """Return the seconds of clipping, which reads and scales gradients, and AdamW: it reads 4 tensors, writes 3."""
        split = (self.layout.tp, self.layout.fsdp)
        elements = sum(count * sum(w.local(*split) for w in weights) for weights, count in share.groups)
        return self._stream((7 + (3 if self.job.clip else 0)) * elements * self.job.master)

    def _copy(self, size: float) -> float:
        """Return the seconds of copying ``size`` bytes of a group's parameters or gradients into new tensors.

        They are freed after use, so that a CPU's system takes their pages and must give them again: the rate is that
        of tensors beyond any heap.
        """
        return self.hardware.memory_s(size, max(size, _BEYOND_HEAPS)) * self.busy_memory

    def _stream(self, size: float) -> float:
        """Return the seconds of reading and writing ``size`` bytes in place."""
        return self.hardware.stream_s(size) * self.busy_memory
