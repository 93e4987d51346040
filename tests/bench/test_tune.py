"""Layer: application, no GPU. Which tiles are tried, which one is best, and the command; kernels in the interpreter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.verification import recorded
from fusemesh import cli
from fusemesh.kernels import env, measure
from fusemesh.kernels.attention.gpu import decode_tiles
from fusemesh.kernels.attention.gpu import tiles as attention_tiles
from fusemesh.kernels.matmul.gpu import tiles as linear_tiles
from fusemesh.kernels.measure import tile_bench, tune
from fusemesh.kernels.measure.cases import AttentionCase, DecodeCase, LinearCase, self_attention
from fusemesh.kernels.measure.tile_bench import TuneJob
from fusemesh.kernels.runtime.launch import TARGETS

QUICK: dict[str, Any] = {"seconds": 0.0, "least": 1, "pause": 0.0}
CPU = torch.device("cpu")


def test_every_kernel_and_entry_has_a_job_in_bf16() -> None:
    jobs = tune.jobs()
    assert {(job.op, job.kernel, job.entry) for job in jobs} == {
        *(("attention", kernel, entry) for kernel in ("forward", "dkdv", "dq") for entry in ("D64", "D128", "D256")),
        *(("linear", kernel, form) for kernel in linear_tiles.OPS for form in linear_tiles.FORMS),
        *(("linear", kernel, f"{form} skinny") for kernel in ("forward", "dgrad") for form in linear_tiles.FORMS),
        *(("attention", kernel, f"D{d} bias") for kernel in attention_tiles.OPS for d in attention_tiles.HEAD_DIMS),
        *(("decode", "split", f"D{d}") for d in decode_tiles.HEAD_DIMS),
    }
    assert {job.case.dtype for job in jobs} == {"bf16"} and len(set(jobs)) == len(jobs) == 40


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_candidates_are_the_shipped_tile_and_valid_neighbours(target: Any) -> None:
    for job in tune.jobs():
        first, *others = tune.candidates(job, target)
        assert first == tune.shipped(job, target)
        assert 1 <= len(others) <= 11 and len({first, *others}) == 1 + len(others), job.name
        for tile in others:
            changed = [field for field, value in dataclasses.asdict(tile).items() if value != getattr(first, field)]
            assert 1 <= len(changed) <= 2
            if isinstance(job.case, AttentionCase):
                block, biased = job.case.D, job.case.bias is not None
                assert attention_tiles.is_valid(tile, job.kernel, target, torch.bfloat16, block, block, biased)
            elif isinstance(job.case, LinearCase):
                assert linear_tiles.is_valid(tile, job.kernel, target, torch.bfloat16, job.form)
            else:
                d, dv, latent = job.case.D, job.case.Dv, job.case.latent
                assert decode_tiles.is_valid(tile, target, torch.bfloat16, d, dv, latent)


def _tuned(times: list[float | str], minutes: float = 1.0) -> dict[str, Any]:
    """Tune one job where the candidates take these times; a text is what is wrong with one."""
    job = tune.small(tune.jobs()[0])
    left = iter(times)

    def measured(bench: Any, tile: Any, device: Any, times: Any) -> dict[str, Any]:
        found = next(left, 9.0)
        row = {"tile": dataclasses.asdict(tile), "check": found if isinstance(found, str) else "ok"}
        return row if isinstance(found, str) else {**row, "seconds": found}

    with recorded():
        return tune.tune_tiles(CPU, measure.Clock(minutes), chosen=[job], measure=measured)


def test_the_fastest_right_tile_is_the_best() -> None:
    result = _tuned([2e-3, 4e-3, 1e-3])
    (row,) = result["rows"]
    assert (row["shipped_seconds"], row["best_seconds"]) == (2e-3, 1e-3)
    assert row["best_tile"] == row["candidates"][2]["tile"] != row["shipped_tile"]
    assert result["target"] == "sm_90" and result["device"] and result["date"]
    cells = tune.table(result["rows"]).splitlines()[1].split()
    assert cells[:4] == ["attention", "forward", "D128", "bfloat16"] and cells[-1] == "2.00"


def test_a_wrong_tile_is_not_timed_and_said_to_be_wrong() -> None:
    (row,) = _tuned([2e-3, "WRONG: out is off", "did not run: OutOfResources"])["rows"]
    assert row["check"] == "WRONG: out is off" and row["best_tile"] == row["shipped_tile"]
    text = tune.table([row])
    assert "WRONG: out is off" in text and "did not run: OutOfResources" in text
    (row,) = _tuned([2e-3, "did not run: OutOfResources"])["rows"]
    assert row["check"] == "ok", "another tile may need more than this GPU has"
    (row,) = _tuned(["did not run: OutOfResources", 1e-3])["rows"]
    assert row["check"].startswith("did not run") and row["shipped_seconds"] is None and row["best_seconds"] == 1e-3


def test_no_candidate_starts_when_the_time_is_up() -> None:
    assert _tuned([1e-3], minutes=0.0)["left_out"] == ["attention forward D128"]


ATTENTION = self_attention("fp32", 1, 4, 2, 40, 16, causal=True)
INTERPRETED = [
    *(TuneJob(kernel, ATTENTION) for kernel in tune.ATTENTION_KERNELS),
    *(TuneJob(kernel, dataclasses.replace(ATTENTION, bias="bhmn")) for kernel in tune.BIAS_KERNELS),
    TuneJob("split", DecodeCase(H=4, Hkv=2, capacity=700, lens=(700, 700))),
    TuneJob("split", DecodeCase(H=4, Hkv=1, D=48, Dv=32, capacity=600, lens=(600, 600), latent=True)),
    TuneJob("dgrad", LinearCase("fp32", 16, 20, 24)),
    *(
        TuneJob(kernel, LinearCase("fp32", 40, 20, 24, activation, gated))
        for kernel in tune.LINEAR_KERNELS
        for activation, gated in ((None, False), ("gelu", False), ("silu", True))
    ),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("job", INTERPRETED, ids=lambda job: job.name)
def test_a_kernel_alone_is_right_with_another_tile_and_a_wrong_one_is_found(
    job: TuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = tile_bench.TileBench(job, CPU)
    if job.op != "linear":
        tile: Any = attention_tiles.Tile(16, 32, 4, 1)
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32}
    else:
        tile = linear_tiles.Tile(16, 32, 16)
        blocks = {name: tile.launch_arguments(job.kernel)[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    results, _, (kernel, _, _, options) = bench.record(tile)
    assert kernel.__name__ == f"{job.op}_{job.kernel}_kernel" and blocks.items() <= options.items()
    assert results
    row = tile_bench.measure_tile(bench, tile, CPU, QUICK)
    assert row["check"] == "ok" and row["seconds"] > 0
    monkeypatch.setattr(tile_bench, "start", lambda launches: [x.zero_() for x in results.values()])
    monkeypatch.setattr(bench, "record", lambda tile: (results, [], None))
    row = tile_bench.measure_tile(bench, tile, CPU, QUICK)
    assert row["check"].startswith("WRONG: ") and "seconds" not in row


def _call(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    status = cli.main(["bench", *arguments])
    return status, *capfd.readouterr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_the_command_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = _call(capfd, "--tune")
    assert (status, out) == (2, "")
    assert err == (
        "fusemesh bench: error: device: expected a GPU that PyTorch can use, received none; run this on a machine with "
        "one\n"
    )
    status, out, _ = _call(capfd, "--tune", "--json")
    assert status == 2 and json.loads(out)["error"].startswith("device: expected a GPU")


def test_wrong_requests(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--tune: expected one of --tune, --compare and --forget" in _call(capfd)[2]
    for minutes in ("0", "-1", "nan"):
        status, _, err = _call(capfd, "--tune", "--minutes", minutes)
        assert status == 2 and f"--minutes: expected more than 0, received {minutes}" in err
    monkeypatch.setattr(env, "INTERPRET", True)
    assert "TRITON_INTERPRET: expected it unset" in _call(capfd, "--tune")[2]


def test_the_command_writes_the_table_and_says_where(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, clocks = _tuned([2e-3, 1e-3]), []

    def tuned(device: torch.device, clock: measure.Clock) -> dict[str, Any]:
        assert device.type == "cuda"
        clocks.append(clock.left)
        return {**found, "left_out": ["linear dgrad gated"]}

    monkeypatch.setattr(tune, "why_not_here", lambda: None)
    monkeypatch.setattr(tune, "tune_tiles", tuned)
    monkeypatch.chdir(tmp_path)
    status, out, _ = _call(capfd, "--tune", "--minutes", "2")
    path = Path("bench", "results", measure.machine_name(measure.machine()), "tune.json")
    assert status == 0 and out.splitlines()[-1] == f"written to {path}"
    assert "left out for lack of time: linear dgrad gated" in out and 110 < clocks[0] <= 120
    saved = json.loads(path.read_text())
    assert saved["device"] and saved["date"] and saved["rows"] == found["rows"]
    status, out, _ = _call(capfd, "--tune", "--json", "-o", "other.json")
    assert status == 0 and json.loads(out)["written"] == "other.json" and Path("other.json").is_file()
    wrong = {**found, "rows": [{**found["rows"][0], "check": "WRONG: out is off"}]}
    monkeypatch.setattr(tune, "tune_tiles", lambda device, clock: wrong)
    status, out, err = _call(capfd, "--tune", "-o", "wrong.json")
    assert status == 1 and "attention forward D128: WRONG: out is off" in err and "wrong.json" in err
    assert Path("wrong.json").is_file()


def test_nothing_reads_a_table_or_times_tiles_when_an_op_is_called() -> None:
    kernels = Path(attention_tiles.__file__).resolve().parents[1]
    for path in kernels.rglob("*.py"):
        assert "autotune" not in path.read_text() and "tune.json" not in path.read_text(), path
