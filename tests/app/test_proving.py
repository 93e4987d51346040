"""fusemesh doctor --prove, and bench --compare, on a device that stands for a GPU. Layer: application, one process.

The device runs launches in Triton's interpreter; once, it is the emulator.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh import cli
from fusemesh.commands import bench
from fusemesh.kernels import env
from fusemesh.kernels.measure import comparison, standard
from fusemesh.kernels.measure.cases import AttentionCase, Case, DecodeCase, LinearCase, PackedCase, VocabLossCase
from fusemesh.kernels.proof import first_use, preferences, store
from fusemesh.kernels.proof.store import Store, Verdict
from fusemesh.kernels.runtime import launch
from tests.support.interpreted_device import InterpretedDevice

SMALL: list[Case] = [
    AttentionCase("fp32", B=1, H=2, Hkv=1, Sq=17, Sk=17, causal=True),
    DecodeCase("bf16", capacity=33, lens=(33, 5)),
    LinearCase("fp16", 17, 16, 24, "gelu"),
]


def wrong(named: dict[str, Any]) -> None:
    named["p_dx"].add_(1.0)


def faulty(named: dict[str, Any]) -> None:
    raise RuntimeError("an illegal memory access was encountered")


@pytest.fixture(autouse=True)
def small_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(standard, "cases", lambda: SMALL)
    monkeypatch.setattr(store, "_default", Store(tmp_path / "proofs"))
    first_use.forget()
    yield
    first_use.forget()


def proven(capfd: pytest.CaptureFixture[str], executor: launch.Executor) -> tuple[int, dict[str, Any]]:
    capfd.readouterr()
    with launch.execute_on(executor):
        status = cli.main(["doctor", "--prove", "--json"])
    return status, json.loads(capfd.readouterr().out)


@pytest.mark.interpreter
def test_a_right_device(capfd: pytest.CaptureFixture[str]) -> None:
    status, findings = proven(capfd, InterpretedDevice("a stand-in"))
    assert status == 0 and findings["failed"] == 0
    assert findings["devices"] == [{"device": "cpu", "name": "a stand-in"}]
    for row, case in zip(findings["rows"], SMALL, strict=True):
        assert (row["operation"], row["case"], row["verdict"], row["why"]) == (case.op, case.name, "right", "")
        assert 0 < row["share"] <= 1 and row["ms"] > 0
    assert len(store.default().all()) >= 6
    assert cli.main(["doctor"]) == 0
    assert f"proofs          {len(store.default().all())} kernels right on a stand-in" in capfd.readouterr().out


@pytest.mark.interpreter
def test_kept_verdicts_are_not_believed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was wrong once is proven anew, and used again where it is right."""
    monkeypatch.setattr(standard, "cases", lambda: SMALL[2:])
    assert proven(capfd, InterpretedDevice("a stand-in"))[0] == 0
    kept = store.default()
    for key, verdict in kept.all().items():
        kept.write(key, dataclasses.replace(verdict, passed=False, reason="once"))
    first_use.forget()
    assert proven(capfd, InterpretedDevice("a stand-in"))[0] == 0
    assert all(verdict.passed for verdict in kept.all().values())


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:.*wrong results on")
def test_the_table(capfd: pytest.CaptureFixture[str]) -> None:
    with launch.execute_on(InterpretedDevice("a stand-in", {"linear_dgrad_kernel": wrong})):
        assert cli.main(["doctor", "--prove"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "cpu  a stand-in"
    assert lines[1].split() == ["operation", "case", "verdict", "share", "of", "budget", "ms"]
    rows = [line.split() for line in lines if line.startswith(("attention", "decode", "linear"))]
    assert [row[0] for row in rows] == ["attention", "decode", "linear"]
    assert ["right" in row for row in rows] == [True, True, False] and "wrong" in rows[2]
    assert lines[-1].startswith("1 of 3 cases failed; auto takes other backends for their kernels")


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:.*wrong results on")
@pytest.mark.parametrize(
    ("spoil", "verdict", "why"),
    [
        ({"linear_dgrad_kernel": wrong}, "wrong", "linear_dgrad_kernel: dx"),
        ({"linear_wgrad_kernel": faulty}, "did not run", "illegal memory access"),
    ],
    ids=["wrong", "does not run"],
)
def test_a_wrong_kernel_fails_its_cases_alone(
    capfd: pytest.CaptureFixture[str], spoil: dict[str, Any], verdict: str, why: str
) -> None:
    status, findings = proven(capfd, InterpretedDevice("a stand-in", spoil))
    assert status == 1 and findings["failed"] == 1
    *others, linear = findings["rows"]
    assert linear["verdict"] == verdict and why in linear["why"] and linear["share"] is None
    assert [row["verdict"] for row in others] == ["right", "right"]


@pytest.mark.interpreter
def test_a_wrong_result_of_proven_kernels_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: LinearCase, outputs: Any, want: Any) -> Any:
        raise AssertionError("outside the error budget: dx")

    monkeypatch.setattr(LinearCase, "check", check)
    with launch.execute_on(InterpretedDevice("a stand-in")):
        (row,) = standard.prove(torch.device("cpu"), SMALL[2:])
    assert (row["verdict"], row["why"], row["share"]) == ("wrong", "outside the error budget: dx", None)


@pytest.mark.aot
def test_on_the_emulator(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that Triton compiles, proven and checked."""
    case = LinearCase("fp16", 17, 16, 24, "gelu")
    monkeypatch.setattr(standard, "cases", lambda: [case])
    with fusemesh.emulate("sm_90", prove=True):
        assert cli.main(["doctor", "--prove", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["rows"]
    assert (row["device"], row["name"], row["case"], row["verdict"]) == ("cpu", "emulated sm_90", case.name, "right")
    kernels = {verdict.details["kernel"] for verdict in store.default().all().values() if verdict.passed}
    assert kernels == {"linear_forward_kernel", "linear_dgrad_kernel", "linear_wgrad_kernel"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is to be done without a GPU")
def test_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--prove"]) == 3
    (line,) = capfd.readouterr().out.splitlines()
    for word in ("no GPU that this torch can use", "TRITON_INTERPRET=1", "fusemesh.emulate", "docs/interpreter.md"):
        assert word in line
    assert cli.main(["doctor", "--prove", "--json"]) == 3
    assert json.loads(capfd.readouterr().out) == {"devices": [], "rows": [], "why_not": line}


def test_either_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--prove", "--trace", "script.py"]) == 2
    assert "--prove: expected it without --trace" in capfd.readouterr().err


def test_doctor_shows_what_is_kept(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def told() -> str:
        assert cli.main(["doctor"]) == 0
        return capfd.readouterr().out

    folder = tmp_path / "proofs"
    assert f"proofs          no kernel proven yet, in {folder}" in told()
    for number in range(3):
        Store(folder).write(f"key {number}", Verdict(True, "", {"device": "NVIDIA X"}))
    Store(folder).write("key 4", Verdict(False, "out: max error 3", {"device": "NVIDIA X", "kernel": "attention_dq"}))
    (folder / "broken.json").touch()
    assert f"proofs          3 kernels right on NVIDIA X, in {folder}" in (out := told())
    assert "  WRONG         attention_dq on NVIDIA X: out: max error 3" in out
    assert cli.main(["doctor", "--json"]) == 0
    proofs = json.loads(capfd.readouterr().out)["proofs"]
    assert proofs["right"] == {"NVIDIA X": 3} and [item["key"] for item in proofs["wrong"]] == ["key 4"]


def test_the_standard_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the set is for is in it, and each of its cases reaches kernels, forward and backward."""
    monkeypatch.undo()
    cases = standard.cases()
    assert len(cases) < 100
    for dtype in ("bf16", "fp16", "fp32"):
        for d in (64, 128):
            others = (LinearCase, VocabLossCase)
            of = [x for x in cases if not isinstance(x, others) and (x.dtype, x.D, x.Dv) == (dtype, d, d)]
            dense = [x for x in of if isinstance(x, AttentionCase)]
            for feature in (
                lambda x: not x.causal,
                lambda x: x.causal,
                lambda x: x.Hkv < x.H,
                lambda x: x.window,
                lambda x: x.mask,
                lambda x: x.bias,
                lambda x: x.dropout,
            ):
                assert any(map(feature, dense))
            assert any(isinstance(x, PackedCase) for x in of)
            assert {x.page for x in of if isinstance(x, DecodeCase)} == {None, 64}
        layers = [x for x in cases if isinstance(x, LinearCase) and x.dtype == dtype]
        assert {x.activation for x in layers} == {None, "gelu", "gelu_tanh", "silu", "relu2"}
        heads = [x for x in cases if isinstance(x, VocabLossCase) and x.dtype == dtype]
        assert {(x.has_bias, x.softcap) for x in heads} == {(False, None), (True, None), (False, 30.0)}
    with launch.any_device(), launch.assume_target(launch.TARGETS["sm_80"]):
        for case in cases:
            launched: list[str] = []
            with launch.intercept(lambda kernel, *_, launched=launched: launched.append(kernel.__name__)):
                case.compute(case.inputs(), "triton")
            assert len(launched) >= len(case.directions), case


class TestBench:
    """``fusemesh bench --compare``, with known times."""

    @pytest.fixture(autouse=True)
    def known(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(env, "CACHE", str(tmp_path))
        preferences.forget_what_was_read()
        monkeypatch.setattr(bench, "_devices", lambda: [(torch.device("cpu"), "a stand-in")])
        self.classes = {
            "attention one": {"choice": "triton", "ms": {"triton": 1.0, "torch": 2.5}, "case": "x"},
            "attention two": {"choice": "torch", "ms": {"torch": 2.5}, "case": "y"},
        }
        self.rows = [{"op": "attention", "direction": "forward", "case": "x", "contender": "triton", "check": "ok"}]
        found = {"rows": self.rows, "classes": self.classes, "left_out": ["lack of time: attention z"]}
        monkeypatch.setattr(comparison, "compare_on", lambda device, clock: found)

    def test_the_table_is_printed_written_shown_and_forgotten(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["bench", "--compare"]) == 0
        out = capfd.readouterr().out.splitlines()
        assert out[0] == "a stand-in" and out[4] == "left out for lack of time: attention z"
        assert [line.split() for line in out[1:4]] == [
            ["class", "triton", "ms", "other", "ms", "x", "auto", "takes"],
            ["attention", "one", "1.000", "2.500", "2.50", "triton"],
            ["attention", "two", "-", "2.500", "-", "torch"],
        ]
        path = preferences.path_of("a stand-in")
        assert out[5] == f"auto takes the faster from now on: {path}"
        assert cli.main(["doctor"]) == 0
        shown = "preferences     a stand-in: triton in 1 classes, torch in 1 classes, measured "
        assert shown in (out := capfd.readouterr().out) and str(path) in out
        assert cli.main(["bench", "--forget"]) == 0
        assert capfd.readouterr().out == f"{path}\n1 tables removed\n"
        assert cli.main(["doctor"]) == 0
        assert "preferences" not in capfd.readouterr().out

    def test_a_wrong_result_is_the_status(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.rows[0]["check"] = "WRONG: out"
        assert cli.main(["bench", "--compare", "--json"]) == 1
        (found,) = json.loads(capfd.readouterr().out)["devices"]
        assert found["classes"] == self.classes and found["device"] == "a stand-in"

    def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(comparison, "compare_on", None)
        (tmp_path / "preferences").touch()
        assert cli.main(["bench", "--compare"]) == 2
        assert "FUSEMESH_CACHE: cannot write" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is to be done without a GPU")
def test_speed_is_measured_on_a_gpu_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--compare"]) == 2
    assert "expected a GPU that this torch can use, received none" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["--tune", "--compare"], ["--compare", "--out", "x"], ["--compare", "--minutes=0"]]
)
def test_options_of_bench(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    assert "expected" in capfd.readouterr().err
