"""Packed sequences on a GPU: cases like those of gpu_cases.py, which verifies them. Each sequence is judged by itself.

Rows of padding before the first sequence and after the last hold NaN.
"""

from __future__ import annotations

import dataclasses
import itertools
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
GAP = 3  # rows of padding at either end


@dataclass(frozen=True)
class Varlen:
    """One call of flash_attention_varlen; a bias is one of each sequence and head."""

    dtype: str = "bf16"
    lens_q: tuple[int, ...] = (203, 0, 1, 130)
    lens_k: tuple[int, ...] = (203, 9, 65, 71)
    d: int = 64
    dv: int | None = None
    heads: int = 4
    kv_heads: int = 2
    causal: bool = False
    align: str = "bottom_right"
    window: tuple[int | None, int | None] | None = None
    bias: bool = False
    softcap: float | None = None
    alibi: bool = False
    dropout: float = 0.0
    repeats: int = 0
    op = "varlen"
    counted = ("attention_varlen_forward", "attention_varlen_backward")

    @property
    def name(self) -> str:
        """Every field that is not the default."""
        return gpu_cases.differences(self)

    def tiny(self) -> Varlen:
        """The same features on a shape small enough for any machine."""
        short = {name: tuple(n % 23 for n in getattr(self, name)) for name in ("lens_q", "lens_k")}
        return dataclasses.replace(self, **short)

    def inputs(self, device: torch.device | str, seed: int) -> Tensors:
        """q, k, v, do, cu_q and cu_k, and bias, slopes and seed where the case has them."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype, dv = gpu_cases.DTYPES[self.dtype], self.d if self.dv is None else self.dv
        rows_q, rows_k = (sum(lens) + 2 * GAP for lens in (self.lens_q, self.lens_k))
        shapes: dict[str, tuple[int, ...]] = {
            "q": (rows_q, self.heads, self.d),
            "k": (rows_k, self.kv_heads, self.d),
            "v": (rows_k, self.kv_heads, dv),
            "do": (rows_q, self.heads, dv),
        }
        x = {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in shapes.items()}
        for value in x.values():
            value[:GAP] = value[-GAP:] = math.nan
        for name, lens in (("cu_q", self.lens_q), ("cu_k", self.lens_k)):
            starts = list(itertools.accumulate(lens, initial=GAP))
            x[name] = torch.tensor(starts, dtype=torch.int32, device=device)
        if self.bias:
            shape = (len(self.lens_q), self.heads, max(self.lens_q), max(self.lens_k))
            x["bias"] = torch.randn(shape, generator=generator, device=device).to(dtype)
        if self.alibi:
            x["slopes"] = torch.rand(self.heads, generator=generator, device=device) / 8
        if self.dropout:
            x["seed"] = torch.tensor([11 + seed], device=device)
        return x

    def _parts(self, x: Tensors) -> list[Tensors]:
        """The rows of each sequence, [1, heads, length, ...] as flash_attention takes them, and its part of a bias."""
        parts = []
        at_q = at_k = GAP
        for b, (sq, sk) in enumerate(zip(self.lens_q, self.lens_k, strict=True)):
            where = {name: slice(at_q, at_q + sq) for name in ("q", "do", "out", "dq")}
            where |= {name: slice(at_k, at_k + sk) for name in ("k", "v", "dk", "dv")}
            part = {name: x[name][rows].transpose(0, 1)[None] for name, rows in where.items() if name in x}
            part |= {name: x[name][b : b + 1, :, :sq, :sk] for name in ("bias", "dbias") if name in x}
            if "lse" in x:
                part["lse"] = x["lse"][None, :, at_q : at_q + sq]
            parts.append(part)
            at_q, at_k = at_q + sq, at_k + sk
        return parts

    def expected(self, x: Tensors) -> list[attention_testing.Expected]:
        """For each sequence the fp64 reference and eager PyTorch's error."""
        left, right = self.window or (None, None)
        wanted = []
        for b, part in enumerate(self._parts(x)):
            mods = [] if self.softcap is None else [score_mods.softcap(self.softcap)]
            if self.alibi:
                mods.append(score_mods.alibi(x["slopes"], part["q"]))
            spec = AttentionSpec(
                self.d**-0.5,
                left,
                0 if self.causal else right,
                self.lens_k[b] - self.lens_q[b] if self.align == "bottom_right" else 0,
                origin_batch=b,
                mods=tuple(bound.mod.name for bound in mods),
                params=tuple(number for bound in mods for number in bound.params),
                dropout_p=self.dropout,
            )
            aux = tuple(tensor for bound in mods for tensor in bound.aux)
            of_call = {name: part.pop(name) for name in ("mask", "bias", "sinks") if name in part}
            call = Call(spec, aux=aux, seed=x.get("seed"), **of_call)
            wanted.append(attention_testing.expected(**part, call=call))
        return wanted

    def compute(self, x: Tensors) -> Tensors:
        """Forward and every gradient, through the public function."""
        leaves = {name: x[name].detach().requires_grad_() for name in ("q", "k", "v", "bias") if name in x}
        out, lse = fusemesh.flash_attention_varlen(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            x["cu_q"],
            x["cu_k"],
            max(self.lens_q),
            max(self.lens_k),
            causal=self.causal,
            align=self.align,
            window=self.window,
            bias=leaves.get("bias"),
            softcap=self.softcap,
            alibi_slopes=x.get("slopes"),
            dropout_p=self.dropout,
            seed=x.get("seed"),
            return_lse=True,
            backend="triton",
        )
        gradients = torch.autograd.grad(out, list(leaves.values()), x["do"])
        named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {"out": out.detach(), "lse": lse.detach(), **named}

    def stand_in(self, want: Any) -> Tensors:
        """Eager PyTorch's values, for a dry run."""
        packed: Tensors = {}
        for name in ("out", "dq", "dk", "dv"):
            rows = torch.cat([part.eager[name][0].transpose(0, 1) for part in want])
            packed[name] = torch.nn.functional.pad(rows, (0, 0, 0, 0, GAP, GAP))
        lse = torch.cat([part.eager["lse"][0] for part in want], 1)
        packed["lse"] = torch.nn.functional.pad(lse, (GAP, GAP), value=-math.inf)
        if self.bias:
            shape = (len(want), self.heads, max(self.lens_q), max(self.lens_k))
            packed["dbias"] = want[0].eager["dbias"].new_zeros(shape)
            for b, part in enumerate(want):
                packed["dbias"][b, :, : self.lens_q[b], : self.lens_k[b]] = part.eager["dbias"][0]
        return packed

    def check(self, outputs: Tensors, want: Any) -> list[budget.Budget]:
        """What was measured; AssertionError where a sequence is outside the budget, or the padding is not 0."""
        for name in ("out", "dq", "dk", "dv"):
            padding = torch.cat([outputs[name][:GAP], outputs[name][-GAP:]])
            assert not padding.any(), f"{name}: the padding is not 0"
        measured = []
        for b, (part, expected) in enumerate(zip(self._parts(outputs), want, strict=True)):
            # An empty sequence has nothing to measure in its queries or keys.
            present = {name: value for name, value in part.items() if value.numel()}
            try:
                measured += attention_testing.check(present, expected)
            except AssertionError as error:
                raise AssertionError(f"sequence {b}: {error}") from error
        return measured


VARLEN: tuple[Varlen, ...] = (
    Varlen(causal=True, lens_q=(1000, 3, 517), lens_k=(1000, 3, 517), d=128, repeats=gpu_cases.REPEATS),
    *(Varlen(t, causal=c) for t in gpu_cases.DTYPES for c in (False, True)),
    Varlen("fp32", bias=True, softcap=3.0, alibi=True, causal=True, d=80, dv=48),
    Varlen(dropout=0.2, window=(50, 9), align="top_left", heads=8, kv_heads=1),
    Varlen("fp16", alibi=True, dropout=0.1, window=(64, 0), d=256),
    Varlen(bias=True, d=192, dv=128),
)
