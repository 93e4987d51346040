"""Layer: application, no GPU. Each stage of bench/on_gpu.py in a dry run, and what wrong results do."""

from __future__ import annotations

import dataclasses
import json
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import on_gpu
from bench.gpu import dry_run, emulation, memcheck, tables
from fusemesh.kernels import measure
from fusemesh.kernels.measure import contest, tune
from fusemesh.kernels.measure.cases import AttentionCase
from fusemesh.kernels.measure.cases.common import DIRECTIONS, DTYPES, Tensors

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On such small tensors threads only wait for each other, the longer the more tests run beside this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _dry_run(stage: str, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    status = on_gpu.main(["--stage", stage, "--dry-run", "--out", str(out), *more])
    return status, json.loads((out / f"{stage}.json").read_text())


def _few(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for name in ("ATTENTION", "LINEAR", "DECODE", "PACKED", "LOSS", "FP8"):
        monkeypatch.setattr(tables, name, getattr(tables, name)[:count])


def _twice(values: Tensors) -> Tensors:
    return {name: 2 * value for name, value in values.items()}


ALL = (*tables.ATTENTION, *tables.LINEAR, *tables.DECODE, *tables.PACKED, *tables.LOSS, *tables.FP8)


def test_correctness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = _dry_run("correctness", tmp_path)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert payload["dry_run"] and payload["left_out"] == []
    assert len(payload["rows"]) == len(ALL)
    assert {row["check"] for row in payload["rows"]} == {"ok"}
    gradients = {name for row in payload["rows"] for name in row["share_of_budget"]}
    assert gradients >= {"out", "lse", "dq", "dk", "dv", "dbias", "dsinks", "y", "dx", "dw", "dw_up"}
    assert "every step ran, no kernel did" in printed


def test_the_matrix_holds_every_feature_in_every_dtype_and_a_dozen_combinations() -> None:
    features = ("softcap", "alibi", "mod", "sinks", "dropout", "origin")
    default = AttentionCase()

    def has(case: AttentionCase, feature: str) -> bool:
        return getattr(case, feature) != getattr(default, feature)

    for feature in features:
        assert {case.dtype for case in tables.ATTENTION if has(case, feature)} == set(DTYPES), feature
    combined = [case for case in tables.COMBINATIONS if any(has(case, feature) for feature in features)]
    assert len(combined) >= 12
    assert {case.D for case in combined} - {2**i for i in range(4, 9)}, "head dims that are no power of two"
    assert any(case.Dv != case.D for case in combined)
    assert any(case.device_origin for case in combined) and any(case.window for case in combined)
    assert len(set(ALL)) == len(ALL) == 193 and set(ALL) >= tables.REPEATED and len(tables.REPEATED) == 11
    assert len({(case.op, case.name) for case in ALL}) == len(ALL), "names tell them apart"


def test_a_stage_that_left_nothing_out_says_that_every_case_is_right() -> None:
    row = {"contender": "triton", "check": "ok"}
    payload = {"rows": [row], "left_out": [], "dry_run": False, "only": ""}
    status, message = on_gpu.verdict("correctness", payload, Path("bench/results/x/correctness.json"))
    assert status == 0 and message.startswith("every case is right")
    part = on_gpu.verdict("correctness", {**payload, "only": "attention"}, Path("x"))
    assert part[0] == 0 and "every case is right" not in part[1]


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = _dry_run("sweep", tmp_path)
    assert status == 0, capsys.readouterr().out
    assert {(row["op"], row["direction"]) for row in payload["rows"]} == {
        (op, direction) for op in ("attention", "linear") for direction in DIRECTIONS
    }
    assert {row["contender"] for row in payload["rows"]} == {"triton", "sdpa", "F.linear", "triton tutorial"}
    fp8 = [row for row in payload["rows"] if row["case"].startswith("fp8 ")]
    assert {(row["direction"], row["contender"]) for row in fp8} == {("forward", "triton")}
    tutorial = [row for row in payload["rows"] if row["contender"] == "triton tutorial"]
    assert {row["direction"] for row in tutorial} == {"forward"}
    assert {row["check"] for row in payload["rows"]} == {"ok"}
    assert not any("seconds" in row for row in payload["rows"]), "a dry run has no speeds"
    assert "triton tutorial" in capsys.readouterr().out


def test_memcheck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = _dry_run("memcheck", tmp_path)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert (payload["errors"], payload["planted_errors"], payload["left_out"]) == (0, 1, [])
    assert [row["case"] for row in payload["rows"]] == [case.name for case in memcheck.CASES]
    assert {row["check"] for row in payload["rows"]} == {"ok"}
    count = len(memcheck.CASES)
    assert f"memcheck: 0 errors in {count} of {count} cases, {count} of them right; the planted error gave 1" in printed


def test_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = _dry_run("tune", tmp_path)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert payload["left_out"] == [] and payload["device"] and payload["date"] and payload["target"] == "sm_90"
    wanted = {(job.op, job.kernel, job.entry) for job in tune.jobs()}
    assert {(row["op"], row["kernel"], row["entry"]) for row in payload["rows"]} == wanted
    assert {row["check"] for row in payload["rows"]} == {"ok"}
    for row in payload["rows"]:
        assert row["best_tile"] is row["best_seconds"] is row["shipped_seconds"] is None, "a dry run has no speeds"
        assert row["candidates"][0]["tile"] == row["shipped_tile"] and len(row["candidates"]) > 3
    assert "shipped tile" in printed and "attention dkdv D128 bfloat16" in printed


def test_emulator(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step but the device's; the programs themselves are those of tests/kernels/emulator/test_opcodes.py."""
    programs = emulation.all_programs()
    some = [*programs[::40], next(p for p in programs if not p.exact), next(p for p in programs if p.least > 90)]
    monkeypatch.setattr(emulation, "all_programs", lambda: some)
    status, payload = _dry_run("emulator", tmp_path)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert {row["check"] for row in payload["rows"]} == {"ok"} and payload["left_out"] == []
    assert len(payload["rows"]) + payload["other_targets"] == len(some) and payload["other_targets"] >= 1
    assert {row["other_bits_than_emulated"] for row in payload["rows"]} == {0}
    assert f"{payload['other_targets']} programs are for other GPUs" in printed
    (tmp_path / "emulator.json").unlink()

    right = emulation.emulated
    monkeypatch.setattr(emulation, "emulated", lambda program, target: tuple(~x for x in right(program, target)))
    status, payload = _dry_run("emulator", tmp_path)
    assert status == 1 and {row["check"][:6] for row in payload["rows"]} == {"WRONG:"}
    assert f"{len(payload['rows'])} programs returned what PTX does not specify" in capsys.readouterr().out


def test_a_program_runs_on_targets_that_have_its_instructions() -> None:
    some = {(p.least, bool(p.target)): p for p in emulation.all_programs()}
    for (least, is_one_generation), program in some.items():
        found = [
            10 * major + minor
            for major, minor in ((8, 0), (8, 9), (9, 0), (10, 0))
            if emulation._is_for(program, major, minor)
        ]
        wanted = [n for n in (80, 89, 90, 100) if n == least or (n > least and not is_one_generation)]
        assert found == wanted, program.name


@pytest.mark.aot
@pytest.mark.slow
def test_every_program_is_assembled(tmp_path: Path) -> None:
    """All programs of a target in one module, each an entry of its own."""
    from triton import knobs

    groups: dict[str, list[str]] = {}
    for n, program in enumerate(emulation.all_programs()):
        head, entry = program.text(f"sm_{max(program.least, 90)}{program.target}").split(".visible", 1)
        groups.setdefault(head, []).append(".visible" + entry.replace("program", f"program{n}"))
    assert len(groups) >= 2
    for head, entries in groups.items():
        path, target = tmp_path / "programs.ptx", head.split(".target ")[1].split()[0]
        path.write_text(head + "\n".join(entries))
        assembler = knobs.nvidia.ptxas_blackwell if "sm_10" in target else knobs.nvidia.ptxas
        command = [assembler.path, "-O0", f"-arch={target}", str(path), "-o", str(tmp_path / "programs.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]


def test_wrong_results_fail_correctness_after_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = dry_run.stand_in
    monkeypatch.setattr(dry_run, "stand_in", lambda case, want: _twice(right(case, want)))
    _few(monkeypatch, 2)
    status, payload = _dry_run("correctness", tmp_path)
    assert status == 1
    assert [row["check"][:6] for row in payload["rows"]] == ["WRONG:"] * 12
    printed = capsys.readouterr().out
    assert "12 of FuseMesh's results are wrong or did not run" in printed and "WRONG: " in printed


def test_a_wrong_result_fails_the_sweep_after_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dry_run.known_outputs

    def wrong(case: Any, contender: contest.Contender, inputs: Any, direction: str) -> Tensors:
        outputs = right(case, contender, inputs, direction)
        return _twice(outputs) if contender.name == "triton" else outputs

    monkeypatch.setattr(dry_run, "known_outputs", wrong)
    monkeypatch.setattr(on_gpu, "sweep_cases", lambda has_fp8, cases=on_gpu.sweep_cases(): cases[:2])  # noqa: B008
    status, payload = _dry_run("sweep", tmp_path)
    assert status == 1
    assert {(row["contender"], row["check"][:6]) for row in payload["rows"]} == {
        ("triton", "WRONG:"),
        ("sdpa", "ok"),
        ("F.linear", "ok"),
        ("triton tutorial", "ok"),
    }


def test_a_wrong_tile_fails_tune_after_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "jobs", lambda jobs=tune.jobs(): jobs[:1])  # noqa: B008
    measure, calls = dry_run.measure_tile, []

    def second_is_wrong(*arguments: Any) -> dict[str, Any]:
        calls.append(0)
        return {**measure(*arguments), **({"check": "WRONG: out is off"} if len(calls) == 2 else {})}

    monkeypatch.setattr(dry_run, "measure_tile", second_is_wrong)
    status, payload = _dry_run("tune", tmp_path)
    assert status == 1 and payload["rows"][0]["check"] == "WRONG: out is off"
    printed = capsys.readouterr().out
    assert "1 of FuseMesh's results are wrong" in printed
    assert f"1 of {len(calls)} right" not in printed and f"{len(calls) - 1} of {len(calls)} right" in printed


def test_a_launcher_that_launches_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusemesh.kernels.matmul.gpu import linear as triton_matmul

    monkeypatch.setattr(triton_matmul, "launch", lambda *arguments, **options: None)
    for name in ("ATTENTION", "DECODE", "PACKED", "LOSS", "FP8"):
        monkeypatch.setattr(tables, name, ())
    status, payload = _dry_run("correctness", tmp_path)
    assert status == 1 and all("recorded []" in row["check"] for row in payload["rows"])


@pytest.mark.parametrize("stage", ["correctness", "tune"])
def test_what_there_was_no_time_for_is_named(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = _dry_run(stage, tmp_path, "--minutes", "0")
    assert status == 1 and payload["rows"] == []
    assert len(payload["left_out"]) == len(ALL if stage == "correctness" else tune.jobs())
    printed = capsys.readouterr().out
    assert "left out: attention " in printed and "no time for a single case" in printed


@pytest.mark.parametrize(
    ("stage", "only", "op"),
    [
        ("correctness", "decode fp16", "decode"),
        ("sweep", "linear forward", "linear"),
        ("tune", "decode split", "decode"),
    ],
)
def test_a_part_of_a_stage(stage: str, only: str, op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--stage", stage, "--dry-run", "--out", str(tmp_path), "--only"]
    assert on_gpu.main([*command, "nothing has this"]) == 1
    assert "no case has 'nothing has this' in its name" in capsys.readouterr().out
    assert on_gpu.main([*command, only]) == 0
    payload = json.loads((tmp_path / f"{stage}-{only.replace(' ', '-')}.json").read_text())
    assert {row["op"] for row in payload["rows"]} == {op} and payload["left_out"] == []
    assert not (tmp_path / f"{stage}.json").exists(), "the whole stage's results are another file's"


def test_what_most_calls_wait_for_is_tuned_first() -> None:
    names = [job.name for job in tune.jobs()]
    assert names[:3] == ["attention forward D128", "attention dkdv D128", "attention dq D128"]
    firsts = [
        names.index(name) for name in ("linear forward plain", "decode split D128", "linear forward plain skinny")
    ]
    assert firsts == sorted(firsts) and names.index("attention forward D128 bias") > firsts[-1]


@WITHOUT_GPU
def test_without_a_gpu_the_command_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        on_gpu.main(["--stage", "sweep"])
    assert raised.value.code == 2 and "--dry-run" in capsys.readouterr().err


def test_without_the_tool_memcheck_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memcheck, "find_tool", lambda: None)
    with pytest.raises(SystemExit) as raised:
        on_gpu.main(["--stage", "memcheck"])
    assert raised.value.code == 2
    assert "compute-sanitizer: expected it in PATH" in capsys.readouterr().err


def test_the_tool_is_looked_for_in_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(memcheck.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert memcheck.find_tool() is None
    tool = tmp_path / "cuda" / "bin" / memcheck.TOOL
    tool.parent.mkdir(parents=True)
    tool.write_text("")
    assert memcheck.find_tool() is None, "it cannot be executed"
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert memcheck.find_tool() == str(tool)


INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at attention_dq_kernel+0x450
=========     by thread (0,0,0) in block (3,0,0)
=========
CASE {"op": "attention"}
========= ERROR SUMMARY: 96 errors
"""


def test_what_the_tool_writes_is_read() -> None:
    assert memcheck.parse("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n").errors == 0
    found = memcheck.parse(INVALID)
    assert found.errors == 96
    assert found.first[:2] == ("Invalid __global__ write of size 4 bytes", "at attention_dq_kernel+0x450")
    assert memcheck.parse("========= ERROR SUMMARY: 1 error\n").errors == 1
    assert memcheck.parse(INVALID * 2).errors == 192, "one summary for each process"
    assert memcheck.parse("Segmentation fault\n") == memcheck.Findings(None, ())


# A tool that answers as it is told to, and runs nothing.
FAKE_TOOL = """#!{python}
import sys
assert sys.argv[1:3] == ["--tool", "memcheck"], sys.argv
assert __import__("os").environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
print({planted!r} if "--planted" in sys.argv else {found!r})
"""
ERRORS = "========= ERROR SUMMARY: {} errors"
RIGHT = 'CASE {"op": "attention", "case": "a", "contender": "triton", "check": "ok"}\n'
WRONG = 'CASE {"op": "attention", "case": "a", "contender": "triton", "check": "WRONG: dq is off"}\n'


@pytest.mark.parametrize(
    ("planted", "found", "fault"),
    [
        (ERRORS.format(1), RIGHT + ERRORS.format(0), None),
        (ERRORS.format(0), RIGHT + ERRORS.format(0), "the tool did not find the planted write"),
        ("Error: no device", RIGHT + ERRORS.format(0), "the tool did not find the planted write"),
        (ERRORS.format(1), RIGHT + INVALID.replace('CASE {"op": "attention"}\n', ""), "96 reads or writes outside"),
        (ERRORS.format(1), RIGHT, "the tool ended without a summary"),
        (ERRORS.format(1), WRONG + ERRORS.format(0), "1 cases are wrong or did not run; the first: a: WRONG: dq"),
        (ERRORS.format(1), ERRORS.format(0), "no case ran"),
    ],
    ids=["right", "blind", "no device", "errors", "no summary", "wrong case", "no case"],
)
def test_what_the_tool_finds_decides(planted: str, found: str, fault: str | None, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(FAKE_TOOL.format(python=sys.executable, planted=planted, found=found))
    tool.chmod(0o755)
    payload = memcheck.run_under_tool(measure.Clock(1.0), tool=str(tool))
    status, message = on_gpu.verdict("memcheck", {**payload, "dry_run": False, "only": ""}, Path("x.json"))
    if fault is None:
        assert status == 0 and "cases were left out" in message and len(payload["left_out"]) == len(memcheck.CASES)
    else:
        assert status == 1 and fault in message


def test_a_tool_that_does_not_end_is_ended_with_its_children() -> None:
    sleeper = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print('before', flush=True); subprocess.run([sys.executable, '-c', {sleeper!r}])"
    begin = time.monotonic()
    # The output is at its end only when the child, too, is gone.
    assert memcheck._run([sys.executable, "-c", code], 1.0) == "before\n"
    assert time.monotonic() - begin < 30


def test_the_sweep_is_that_of_the_design() -> None:
    attention = [case for case in on_gpu.sweep_cases() if isinstance(case, AttentionCase)]
    cases = [case for case in attention if case.dtype == "bf16"]
    fp8 = [case for case in attention if case not in cases]
    in_bf16 = {dataclasses.replace(case, dtype="bf16") for case in fp8}
    assert fp8 and in_bf16 <= set(cases), "rows of the same shapes to compare with"
    without = on_gpu.sweep_cases(has_fp8=False)
    assert set(on_gpu.sweep_cases()) - set(without) == set(fp8)
    assert {case.B * case.Sq for case in cases} == {16384}
    assert {case.H * case.D for case in cases if case.Hkv == case.H} == {2048}
    assert {(case.D, case.causal) for case in cases if case.Hkv == case.H} == {
        (d, causal) for d in (64, 128, 256) for causal in (False, True)
    }
    assert {(c.H, c.Hkv, c.D) for c in cases if c.Hkv != c.H} == {(64, 8, 128)}
    assert len(set(cases)) == len(cases) == 48
    from bench.peers import tutorial_attention

    assert all(tutorial_attention.contender(case) is not None for case in cases)
    assert tutorial_attention.contender(dataclasses.replace(cases[0], D=80, Dv=80)) is None
