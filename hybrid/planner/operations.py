"""The operations of one microbatch, and its messages over tp, as the modules of this package do them.

A matmul [m, k] x [k, n] is 2 m n k FLOPs, its backward twice that. Attention is 4 S^2 D FLOPs a head and sample
forward, of which the visible part is computed (half where causal tiles are skipped), and 2.5 times that backward (Dao,
"FlashAttention-2", 2023, section 4.1). An elementwise operation is the bytes that it reads and writes; their number of
passes over a tensor is counted in the modules' own code. Collectives are those of
:mod:`fusemesh.kernels.matmul.parallel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ..tensor.modules import own_rows
from .job import TrainingJob
from .model import Layer, ModelDescription, Share

# Reads and writes of a whole tensor, forward and backward. RMS norm on a CPU is five operations of torch, on a GPU one
# kernel; rotary positions are two halves of products, a sum and a concatenation; the loss is in fp32; a mean's
# gradient is added to another.
_NORM = {"cpu": (7, 14), "gpu": (2, 4)}
_ROTARY = (9, 9)
_RESIDUAL = (3, 3)
_GATED = (5, 8)
_PLAIN = (2, 3)
_LOSS = (7, 6)
_MEAN = (1, 2)
# Of scores [H, S, S] where attention is not fused: scale, mask and softmax, dropout, and the operands of two matmuls.
_SCORES = (6.5, 8)


@dataclass(frozen=True)
class Operation:
    """One operation of one rank in one microbatch.

    kind: ``matmul``, ``attention``, ``elementwise`` or ``tp`` (a collective over tp). flops. size: bytes of all
    operands and results, or of a collective's whole tensor. tensor: bytes of one tensor of an elementwise operation.
    calls: kernels that it is.
    """

    name: str
    kind: str
    backward: bool
    flops: float = 0.0
    size: float = 0.0
    tensor: float = 0.0
    calls: int = 1
    collective: str = ""


@dataclass(frozen=True)
class Local:
    """One rank's share of the model's sizes in a microbatch; heads and widths after tp.

    tokens: of the microbatch. own_tokens: of it between the matmuls, under sequence parallel. outputs: elements of the
    logits.
    """

    tokens: int
    own_tokens: int
    heads: int
    kv_heads: int
    wide: int
    vocab: int
    outputs: int

    @classmethod
    def of(cls, model: ModelDescription, job: TrainingJob, tp: int, samples: int) -> Local:
        """Return the share of the first rank of ``tp``, which is the largest, for ``samples`` in a microbatch."""
        tokens, head = samples * job.sequence_length, model.head
        own_tokens = tokens // tp if job.sequence_parallel else tokens
        rows = {"tokens": tokens, "texts": samples, "positions": own_tokens}[head.of]
        return cls(
            tokens=tokens,
            own_tokens=own_tokens,
            heads=model.num_heads // tp,
            kv_heads=max(1, model.num_kv_heads // tp),
            wide=own_rows(model.intermediate_size, tp, 0).stop,
            vocab=own_rows(model.vocab_size, tp, 0).stop,
            outputs=rows * (head.outputs if head.of == "positions" else head.own_outputs(tp)),
        )


def layer_operations(
    model: ModelDescription, layer: Layer, job: TrainingJob, tp: int, samples: int, device: str
) -> list[Operation]:
    """Return forward and backward of one layer."""
    at, item, hidden = Local.of(model, job, tp, samples), job.item, model.hidden_size
    size, residual = at.tokens * hidden * item, at.own_tokens * hidden * item
    found: list[Operation] = []
    for name in ("attention", "cross_attention", "mlp") if layer.with_memory else ("attention", "mlp"):
        found += _norm(f"{name}_norm", model, device, residual)
        found += _enter(f"{name}.enter", size, job, tp)
        if name == "mlp":
            found += _feed_forward(model, at, item)
        else:
            found += _attention(name, model, layer, job, at, samples)
        found += _leave(f"{name}.leave", size, job, tp)
        found += _elementwise(f"{name}.residual", _RESIDUAL, residual)
    if layer.with_memory:
        found += _enter("cross_attention.memory", size, job, tp)
    return [*found, *_replicated_gradients(layer, job, tp)]


def embedding_operations(model: ModelDescription, job: TrainingJob, tp: int, samples: int) -> list[Operation]:
    """Return the look-up of an embedding and its gradient."""
    at, hidden, item = Local.of(model, job, tp, samples), model.hidden_size, job.item
    rows = at.tokens * hidden * item
    passes = 2 if tp == 1 else 5
    found = [
        Operation("embedding", "elementwise", False, size=passes * rows, tensor=rows),
        Operation("embedding", "elementwise", True, size=2 * rows + at.vocab * hidden * item, tensor=rows),
    ]
    return [*found, *_leave("embedding.leave", rows, job, tp)]


def last_operations(model: ModelDescription, job: TrainingJob, tp: int, samples: int, device: str) -> list[Operation]:
    """Return the last norm, the head and the loss, whose reductions over tp are three numbers a row.

    Backward computes the logits of tokens again where the loss is fused.
    """
    at, hidden, item, head = Local.of(model, job, tp, samples), model.hidden_size, job.item, model.head
    found = _norm("norm", model, device, at.own_tokens * hidden * item)
    rows = at.tokens
    if head.of == "tokens":
        found += _enter("head.enter", at.tokens * hidden * item, job, 1 if head.is_whole else tp)
        product = list(_matmul("head", at.tokens, head.own_outputs(tp), hidden, item))
        if job.fused_loss and head.is_vocabulary:
            product.append(dataclasses.replace(product[0], name="head.again", backward=True))
        found += product
    else:
        rows = samples * (head.outputs if head.of == "positions" else 1)
        found += _mean(model, job, at, tp, samples)
        if head.of == "texts":
            found += _matmul("head", samples, head.own_outputs(tp), hidden, item)
        else:
            found += _matmul("head.query", samples, head.outputs * hidden, hidden, item)
            found += _matmul("head", at.own_tokens, head.outputs, hidden, item)
    found += _elementwise("loss", _LOSS, at.outputs * 4, calls=6)
    if tp > 1 and not head.is_whole and (head.of != "positions" or job.sequence_parallel):
        found += [
            Operation("loss.maximum", "tp", False, size=rows * 4, collective="all_reduce"),
            Operation("loss.sums", "tp", False, size=rows * 8, collective="all_reduce"),
        ]
    return found


def outer_operations(
    model: ModelDescription, share: Share, job: TrainingJob, tp: int, samples: int, device: str
) -> list[Operation]:
    """Return everything of a rank's stages but their layers: embeddings, an encoder's norm, the head and the loss."""
    found: list[Operation] = []
    for _ in range(share.is_first + share.decoder_starts):
        found += embedding_operations(model, job, tp, samples)
    if share.encoder_ends:
        size = Local.of(model, job, tp, samples).own_tokens * model.hidden_size * job.item
        found += _norm("encoder_norm", model, device, size)
    if share.is_last:
        found += last_operations(model, job, tp, samples, device)
    return found


def _feed_forward(model: ModelDescription, at: Local, item: int) -> Iterator[Operation]:
    """Yield the feed-forward's products and its activation."""
    yield from _matmul("mlp.gate", at.tokens, at.wide, model.hidden_size, item)
    if model.gated:
        yield from _matmul("mlp.up", at.tokens, at.wide, model.hidden_size, item)
    size = at.tokens * at.wide * item
    yield from _elementwise("mlp.activation", _GATED if model.gated else _PLAIN, size, calls=2)
    yield from _matmul("mlp.down", at.tokens, model.hidden_size, at.wide, item)


def _attention(
    name: str, model: ModelDescription, layer: Layer, job: TrainingJob, at: Local, samples: int
) -> Iterator[Operation]:
    """Yield the projections and the core of self-attention, or of ``cross_attention``, which sees all of the memory."""
    hidden, dim, item, over_memory = model.hidden_size, model.head_dim, job.item, name == "cross_attention"
    # Source and target are equally long, so that the memory has as many tokens.
    for part, heads in (("query", at.heads), ("key", at.kv_heads), ("value", at.kv_heads)):
        yield from _matmul(f"{name}.{part}", at.tokens, heads * dim, hidden, item)
    if model.rotary and not over_memory:
        size = at.tokens * (at.heads + at.kv_heads) * dim * item
        yield from _elementwise(f"{name}.rotary", _ROTARY, size, calls=8)
    yield from _core(name, 1.0 if over_memory else layer.visible(job.sequence_length), model, job, at, samples)
    yield from _matmul(f"{name}.output", at.tokens, hidden, at.heads * dim, item)


def _core(
    name: str, visible: float, model: ModelDescription, job: TrainingJob, at: Local, samples: int
) -> Iterator[Operation]:
    """Yield attention's core, of whose scores the part ``visible`` is computed."""
    scores = float(samples) * at.heads * job.sequence_length**2
    flops = 4.0 * scores * model.head_dim
    if job.fused_attention:
        yield Operation(f"{name}.core", "attention", False, visible * flops)
        yield Operation(f"{name}.core", "attention", True, 2.5 * visible * flops)
        return
    yield Operation(f"{name}.core", "matmul", False, flops, calls=2)
    yield Operation(f"{name}.core", "matmul", True, 2 * flops, calls=4)
    size = scores * job.item
    for backward, passes in zip((False, True), _SCORES, strict=True):
        yield Operation(f"{name}.scores", "elementwise", backward, size=passes * size, tensor=size, calls=3)


def _mean(model: ModelDescription, job: TrainingJob, at: Local, tp: int, samples: int) -> Iterator[Operation]:
    """Yield the mean of some tokens of each text, which sequence parallel sums over tp."""
    yield from _elementwise("head.mean", _MEAN, at.own_tokens * model.hidden_size * job.item, calls=2)
    if tp > 1:
        size = samples * model.hidden_size * job.item
        if job.sequence_parallel:
            yield Operation("head.mean", "tp", False, size=size, collective="all_reduce")
        if (model.head.of == "texts" and not model.head.is_whole) or job.sequence_parallel:
            yield Operation("head.mean", "tp", True, size=size, collective="all_reduce")


def _matmul(name: str, rows: int, out: int, inner: int, item: int) -> Iterator[Operation]:
    flops, size = 2.0 * rows * out * inner, float(item) * (rows * out + out * inner + rows * inner)
    yield Operation(name, "matmul", False, flops, size)
    for part in ("dgrad", "wgrad"):
        yield Operation(f"{name}.{part}", "matmul", True, flops, size)


def _elementwise(name: str, passes: tuple[float, float], size: float, calls: int = 1) -> Iterator[Operation]:
    for backward, times in zip((False, True), passes, strict=True):
        yield Operation(name, "elementwise", backward, size=times * size, tensor=size, calls=calls)


def _norm(name: str, model: ModelDescription, device: str, size: float) -> list[Operation]:
    """Return a norm of ``size`` bytes."""
    passes = (2, 4) if model.layer_norm else _NORM[device]
    return list(_elementwise(name, passes, size, calls=1 if device == "gpu" else 5))


def _enter(name: str, size: float, job: TrainingJob, tp: int) -> Iterator[Operation]:
    """Yield the way into matmuls split over tp.

    Under sequence parallel gather the sequence, and scatter the sum of its gradients; else copy, and sum them.
    """
    if tp == 1:
        return
    if job.sequence_parallel:
        yield Operation(name, "tp", False, size=size, collective="all_gather")
        yield Operation(name, "tp", True, size=size, collective="reduce_scatter")
        # The collectives work along dim 0 and the sequence is dim 1, so the whole is copied once more each way.
        yield from _elementwise(name, (2, 2), size)
    else:
        yield Operation(name, "tp", True, size=size, collective="all_reduce")


def _leave(name: str, size: float, job: TrainingJob, tp: int) -> Iterator[Operation]:
    """Yield the way out of matmuls split over tp: the transpose of :func:`_enter`."""
    if tp == 1:
        return
    if job.sequence_parallel:
        yield Operation(name, "tp", False, size=size, collective="reduce_scatter")
        yield Operation(name, "tp", True, size=size, collective="all_gather")
        yield from _elementwise(name, (2, 2), size)
    else:
        yield Operation(name, "tp", False, size=size, collective="all_reduce")


def _replicated_gradients(layer: Layer, job: TrainingJob, tp: int) -> Iterator[Operation]:
    """Yield the sums of gradients of which each rank of tp has a term.

    They are those of key/value heads that are stored whole, and of norms under sequence parallel.
    """
    if tp == 1:
        return
    for weight in layer.weights:
        partial = weight.split == "heads" and weight.is_replicated(tp)
        if partial or (weight.split == "whole" and job.sequence_parallel):
            yield Operation(
                f"{weight.name}.gradient", "tp", True, size=weight.numel * job.item, collective="all_reduce"
            )
