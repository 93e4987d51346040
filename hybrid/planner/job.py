"""One optimizer step, whatever its layout, and the parts into which a layout can cut it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data import BatchOrder
from ..layout import Layout
from ..pipeline_options import PipelineOptions

# Bytes of an element in compute. Parameters, gradients and optimizer states stay in fp32 unless compute is fp64.
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class BatchSplit:
    """The number of parts into which a replica's samples of one step are cut.

    accumulation: parts that go through the model one after the other, their gradients added. microbatches: parts of
    each of those that are in the pipeline together; 1 without a pipeline.
    """

    accumulation: int = 1
    microbatches: int = 1

    @property
    def parts(self) -> int:
        """All of them."""
        return self.accumulation * self.microbatches


@dataclass(frozen=True)
class TrainingJob:
    """One optimizer step.

    Args:
        global_batch: samples over all replicas.
        sequence_length: tokens a sample.
        microbatches: parts into which a replica's samples are cut, by accumulation or in a pipeline. None: the planner
            chooses for each layout.
        dtype: of compute.
        sequence_parallel: whether tp also splits activations along the sequence between the matmuls.
        pipeline: schedule and virtual stages, with a pipeline.
        recompute: the part that backward computes again instead of keeping it: ``none``, ``selective`` (attention's
            core, which is planned alone) or ``full`` (each layer, as :mod:`fusemesh.hybrid.recompute` does).
        fused_attention: False charges for scores that travel through memory, as before FlashAttention.
        fused_loss: whether logits of tokens are computed in chunks, and again in backward, as our losses do; else kept.
        fused_accumulation: whether a weight's gradient is added to what is there within its matmul, as in Megatron, and
            not by an operation of its own, as torch does.
        whole_at_start: whether every rank first builds the whole model in its host's memory, as our trainer does. Where
            that is a GPU's host, the GPU holds only the layer that is being cut and what has been cut.
        clip: whether the gradient's norm is clipped.
        accumulation: of our trainer, in every layout; the pipeline's microbatches are then ``pipeline``'s. None: see
            ``microbatches``.

    Raises:
        ValueError: a number below 1, or an unknown word.
    """

    global_batch: int
    sequence_length: int
    microbatches: int | None = None
    dtype: str = "bfloat16"
    sequence_parallel: bool = True
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    recompute: str = "none"
    fused_attention: bool = True
    fused_loss: bool = True
    fused_accumulation: bool = False
    whole_at_start: bool = False
    clip: bool = True
    accumulation: int | None = None

    def __post_init__(self) -> None:
        for name in ("global_batch", "sequence_length", "microbatches", "accumulation"):
            value = getattr(self, name)
            if value is None and name in ("microbatches", "accumulation"):
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive integer, received {value!r}")
        for name, choices in (("dtype", tuple(ITEM_BYTES)), ("recompute", RECOMPUTE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, received {getattr(self, name)!r}")

    @property
    def item(self) -> int:
        """Bytes of an activation's element, and of a parameter where it is computed with."""
        return ITEM_BYTES[self.dtype]

    @property
    def master(self) -> int:
        """Bytes of an element of stored parameters, of gradients, and of each of AdamW's two states."""
        return 8 if self.dtype == "float64" else 4

    def samples(self, layout: Layout, split: BatchSplit) -> int:
        """Return the samples of one part on one replica."""
        return max(1, self.global_batch // layout.replicas // split.parts)

    def splits(self, layout: Layout) -> list[BatchSplit]:
        """Return the ways in which ``layout`` can cut a step; the batch divides among the replicas.

        Raises:
            ValueError: there are none, or the one asked for is none of them; in the words that training would use.
        """
        share = self.global_batch // layout.replicas
        if self.accumulation is not None:
            BatchOrder(1, self.global_batch, replicas=layout.replicas, accumulation=self.accumulation)
            if layout.pp == 1:
                return [BatchSplit(self.accumulation)]
            key = "training.global_batch_size / (dp * fsdp * training.accumulation)"
            part = share // self.accumulation
            return [BatchSplit(self.accumulation, self.pipeline.microbatches_of(layout.pp, part, key))]
        if self.microbatches is not None and share % self.microbatches:
            raise ValueError(
                f"microbatches: {share} samples a replica cannot be cut into {self.microbatches} parts; use a divisor "
                f"for --microbatches, or another --batch than {self.global_batch}"
            )
        if layout.pp == 1:
            asked = [self.microbatches] if self.microbatches else _divisors(share)
            return [BatchSplit(count) for count in asked]
        legal = self.pipeline.legal_microbatches(layout.pp, share)
        found = [count for count in legal if self.microbatches in (None, count)]
        if not found:
            raise ValueError(
                f"microbatches: {self.pipeline.schedule} on pp{layout.pp} needs at least {layout.pp} microbatches, "
                f"and {share} samples a replica are cut into {self.microbatches or max(_divisors(share))}; use a "
                "larger --batch, other --microbatches, or a smaller pp"
            )
        return [BatchSplit(1, count) for count in found]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
