"""The layers of :class:`fusemesh.Transformer`: rotary positions, attention with a cache or a memory, MLP, block.

Shapes: B batch, S sequence, E hidden size, H heads, Hkv key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fusemesh.hybrid.tensor.modules import ColumnParallelLinear, RMSNorm, RowParallelLinear
from fusemesh.kernels.attention.decode.api import flash_attention_decode
from fusemesh.kernels.attention.dense.api import flash_attention

from .config import TransformerConfig

Table = tuple[torch.Tensor, torch.Tensor]


def rotary_table(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Table:
    """cos and sin [..., D / 2] of the angles of positions [...], computed in fp64 and rounded once to ``dtype``."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions.double().unsqueeze(-1) * theta ** (-pairs / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, table: Table) -> torch.Tensor:
    """x [B, S, H, D] with dimension i and i + D / 2 of each head turned as a pair (the half-split convention).

    Args:
        table: of positions [S], or [B, S].
    """
    # [S, 1, D / 2] or [B, S, 1, D / 2]
    cos, sin = (part.unsqueeze(-2) for part in table)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass
class KeyValueCache:
    """One layer's keys and values of this rank's heads: of the tokens so far, and of the memory.

    slots: tokens that it can hold. keys, values: [B, Hkv, slots, D], of which the first are filled; memory: keys and
    values [B, Hkv, S, D] of the encoder's output. All are None before the first call.
    """

    slots: int
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    memory: tuple[torch.Tensor, torch.Tensor] | None = None

    def make_room(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with all slots, for tokens such as ``k`` and ``v`` [B, Hkv, n, D]."""
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], self.slots, k.shape[3])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        return self.keys, self.values


@dataclass
class Caches:
    """Results of a generation's earlier steps, on this rank.

    layers: by the number of the block. starts: int64 [B], the first slot of each row that counts (left padding).
    used: slots that are filled. encoded: whether the encoder has run, so that the memory is in the layers.
    """

    layers: dict[int, KeyValueCache]
    starts: torch.Tensor
    used: int = 0
    encoded: bool = False

    def reorder(self, rows: torch.Tensor) -> None:
        """Put a copy of row ``rows[i]``, int64 [B], in the place of row i, for the beams that are kept."""
        self.starts = self.starts[rows]
        for layer in self.layers.values():
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            if layer.memory is not None:
                layer.memory = (layer.memory[0][rows], layer.memory[1][rows])


@dataclass(frozen=True)
class View:
    """The tokens that the tokens of one forward may see, the same for every layer of a kind.

    table: of the tokens' positions. causal: whether a token sees those before it alone. mask, memory_mask: bool,
    broadcast to [B, H, S, keys], True where a token may look among the tokens and in the memory; None hides nothing.
    caches: of the tokens before these; None without generation.
    """

    table: Table
    causal: bool
    mask: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    caches: Caches | None = None


class Attention(nn.Module):
    """Self-attention of the heads that this rank holds; query, key and value share one gather of the input.

    With ``of_memory`` keys and values come from the encoder's output instead, without positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: str,
        *,
        of_memory: bool = False,
        window: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        hidden, dim, bias = config.hidden_size, config.head_dim, config.use_bias
        self.head_dim, self.backend, self.of_memory, self.window = dim, backend, of_memory, window
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
        self,
        x: torch.Tensor,
        view: View,
        residual: torch.Tensor,
        memory: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """x [B, S, E], or [B, S / tp, E], to residual plus what attention gives.

        Args:
            view: what x sees.
            memory: [B, S', E], or its part, of the encoder; None once the cache holds its keys.
            cache: of this layer, of ``view.caches``.
        """
        # [B, S, E]: the whole sequence, also where x is a part of it
        x = self.query.enter_group(x)
        # [B, S, H / tp, D]
        q = self._heads(self.query, x)
        if self.of_memory:
            y = self._over_memory(q, view, memory, cache)
        else:
            # [B, S, Hkv / tp, D], at least one head
            k, v = self._heads(self.key, x), self._heads(self.value, x)
            q, k, v = (part.transpose(1, 2) for part in (rotate(q, view.table), rotate(k, view.table), v))
            if cache is None:
                y = self._attend(q, k, v, view.mask, view.causal)
            else:
                assert view.caches is not None
                y = self._over_cache(q, k, v, cache, view.caches)
        return self.output(y.transpose(1, 2).flatten(2), residual)

    def _heads(self, linear: ColumnParallelLinear, x: torch.Tensor) -> torch.Tensor:
        return linear(x).view(*x.shape[:2], linear.local_heads, self.head_dim)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        window = None if self.of_memory else self.window
        y = flash_attention(q, k, v, causal=causal, window=window, mask=mask, backend=self.backend)
        assert isinstance(y, torch.Tensor)  # not a pair, since no LSE was asked for
        return y

    def _over_cache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KeyValueCache, caches: Caches
    ) -> torch.Tensor:
        """Attention of new tokens over what the cache holds and themselves, which it then holds too."""
        keys, values = cache.make_room(k, v)
        y = flash_attention_decode(
            q,
            keys,
            values,
            cache_lens=torch.full_like(caches.starts, caches.used),
            k_new=k,
            v_new=v,
            cache_starts=caches.starts,
            causal=True,
            window=self.window,
            align="bottom_right",
            backend=self.backend,
        )
        assert isinstance(y, torch.Tensor)
        return y

    def _over_memory(
        self, q: torch.Tensor, view: View, memory: torch.Tensor | None, cache: KeyValueCache | None
    ) -> torch.Tensor:
        found = cache.memory if cache is not None else None
        if found is None:
            assert memory is not None
            memory = self.key.enter_group(memory)
            found = (self._heads(self.key, memory).transpose(1, 2), self._heads(self.value, memory).transpose(1, 2))
            if cache is not None:
                cache.memory = found
        return self._attend(q.transpose(1, 2), *found, view.memory_mask, False)


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
    """One layer: h + attention(norm(h)); with a memory h + cross_attention(norm(h)); then h + mlp(norm(h)).

    The residuals join in the row-parallel layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: str,
        *,
        with_memory: bool = False,
        window: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, backend, window=window)
        self.cross_attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps) if with_memory else None
        self.cross_attention = Attention(config, backend, of_memory=True) if with_memory else None
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config, backend)

    def forward(
        self,
        h: torch.Tensor,
        view: View,
        memory: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        h = self.attention(self.attention_norm(h), view, h, cache=cache)
        if self.cross_attention is not None:
            assert self.cross_attention_norm is not None
            h = self.cross_attention(self.cross_attention_norm(h), view, h, memory=memory, cache=cache)
        return self.mlp(self.mlp_norm(h), h)
