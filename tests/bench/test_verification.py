"""Layer: application, in Triton's interpreter. The check that proves a kernel on a GPU fails wrong ones only."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bench.gpu import tables
from bench.gpu.dry_run import tiny
from bench.gpu.verification import verify
from bench.peers import tutorial_attention
from fusemesh.kernels.measure import contest
from fusemesh.kernels.measure.cases import Case, DecodeCase, common, self_attention
from fusemesh.kernels.measure.cases.common import Tensors

pytestmark = pytest.mark.interpreter

CASES = [
    tiny(tables.attention("fp32", bias="hmn", mask="bhmn", causal=True, dlse=True, layout="padded")),
    tiny(tables.attention(Sq=33, Sk=17, align="bottom_right", window=(7, 3))),
    tiny(tables.linear("fp32", activation="silu", gated=True, columns=True)),
    tiny(tables.linear(has_bias=False)),
    *(tiny(tables.COMBINATIONS[i]) for i in (0, 3, 4, 8, 9, 11)),
    *(tiny(tables.DECODE[i]) for i in (0, 1, 2, 6)),
    *(tiny(tables.PACKED[i]) for i in (2, 7, 8)),
    *(tiny(tables.FP8[i]) for i in (1, 2, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_right_kernels_pass(case: Case) -> None:
    measured = verify(case, "cpu", repeats=2 if case in (CASES[0], CASES[2], CASES[10]) else 0)
    gradients = {"out", "lse", "dq", "dk", "dv"}
    wanted = {"attention": gradients, "varlen": gradients, "linear": {"y", "dx"}}.get(case.op, {"out", "lse"})
    if case.dtype == "fp8":
        wanted = {"out", "lse"}
    assert {b.name for b in measured} >= wanted
    assert ("dsinks" in {b.name for b in measured}) == (case.op == "attention" and case.sinks and case.dtype != "fp8")
    assert all(b.passed for b in measured)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=lambda case: case.op)
def test_a_wrong_value_a_forgotten_one_and_moving_bits_fail(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = type(case).compute
    calls = 0

    def changed(change: Any) -> Any:
        def run(self: Any, x: Any, backend: str) -> Tensors:
            nonlocal calls
            calls += 1
            outputs = compute(self, x, backend)
            name = "dv" if case.op == "attention" else "dw"
            outputs[name] = change(outputs[name])
            return outputs

        return run

    monkeypatch.setattr(type(case), "compute", changed(lambda x: x * 1.05))
    with pytest.raises(AssertionError, match=r"outside the error budget: d[vw]"):
        verify(case, "cpu")
    monkeypatch.setattr(type(case), "compute", changed(lambda x: x.index_fill(0, torch.tensor(0), float("nan"))))
    with pytest.raises(AssertionError, match="are NaN"):
        verify(case, "cpu")
    monkeypatch.setattr(type(case), "compute", changed(lambda x: torch.nextafter(x, x + 1) if calls % 2 else x))
    with pytest.raises(AssertionError, match=r"repeat 1 differs in the bits of d[vw]"):
        calls = 0
        verify(case, "cpu", repeats=2)


def test_a_call_that_another_backend_answers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[3]
    monkeypatch.setattr(type(case), "compute", lambda self, x, backend: {"y": x["dy"]})
    with pytest.raises(AssertionError, match="expected 1 call of the triton backend, counted 0"):
        verify(case, "cpu")


def test_a_mod_that_is_left_out_and_an_append_that_is_not_made_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    case: Any = tiny(tables.attention("fp32", mod=True))
    bound = common.table_mod
    x = case.inputs()
    monkeypatch.setattr(common, "table_mod", lambda table: dataclasses.replace(bound(table), params=(0.0,)))
    outputs = case.compute(x, "triton")
    monkeypatch.setattr(common, "table_mod", bound)
    with pytest.raises(AssertionError, match="outside the error budget: out"):
        case.check(outputs, case.expected(x))
    decode = DecodeCase(H=8, Hkv=2, lens=(9, 4), added=1, page=4, capacity=12)
    x = decode.inputs()
    outputs = decode.compute(x, "triton")
    decode.check(outputs, decode.expected(x))
    with pytest.raises(AssertionError, match="k_cache: 64 elements are not what the append should leave"):
        decode.check({**outputs, "k_cache": x["k_cache"]}, decode.expected(x))


@pytest.mark.parametrize("causal", [False, True])
def test_the_tutorial_is_right_and_takes_its_fastest_tile(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = self_attention("bf16", 1, 2, 1, 128, 16, causal)
    too_large = (128, 256, 8, 3)
    monkeypatch.setattr(tutorial_attention, "TILES", (too_large, (128, 32, 4, 3)))
    contender = tutorial_attention.contender(case)
    assert contender is not None and not contender.differentiable
    x = case.inputs()
    outputs = contest.outputs(case, contender, x, "forward")
    assert all(b.passed for b in case.check(outputs, case.expected(x, "forward")))
    q = x["q"][..., :12]
    with pytest.raises(ValueError, match="expected one shape with D of"):
        tutorial_attention.attention(q, q, q, causal=causal, tile=too_large)
