"""Layer: application, in Triton's interpreter. The check that proves a kernel on a GPU fails wrong ones only."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bench.gpu import cases as gpu_cases
from bench.gpu import decode as gpu_decode
from bench.gpu import fp8 as gpu_fp8
from bench.gpu import tutorial_attention
from bench.gpu import varlen as gpu_varlen
from fusemesh import peers

pytestmark = pytest.mark.interpreter

CASES = [
    gpu_cases.Attention("fp32", bias="HQK", mask="BHQK", causal=True, dlse=True, storage="padded", repeats=2).tiny(),
    gpu_cases.Attention("bf16", sq=33, sk=17, align="bottom_right", window=(7, 3)).tiny(),
    gpu_cases.Linear("fp32", activation="silu", gated=True, storage="columns", repeats=2).tiny(),
    gpu_cases.Linear("bf16", has_bias=False).tiny(),
    *(dataclasses.replace(gpu_cases.COMBINATIONS[i].tiny(), repeats=0) for i in (0, 3, 4, 8, 9, 11)),
    *(gpu_decode.DECODE[i].tiny() for i in (1, 2, 6)),
    *(gpu_varlen.VARLEN[i].tiny() for i in (2, 7, 8)),
    *(gpu_fp8.FP8_CASES[i].tiny() for i in (1, 2, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_right_kernels_pass(case: gpu_cases.Case) -> None:
    measured = gpu_cases.verify(case, "cpu")
    gradients = {"out", "lse", "dq", "dk", "dv"}
    wanted = {"attention": gradients, "varlen": gradients, "linear": {"y", "dx"}}.get(case.op, {"out", "lse"})
    assert {b.name for b in measured} >= wanted
    assert ("dsinks" in {b.name for b in measured}) == (case.op == "attention" and case.sinks)
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


def test_a_mod_that_is_left_out_and_an_append_that_is_not_made_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_cases.Attention("fp32", mod=True).tiny()
    bound = gpu_cases.Attention._table_mod
    x = case.inputs("cpu", 0)
    monkeypatch.setattr(
        gpu_cases.Attention, "_table_mod", staticmethod(lambda x: dataclasses.replace(bound(x), params=(0.0,)))
    )
    outputs = case.compute(x)
    monkeypatch.setattr(gpu_cases.Attention, "_table_mod", staticmethod(bound))
    with pytest.raises(AssertionError, match="outside the error budget: out"):
        case.check(outputs, case.expected(x))
    decode = gpu_decode.Decode("fp32", lens=(9, 4), added=1, page=4, d=16)
    x = decode.inputs("cpu", 0)
    outputs = decode.compute(x)
    decode.check(outputs, decode.expected(x))
    with pytest.raises(AssertionError, match="k_cache: 64 elements are not what the append should leave"):
        decode.check({**outputs, "k_cache": x["k_cache"]}, decode.expected(x))


@pytest.mark.parametrize("causal", [False, True])
def test_the_tutorial_is_right_and_takes_its_fastest_tile(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = peers.AttentionCase(1, 2, 1, 128, 16, causal, torch.bfloat16)
    too_large = (128, 256, 8, 3)
    monkeypatch.setattr(tutorial_attention, "TILES", (too_large, (128, 32, 4, 3)))
    contender = tutorial_attention.contender(case)
    assert contender is not None and not contender.differentiable
    x = case.inputs("cpu")
    assert all(b.passed for b in case.check(case.outputs(contender, x, "forward"), case.expected(x, "forward")))
    q = x["q"][..., :12]
    with pytest.raises(ValueError, match="expected one shape with D of"):
        tutorial_attention.attention(q, q, q, causal=causal, tile=too_large)
