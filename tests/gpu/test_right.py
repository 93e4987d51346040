"""Layer: kernels on a real GPU. The tables of bench/gpu: forward, gradients, equal bits on every repeat."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import tables
from bench.gpu.verification import verify
from fusemesh.kernels.measure.cases import Case

pytestmark = pytest.mark.gpu

CASES: tuple[Case, ...] = (*tables.ATTENTION, *tables.LINEAR, *tables.DECODE, *tables.PACKED, *tables.LOSS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_right(case: Case) -> None:
    verify(case, "cuda", repeats=tables.REPEATS if case in tables.REPEATED else 0)


@pytest.mark.parametrize("case", tables.FP8, ids=str)
def test_fp8(case: Case) -> None:
    if not tables.fp8_cases(torch.device("cuda"), is_dry=False):
        pytest.skip("this GPU has no fp8")
    verify(case, "cuda", repeats=tables.REPEATS if case in tables.REPEATED else 0)
