"""The whole Transformer: initial weights, stages, losses, logits, caches."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping

import torch

from fusemesh.hybrid.pipeline_parallel import Pipeline, PipelinedModel
from fusemesh.hybrid.tensor.modules import RMSNorm, TensorParallelModule, VocabParallelEmbedding

from .config import TransformerConfig
from .heads import OUTPUTS
from .layers import Block, Caches, KeyValueCache
from .stage import TransformerStage, state_shapes


class Transformer(TransformerStage, PipelinedModel):
    """A language model, classifier, span finder or translator, by :class:`TransformerConfig`.

    Args:
        config: its kind and sizes.
        backend: of attention and of the linear layers; see :func:`fusemesh.flash_attention`.
        seed: of the initial weights. Each parameter draws from a generator of its own, seeded by ``seed`` and its name,
            on the CPU in fp32: equal in every layout, and in every dtype up to rounding.
        dtype: of the parameters; None is torch's default.

    Sources: Vaswani et al., "Attention Is All You Need" (2017); Touvron et al., "LLaMA" (2023); Su et al., "RoFormer"
    (2021); Ainslie et al., "GQA" (2023); Shazeer, "GLU Variants Improve Transformer" (2020); Devlin et al., "BERT"
    (2019) for the heads of an encoder.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: str = "auto",
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        hidden, at = config.hidden_size, config.memory_at
        super().__init__(
            config,
            backend,
            range(config.num_blocks),
            embedding=VocabParallelEmbedding(config.vocab_size, hidden),
            blocks=[
                Block(config, backend, with_memory=at is not None and index >= at, window=config.window_of(index))
                for index in range(config.num_blocks)
            ],
            target_embedding=None if at is None else VocabParallelEmbedding(config.vocab_size, hidden),
            encoder_norm=None if at is None else RMSNorm(hidden, eps=config.norm_eps),
            norm=RMSNorm(hidden, eps=config.norm_eps),
            head=OUTPUTS[config.output].head(config, backend),
        )
        self.initialise(seed)
        self.to(dtype if dtype is not None else torch.get_default_dtype())

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Give every parameter its initial value; see the class. Those on meta have none."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            onto_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            # torch's CPU generator takes 32 bits of its seed and ignores the others.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(values * (std / math.sqrt(2 * self.config.num_layers) if onto_residual else std))

    def stage(self, blocks: range, *, first: bool, last: bool) -> TransformerStage:
        config, at = self.config, self.config.memory_at
        tied = last and config.tie_embeddings
        return TransformerStage(
            config,
            self.backend,
            blocks,
            embedding=self.embedding if first or (tied and at is None) else None,
            blocks=[self.blocks[index] for index in blocks],
            encoder_norm=self.encoder_norm if at is not None and at - 1 in blocks else None,
            target_embedding=self.target_embedding if (at is not None and at in blocks) or tied else None,
            norm=self.norm if last else None,
            head=self.head if last else None,
        )

    def forward(  # type: ignore[override]
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        caches: Caches | None = None,
        **inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits, or with ``targets`` the loss.

        Args:
            tokens: [B, S] integer ids of this replica's samples, equal on every rank of tp and pp.
            targets: ids, -100 where one does not count: [B, S] of the next token (a decoder), [B, T] (an
                encoder-decoder), [B, 1] of the class, [B, 2] of a span's first and last position; or None.
            caches: see :meth:`logits`, which alone passes it.
            inputs: ``lengths``, int64 [B], tokens of each text before its padding, for an encoder; None: no padding.
                ``target_tokens``, [B, T], the tokens that the decoder of an encoder-decoder has seen. And what the
                output reads: of a span ``span_starts``, int64 [B], the first position at which it may start; None: 0.

        Returns:
            [B, S, V_local] or [B, T, V_local]: this rank's part of the vocabulary; [B, 1, C_local] of the classes;
            [B, 2, S] of where a span starts and ends, [B, 2, S / tp] under sequence parallel. With ``targets`` a
            scalar, the loss summed over this replica's targets, equal on every rank of tp and pp: divide it by the
            count of all replicas. With pp it has no gradient: see :meth:`loss_and_gradients`.

        Raises:
            ValueError: tokens of another shape, or longer than ``max_sequence_length``, or (sequence parallel) a
                length that tp does not divide; or logits are asked for with pp, where one stage alone has them: see
                :meth:`logits`.
        """
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        self._check_inputs(tokens, given)
        if self.pipeline is not None:
            if targets is None:
                raise ValueError(
                    "targets: expected with pp, because the logits are on the last stage alone, received None; give "
                    "targets, call logits(), or use pp1"
                )
            return self.pipeline.loss(tokens, targets, **given)
        found = super().forward(tokens, targets=targets, caches=caches, **given)
        assert isinstance(found, torch.Tensor)
        return found

    def loss_and_gradients(
        self, tokens: torch.Tensor, targets: torch.Tensor, count: int | torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        self._check_inputs(tokens, inputs)
        return super().loss_and_gradients(tokens, targets, count, **inputs)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, *, caches: Caches | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        """The whole logits on every rank, in any layout; every rank of a replica calls it.

        Args:
            tokens, inputs: see :meth:`forward`.
            caches: from :meth:`new_caches`: what came before the tokens, to which they are added.

        Returns:
            [B, S, V], [B, T, V], [B, 1, C] or [B, 2, S].
        """
        if self.pipeline is None:
            own = self(tokens, caches=caches, **inputs)
        else:
            self._check_inputs(tokens, inputs)
            own = self._flow(self.pipeline, tokens, caches, inputs)
        if caches is not None:
            caches.used += inputs.get("target_tokens", tokens).shape[1]
            caches.encoded = True
        return self.output.whole(self.config, self._place(), own)

    def _flow(
        self, pipeline: Pipeline, tokens: torch.Tensor, caches: Caches | None, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """This rank of tp's part of the logits, which the last stage computes, on every rank of pp."""
        config, at = self.config, self.config.memory_at
        spans = pipeline.parts.spans
        encoded = caches is not None and caches.encoded
        first = next(index for index, span in enumerate(spans) if at in span) if encoded and at is not None else 0
        shapes = {name: tuple(x.shape) for name, x in {"tokens": tokens, **inputs}.items()}
        place = self._place()
        leaving = [state_shapes(config, span.stop, place.parts, shapes) for span in spans[:-1]]
        if encoded:
            # h alone: nobody asks for the memory any more.
            leaving = [shapes[:1] for shapes in leaving]
        leaving.append([self.output.shape(config, place, shapes)])
        state = pipeline.flow((tokens,), leaving, first=first, caches=caches, **inputs)
        return state[0]

    def new_caches(self, slots: int, starts: torch.Tensor) -> Caches:
        """Empty caches of the decoder's blocks on this rank, for sequences of at most ``slots`` tokens.

        Args:
            starts: int64 [B], how many slots at the front of each row are padding.

        Raises:
            ValueError: an encoder, which generates nothing.
        """
        if not self.output.generates:
            raise ValueError(
                f"model: expected a decoder or an encoder-decoder, received architecture {self.config.architecture!r}; "
                "call logits()"
            )
        decoder = range(self.config.memory_at or 0, self.config.num_blocks)
        # With pp the other stages' blocks are gone.
        own = dict(self.blocks.named_children())
        layers = {index: KeyValueCache(slots) for index in decoder if str(index) in own}
        return Caches(layers, starts)

    @contextlib.contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Without sequence parallel, for forwards alone: a step of a generation is one token, which tp cannot split."""
        parts = [module for module in self.modules() if isinstance(module, TensorParallelModule)]
        before = [module.sequence_parallel for module in parts]
        for module in parts:
            module.sequence_parallel = False
        try:
            yield
        finally:
            for module, value in zip(parts, before, strict=True):
                module.sequence_parallel = value

    def _check_inputs(self, tokens: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        legal = ("lengths", "target_tokens", *self.output.inputs)
        for name in inputs:
            if name not in legal:
                raise ValueError(
                    f"inputs: expected none but {', '.join(legal)} with output {self.config.output!r}, received {name}"
                )
        for name, x in {"tokens": tokens, "target_tokens": inputs.get("target_tokens", tokens)}.items():
            if x.ndim != 2:
                raise ValueError(f"{name}: expected shape [B, S], received {tuple(x.shape)}")
            length, parts = x.shape[1], self._parts()
            if length > self.config.max_sequence_length:
                raise ValueError(
                    f"{name}: expected at most max_sequence_length = {self.config.max_sequence_length} a sample, "
                    f"received {length}; cut the samples, or configure a longer maximum"
                )
            if length % parts != 0:
                raise ValueError(
                    f"{name}: {length} tokens a sample cannot be split over tp{parts}; use a multiple of {parts}, or "
                    "sequence_parallel=False"
                )
        if (self.config.memory_at is not None) != ("target_tokens" in inputs):
            expected = "what the decoder has seen" if self.config.memory_at is not None else "nothing but for a decoder"
            raise ValueError(
                f"target_tokens: expected {expected}, received {'some' if 'target_tokens' in inputs else 'none'}; "
                f"architecture is {self.config.architecture!r}"
            )
