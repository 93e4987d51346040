"""Layer: application, in Triton's interpreter. The check that proves a kernel on a GPU fails wrong ones only."""

from __future__ import annotations

import dataclasses
from typing import Any

import gpu_cases
import pytest
import torch

pytestmark = pytest.mark.interpreter

CASES = [
    gpu_cases.Attention("fp32", bias="HQK", mask="BHQK", causal=True, dlse=True, storage="padded", repeats=2).tiny(),
    gpu_cases.Attention("bf16", sq=33, sk=17, align="bottom_right", window=(7, 3)).tiny(),
    gpu_cases.Linear("fp32", activation="silu", gated=True, storage="columns", repeats=2).tiny(),
    gpu_cases.Linear("bf16", has_bias=False).tiny(),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_right_kernels_pass(case: gpu_cases.Case) -> None:
    measured = gpu_cases.verify(case, "cpu")
    assert {b.name for b in measured} >= ({"out", "lse", "dq", "dk", "dv"} if case.op == "attention" else {"y", "dx"})
    assert all(b.passed for b in measured)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=lambda case: case.op)
def test_a_wrong_value_a_forgotten_one_and_moving_bits_fail(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = type(case).compute
    calls = 0

    def changed(change: Any) -> Any:
        def run(self: Any, x: gpu_cases.Tensors) -> gpu_cases.Tensors:
            nonlocal calls
            calls += 1
            outputs = compute(self, x)
            name = "dv" if case.op == "attention" else "dw"
            outputs[name] = change(outputs[name])
            return outputs

        return run

    monkeypatch.setattr(type(case), "compute", changed(lambda x: x * 1.05))
    with pytest.raises(AssertionError, match=r"outside the error budget: d[vw]"):
        gpu_cases.verify(case, "cpu")
    monkeypatch.setattr(type(case), "compute", changed(lambda x: x.index_fill(0, torch.tensor(0), float("nan"))))
    with pytest.raises(AssertionError, match="are NaN"):
        gpu_cases.verify(case, "cpu")
    monkeypatch.setattr(type(case), "compute", changed(lambda x: torch.nextafter(x, x + 1) if calls % 2 else x))
    with pytest.raises(AssertionError, match=r"repeat 1 differs in the bits of d[vw]"):
        calls = 0
        gpu_cases.verify(dataclasses.replace(case, repeats=2), "cpu")


def test_a_call_that_another_backend_answers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[3]
    monkeypatch.setattr(type(case), "compute", lambda self, x: {"y": x["dy"]})
    with pytest.raises(AssertionError, match="expected 1 call of the triton backend, counted 0"):
        gpu_cases.verify(case, "cpu")
