"""Layer: application. The scaling table: its arithmetic (pure), and a real one of 1 and 2 gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusemesh import cli
from fusemesh.run import scaling
from fusemesh.run.drawing import draw_speed_up
from tests.support import tiny_run


def result(cores: int = 2) -> dict:
    seconds = {1: 1.0, 2: 0.625, 4: 0.8}
    rows = [
        {
            "processes": n,
            "layout": f"dp{n}",
            "step_s": s,
            "tokens_per_s": 64 / s,
            "speed_up": 1 / s,
            "efficiency": 1 / s / n,
        }
        for n, s in seconds.items()
    ]
    return {"cores": cores, "tokens_per_step": 64, "machine": {"cpu": "a processor"}, "rows": rows}


def test_the_table_says_how_many_cores_there_are() -> None:
    lines = scaling.table(result()).splitlines()
    assert lines[0].startswith("2 cores; one thread a process; 64 tokens a step")
    assert lines[2].split() == ["1", "dp1", "1.000", "s", "64", "1.00", "100%"]
    assert lines[3].split() == ["2", "dp2", "0.625", "s", "102", "1.60", "80%"]
    assert lines[4].endswith("31%  more processes than cores")
    assert scaling.cores() >= 1


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    draw_speed_up(result(), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc", "1,two"], "--nproc: expected numbers such as 1,2,4, received '1,two'"),
        (["--nproc", "1,1"], "--nproc, --runs: expected different numbers above 0"),
        (["--nproc", "0,1"], "--nproc, --runs: expected different numbers above 0"),
        (["--axis", "ep"], "--axis: expected one of pp, dp, fsdp, cp, tp, received 'ep'"),
        (["--nproc", "1,3"], "global_batch_size: expected a multiple of"),
    ],
)
def test_wrong_requests(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tiny_run.write_text(tmp_path / "text")
    assert cli.main(["scaling", *tiny_run.options(text, tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_a_row_for_each_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tiny_run.write_text(tmp_path / "text"), tmp_path / "scaling"
    arguments = ["--nproc", "1,2", "--axis", "tp", "--runs", "1", "--steps", "3", "--out", str(out), "--json"]
    options = [
        value for value in tiny_run.options(text, out) if not value.startswith(("--training.steps", "--run.dir"))
    ]
    assert cli.main(["scaling", *options, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["processes"], row["layout"], len(row["runs_s"])) for row in found["rows"]] == [
        (1, "single", 1),
        (2, "tp2", 1),
    ]
    first, second = found["rows"]
    assert first["speed_up"] == first["efficiency"] == 1.0
    assert second["speed_up"] == pytest.approx(first["step_s"] / second["step_s"])
    assert second["efficiency"] == pytest.approx(second["speed_up"] / 2)
    assert second["tokens_per_s"] == pytest.approx(8 * 16 / second["step_s"])
    assert found["files"] == [str(out / "scaling.json"), str(out / "scaling.png")]
    assert json.loads((out / "scaling.json").read_text())["rows"] == found["rows"]
