"""examples/train_stdlib.py, small, in dp2 x tp2, from training to the report. Layers: 4 gloo ranks."""

import importlib.util
import json
from pathlib import Path

import pytest

from fusemesh.run.metrics import read_metrics
from tests.support import tiny_run
from tests.support.engine_required import AUTO

SCRIPT = Path(__file__).parents[2] / "examples" / "train_stdlib.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("train_stdlib", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(tmp_path, text, **overrides):
    changes = {"training__learning_rate": "0.02", "training__steps": "60", "model__initializer_range": "0.1"}
    return tiny_run.options(text, tmp_path / "run", **{**changes, **overrides})


@pytest.mark.distributed
def test_trains_evaluates_merges_and_reports(demo, tmp_path, capfd):
    text = tiny_run.write_text(tmp_path / "documents")
    assert demo.main(options(tmp_path, text)) == 0
    out = capfd.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["layout"], report["world_size"], report["held_out_bytes"]) == ("dp2 x tp2", 4, 21 * 16)
    assert report["relative_difference"] <= 1e-5
    assert report["loss_all_ranks"] == pytest.approx(report["loss_merged_one_process"], rel=1e-5)
    bits = report["bits_per_byte"]
    assert bits["model"] < bits["ngram1"] and bits.keys() == {"model", "ngram0", "ngram1", "ngram2", "gzip"}
    assert bits["model"] == pytest.approx(read_metrics(tmp_path / "run")[-1]["held_out_loss"] / 0.6931471805599453)
    assert (tmp_path / "run" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "model.safetensors").stat().st_size > 0
    first = "attention_backward: cpu" if AUTO == "cpu" else "attention_forward: torch"
    for part in (f"layout dp2 x tp2 on 4 cpu ranks; {first}", "bytes/s", "gzip -9", "n-gram, 2 bytes"):
        assert part in out


def test_fails_where_the_losses_differ_or_the_model_learnt_nothing(demo, tmp_path, monkeypatch, capfd):
    text = tiny_run.write_text(tmp_path / "documents")
    whole = demo.evaluate_file
    monkeypatch.setattr(demo, "launch_local", lambda ranks, function, *arguments: [function(*arguments)])
    for factor, steps, message in (
        (1 + 3e-5, "60", "FAILED: the two losses differ by more than 1e-05"),
        (1.0, "1", "FAILED: the model is no better than the n-gram with 1 byte of context"),
    ):
        monkeypatch.setattr(
            demo, "evaluate_file", lambda *a, f=factor: (answer := whole(*a)) | {"loss": answer["loss"] * f}
        )
        assert demo.main(options(tmp_path, text, layout="single", training__steps=steps)) == 1
        assert message in capfd.readouterr().err


def test_deletes_an_earlier_run_and_nothing_else(demo, tmp_path):
    demo.remove_earlier_run(tmp_path / "absent")
    demo.remove_earlier_run(tmp_path)
    assert tmp_path.is_dir()
    (tmp_path / "config.toml").touch()
    with pytest.raises(SystemExit, match=r"run\.directory: .* holds files, but no run"):
        demo.main(["--run.directory", str(tmp_path)])
    assert (tmp_path / "config.toml").is_file()
    (tmp_path / "checkpoints").mkdir()
    demo.remove_earlier_run(tmp_path)
    assert not tmp_path.exists()
