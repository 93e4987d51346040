"""Attention over a full contiguous cache, one new query for each sequence: decode's case for tune.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import fusemesh
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.testing import attention as attention_testing
from fusemesh.kernels.testing import budget

from . import peers


@dataclass(frozen=True)
class DecodeCase:
    """q [batch, heads, 1, head_dim], caches [batch, kv_heads, length, ...]; with v_dim keys and values are one."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype
    v_dim: int | None = None
    op = "decode"
    directions = ("forward",)

    @property
    def name(self) -> str:
        latent = "" if self.v_dim is None else f" latent Dv{self.v_dim}"
        return f"B{self.batch} H{self.heads}/{self.kv_heads} S{self.length} D{self.head_dim}{latent}"

    def inputs(self, device: torch.device | str, seed: int = 0) -> peers.Tensors:
        """Random q, caches and the lengths, all of them the caches'."""
        cache = (self.batch, self.kv_heads, self.length, self.head_dim)
        generator = torch.Generator(device).manual_seed(seed)

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        x = {"q": new(self.batch, self.heads, 1, self.head_dim), "k_cache": new(*cache)}
        if self.v_dim is None:
            x["v_cache"] = new(*cache)
        x["cache_lens"] = torch.full((self.batch,), self.length, dtype=torch.int32, device=device)
        return x

    def expected(self, inputs: peers.Tensors, direction: str) -> list[attention_testing.Expected]:
        """The right answer for the first and the last sequence."""
        spec, keys = AttentionSpec(scale=self.head_dim**-0.5), inputs["k_cache"]
        values = keys[..., : self.v_dim] if self.v_dim is not None else inputs["v_cache"]
        ends = (slice(0, 1), slice(self.batch - 1, self.batch))
        return [attention_testing.expected(inputs["q"][b], keys[b], values[b], Call(spec)) for b in ends]

    def check(self, outputs: peers.Tensors, expected: Any) -> list[budget.Budget]:
        """What was measured; AssertionError where ``outputs`` is outside the budget."""
        measured = []
        for b, want in zip((0, self.batch - 1), expected, strict=True):
            measured += attention_testing.check({n: x[b : b + 1] for n, x in outputs.items()}, want)
        return measured

    def outputs(self, contender: peers.Contender, inputs: peers.Tensors, direction: str) -> peers.Tensors:
        """What a contender computes: out."""
        with torch.no_grad():
            return {"out": contender.forward(inputs)}

    def ours(self, backend: str) -> peers.Contender:
        """FuseMesh's backend of this name, through the public function."""

        def forward(x: peers.Tensors) -> torch.Tensor:
            caches = (x["q"], x["k_cache"], x.get("v_cache"))
            out = fusemesh.flash_attention_decode(
                *caches, cache_lens=x["cache_lens"], v_dim=self.v_dim, backend=backend
            )
            assert isinstance(out, torch.Tensor)
            return out

        return peers.Contender(backend, True, forward, differentiable=False)
