"""Some consecutive blocks of a Transformer, as a stage of a pipeline; the whole model is the stage of all its blocks.

Shapes: B batch, S sequence, T target sequence, E hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fusemesh.hybrid.pipeline_parallel import StageModule
from fusemesh.hybrid.tensor.modules import RMSNorm, VocabParallelEmbedding, VocabParallelLoss, own_rows
from fusemesh.kernels.vocab_loss.api import vocab_parallel_cross_entropy

from .config import TransformerConfig
from .heads import ClassHead, SpanHead
from .layers import Caches, View, rotary_table

Shape = tuple[int, ...]
State = tuple[torch.Tensor, ...]


class TransformerStage(StageModule):
    """Blocks ``span`` of a :class:`fusemesh.Transformer`, with what stands before, between and after them.

    The modules are the Transformer's own, not copies. What a stage hands to the next is h; where an encoder ends, its
    output, the memory; within the decoder behind it h and the memory. Local shapes: tokens [B, S]; h and memory
    [B, S, E], or [B, S / tp, E] under sequence parallel; logits as :meth:`Transformer.forward` returns them.

    Args:
        span: which blocks of the whole model.
        embedding, target_embedding: None in a stage that neither begins with it nor (tied) ends in logits.
        encoder_norm: None where no encoder ends that a decoder follows.
        norm, head: None before the last stage; ``head`` is None in the last one too if embeddings are tied.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: str,
        span: range,
        *,
        embedding: VocabParallelEmbedding | None,
        blocks: Sequence[nn.Module],
        target_embedding: VocabParallelEmbedding | None,
        encoder_norm: RMSNorm | None,
        norm: RMSNorm | None,
        head: nn.Module | None,
    ) -> None:
        super().__init__()
        self.config, self.backend, self.span = config, backend, span
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.encoder_norm = encoder_norm
        self.target_embedding = target_embedding
        self.norm = norm
        self.head = head
        self.token_loss = VocabParallelLoss(_outputs(config)) if norm is not None else None

    def _parts(self) -> int:
        """Into how many parts the sequence is split between the matmuls."""
        norm = next(module for module in self.modules() if isinstance(module, RMSNorm))
        return norm.ranks if norm.sequence_parallel else 1

    def forward(
        self,
        *state: torch.Tensor,
        lengths: torch.Tensor | None = None,
        span_starts: torch.Tensor | None = None,
        target_tokens: torch.Tensor | None = None,
        caches: Caches | None = None,
    ) -> torch.Tensor | State:
        """Tokens (in the first stage), or what the stage before handed on, to what this stage hands on.

        The other arguments are those of :meth:`Transformer.forward`, the same in every stage.
        """
        if self.config.memory_at is not None:
            found = self._encoder_decoder(state, lengths, target_tokens, caches)
        else:
            h = self._embed(self.embedding, state[0]) if self.span.start == 0 else state[0]
            is_causal = self.config.architecture == "decoder"
            mask = None if is_causal else self._seen(h.shape[1] * self._parts(), lengths)
            found = (self._run(h, self.span, self._view(h, caches, is_causal, mask=mask)),)
        if self.norm is not None:
            return self._logits(self.norm(found[0]), lengths, span_starts)
        return found if len(found) > 1 else found[0]

    def _encoder_decoder(
        self,
        state: State,
        lengths: torch.Tensor | None,
        target_tokens: torch.Tensor | None,
        caches: Caches | None,
    ) -> State:
        """h, or the memory where the encoder just ends, or h and the memory."""
        at, parts = self.config.memory_at, self._parts()
        assert at is not None
        encoder = range(self.span.start, min(at, self.span.stop))
        decoder = range(max(at, self.span.start), self.span.stop)
        encoded = caches is not None and caches.encoded
        h: torch.Tensor | None = None
        memory: torch.Tensor | None = None
        if encoded:
            # Every later step of a generation: what the decoder sees of the encoder is in the caches.
            h = state[0] if self.span.start > at else None
        elif encoder:
            h = self._embed(self.embedding, state[0]) if encoder.start == 0 else state[0]
            view = self._view(h, None, False, mask=self._seen(h.shape[1] * parts, lengths))
            h = self._run(h, encoder, view)
            if encoder.stop < at:
                return (h,)
            assert self.encoder_norm is not None
            memory = self.encoder_norm(h)
            if not decoder:
                return (memory,)
        elif self.span.start == at:
            memory = state[0]
        else:
            h, memory = state
        if decoder.start == at:
            assert target_tokens is not None
            h = self._embed(self.target_embedding, target_tokens)
        assert h is not None
        keys = self._memory_length(caches) if memory is None else memory.shape[1] * parts
        view = self._view(h, caches, True, memory_mask=self._seen(keys, lengths))
        h = self._run(h, decoder, view, memory)
        return (h,) if memory is None else (h, memory)

    def _memory_length(self, caches: Caches | None) -> int:
        """Positions of the memory whose keys the caches hold."""
        assert caches is not None
        memory = caches.layers[self.span.stop - 1].memory
        assert memory is not None
        return memory[0].shape[2]

    @staticmethod
    def _embed(embedding: VocabParallelEmbedding | None, tokens: torch.Tensor) -> torch.Tensor:
        assert embedding is not None
        return embedding(tokens)

    @staticmethod
    def _seen(length: int, lengths: torch.Tensor | None) -> torch.Tensor | None:
        """bool [B, 1, 1, length]: which of a text's tokens are not padding; None if all are."""
        if lengths is None:
            return None
        return (torch.arange(length, device=lengths.device) < lengths[:, None])[:, None, None]

    def _view(
        self,
        h: torch.Tensor,
        caches: Caches | None,
        causal: bool,
        mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> View:
        # Attention sees the whole sequence on every rank of tp, so positions count from its start.
        positions = torch.arange(h.shape[1] * self._parts(), device=h.device)
        if caches is not None:
            positions = (positions + caches.used - caches.starts[:, None]).clamp(min=0)
        table = rotary_table(positions, self.config.head_dim, self.config.rope_theta, h.dtype)
        return View(table, causal, mask, memory_mask, caches)

    def _run(self, h: torch.Tensor, span: range, view: View, memory: torch.Tensor | None = None) -> torch.Tensor:
        for index in span:
            cache = None if view.caches is None else view.caches.layers[index]
            h = self.blocks[index - self.span.start](h, view, memory, cache)
        return h

    def _logits(self, h: torch.Tensor, lengths: torch.Tensor | None, span_starts: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self.head, ClassHead | SpanHead):
            length = h.shape[1] * self._parts()
            where = self._seen(length, lengths)
            # [B, S]
            allowed = h.new_ones((h.shape[0], length), dtype=torch.bool) if where is None else where[:, 0, 0]
            if isinstance(self.head, SpanHead):
                question = allowed
                if span_starts is not None:
                    question = torch.arange(length, device=h.device) < span_starts[:, None]
                    allowed = allowed & ~question
                return self.head(h, allowed, question)
            return self.head(h, allowed)
        if self.head is not None:
            return self.head(h)
        table = self.embedding if self.config.memory_at is None else self.target_embedding
        assert table is not None
        return table.logits(h, self.backend)

    def input_shapes(self, batch: Mapping[str, Shape]) -> list[Shape]:
        return state_shapes(self.config, self.span.start, self._parts(), batch)

    def output_shapes(self, batch: Mapping[str, Shape]) -> list[Shape]:
        if self.norm is None:
            return state_shapes(self.config, self.span.stop, self._parts(), batch)
        return [logits_shape(self.config, self.norm.ranks, self.norm.rank, self._parts(), batch)]

    def summed_loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert self.token_loss is not None and self.norm is not None
        if self.config.output != "span":
            return self.token_loss(output, targets).sum()
        # The classes are positions: split over tp under sequence parallel, else whole on every rank.
        is_split = self.norm.sequence_parallel
        start = self.norm.rank * output.shape[-1] if is_split else 0
        group = self.norm.group if is_split else None
        return vocab_parallel_cross_entropy(output, targets, vocab_start=start, group=group).sum()


def _outputs(config: TransformerConfig) -> int:
    """Over how many the logits of one place go; of a span see :meth:`TransformerStage.summed_loss`."""
    return config.num_classes if config.output == "class" else config.vocab_size


def state_shapes(config: TransformerConfig, block: int, parts: int, batch: Mapping[str, Shape]) -> list[Shape]:
    """The shapes on a rank of what goes into block number ``block``, for tensors of these shapes in a batch."""
    if block == 0:
        return [batch["tokens"]]
    rows, length = batch["tokens"]
    h = (rows, length // parts, config.hidden_size)
    if config.memory_at is None or block <= config.memory_at:
        return [h]
    return [(rows, batch["target_tokens"][1] // parts, config.hidden_size), h]


def logits_shape(config: TransformerConfig, ranks: int, rank: int, parts: int, batch: Mapping[str, Shape]) -> Shape:
    """The shape of the logits on a rank of tp."""
    rows, length = batch["tokens"]
    if config.output == "span":
        return rows, 2, length // parts
    if config.output == "class":
        length = 1
    elif config.memory_at is not None:
        length = batch["target_tokens"][1]
    own = own_rows(_outputs(config), ranks, rank)
    return rows, length, own.stop - own.start
