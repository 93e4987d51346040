"""Layer: emulator. `python -m fusemesh.kernels.aot --emulate` says what is right, and fails where anything is not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from fusemesh.kernels import aot
from fusemesh.kernels.emulator.launch import launching
from fusemesh.kernels.emulator.parsing import parse

pytestmark = pytest.mark.aot
LINEAR = ["--emulate", "--kernel", "linear", "--target", "sm_80", "--length", "40", "--no-backward"]


def test_a_call_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(LINEAR) == 0
    title, head, row, late, early = capsys.readouterr().out.splitlines()
    assert title == "sm_80 linear bf16 M40 K64 N64 plain, seed 0"
    assert head.split()[:4] == ["kernel", "CTAs", "threads", "instr"] and row.split()[0] == "linear_forward_kernel"
    assert late.startswith("copies land late: no hazard; errors as shares of the allowed ones: y 0.")
    assert early.startswith("copies land early: no hazard")


def test_gradients_and_several_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main([*LINEAR[:-1], "--target", "sm_80", "sm_90", "--dtype", "fp16", "--activation", "relu2"]) == 0
    printed = capsys.readouterr().out
    assert "sm_90 linear fp16 M40 K64 N64 relu2, seed 0" in printed
    assert printed.count("linear_wgrad_kernel") == 2 and printed.count("dbias 0.") == 4


def test_options_of_attention(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target", "sm_80", "--head-dim", "32", "--causal", "--length", "20", "--bias", "HQ", "--no-backward"]
    assert aot.main(["--emulate", *options]) == 0
    printed = capsys.readouterr().out
    assert "sm_80 attention bf16 B1 H2/1 S20 D32 causal bias=hm, seed 0" in printed and "out 0." in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("bar.sync \t0;", "// "), "copies land late: HAZARD: "),
        (lambda text: re.sub(r"mma\.sync[^;]*;", ";", text, count=1), "copies land early: WRONG: "),
        (lambda text: text.replace("ldmatrix.", "ldmatrices."), "copies land early: NOT EMULATED: "),
    ],
    ids=["hazard", "wrong", "unknown"],
)
def test_what_is_not_right(
    change: Callable[[str], str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "_parsed", lambda text: parse(change(text)))
    assert aot.main(LINEAR) == 1
    printed = capsys.readouterr().out
    assert said in printed and "linear" in printed


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--json"], "--json: expected without --emulate"),
        (["--target", "gfx942"], "--emulate: expected targets of NVIDIA's, received gfx942"),
        (["--bias", "HX"], "--bias: expected letters out of BHQK, received HX"),
    ],
    ids=["json", "target", "bias"],
)
def test_options_that_do_not_fit(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        aot.main(["--emulate", *options])
    assert raised.value.code == 2 and why in capsys.readouterr().err
