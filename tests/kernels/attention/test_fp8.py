"""Layer: kernels, Triton's interpreter and the reference. fp8 (e4m3) attention forward against fp64, with descale."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh import flash_attention
from fusemesh.kernels import backends
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import FP8, AttentionSpec
from fusemesh.kernels.testing.attention import check, expected

B, H, HKV, SQ, SK, D, DV = 2, 4, 2, 33, 40, 48, 32

interpreter = pytest.mark.interpreter


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v in fp8, of a size that uses its range."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, SQ, D), (B, HKV, SK, D), (B, HKV, SK, DV))
    q, k, v = ((4 * torch.randn(shape, generator=generator)).to(FP8) for shape in shapes)
    return q, k, v


def factors(powers_of_two: bool) -> tuple[Any, Any, Any]:
    """A number, one for the tensor, one for each batch and key head."""
    if powers_of_two:
        per_head = torch.tensor([[0.5, 2.0], [0.25, 1.0]])
        return 0.25, torch.tensor([0.5]), per_head
    return 0.3, torch.tensor(0.41), torch.tensor([[0.7, 1.9], [0.33, 1.0]])


def multiplied(x: torch.Tensor, factor: Any) -> torch.Tensor:
    """factor * x in fp32, by hand."""
    factor = factor if isinstance(factor, torch.Tensor) else torch.tensor(factor)
    if factor.numel() > 1:
        factor = factor.repeat_interleave(x.shape[1] // HKV, 1)[..., None, None]
    return x.float() * factor


FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({"causal": True, "align": "bottom_right"}, {"window_right": 0, "origin_q": SK - SQ}),
    "softcap": ({"softcap": 5.0}, {"mods": ("softcap",), "params": (5.0,)}),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "reference"])
def test_within_the_budget_of_bf16(backend: str, feature: str) -> None:
    """With factors that are powers of two bf16 holds the inputs exactly, so its budget is the one to keep."""
    (q, k, v), descale = inputs(), factors(True)
    options, spec = FEATURES[feature]
    bias = torch.randn(1, H, 1, SK).bfloat16()
    sinks = torch.randn(H)
    before = backends.call_counts().get(("attention_forward", backend), 0)
    out, lse = flash_attention(
        q, k, v, descale=descale, bias=bias, sinks=sinks, return_lse=True, backend=backend, **options
    )
    assert backends.call_counts()[("attention_forward", backend)] == before + 1
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and out.shape == (B, H, SQ, DV)
    wide = [multiplied(x, f).bfloat16() for x, f in zip((q, k, v), descale, strict=True)]
    want = expected(*wide, Call(AttentionSpec(D**-0.5, **spec), bias=bias, sinks=sinks))
    check({"out": out, "lse": lse}, want)


@interpreter
def test_any_factors_on_triton_and_reference_agree() -> None:
    (q, k, v), descale = inputs(), factors(False)
    fused, fused_lse = flash_attention(q, k, v, descale=descale, return_lse=True, backend="triton")
    plain, lse = flash_attention(q, k, v, descale=descale, return_lse=True, backend="reference")
    torch.testing.assert_close(fused_lse, lse, rtol=2e-6, atol=2e-5)
    # Half a unit in bf16's last place for each of the two roundings, and one for the probabilities'.
    torch.testing.assert_close(fused.float(), plain.float(), rtol=2**-7, atol=2**-8 * plain.abs().max().item())


def test_the_reference_multiplies() -> None:
    (q, k, v), descale = inputs(), factors(False)
    wide = [multiplied(x, f) for x, f in zip((q, k, v), descale, strict=True)]
    out = flash_attention(q, k, v, descale=descale, backend="reference")
    assert torch.equal(out, flash_attention(*wide, backend="reference").bfloat16())
    assert torch.equal(
        flash_attention(q, k, v, backend="reference"),
        flash_attention(q, k, v, descale=(1, None, 1.0), backend="reference"),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"descale": 1.0}, r"descale: expected \(q's, k's, v's\), .* received 1\.0"),
        ({"descale": (1.0, 1.0)}, r"descale: expected \(q's, k's, v's\), .* received \(1\.0, 1\.0\)"),
        ({"descale": (1.0, "2", 1.0)}, r"descale: expected .* received '2'"),
        ({"descale": (1.0, torch.ones(B, H), 1.0)}, r"descale: expected .*\[B, Hkv\] = \[2, 2\].* shape \(2, 4\)"),
        ({"descale": (1.0, torch.ones(1).double(), 1.0)}, r"descale: expected .*torch.float64"),
        ({"backend": "torch"}, r"backend: .*does not express fp8"),
        ({"bias": torch.zeros(SK).half()}, r"bias: expected a tensor of q's dtype torch.bfloat16 or torch.float32"),
    ],
    ids=str,
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(*inputs(), **changed)


def test_only_fp8_is_descaled_and_only_forward() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"descale: expected None beside q of torch\.bfloat16"):
        flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), descale=(1.0, 1.0, 1.0))
    out, lse = fusemesh.attention_forward(q, k, v, backend="reference")
    with pytest.raises(ValueError, match=r"q: expected a dtype with gradients, received torch\.float8_e4m3fn"):
        fusemesh.attention_backward(out, q, k, v, out, lse, backend="reference")


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_compiled_ahead_of_time(target: str) -> None:
    """fp8 goes to the matrix units as it is."""
    from fusemesh.kernels import aot
    from fusemesh.kernels.runtime.launch import any_device

    def run() -> None:
        q, k, v = (torch.empty(2, 4, 512, 64, dtype=FP8) for _ in range(3))
        with any_device():
            flash_attention(q, k, v, causal=True, backend="triton")

    (report,) = aot.compile_launches(run, target)
    assert report.fits and not report.atomics and report.tensor_core and report.loop_spills == 0
    with pytest.raises(ValueError, match=r"q: .*float8_e4m3fn, which needs a GPU from sm_89 for backend='triton'"):
        aot.compile_launches(run, "sm_80")
    assert os.environ.get("TRITON_INTERPRET") != "1"
