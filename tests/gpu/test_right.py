"""Layer: kernels on a real GPU. The cases of bench/gpu_*.py: forward, gradients, equal bits on every repeat."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import cases as gpu_cases
from bench.gpu import decode as gpu_decode
from bench.gpu import fp8 as gpu_fp8
from bench.gpu import varlen as gpu_varlen

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", gpu_cases.ATTENTION, ids=lambda case: case.name)
def test_attention(case: gpu_cases.Attention) -> None:
    gpu_cases.verify(case, "cuda")


@pytest.mark.parametrize("case", gpu_cases.LINEAR, ids=lambda case: case.name)
def test_linear(case: gpu_cases.Linear) -> None:
    gpu_cases.verify(case, "cuda")


@pytest.mark.parametrize("case", gpu_decode.DECODE, ids=lambda case: case.name)
def test_decode(case: gpu_decode.Decode) -> None:
    gpu_cases.verify(case, "cuda")


@pytest.mark.parametrize("case", gpu_varlen.VARLEN, ids=lambda case: case.name)
def test_varlen(case: gpu_varlen.Varlen) -> None:
    gpu_cases.verify(case, "cuda")


@pytest.mark.parametrize("case", gpu_fp8.FP8_CASES, ids=lambda case: case.name)
def test_fp8(case: gpu_fp8.Fp8) -> None:
    if not gpu_fp8.cases(torch.device("cuda"), is_dry=False):
        pytest.skip("this GPU has no fp8")
    gpu_cases.verify(case, "cuda")
