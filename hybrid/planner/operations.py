"""What one microbatch computes and sends over tp, operation by operation, as the modules of this package do it.

A matmul [m, k] x [k, n] is 2 m n k FLOPs, its backward twice that. Attention is 4 S^2 D FLOPs a head and sample
forward, half of it where causal tiles are skipped, and 2.5 times that backward (Dao, "FlashAttention-2", 2023, section
4.1). An elementwise operation is the bytes that it reads and writes; their number of passes over a tensor is counted
in the modules' own code. Collectives are those of :mod:`fusemesh.kernels.matmul.parallel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..tensor.modules import own_rows
from .job import Job
from .model import Model

# Reads and writes of a whole tensor, forward and backward. RMS norm on a CPU is five operations of torch, on a GPU one
# kernel; rotary positions are two halves of products, a sum and a concatenation; the loss is in fp32.
_NORM = {"cpu": (7, 14), "gpu": (2, 4)}
_ROTARY = (9, 9)
_RESIDUAL = (3, 3)
_GATED = (5, 8)
_PLAIN = (2, 3)
_LOSS = (7, 6)
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

    tokens: of the microbatch. own_tokens: of it between the matmuls, under sequence parallel.
    """

    tokens: int
    own_tokens: int
    heads: int
    kv_heads: int
    wide: int
    vocab: int

    @classmethod
    def of(cls, model: Model, job: Job, tp: int, samples: int) -> Local:
        """The share of the first rank of ``tp``, which is the largest, for ``samples`` in a microbatch."""
        tokens = samples * job.sequence_length
        vocab = own_rows(model.vocab_size, tp, 0)
        return cls(
            tokens=tokens,
            own_tokens=tokens // tp if job.sequence_parallel else tokens,
            heads=model.num_heads // tp,
            kv_heads=max(1, model.num_kv_heads // tp),
            wide=own_rows(model.intermediate_size, tp, 0).stop,
            vocab=vocab.stop - vocab.start,
        )


def block_operations(model: Model, job: Job, tp: int, samples: int, device: str) -> list[Operation]:
    """Forward and backward of one layer."""
    at, item, hidden, dim = Local.of(model, job, tp, samples), job.item, model.hidden_size, model.head_dim
    residual = at.own_tokens * hidden * item
    found: list[Operation] = []
    for name in ("attention", "mlp"):
        found += _elementwise(f"{name}_norm", _norm_passes(model, device), residual, calls=1 if device == "gpu" else 5)
        found += _enter(f"{name}.enter", at.tokens * hidden * item, job, tp)
        if name == "attention":
            found += _matmul("attention.query", at.tokens, at.heads * dim, hidden, item)
            found += _matmul("attention.key", at.tokens, at.kv_heads * dim, hidden, item)
            found += _matmul("attention.value", at.tokens, at.kv_heads * dim, hidden, item)
            if not model.learned_positions:
                size = at.tokens * (at.heads + at.kv_heads) * dim * item
                found += _elementwise("attention.rotary", _ROTARY, size, calls=8)
            found += _attention(model, job, at.heads, samples)
            found += _matmul("attention.output", at.tokens, hidden, at.heads * dim, item)
        else:
            found += _matmul("mlp.gate", at.tokens, at.wide, hidden, item)
            if model.gated:
                found += _matmul("mlp.up", at.tokens, at.wide, hidden, item)
            size = at.tokens * at.wide * item
            found += _elementwise("mlp.activation", _GATED if model.gated else _PLAIN, size, calls=2)
            found += _matmul("mlp.down", at.tokens, hidden, at.wide, item)
        found += _leave(f"{name}.leave", at.tokens * hidden * item, job, tp)
        found += _elementwise(f"{name}.residual", _RESIDUAL, residual)
    return [*found, *_replicated_gradients(model, job, tp)]


def first_operations(model: Model, job: Job, tp: int, samples: int) -> list[Operation]:
    """The embedding's look-up and its gradient."""
    at, hidden, item = Local.of(model, job, tp, samples), model.hidden_size, job.item
    rows = at.tokens * hidden * item
    passes = 2 if tp == 1 else 5
    found = [
        Operation("embedding", "elementwise", False, size=passes * rows, tensor=rows),
        Operation("embedding", "elementwise", True, size=2 * rows + at.vocab * hidden * item, tensor=rows),
    ]
    return [*found, *_leave("embedding.leave", rows, job, tp)]


def last_operations(model: Model, job: Job, tp: int, samples: int, device: str) -> list[Operation]:
    """The last norm, the head and the loss, whose reductions over tp are three numbers a token."""
    at, hidden, item = Local.of(model, job, tp, samples), model.hidden_size, job.item
    found = [*_elementwise("norm", _norm_passes(model, device), at.own_tokens * hidden * item, calls=5)]
    found += _enter("head.enter", at.tokens * hidden * item, job, tp)
    found += _matmul("head", at.tokens, at.vocab, hidden, item)
    found += _elementwise("loss", _LOSS, at.tokens * at.vocab * 4, calls=6)
    if tp > 1:
        found += [
            Operation("loss.maximum", "tp", False, size=at.tokens * 4, collective="all_reduce"),
            Operation("loss.sums", "tp", False, size=at.tokens * 8, collective="all_reduce"),
        ]
    return found


def _matmul(name: str, rows: int, out: int, inner: int, item: int) -> Iterator[Operation]:
    flops, size = 2.0 * rows * out * inner, float(item) * (rows * out + out * inner + rows * inner)
    yield Operation(name, "matmul", False, flops, size)
    for part in ("dgrad", "wgrad"):
        yield Operation(f"{name}.{part}", "matmul", True, flops, size)


def _attention(model: Model, job: Job, heads: int, samples: int) -> Iterator[Operation]:
    scores = float(samples) * heads * job.sequence_length**2
    flops = 4.0 * scores * model.head_dim
    if job.fused_attention:
        yield Operation("attention.core", "attention", False, flops / 2)
        yield Operation("attention.core", "attention", True, 1.25 * flops)
        return
    yield Operation("attention.core", "matmul", False, flops, calls=2)
    yield Operation("attention.core", "matmul", True, 2 * flops, calls=4)
    size = scores * job.item
    for backward, passes in zip((False, True), _SCORES, strict=True):
        yield Operation("attention.scores", "elementwise", backward, size=passes * size, tensor=size, calls=3)


def _elementwise(name: str, passes: tuple[float, float], size: float, calls: int = 1) -> Iterator[Operation]:
    for backward, times in zip((False, True), passes, strict=True):
        yield Operation(name, "elementwise", backward, size=times * size, tensor=size, calls=calls)


def _norm_passes(model: Model, device: str) -> tuple[float, float]:
    return (2, 4) if model.layer_norm else _NORM[device]


def _enter(name: str, size: float, job: Job, tp: int) -> Iterator[Operation]:
    """Into matmuls split over tp: gather the sequence, and scatter its gradient's sum; or copy, and sum it."""
    if tp == 1:
        return
    if job.sequence_parallel:
        yield Operation(name, "tp", False, size=size, collective="all_gather")
        yield Operation(name, "tp", True, size=size, collective="reduce_scatter")
        # The collectives work along dim 0 and the sequence is dim 1, so the whole is copied once more each way.
        yield from _elementwise(name, (2, 2), size)
    else:
        yield Operation(name, "tp", True, size=size, collective="all_reduce")


def _leave(name: str, size: float, job: Job, tp: int) -> Iterator[Operation]:
    """Out of matmuls split over tp: the transpose of :func:`_enter`."""
    if tp == 1:
        return
    if job.sequence_parallel:
        yield Operation(name, "tp", False, size=size, collective="reduce_scatter")
        yield Operation(name, "tp", True, size=size, collective="all_gather")
        yield from _elementwise(name, (2, 2), size)
    else:
        yield Operation(name, "tp", False, size=size, collective="all_reduce")


def _replicated_gradients(model: Model, job: Job, tp: int) -> Iterator[Operation]:
    """Gradients that each rank of tp holds a part of: kv heads stored whole, and norms under sequence parallel."""
    if tp == 1:
        return
    for weight in model.block_weights():
        partial = weight.split == "heads" and weight.is_replicated(tp)
        if partial or (weight.split == "whole" and job.sequence_parallel):
            yield Operation(
                f"{weight.name}.gradient", "tp", True, size=weight.numel * job.item, collective="all_reduce"
            )
