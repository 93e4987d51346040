"""One Transformer: a decoder with RMS norm, rotary positions, grouped-query attention and a gated MLP.

Built from the modules of :mod:`fusemesh.hybrid.tensor_parallel`, so that the same class is the model of one process and
of any layout. Shapes: B batch, S sequence, E hidden size, H heads, Hkv key/value heads, D head dim, V vocabulary.

Sources: Touvron et al., "LLaMA" (2023); Su et al., "RoFormer" (2021); Ainslie et al., "GQA" (2023); Shazeer, "GLU
Variants Improve Transformer" (2020).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import nn

from fusemesh.hybrid.pipeline_parallel import PipelinedModel, StageModule
from fusemesh.hybrid.tensor_parallel import (
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelLoss,
    own_rows,
)
from fusemesh.kernels.attention.api import flash_attention


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a :class:`Transformer`.

    Raises:
        ValueError: a size that is no positive number, or sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_sequence_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    use_bias: bool = False
    """Whether the linear layers (not the head) have biases."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; projections onto the residual have it over sqrt(2 * num_layers)."""
    tie_embeddings: bool = False
    """Whether the head's weight is the embedding's: one parameter, ``embedding.weight``, with both gradients."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "intermediate_size",
            "max_sequence_length",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, received {value!r}")
        for name in ("rope_theta", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, received {value!r}")
        for name in ("use_bias", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, received {getattr(self, name)!r}")
        if self.hidden_size % (2 * self.num_heads) != 0:
            raise ValueError(
                f"hidden_size: expected a multiple of 2 * num_heads = {2 * self.num_heads}, because rotary positions "
                f"turn pairs of a head's dimensions, received {self.hidden_size}"
            )
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, received {self.num_kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.hidden_size // self.num_heads


def rotary_table(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [S, D / 2] of each position's angles, computed in fp64 and rounded once to ``dtype``."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angles = torch.outer(positions.double(), theta ** (-pairs / head_dim))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [B, S, H, D] with dimension i and i + D / 2 of each head turned as a pair (the half-split convention)."""
    # [S, 1, D / 2]
    cos, sin = (part.unsqueeze(1) for part in table)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention of the heads that this rank holds; query, key and value share one gather of the input."""

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        hidden, dim, bias = config.hidden_size, config.head_dim, config.use_bias
        self.head_dim, self.backend = dim, backend
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.query = ColumnParallelLinear(hidden, heads * dim, bias=bias, num_heads=heads, enter=False, backend=backend)
        self.key = ColumnParallelLinear(
            hidden, kv_heads * dim, bias=bias, num_heads=kv_heads, enter=False, backend=backend
        )
        self.value = ColumnParallelLinear(
            hidden, kv_heads * dim, bias=bias, num_heads=kv_heads, enter=False, backend=backend
        )
        self.output = RowParallelLinear(heads * dim, hidden, bias=bias, backend=backend)

    def forward(
        self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], residual: torch.Tensor
    ) -> torch.Tensor:
        # [B, S, E]: the whole sequence, also where x is a part of it
        x = self.query.enter_group(x)
        batch, length = x.shape[:2]
        # [B, S, H / tp, D] and [B, S, Hkv / tp, D], at least one head
        q = rotate(self.query(x).view(batch, length, self.query.local_heads, self.head_dim), table)
        k = rotate(self.key(x).view(batch, length, self.key.local_heads, self.head_dim), table)
        v = self.value(x).view(batch, length, self.value.local_heads, self.head_dim)
        y = flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True, backend=self.backend)
        assert isinstance(y, torch.Tensor)  # not a pair, since no LSE was asked for
        return self.output(y.transpose(1, 2).reshape(batch, length, -1), residual)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are the two weights of one fused layer."""

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.use_bias
        self.gate = ColumnParallelLinear(hidden, wide, bias=bias, activation="silu", gated=True, backend=backend)
        self.down = RowParallelLinear(wide, hidden, bias=bias, backend=backend)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate(x), residual)


class Block(nn.Module):
    """One layer: h + attention(norm(h)), then h + mlp(norm(h)); both residuals join in the row-parallel layers."""

    def __init__(self, config: TransformerConfig, backend: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, backend)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config, backend)

    def forward(self, h: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        h = self.attention(self.attention_norm(h), table, h)
        return self.mlp(self.mlp_norm(h), h)


class TransformerStage(StageModule):
    """Some consecutive blocks of a :class:`Transformer`, with the embedding before them, or norm and head after them.

    The modules are the Transformer's own, not copies. Local shapes: tokens [B, S]; h [B, S, E], or [B, S / tp, E] under
    sequence parallel; logits [B, S, V_local].

    Args:
        embedding: None in a stage that neither embeds nor (with tied embeddings) ends in logits.
        norm, head: None before the last stage; ``head`` is None in the last one too if embeddings are tied.
        first: whether the input is tokens rather than h.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: str,
        embedding: VocabParallelEmbedding | None,
        blocks: list[Block],
        norm: RMSNorm | None,
        head: ColumnParallelLinear | None,
        *,
        first: bool,
    ) -> None:
        super().__init__()
        self.config, self.backend, self.first = config, backend, first
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head
        self.token_loss = VocabParallelLoss(config.vocab_size) if norm is not None else None

    def _parts(self) -> int:
        """Into how many parts the sequence is split between the matmuls."""
        norm = next(module for module in self.modules() if isinstance(module, RMSNorm))
        return norm.ranks if norm.sequence_parallel else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (in the first stage) or h to h, or (in the last) to logits."""
        length = x.shape[1] if self.first else x.shape[1] * self._parts()
        h = x
        if self.first:
            assert self.embedding is not None
            h = self.embedding(x)
        # Attention sees the whole sequence on every rank of tp, so positions count from its start.
        positions = torch.arange(length, device=x.device)
        table = rotary_table(positions, self.config.head_dim, self.config.rope_theta, h.dtype)
        for block in self.blocks:
            h = block(h, table)
        if self.norm is None:
            return h
        h = self.norm(h)
        if self.head is not None:
            return self.head(h)
        assert self.embedding is not None
        return self.embedding.logits(h, self.backend)

    def input_shape(self, batch: int, length: int) -> tuple[int, ...]:
        return (batch, length) if self.first else (batch, length // self._parts(), self.config.hidden_size)

    def output_shape(self, batch: int, length: int) -> tuple[int, ...]:
        if self.norm is None:
            return batch, length // self._parts(), self.config.hidden_size
        rows = own_rows(self.config.vocab_size, self.norm.ranks, self.norm.rank)
        return batch, length, rows.stop - rows.start

    def summed_loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert self.token_loss is not None
        return self.token_loss(output, targets).sum()


class Transformer(TransformerStage, PipelinedModel):
    """A causal language model.

    Args:
        config: its sizes.
        backend: of attention and of the linear layers; see :func:`fusemesh.flash_attention`.
        seed: of the initial weights. Each parameter draws from a generator of its own, seeded by ``seed`` and its name,
            on the CPU in fp32: equal in every layout, and in every dtype up to rounding.
        dtype: of the parameters; None is torch's default.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: str = "auto",
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        tied = config.tie_embeddings
        super().__init__(
            config,
            backend,
            VocabParallelEmbedding(config.vocab_size, config.hidden_size),
            [Block(config, backend) for _ in range(config.num_layers)],
            RMSNorm(config.hidden_size, eps=config.norm_eps),
            None if tied else ColumnParallelLinear(config.hidden_size, config.vocab_size, backend=backend),
            first=True,
        )
        self.initialise(seed)
        self.to(dtype if dtype is not None else torch.get_default_dtype())

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Give every parameter its initial value; see the class."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            onto_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            # torch's CPU generator takes 32 bits of its seed and ignores the others.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(values * (std / math.sqrt(2 * self.config.num_layers) if onto_residual else std))

    def stage(self, blocks: range, *, first: bool, last: bool) -> TransformerStage:
        return TransformerStage(
            self.config,
            self.backend,
            self.embedding if first or (last and self.config.tie_embeddings) else None,
            [self.blocks[index] for index in blocks],  # type: ignore[misc]
            self.norm if last else None,
            self.head if last else None,
            first=first,
        )

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the next token, or with ``targets`` the loss.

        Args:
            tokens: [B, S] integer ids of this replica's samples, equal on every rank of tp and pp.
            targets: [B, S] ids, -100 where a token does not count; or None.

        Returns:
            [B, S, V_local]: this rank's part of the vocabulary; with ``targets`` a scalar, the loss summed over this
            replica's tokens, equal on every rank of tp and pp: divide it by the token count of all replicas. With pp it
            has no gradient: see :meth:`loss_and_gradients`.

        Raises:
            ValueError: tokens of another shape, or longer than ``max_sequence_length``, or (sequence parallel) a
                length that tp does not divide; or logits are asked for with pp, where one stage alone has them.
        """
        self._check_tokens(tokens)
        if self.pipeline is not None:
            if targets is None:
                raise ValueError(
                    "targets: expected with pp, because the logits are on the last stage alone, received None; give "
                    "targets, or use pp1"
                )
            return self.pipeline.loss(tokens, targets)
        logits = super().forward(tokens)
        return logits if targets is None else self.summed_loss(logits, targets)

    def loss_and_gradients(
        self, tokens: torch.Tensor, targets: torch.Tensor, count: int | torch.Tensor
    ) -> torch.Tensor:
        self._check_tokens(tokens)
        return super().loss_and_gradients(tokens, targets, count)

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected shape [B, S], received {tuple(tokens.shape)}")
        length, parts = tokens.shape[1], self._parts()
        if length > self.config.max_sequence_length:
            raise ValueError(
                f"tokens: expected at most max_sequence_length = {self.config.max_sequence_length} a sample, received "
                f"{length}; cut the samples, or configure a longer maximum"
            )
        if length % parts != 0:
            raise ValueError(
                f"tokens: {length} tokens a sample cannot be split over tp{parts}; use a multiple of {parts}, or "
                "sequence_parallel=False"
            )
