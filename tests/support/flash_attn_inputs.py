"""Inputs of flash-attn 2's functions: a batch, and packed sequences of unlike lengths."""

from __future__ import annotations

import torch

# Sq, Sk, H, Hkv: fewer queries than keys, and more (then the first queries see no key under a causal mask).
SHAPES = {"few": (3, 7, 4, 2), "many": (7, 4, 2, 1), "square": (6, 6, 2, 2)}
LENS_Q, LENS_K = [3, 0, 5, 2], [4, 3, 2, 0]


def new(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(shape: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    sq, sk, heads, kv_heads = SHAPES[shape]
    sizes = ((sq, heads), (sk, kv_heads), (sk, kv_heads))
    return [new(2, length, h, 16, seed=i, dtype=dtype) for i, (length, h) in enumerate(sizes)]


def ragged(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    sizes = ((sum(LENS_Q), 4), (sum(LENS_K), 2), (sum(LENS_K), 2))
    return [new(length, h, 16, seed=i, dtype=dtype) for i, (length, h) in enumerate(sizes)]


def bounds(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
