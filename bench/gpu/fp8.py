"""Attention of fp8 (e4m3) on a GPU: cases like those of gpu_cases.py, which verifies them. Forward only.

The factors are powers of two, so that bf16 holds the inputs exactly, and its budget is the one to keep.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

import fusemesh
from bench.gpu import cases as gpu_cases
from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import FP8, AttentionSpec
from fusemesh.kernels.runtime.launch import target_of
from fusemesh.kernels.testing import attention as attention_testing
from fusemesh.kernels.testing import budget

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fp8:
    """One call, aligned to the last key. ``per_head``: a factor for each batch and key head, else for each tensor."""

    dtype: str = "fp8"
    sq: int = 203
    sk: int = 203
    d: int = 128
    dv: int | None = None
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    bias: bool = False
    softcap: float | None = None
    sinks: bool = False
    per_head: bool = False
    repeats: int = 0
    op = "fp8"
    counted = ("attention_forward",)

    @property
    def name(self) -> str:
        """Every field that is not the default."""
        return gpu_cases.differences(self)

    def tiny(self) -> Fp8:
        """The same features on a shape small enough for any machine."""
        return dataclasses.replace(self, sq=min(self.sq, 19), sk=min(self.sk, 23 if self.sk != self.sq else 19))

    def inputs(self, device: torch.device | str, seed: int) -> Tensors:
        """q, k, v in fp8, of a size that uses its range; factors; and bias and sinks where the case has them."""
        generator = torch.Generator(device).manual_seed(seed)

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        kv = (self.batch, self.kv_heads, self.sk)
        shapes = {"q": (self.batch, self.heads, self.sq, self.d), "k": (*kv, self.d)}
        shapes["v"] = (*kv, self.d if self.dv is None else self.dv)
        x = {name: (4 * new(*shape)).to(FP8) for name, shape in shapes.items()}
        for name, power in (("q", -2), ("k", -1), ("v", 1)):
            size = (self.batch, self.kv_heads) if self.per_head else (1,)
            powers = torch.randint(-1, 2, size, generator=generator, device=device)
            x[f"descale_{name}"] = torch.exp2((powers + power).float())
        if self.bias:
            x["bias"] = new(1, self.heads, 1, self.sk).bfloat16()
        if self.sinks:
            x["sinks"] = new(self.heads).bfloat16()
        return x

    def expected(self, x: Tensors) -> attention_testing.Expected:
        """The fp64 reference, and eager PyTorch's error in bf16."""
        left, right = self.window or (None, None)
        mods = [] if self.softcap is None else [score_mods.softcap(self.softcap)]
        spec = AttentionSpec(
            self.d**-0.5,
            left,
            0 if self.causal else right,
            self.sk - self.sq if self.causal or self.window else 0,
            mods=tuple(bound.mod.name for bound in mods),
            params=tuple(number for bound in mods for number in bound.params),
        )
        wide = [self._multiplied(x, name).bfloat16() for name in "qkv"]
        return attention_testing.expected(*wide, Call(spec, bias=x.get("bias"), sinks=x.get("sinks")))

    def _multiplied(self, x: Tensors, name: str) -> torch.Tensor:
        factor = x[f"descale_{name}"]
        if self.per_head:
            factor = factor.repeat_interleave(x[name].shape[1] // self.kv_heads, 1)
        return x[name].float() * factor.reshape(*factor.shape, *[1] * (4 - factor.dim()))

    def compute(self, x: Tensors) -> Tensors:
        """out and lse, through the public function."""
        out, lse = fusemesh.flash_attention(
            x["q"],
            x["k"],
            x["v"],
            causal=self.causal,
            window=self.window,
            align="bottom_right" if self.causal or self.window else None,
            bias=x.get("bias"),
            softcap=self.softcap,
            sinks=x.get("sinks"),
            descale=tuple(x[f"descale_{name}"] for name in "qkv"),
            return_lse=True,
            backend="triton",
        )
        return {"out": out, "lse": lse}

    def stand_in(self, want: Any) -> Tensors:
        """Eager PyTorch's values, for a dry run."""
        return dict(want.eager)

    def check(self, outputs: Tensors, want: Any) -> list[budget.Budget]:
        """What was measured; AssertionError where ``outputs`` is outside the budget."""
        return attention_testing.check(outputs, want)


FP8_CASES: tuple[Fp8, ...] = (
    Fp8(sq=1024, sk=1024, causal=True, repeats=gpu_cases.REPEATS),
    Fp8(per_head=True, d=64, heads=8, sq=113, causal=True),
    Fp8(bias=True, softcap=20.0, sinks=True, per_head=True),
    Fp8(d=256, window=(64, 0), sq=301, sk=301),
    Fp8(d=80, dv=48, sq=65, sk=257),
    Fp8(d=192, dv=128, causal=True, kv_heads=4, sinks=True),
    Fp8(sq=1, sk=203, d=16, per_head=True),
    Fp8(sq=4096, sk=4096, batch=1, causal=True),
)


def cases(device: torch.device, is_dry: bool) -> tuple[Fp8, ...]:
    """The cases, or none on a GPU that has no fp8."""
    if not is_dry:
        from fusemesh.kernels.attention.gpu.inputs import has_fp8

        if not has_fp8(target_of(device)):
            return ()
    return FP8_CASES
