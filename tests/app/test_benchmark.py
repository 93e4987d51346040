"""Layer: application, no GPU. Benchmarks count FLOPs rightly and refuse wrong results; on_gpu.py works end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_cases
import on_gpu
import pytest
import torch

from fusemesh import benchmark, peers
from fusemesh.kernels.attention.spec import AttentionSpec
from fusemesh.kernels.testing import attention as attention_testing

FP32 = torch.float32
ROOFLINE = benchmark.Roofline("float32", matmul_flops=1e12, copy_bytes=1e10)
QUICK: dict[str, Any] = {"seconds": 0.0, "least": 1, "pause": 0.0}
ATTENTION = peers.AttentionCase(2, 4, 2, 17, 16, True, FP32)
LINEAR = peers.LinearCase(17, 16, 24, "silu", True, FP32)
CASES = [
    pytest.param(case, direction, id=f"{case.op}-{direction}")
    for case in (ATTENTION, LINEAR)
    for direction in peers.DIRECTIONS
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
    full = peers.AttentionCase(2, 16, 16, 1024, 128, False, FP32)
    assert full.flops("forward") == 17_179_869_184
    assert dataclasses.replace(full, causal=True).flops("forward") == 17_179_869_184 / 2
    assert full.flops("backward") == 2.5 * 17_179_869_184
    plain = peers.LinearCase(10, 20, 30, None, False, FP32)
    assert plain.flops("forward") == 2 * 10 * 20 * 30
    assert plain.flops("backward") == 4 * 10 * 20 * 30
    assert dataclasses.replace(plain, gated=True).flops("forward") == 4 * 10 * 20 * 30


def test_bytes_count_each_tensor_once() -> None:
    case = peers.AttentionCase(1, 4, 1, 8, 16, False, torch.bfloat16)
    q, kv = 4 * 8 * 16 * 2, 8 * 16 * 2
    assert case.bytes_moved("forward") == 2 * q + 2 * kv
    assert case.bytes_moved("backward") == 4 * q + 4 * kv
    linear = peers.LinearCase(10, 20, 30, None, False, FP32)
    assert linear.bytes_moved("forward") == 4 * (10 * 20 + 20 * 30 + 10 * 30)


def test_a_time_is_a_median_of_as_many_calls_as_asked_for() -> None:
    assert benchmark.summarise([3.0, 1.0, 2.0, 100.0, 2.5]) == benchmark.Timing(2.5, 1.0, 100.0, 5)
    calls = []
    timing = benchmark.time_call(lambda: calls.append(0), "cpu", seconds=10.0, least=3, most=7, pause=0.0)
    assert timing.runs == 7 and len(calls) == 9 and 0 < timing.low <= timing.median <= timing.high


def test_percent_of_the_roofline() -> None:
    assert ROOFLINE.percent(5e11, 1e9, 1.0) == {"percent_of_matmul_peak": 50.0, "percent_of_copy_bandwidth": 10.0}
    measured = benchmark.measure_roofline("cpu", FP32, size=64)
    assert measured.matmul_flops > 0 and measured.copy_bytes > 0 and measured.dtype == "float32"


@pytest.mark.parametrize(("case", "direction"), CASES)
def test_right_results_are_timed(case: peers.Case, direction: str) -> None:
    rows = peers.compare(case, direction, "cpu", ROOFLINE, **QUICK)
    names = [row["contender"] for row in rows]
    assert {"reference", "torch"} <= set(names) and set(names) & set(peers.PEERS)
    for row in rows:
        assert row["check"] == "ok", row
        assert math.isclose(row["tflops"], case.flops(direction) / row["seconds"] / 1e12)
    assert ("cpu" in names) == (case is ATTENTION and direction == "forward" and _has_engine())


def _has_engine() -> bool:
    from fusemesh.kernels import backends

    return backends.why_unavailable("cpu", "cpu") is None


@pytest.mark.parametrize(("case", "direction"), CASES)
def test_a_wrong_result_gets_no_time(case: peers.Case, direction: str) -> None:
    right = case.ours("reference")
    calls = []

    def slightly_wrong(x: peers.Tensors) -> torch.Tensor:
        calls.append(0)
        return right.forward(x) * (1 + 1e-4)

    rows = peers.compare(
        case, direction, "cpu", ROOFLINE, [peers.Contender("wrong", True, slightly_wrong), right], **QUICK
    )
    assert [row["check"] == "ok" for row in rows] == [False, True]
    assert rows[0]["check"].startswith("WRONG: ") and "allowed" in rows[0]["check"]
    assert "seconds" not in rows[0] and "tflops" not in rows[0]
    assert len(calls) == 1, "a wrong contender was run again to be timed"


def test_a_contender_that_raises_is_named() -> None:
    def broken(x: peers.Tensors) -> torch.Tensor:
        raise RuntimeError("no kernel for this shape")

    rows = peers.compare(LINEAR, "forward", "cpu", ROOFLINE, [peers.Contender("broken", False, broken)], **QUICK)
    assert rows == [
        benchmark.refused(
            "linear", "forward", LINEAR.name, "broken", "did not run: RuntimeError: no kernel for this shape"
        )
    ]


def test_the_right_answer_head_by_head_is_that_of_the_whole() -> None:
    x = ATTENTION.inputs("cpu")
    ((b, h), got), *others = ATTENTION.expected(x, "backward")
    assert (b, h, others) == (1, 1, [])
    spec = AttentionSpec(scale=0.25, window_right=0)
    whole = attention_testing.expected(x["q"], x["k"], x["v"], do=x["do"], spec=spec)
    for field in ("exact", "absolute"):
        for name, value in getattr(got, field).items():
            heads = slice(1, 2) if name in ("dk", "dv") else slice(2, 4)
            torch.testing.assert_close(value, getattr(whole, field)[name][1:2, heads], rtol=1e-12, atol=1e-12)


def test_table_of_ratios() -> None:
    def timed(contender: str, seconds: float) -> dict[str, Any]:
        timing = benchmark.Timing(seconds, seconds, seconds, 5)
        return benchmark.row("linear", "forward", "M1", contender, timing, 1e9, 1e6, ROOFLINE, "ok")

    rows = [timed("triton", 2e-3), timed("F.linear", 3e-3), timed("sdpa", 4e-3)]
    rows.append(benchmark.refused("linear", "forward", "M1", "cpu", "WRONG: y is off"))
    lines = benchmark.ratio_table(rows, peers.PEERS, peers.OURS).splitlines()
    cells = {line.split()[3]: line.split() for line in lines[1:]}
    assert cells["triton"][-4:] == ["2.000", "0.5", "50", "1.50"]
    assert cells["F.linear"][-1] == "1.00" and cells["sdpa"][-1] == "0.75"
    assert lines[1].split()[3:] == ["cpu", "-", "-", "-", "WRONG:", "y", "is", "off"]


def test_machine_record_survives_json(tmp_path: Path) -> None:
    record = benchmark.machine()
    path = benchmark.write_results(tmp_path / "a" / "b.json", {"machine": record})
    assert json.loads(path.read_text())["machine"] == record
    assert record["torch"] == torch.__version__.split("+")[0] or record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads() and record["cpu"] and record["date"]
    assert benchmark.machine_name({"cpu": "AMD EPYC (TM) 7", "cores": 2}) == "AMD-EPYC-TM-7-2-cores"
    assert benchmark.machine_name({"gpu": "NVIDIA H100 80GB HBM3"}) == "NVIDIA-H100-80GB-HBM3"


def _dry_run(stage: str, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    status = on_gpu.main(["--stage", stage, "--dry-run", "--out", str(out), *more])
    return status, json.loads((out / f"{stage}.json").read_text())


def test_dry_run_of_correctness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = _dry_run("correctness", tmp_path)
    assert status == 0, capsys.readouterr().out
    assert payload["dry_run"] and payload["left_out"] == []
    assert len(payload["rows"]) == len(gpu_cases.ATTENTION) + len(gpu_cases.LINEAR)
    assert {row["check"] for row in payload["rows"]} == {"ok"}
    printed = capsys.readouterr().out
    assert "every step ran, no kernel did" in printed and "PROVEN_ON_GPU" not in printed


def test_dry_run_of_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = _dry_run("sweep", tmp_path)
    assert status == 0, capsys.readouterr().out
    assert {(row["op"], row["direction"]) for row in payload["rows"]} == {
        (op, direction) for op in ("attention", "linear") for direction in peers.DIRECTIONS
    }
    assert {row["contender"] for row in payload["rows"]} == {"triton", "sdpa", "F.linear"}
    assert {row["check"] for row in payload["rows"]} == {"ok"}
    assert not any("seconds" in row for row in payload["rows"]), "a dry run has no speeds"


def _twice(values: peers.Tensors) -> peers.Tensors:
    return {name: 2 * value for name, value in values.items()}


def test_a_wrong_result_fails_correctness_after_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = on_gpu._stand_in
    monkeypatch.setattr(on_gpu, "_stand_in", lambda case, want: _twice(right(case, want)))
    monkeypatch.setattr(gpu_cases, "ATTENTION", gpu_cases.ATTENTION[:2])
    monkeypatch.setattr(gpu_cases, "LINEAR", gpu_cases.LINEAR[:2])
    status, payload = _dry_run("correctness", tmp_path)
    assert status == 1
    assert [row["check"][:6] for row in payload["rows"]] == ["WRONG:"] * 4
    printed = capsys.readouterr().out
    assert "4 of FuseMesh's results are wrong or did not run" in printed and "WRONG: " in printed


def test_a_wrong_result_fails_the_sweep_after_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = on_gpu._dry_outputs

    def wrong(compute: Any, known: Any, contender: peers.Contender, inputs: Any, direction: str) -> peers.Tensors:
        outputs = right(compute, known, contender, inputs, direction)
        return _twice(outputs) if contender.name == "triton" else outputs

    monkeypatch.setattr(on_gpu, "_dry_outputs", wrong)
    monkeypatch.setattr(on_gpu, "sweep_cases", lambda cases=on_gpu.sweep_cases(): cases[:2])  # noqa: B008
    status, payload = _dry_run("sweep", tmp_path)
    assert status == 1
    assert {(row["contender"], row["check"][:6]) for row in payload["rows"]} == {
        ("triton", "WRONG:"),
        ("sdpa", "ok"),
        ("F.linear", "ok"),
    }


def test_a_launcher_that_launches_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusemesh.kernels.matmul import triton_matmul

    monkeypatch.setattr(triton_matmul, "launch", lambda *arguments, **options: None)
    monkeypatch.setattr(gpu_cases, "ATTENTION", ())
    status, payload = _dry_run("correctness", tmp_path)
    assert status == 1 and all("recorded []" in row["check"] for row in payload["rows"])


def test_what_there_was_no_time_for_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = _dry_run("correctness", tmp_path, "--minutes", "0")
    assert status == 1 and payload["rows"] == []
    assert len(payload["left_out"]) == len(gpu_cases.ATTENTION) + len(gpu_cases.LINEAR)
    assert "left out: attention bf16" in capsys.readouterr().out


def test_clock_leaves_out_what_may_not_fit() -> None:
    clock = on_gpu.Clock(minutes=1.0)
    assert clock.allows_another()
    clock.took(3.0)
    assert clock.allows_another()
    clock.took(61.0)
    clock.took(1.0)
    assert not clock.allows_another()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_without_a_gpu_the_command_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        on_gpu.main(["--stage", "sweep"])
    assert raised.value.code == 2 and "--dry-run" in capsys.readouterr().err


def test_the_sweep_is_that_of_the_design() -> None:
    cases = [case for case in on_gpu.sweep_cases() if isinstance(case, peers.AttentionCase)]
    assert {case.batch * case.length for case in cases} == {16384}
    assert {case.heads * case.head_dim for case in cases if case.heads == case.kv_heads} == {2048}
    assert {(case.head_dim, case.causal) for case in cases if case.heads == case.kv_heads} == {
        (d, causal) for d in (64, 128, 256) for causal in (False, True)
    }
    assert {(c.heads, c.kv_heads, c.head_dim) for c in cases if c.heads != c.kv_heads} == {(64, 8, 128)}
    assert len(set(cases)) == len(cases) == 48
