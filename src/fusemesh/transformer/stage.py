"""Some consecutive blocks of a Transformer, as a stage of a pipeline; the whole model is the stage of all its blocks.

Shapes: B batch, S sequence, T target sequence, E hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fusemesh.hybrid.pipeline_parallel import StageModule
from fusemesh.hybrid.tensor.modules import RMSNorm, VocabParallelEmbedding

from .config import TransformerConfig
from .heads import OUTPUTS, Place, Shape, TiedHead
from .layers import Caches, View, rotary_table

State = tuple[torch.Tensor, ...]


class TransformerStage(StageModule):
    """Blocks ``span`` of a :class:`fusemesh.Transformer`, with the layers before, between and after them.

    The modules are the Transformer's own, not copies. The state that a stage hands to the next is h; where an encoder
    ends, its output, the memory; within the decoder behind it h and the memory. Local shapes: tokens [B, S]; h
    and memory [B, S, E], or [B, S / tp, E] under sequence parallel; logits as :meth:`Transformer.forward` returns them.

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
        self.output = OUTPUTS[config.output]

    def _place(self) -> Place:
        """Return this rank's place on the tp axis, which each norm knows."""
        norm = next(module for module in self.modules() if isinstance(module, RMSNorm))
        return Place(norm.group, norm.ranks, norm.rank, norm.ranks if norm.sequence_parallel else 1)

    def _parts(self) -> int:
        """Return into how many parts the sequence is split between the matmuls."""
        return self._place().parts

    def forward(
        self,
        *state: torch.Tensor,
        targets: torch.Tensor | None = None,
        caches: Caches | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor | State:
        """Return the state for the next stage; in the last one the logits, or with targets the loss summed over them.

        Args:
            state: the tokens (in the first stage) or the state that the stage before returned.
            targets, caches, inputs: those of :meth:`Transformer.forward`, the same in every stage.
        """
        if self.config.memory_at is not None:
            found = self._encoder_decoder(state, inputs.get("lengths"), inputs.get("target_tokens"), caches)
        else:
            h = self._embed(self.embedding, state[0]) if self.span.start == 0 else state[0]
            is_causal = self.config.is_causal(self.span.start)
            mask = None if is_causal else self._seen(h.shape[1] * self._parts(), inputs.get("lengths"))
            found = (self._run(h, self.span, self._view(h, caches, is_causal, mask=mask)),)
        if self.norm is not None:
            h = self.norm(found[0])
            if targets is None:
                return self.output.logits(self._head(), h, self._place(), inputs)
            return self.output.summed_loss(self.config, self._place(), self._head(), h, inputs, targets)
        return found if len(found) > 1 else found[0]

    def _encoder_decoder(
        self,
        state: State,
        lengths: torch.Tensor | None,
        target_tokens: torch.Tensor | None,
        caches: Caches | None,
    ) -> State:
        """Return h, or the memory where the encoder just ends, or h and the memory."""
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
        """Return the number of positions of the memory whose keys the caches hold."""
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
        """Return bool [B, 1, 1, length], True for the tokens that are not padding; None if all are."""
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

    def _head(self) -> Any:
        """Return the head; where embeddings are tied, their table as one."""
        if self.head is not None:
            return self.head
        table = self.embedding if self.config.memory_at is None else self.target_embedding
        assert table is not None
        return TiedHead(table, self.backend)

    def input_shapes(self, batch: Mapping[str, Shape]) -> list[Shape]:
        return state_shapes(self.config, self.span.start, self._parts(), batch)

    def output_shapes(self, batch: Mapping[str, Shape]) -> list[Shape]:
        if self.norm is None:
            return state_shapes(self.config, self.span.stop, self._parts(), batch)
        return [self.output.shape(self.config, self._place(), batch)]


def state_shapes(config: TransformerConfig, block: int, parts: int, batch: Mapping[str, Shape]) -> list[Shape]:
    """Return the shapes on a rank of the state before block number ``block``, for a batch of these shapes."""
    if block == 0:
        return [batch["tokens"]]
    rows, length = batch["tokens"]
    h = (rows, length // parts, config.hidden_size)
    if config.memory_at is None or block <= config.memory_at:
        return [h]
    return [(rows, batch["target_tokens"][1] // parts, config.hidden_size), h]
