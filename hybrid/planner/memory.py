"""Bytes of one rank, by what they are for: exact for what is stored, counted for what a step holds for a while.

Parameters, gradients and AdamW's states are summed over the very shards that the runtime cuts. What a step holds
besides follows torch's fully_shard (2.11 to 2.13), with the settings of :mod:`fusemesh.hybrid.data_parallel`: a layer's
parameters are copied out of their shards, also where there is one shard; layers keep the copy until backward only if
they are not gathered again; gradients are copied into one buffer a layer and reduced. What autograd keeps of a layer is
counted from the modules' own code, and tests compare it with autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..layout import Layout
from ..pipeline_options import deal_blocks
from .hardware import Hardware
from .job import Cut, Job
from .model import Model, Weight
from .operations import Local


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most: of a pipeline, of its fullest stage.

    parameters, gradients, optimizer: stored, exactly. start, forward, backward, update: the total at the ends of four
    phases of a step (``start`` is before the first: the model is cut). parts: what the largest of them is made of.
    reserved: gone before the first tensor.
    """

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    phases: Mapping[str, int]
    parts: Mapping[str, int] = field(default_factory=dict)
    reserved: int = 0

    @property
    def tensors(self) -> int:
        """The largest phase, without what is reserved."""
        return max(self.phases.values())

    @property
    def total(self) -> int:
        """Bytes that the rank must have."""
        return self.tensors + self.reserved


def stage_weights(model: Model, layout: Layout, stage: int, virtual_stages: int = 1) -> tuple[int, list[Weight]]:
    """How many layers a rank of the pipeline's ``stage`` holds, and the weights besides them.

    With ``virtual_stages`` v, a rank holds every pp-th of pp * v stages.
    """
    stages = layout.pp * virtual_stages
    dealt = deal_blocks(model.num_layers, stages)
    layers = sum(len(blocks) for blocks in dealt[stage :: layout.pp])
    rest: list[Weight] = []
    if stage == 0:
        rest += model.first_weights()
    if stage == layout.pp - 1:
        rest += model.last_weights(with_tied=layout.pp > 1)
    return layers, rest


def stored(
    model: Model, job: Job, layout: Layout, *, stage: int = 0, tp_rank: int = 0, fsdp_rank: int = 0
) -> tuple[int, int, int]:
    """Exact bytes of one rank's parameters, gradients and optimizer states.

    AdamW has two states of a parameter's size and a step count of 4 bytes.
    """
    layers, rest = stage_weights(model, layout, stage, job.pipeline.virtual_stages)
    block = model.block_weights()
    split = (layout.tp, layout.fsdp, tp_rank, fsdp_rank)
    elements = layers * sum(w.local(*split) for w in block) + sum(w.local(*split) for w in rest)
    held = job.master * elements
    return held, held, 2 * held + 4 * (layers * len(block) + len(rest))


def saved_by_block(model: Model, job: Job, tp: int, samples: int, device: str) -> int:
    """Bytes that autograd keeps of one layer for backward.

    Of tokens held whole: q, k, v and attention's output; the feed-forward's pre-activations and what follows them (4 F
    gated, 2 F plain); the two norms' outputs, which the matmuls keep (gathered, under sequence parallel). Of a rank's
    own tokens: the norms' inputs, and on a CPU, where RMS norm is several operations, also x / rms(x).
    """
    at, hidden = Local.of(model, job, tp, samples), model.hidden_size
    heads = (2 * at.heads + 2 * at.kv_heads) * model.head_dim
    wide = (4 if model.gated else 2) * at.wide
    norms = 2 if model.layer_norm or device == "gpu" else 4
    item = job.item * (at.tokens * (heads + wide + 2 * hidden) + at.own_tokens * norms * hidden)
    # The log-sum-exp of each row of scores, and each norm's factor of a token, in fp32.
    return item + 4 * (at.tokens * at.heads + 2 * at.own_tokens)


def saved_around(model: Model, job: Job, tp: int, samples: int, device: str) -> int:
    """Bytes that autograd keeps after the layers: the last norm's, as in :func:`saved_by_block`, and the logits."""
    at, hidden = Local.of(model, job, tp, samples), model.hidden_size
    norm = at.tokens * hidden + at.own_tokens * hidden * (1 if model.layer_norm or device == "gpu" else 2)
    return job.item * (norm + at.tokens * at.vocab)


def in_flight(job: Job, layout: Layout, stage: int, microbatches: int) -> float:
    """Microbatches whose activations a stage holds at once, as multiples of what all its layers keep.

    GPipe holds all, 1F1B those of the stages behind it (Narayanan et al., 2021, section 2.2), interleaved 1F1B a factor
    1 + (p - 1) / (p v) more on the first stage (Korthikanti et al., 2022, section 4.2.3).
    """
    stages = layout.pp
    if stages == 1:
        return 1.0
    virtual = job.pipeline.virtual_stages
    if job.pipeline.schedule == "gpipe":
        return float(microbatches)
    if virtual > 1:
        factor = 1 + (stages - 1) / (stages * virtual)
        return min(float(microbatches), (stages - stage) * factor)
    return float(min(microbatches, stages - stage))


def estimate(model: Model, job: Job, layout: Layout, hardware: Hardware, cut: Cut) -> Memory:
    """The bytes of the rank that needs most."""
    stages = sorted({0, layout.pp - 1, min(1, layout.pp - 1)})
    return max((_stage(model, job, layout, hardware, cut, s) for s in stages), key=lambda m: m.total)


def _stage(model: Model, job: Job, layout: Layout, hardware: Hardware, cut: Cut, stage: int) -> Memory:
    parameters, gradients, optimizer = stored(model, job, layout, stage=stage)
    layers, rest = stage_weights(model, layout, stage, job.pipeline.virtual_stages)
    block = _full(model.block_weights(), layout)
    groups = [block, _full(rest, layout)]
    # A pipeline's layers stay gathered, for many microbatches need them between forward and backward.
    again = layout.fsdp > 1 and layout.pp == 1
    # What stays gathered until backward: all of it where layers are not gathered again, else what is no layer.
    gathered = job.item * (groups[1] + (block if again else layers * block))
    # One group on its way: its gradients and the buffer that they are reduced from, kept until the next group's is; and
    # with several shards the next group's parameters, in the collective's buffer and copied out of it.
    largest = max(groups)
    reducing = largest * (job.item + 2 * job.master)
    prefetched = 2 * job.item * block if again else 0
    # Gradients that are there before the last backward: of earlier parts, and in a pipeline not reduced before the end.
    held = gradients if cut.accumulation > 1 else 0
    unreduced = job.master * (layers * block + groups[1]) if cut.microbatches > 1 else 0

    samples = job.samples(layout, cut)
    flying = in_flight(job, layout, stage, cut.microbatches)
    activations = _activations(model, job, layout, hardware.device, samples, layers, flying)
    logits = 0
    if stage == layout.pp - 1:
        at = Local.of(model, job, layout.tp, samples)
        activations += saved_around(model, job, layout.tp, samples, hardware.device)
        # softmax in fp32 forward; then its backward's exponential, product and gradient.
        logits = 3 * max(4, job.item) * at.tokens * at.vocab
    at = Local.of(model, job, layout.tp, samples)
    workspace = job.item * at.tokens * max(3 * at.wide, 4 * model.hidden_size)
    # Parameters are cut layer by layer where the model was built, in memory that a GPU does not count.
    start = {"parameters": parameters, "layer being cut": job.master * largest}
    if job.whole_at_start and hardware.device == "cpu":
        start = {"whole model": job.master * model.parameters, "layer being cut": job.master * largest // layout.fsdp}
    parts = {
        "start": start,
        "forward": {
            "parameters": parameters,
            "optimizer": optimizer,
            "gradients": held + unreduced,
            "gathered parameters": gathered + prefetched,
            "activations": activations,
            "logits": max(logits, workspace),
        },
        "backward": {
            "parameters": parameters,
            "optimizer": optimizer,
            "gradients": max(gradients, held + unreduced),
            "gathered parameters": job.item * (block + groups[1]) + prefetched,
            "gradients on their way": reducing,
        },
        "update": {"parameters": parameters, "optimizer": optimizer, "gradients": gradients},
    }
    phases = {name: sum(found.values()) for name, found in parts.items()}
    peak = max(phases, key=lambda name: phases[name])
    return Memory(stage, parameters, gradients, optimizer, phases, parts[peak], hardware.reserved)


def _full(weights: Iterable[Weight], layout: Layout) -> int:
    """Elements of a group of weights once its shards are gathered, padded to equal shards as the collective needs."""
    return sum(
        layout.fsdp * w.local(layout.tp, layout.fsdp) if layout.fsdp > 1 else w.local(layout.tp) for w in weights
    )


def _activations(
    model: Model, job: Job, layout: Layout, device: str, samples: int, layers: int, microbatches: float
) -> int:
    at = Local.of(model, job, layout.tp, samples)
    block = saved_by_block(model, job, layout.tp, samples, device)
    if job.recompute == "full":
        # Each layer keeps its input; one layer at a time is computed again.
        return math.ceil(microbatches * layers * job.item * at.own_tokens * model.hidden_size) + block
    if not job.fused_attention and job.recompute == "none":
        # Probabilities, and after dropout, and its mask of one byte.
        block += samples * at.heads * job.sequence_length**2 * (2 * job.item + 1)
    return math.ceil(microbatches * layers * block)
