"""Layer: kernels, no GPU. Benchmarks count FLOPs rightly and refuse wrong results."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.peers import torch_ops
from fusemesh.kernels import measure
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.measure import contest
from fusemesh.kernels.measure.cases import AttentionCase, LinearCase, self_attention
from fusemesh.kernels.measure.cases.common import DIRECTIONS, Tensors
from fusemesh.kernels.testing import attention as attention_testing

ROOFLINE = measure.Roofline("float32", matmul_flops=1e12, copy_bytes=1e10)
QUICK: dict[str, Any] = {"seconds": 0.0, "least": 1, "pause": 0.0}
ATTENTION = self_attention("fp32", 2, 4, 2, 17, 16, causal=True)
LINEAR = LinearCase("fp32", 17, 16, 24, "silu", gated=True)
CASES = [
    pytest.param(case, direction, id=f"{case.op}-{direction}")
    for case in (ATTENTION, LINEAR)
    for direction in DIRECTIONS
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On such small tensors threads only wait for each other, the longer the more tests run beside this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_flops_follow_the_convention() -> None:
    # 4 B H S^2 D = 4 * 2 * 16 * 1024^2 * 128
    full = self_attention("fp32", 2, 16, 16, 1024, 128, causal=False)
    assert full.flops("forward") == 17_179_869_184
    assert dataclasses.replace(full, causal=True).flops("forward") == 17_179_869_184 / 2
    assert full.flops("backward") == 2.5 * 17_179_869_184
    plain = LinearCase("fp32", 10, 20, 30)
    assert plain.flops("forward") == 2 * 10 * 20 * 30
    assert plain.flops("backward") == 4 * 10 * 20 * 30
    assert dataclasses.replace(plain, gated=True).flops("forward") == 4 * 10 * 20 * 30


def test_bytes_count_each_tensor_once() -> None:
    case = self_attention("bf16", 1, 4, 1, 8, 16, causal=False)
    q, kv = 4 * 8 * 16 * 2, 8 * 16 * 2
    assert case.bytes_moved("forward") == 2 * q + 2 * kv
    assert case.bytes_moved("backward") == 4 * q + 4 * kv
    linear = LinearCase("fp32", 10, 20, 30)
    assert linear.bytes_moved("forward") == 4 * (10 * 20 + 20 * 30 + 10 * 30)


def test_a_time_is_a_median_of_as_many_calls_as_asked_for() -> None:
    assert measure.summarise([3.0, 1.0, 2.0, 100.0, 2.5]) == measure.Timing(2.5, 1.0, 100.0, 5)
    calls = []
    timing = measure.time_call(lambda: calls.append(0), "cpu", seconds=10.0, least=3, most=7, pause=0.0)
    assert timing.runs == 7 and len(calls) == 9 and 0 < timing.low <= timing.median <= timing.high


def test_percent_of_the_roofline() -> None:
    assert ROOFLINE.percent(5e11, 1e9, 1.0) == {"percent_of_matmul_peak": 50.0, "percent_of_copy_bandwidth": 10.0}
    measured = measure.measure_roofline("cpu", torch.float32, size=64)
    assert measured.matmul_flops > 0 and measured.copy_bytes > 0 and measured.dtype == "float32"


@pytest.mark.parametrize(("case", "direction"), CASES)
def test_right_results_are_timed(case: AttentionCase | LinearCase, direction: str) -> None:
    rows = contest.compare(case, direction, "cpu", ROOFLINE, torch_ops.contenders(case, "cpu"), **QUICK)
    names = [row["contender"] for row in rows]
    assert {"reference", "torch"} <= set(names) and set(names) & set(torch_ops.NAMES)
    for row in rows:
        assert row["check"] == "ok", row
        assert math.isclose(row["tflops"], case.flops(direction) / row["seconds"] / 1e12)
    assert ("cpu" in names) == (case is ATTENTION and direction == "forward" and _has_engine())


def _has_engine() -> bool:
    from fusemesh.kernels import backends

    return backends.why_unavailable("cpu", "cpu") is None


@pytest.mark.parametrize(("case", "direction"), CASES)
def test_a_wrong_result_gets_no_time(case: AttentionCase | LinearCase, direction: str) -> None:
    right = contest.our_backend(case, "reference")
    calls = []

    def slightly_wrong(x: Tensors) -> torch.Tensor:
        calls.append(0)
        return right.forward(x) * (1 + 1e-4)

    rows = contest.compare(
        case, direction, "cpu", ROOFLINE, [contest.Contender("wrong", True, slightly_wrong), right], **QUICK
    )
    assert [row["check"] == "ok" for row in rows] == [False, True]
    assert rows[0]["check"].startswith("WRONG: ") and "allowed" in rows[0]["check"]
    assert "seconds" not in rows[0] and "tflops" not in rows[0]
    assert len(calls) == 1, "a wrong contender was run again to be timed"


def test_a_contender_that_raises_is_named() -> None:
    def broken(x: Tensors) -> torch.Tensor:
        raise RuntimeError("no kernel for this shape")

    rows = contest.compare(LINEAR, "forward", "cpu", ROOFLINE, [contest.Contender("broken", False, broken)], **QUICK)
    assert rows == [
        measure.refused(
            "linear", "forward", LINEAR.name, "broken", "did not run: RuntimeError: no kernel for this shape"
        )
    ]


def test_the_right_answer_head_by_head_is_that_of_the_whole() -> None:
    x = ATTENTION.inputs("cpu")
    part, *others = ATTENTION.expected_at_ends(x, "backward")
    assert (part.batch, part.heads, part.kv_heads, others) == (slice(1, 2), slice(2, 4), slice(1, 2), [])
    spec = AttentionSpec(scale=0.25, window_right=0)
    whole = attention_testing.expected(x["q"], x["k"], x["v"], Call(spec), do=x["do"])
    for field in ("exact", "absolute"):
        for name, value in getattr(part.want, field).items():
            heads = slice(1, 2) if name in ("dk", "dv") else slice(2, 4)
            torch.testing.assert_close(value, getattr(whole, field)[name][1:2, heads], rtol=1e-12, atol=1e-12)


def test_table_of_ratios() -> None:
    def timed(contender: str, seconds: float) -> dict[str, Any]:
        timing = measure.Timing(seconds, seconds, seconds, 5)
        return measure.row("linear", "forward", "M1", contender, timing, 1e9, 1e6, ROOFLINE, "ok")

    rows = [timed("triton", 2e-3), timed("F.linear", 3e-3), timed("sdpa", 4e-3)]
    rows.append(measure.refused("linear", "forward", "M1", "cpu", "WRONG: y is off"))
    lines = measure.ratio_table(rows, torch_ops.NAMES, contest.OURS).splitlines()
    cells = {line.split()[3]: line.split() for line in lines[1:]}
    assert cells["triton"][-4:] == ["2.000", "0.5", "50", "1.50"]
    assert cells["F.linear"][-1] == "1.00" and cells["sdpa"][-1] == "0.75"
    assert lines[1].split()[3:] == ["cpu", "-", "-", "-", "WRONG:", "y", "is", "off"]


def test_machine_record_survives_json(tmp_path: Path) -> None:
    record = measure.machine()
    path = measure.write_results(tmp_path / "a" / "b.json", {"machine": record})
    assert json.loads(path.read_text())["machine"] == record
    assert record["torch"] == torch.__version__.split("+")[0] or record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads() and record["cpu"] and record["date"]
    assert measure.machine_name({"cpu": "AMD EPYC (TM) 7", "cores": 2}) == "AMD-EPYC-TM-7-2-cores"
    assert measure.machine_name({"gpu": "NVIDIA H100 80GB HBM3"}) == "NVIDIA-H100-80GB-HBM3"


def test_clock_leaves_out_what_may_not_fit() -> None:
    clock = measure.Clock(minutes=1.0)
    assert clock.allows_another() and 59 < clock.left <= 60
    clock.took(3.0)
    assert clock.allows_another()
    clock.took(61.0)
    clock.took(1.0)
    assert not clock.allows_another()
    assert measure.Clock(minutes=0.0).left == 0.0


def test_flash_attn_is_a_peer_where_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    known = contest.Contender("sdpa", False, torch_ops._sdpa(ATTENTION, None))
    calls = []

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        calls.append(q.shape)
        x = {name: value.transpose(1, 2) for name, value in (("q", q), ("k", k), ("v", v))}
        return known.forward(x).transpose(1, 2)

    def names() -> set[str]:
        return {contender.name for contender in torch_ops.peers(ATTENTION, "cuda")}

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "flash-attn" not in names()
    module = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert "flash-attn" in names() and "flash-attn" in torch_ops.NAMES
    contender = next(c for c in torch_ops.peers(ATTENTION, "cuda") if c.name == "flash-attn")
    rows = contest.compare(ATTENTION, "forward", "cpu", ROOFLINE, [contender], **QUICK)
    assert rows[0]["check"] == "ok" and set(calls) == {(2, 17, 4, 16)}
