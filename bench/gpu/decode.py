"""Attention over a cache on a GPU: cases like those of gpu_cases.py, which verifies them. Forward only.

Slots of the cache without a key hold NaN, and so do pages of no sequence.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

import fusemesh
from bench.gpu import cases as gpu_cases
from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.testing import attention as attention_testing
from fusemesh.kernels.testing import budget

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Decode:
    """One call. ``lens`` counts the keys of each sequence before ``added`` ones are appended."""

    dtype: str = "bf16"
    sq: int = 1
    d: int = 128
    dv: int | None = None
    heads: int = 8
    kv_heads: int = 2
    lens: tuple[int, ...] = (301, 1, 130)
    added: int = 0
    page: int | None = None
    latent: bool = False  # the values are the first dv columns of the keys
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    bias: bool = False
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    repeats: int = 0
    op = "decode"
    counted = ("attention_decode",)

    @property
    def name(self) -> str:
        """Every field that is not the default."""
        return gpu_cases.differences(self)

    def tiny(self) -> Decode:
        """The same features on a shape small enough for any machine."""
        return dataclasses.replace(self, lens=tuple(max(1, n % 41) for n in self.lens))

    @property
    def _lengths(self) -> list[int]:
        return [n + self.added for n in self.lens]

    def inputs(self, device: torch.device | str, seed: int) -> Tensors:
        """q, caches and what else the call takes; and all keys and values in order, new ones included."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype, B = gpu_cases.DTYPES[self.dtype], len(self.lens)
        page = self.page or 1
        pages = -(-max(self._lengths) // page)
        slots, dv = pages * page, self.d if self.dv is None else self.dv

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        keys = new(B, self.kv_heads, slots, self.d)
        x = {"q": new(B, self.heads, self.sq, self.d), "keys": keys}
        x["values"] = keys[..., :dv] if self.latent else new(B, self.kv_heads, slots, dv)
        x["cache_lens"] = torch.tensor(self.lens, dtype=torch.int32, device=device)
        if self.page is not None:
            order = torch.randperm(B * pages + 3, generator=generator, device=device)[: B * pages]
            x["block_table"] = order.view(B, pages).to(torch.int32)
        for short, whole in (("k", "keys"), ("v", "values")):
            if short == "v" and self.latent:
                continue
            x[f"{short}_cache"] = self._cache(x[whole], x.get("block_table"), self.lens)
            if self.added:
                rows = [x[whole][b, :, n : n + self.added] for b, n in enumerate(self.lens)]
                x[f"{short}_new"] = torch.stack(rows).contiguous()
        if self.bias:
            x["bias"] = new(1, self.heads, 1, slots)
        if self.alibi:
            x["alibi_slopes"] = torch.rand(self.heads, generator=generator, device=device) / 8
        if self.sinks:
            x["sinks"] = new(self.heads)
        return x

    def _cache(self, rows: torch.Tensor, table: torch.Tensor | None, lens: Any) -> torch.Tensor:
        """The first of each sequence's rows where the call looks for them, NaN in all other slots."""
        filled = rows.clone()
        for b, n in enumerate(lens):
            filled[b, :, n:] = math.nan
        if table is None or self.page is None:
            return filled
        cache = rows.new_full((table.numel() + 3, self.kv_heads, self.page, rows.shape[-1]), math.nan)
        split = filled.unflatten(2, (-1, self.page)).transpose(1, 2)
        cache[table.flatten().long()] = split.flatten(0, 1)
        return cache

    def expected(self, x: Tensors) -> tuple[list[attention_testing.Expected], Tensors]:
        """For each sequence the fp64 reference and eager PyTorch's error; and the caches after the append."""
        wanted = []
        mods = [] if self.softcap is None else [score_mods.softcap(self.softcap)]
        if self.alibi:
            mods.append(score_mods.alibi(x["alibi_slopes"], x["q"][:1]))
        left, right = self.window or (None, None)
        for b, n in enumerate(self._lengths):
            spec = AttentionSpec(
                self.d**-0.5,
                left,
                0 if self.causal else right,
                n - self.sq,
                mods=tuple(bound.mod.name for bound in mods),
                params=tuple(number for bound in mods for number in bound.params),
            )
            one = {name: x[name][b : b + 1, :, :n] for name in ("keys", "values")}
            bias = x["bias"][..., :n] if self.bias else None
            aux = tuple(tensor for bound in mods for tensor in bound.aux)
            call = Call(spec, bias=bias, aux=aux, sinks=x.get("sinks"))
            wanted.append(attention_testing.expected(x["q"][b : b + 1], one["keys"], one["values"], call))
        caches = {"k_cache": self._cache(x["keys"], x.get("block_table"), self._lengths)}
        if not self.latent:
            caches["v_cache"] = self._cache(x["values"], x.get("block_table"), self._lengths)
        return wanted, caches

    def compute(self, x: Tensors) -> Tensors:
        """out, lse and the caches as the call leaves them."""
        caches = {name: x[name].clone() for name in ("k_cache", "v_cache") if name in x}
        names = ("cache_lens", "block_table", "k_new", "v_new", "bias", "alibi_slopes", "sinks")
        out, lse = fusemesh.flash_attention_decode(
            x["q"],
            **caches,
            **{name: x[name] for name in names if name in x},
            v_dim=self.dv if self.latent else None,
            causal=self.causal,
            window=self.window,
            align="bottom_right" if self.causal or self.window or self.alibi else None,
            softcap=self.softcap,
            return_lse=True,
            backend="triton",
        )
        return {"out": out, "lse": lse, **caches}

    def stand_in(self, want: Any) -> Tensors:
        """Eager PyTorch's values, for a dry run."""
        parts, caches = want
        return {**{name: torch.cat([part.eager[name] for part in parts]) for name in ("out", "lse")}, **caches}

    def check(self, outputs: Tensors, want: Any) -> list[budget.Budget]:
        """What was measured; AssertionError where ``outputs`` is outside the budget, or a cache not as it should be."""
        parts, caches = want
        for name, cache in caches.items():
            same = (outputs[name] == cache) | (outputs[name].isnan() & cache.isnan())
            assert same.all(), f"{name}: {int((~same).sum())} elements are not what the append should leave"
        measured = []
        for b, part in enumerate(parts):
            measured += attention_testing.check({name: outputs[name][b : b + 1] for name in ("out", "lse")}, part)
        return measured


DECODE: tuple[Decode, ...] = (
    Decode(lens=(8191, 100), repeats=gpu_cases.REPEATS),
    Decode(added=1, page=64, causal=True, lens=(1000, 63, 64)),
    Decode(d=576, dv=512, heads=16, kv_heads=1, latent=True, lens=(2000, 77)),
    *(Decode(t) for t in ("fp16", "fp32")),
    Decode(sq=5, added=5, causal=True, page=16, dv=64, window=(100, 0), softcap=20.0),
    Decode("fp32", alibi=True, sinks=True, bias=True, d=80, added=2, sq=2, causal=True),
    Decode("fp16", page=128, heads=64, kv_heads=8, softcap=30.0, sinks=True, lens=(3000, 129)),
    Decode(d=576, dv=512, heads=128, kv_heads=1, latent=True, page=64, added=1, lens=(500, 64, 63)),
    Decode(d=256, window=(255, 0), sq=3, heads=4, kv_heads=4, alibi=True),
)
