"""Bytes of one rank, by their use: exact for stored tensors, counted for those that a step holds for a while.

Parameters, gradients and AdamW's states are summed over the very shards that the runtime cuts. Temporary tensors follow
torch's fully_shard (2.11 to 2.13), with the settings of :mod:`fusemesh.hybrid.data_parallel`: a layer's parameters are
copied out of their shards, also where there is one shard; layers keep the copy until backward only if they are not
gathered again; gradients are copied into one buffer a layer and reduced. The tensors that autograd keeps of a layer are
counted from the modules' own code, and tests compare them with autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fusemesh.kernels.vocab_loss.chunked import CHUNK_BYTES

from ..layout import Layout
from .hardware import Hardware
from .job import BatchSplit, TrainingJob
from .model import Layer, ModelDescription, Share, Weight
from .operations import Local


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most: of a pipeline, of its fullest stage.

    parameters, gradients, optimizer: stored, exactly. start, forward, backward, update: the total at the ends of four
    phases of a step (``start`` is before the first: the model is cut). parts: the parts of the largest of them.
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


def stored(
    model: ModelDescription,
    job: TrainingJob,
    layout: Layout,
    *,
    stage: int = 0,
    tp_rank: int = 0,
    fsdp_rank: int = 0,
) -> tuple[int, int, int]:
    """Return the exact bytes of one rank's parameters, gradients and optimizer states.

    AdamW has two states of a parameter's size and a step count of 4 bytes.
    """
    elements = frozen = count = 0
    for weights, times in model.share(layout, stage, job.pipeline.virtual_stages).groups:
        for weight in weights:
            local = times * weight.local(layout.tp, layout.fsdp, tp_rank, fsdp_rank)
            elements += local
            frozen += local if weight.is_frozen else 0
            count += 0 if weight.is_frozen else times
    gradients = job.master * (elements - frozen)
    return job.master * elements, gradients, 2 * gradients + 4 * count


def saved_by_layer(model: ModelDescription, layer: Layer, job: TrainingJob, tp: int, samples: int, device: str) -> int:
    """Return the bytes that autograd keeps of one layer for backward.

    Of tokens held whole: q, k, v and attention's output; the feed-forward's pre-activations and what follows them (4 F
    gated, 2 F plain); the norms' outputs, which the matmuls keep (gathered, under sequence parallel). Of a rank's own
    tokens: the norms' inputs, and on a CPU, where RMS norm is several operations, also x / rms(x). A second attention
    has all of this again, and the gathered memory; a memory that is not gathered is one tensor for all layers: see
    :func:`saved_around`.
    """
    at, hidden = Local.of(model, job, tp, samples), model.hidden_size
    attentions = 2 if layer.with_memory else 1
    heads = attentions * (2 * at.heads + 2 * at.kv_heads) * model.head_dim
    wide = (4 if model.gated else 2) * at.wide
    gathered = (1 + attentions) * hidden
    if layer.with_memory and job.sequence_parallel and tp > 1:
        gathered += hidden
    norms = (1 + attentions) * _kept_by_norm(model, device)
    item = job.item * (at.tokens * (heads + wide + gathered) + at.own_tokens * norms * hidden)
    # The log-sum-exp of each row of scores, and each norm's factor of a token, in fp32.
    return item + 4 * (attentions * at.tokens * at.heads + (1 + attentions) * at.own_tokens)


def saved_around(model: ModelDescription, share: Share, job: TrainingJob, tp: int, samples: int, device: str) -> int:
    """Return the bytes that autograd keeps outside the layers of a rank's stages.

    Behind the last layer those of the norm, as in :func:`saved_by_layer`, and the logits, or in the place of those of
    tokens two indices and two sums of each; where an encoder ends those of its norm; and the memory that a decoder's
    layers share.
    """
    at, hidden = Local.of(model, job, tp, samples), model.hidden_size
    norm, kept = at.own_tokens * hidden * _kept_by_norm(model, device), 0
    numbers = 0  # bytes of what is not of the job's dtype
    if share.is_last:
        # A linear layer on each token needs the tokens whole, and a product with each a rank's own; a mean needs none.
        read = {"tokens": at.tokens, "positions": at.own_tokens, "texts": 0}[model.head.of]
        kept += norm + read * hidden
        if job.fused_loss and model.head.is_vocabulary:
            numbers = 24 * at.tokens
        else:
            kept += at.outputs
    if share.encoder_ends:
        kept += norm
    if share.has_memory and not (job.sequence_parallel and tp > 1):
        kept += at.tokens * hidden
    return job.item * kept + numbers


def _kept_by_norm(model: ModelDescription, device: str) -> int:
    """Return how many tensors like its input a norm keeps."""
    return 1 if model.layer_norm or device == "gpu" else 2


def in_flight(job: TrainingJob, layout: Layout, stage: int, microbatches: int) -> float:
    """Return how many microbatches' activations of all its layers a stage holds at once.

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


def estimate(
    model: ModelDescription, job: TrainingJob, layout: Layout, hardware: Hardware, split: BatchSplit
) -> Memory:
    """Return the bytes of the rank that needs most."""
    found = (_stage(model, job, layout, hardware, split, stage) for stage in model.distinct_stages(layout))
    return max(found, key=lambda memory: memory.total)


def _stage(
    model: ModelDescription, job: TrainingJob, layout: Layout, hardware: Hardware, split: BatchSplit, stage: int
) -> Memory:
    parameters, gradients, optimizer = stored(model, job, layout, stage=stage)
    share = model.share(layout, stage, job.pipeline.virtual_stages)
    layers = sum(count * _full(layer.weights, layout) for layer, count in share.layers)
    block, outer = max(_full(layer.weights, layout) for layer, _ in share.layers), _full(share.weights, layout)
    # A pipeline's layers stay gathered, for many microbatches need them between forward and backward.
    again = layout.fsdp > 1 and layout.pp == 1
    # Gathered until backward: all of it where layers are not gathered again, else only the parameters of no layer.
    gathered = job.item * (outer + (block if again else layers))
    # One group on its way: its gradients and the buffer that they are reduced from, kept until the next group's is; and
    # with several shards the next group's parameters, in the collective's buffer and copied out of it.
    largest = max(block, outer)
    reducing = largest * (job.item + 2 * job.master)
    prefetched = 2 * job.item * block if again else 0
    # Gradients that are there before the last backward: of earlier parts, and in a pipeline not reduced before the end.
    held = gradients if split.accumulation > 1 else 0
    unreduced = job.master * (layers + outer) if split.microbatches > 1 else 0

    samples, device = job.samples(layout, split), hardware.device
    at = Local.of(model, job, layout.tp, samples)
    flying = in_flight(job, layout, stage, split.microbatches)
    activations = sum(kept_by_layers(model, share, job, layout.tp, device, samples, flying))
    activations += saved_around(model, share, job, layout.tp, samples, device)
    logits = _logits(model, at, job) if share.is_last else 0
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
            "gathered parameters": job.item * (block + outer) + prefetched,
            "gradients on their way": reducing,
        },
        "update": {"parameters": parameters, "optimizer": optimizer, "gradients": gradients},
    }
    phases = {name: sum(found.values()) for name, found in parts.items()}
    peak = max(phases, key=lambda name: phases[name])
    return Memory(stage, parameters, gradients, optimizer, phases, parts[peak], hardware.reserved)


def _logits(model: ModelDescription, at: Local, job: TrainingJob) -> int:
    """Return the bytes of logits and their like while the loss is computed.

    softmax in fp32 forward; then its backward's exponential, product and gradient. Of a fused loss these are chunks,
    beside the gradient of h in fp32.
    """
    size = 3 * max(4, job.item) * at.outputs
    if not (job.fused_loss and model.head.is_vocabulary):
        return size
    return min(size, 3 * CHUNK_BYTES) + max(4, job.item) * at.tokens * model.hidden_size


def _full(weights: Iterable[Weight], layout: Layout) -> int:
    """Return the elements of a group of weights once gathered, padded to equal shards as the collective needs."""
    return sum(
        layout.fsdp * w.local(layout.tp, layout.fsdp) if layout.fsdp > 1 else w.local(layout.tp) for w in weights
    )


def kept_by_layers(
    model: ModelDescription,
    share: Share,
    job: TrainingJob,
    tp: int,
    device: str,
    samples: int,
    microbatches: float,
) -> tuple[int, int]:
    """Return the bytes that all layers of a rank keep for backward, of so many microbatches at once.

    And those that one of them saves while it is computed again.
    """
    at = Local.of(model, job, tp, samples)
    total = largest = 0
    for layer, count in share.layers:
        size = saved_by_layer(model, layer, job, tp, samples, device)
        if not job.fused_attention and job.recompute == "none":
            # Probabilities, and after dropout, and its mask of one byte.
            size += samples * at.heads * job.sequence_length**2 * (2 * job.item + 1)
        total, largest = total + count * size, max(largest, size)
    if job.recompute == "full":
        # Each layer keeps its input; one layer at a time is computed again.
        inputs = share.num_layers
        if share.has_memory and job.sequence_parallel and tp > 1:
            # The memory before it is gathered, which saved_around() has of no gathering alone.
            inputs += 1
        kept = inputs * job.item * at.own_tokens * model.hidden_size
        return math.ceil(microbatches * kept), largest
    return math.ceil(microbatches * total), 0
