"""Inputs of attention for tests of the public functions."""

from __future__ import annotations

import torch


def qkv(
    sq: int = 5,
    sk: int = 5,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    dim_v: int = 8,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = (2, heads, sq, dim), (2, kv_heads, sk, dim), (2, kv_heads, sk, dim_v)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_(requires_grad) for shape in shapes)
    return q, k, v


def close(actual: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(actual, want, rtol=1e-12, atol=1e-13)
