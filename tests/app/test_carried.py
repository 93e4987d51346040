"""Layer: application, the command line in this process. A run is carried away, damaged, changed, and gone on with."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fusemesh import cli
from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.outputs import OutputError

OPTIONS = {
    "model.hidden_size": "16",
    "model.num_layers": "1",
    "model.num_heads": "2",
    "model.num_kv_heads": "1",
    "model.intermediate_size": "24",
    "data.sequence_length": "16",
    "training.steps": "4",
    "training.global_batch_size": "8",
    "training.warmup_steps": "1",
    "run.checkpoint_every": "2",
    "run.log_every": "2",
    "run.device": "cpu",
}
LABELS = ("abend", "morgen")
Ask = Callable[..., tuple[int, dict[str, Any], str]]


def write_records(path: Path, count: int = 96) -> Path:
    lines = [f"{LABELS[n % 2][:3]} number {n},{LABELS[n % 2]}" for n in range(count)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def without_drawings() -> Iterator[None]:
    """They take longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("matplotlib", "torch.utils.tensorboard"):
            patch.setitem(sys.modules, name, None)
        yield


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Ask:
    """Status, the one JSON object on standard output, and standard error of a command, with what it has logged."""

    def call(*arguments: object) -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        caplog.clear()
        status = cli.main([*map(str, arguments), "--json"])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return status, json.loads(out), err + caplog.text

    return call


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, its records and its merged file."""
    folder = tmp_path_factory.mktemp("home")
    write_records(folder / "records.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # From here the data are known by a relative path.
        assert cli.main(["train", "text_classification", *options(), "--data.path=records.csv", "--out=run"]) == 0
    assert cli.main(["merge", str(folder / "run")]) == 0
    return folder


def options(**changed: str) -> list[str]:
    return [f"--{key}={value}" for key, value in {**OPTIONS, **changed}.items()]


@pytest.fixture
def away(home: Path, tmp_path: Path) -> Path:
    """A copy of the run and of its merged file, without the data; home is not to be changed."""
    shutil.copytree(home / "run", tmp_path / "run")
    shutil.copy(home / "run" / "model.safetensors", tmp_path / "model.safetensors")
    return tmp_path


@contextmanager
def hidden(path: Path) -> Iterator[None]:
    """Within the block nothing is at ``path``."""
    path.rename(aside := path.with_name("hidden"))
    try:
        yield
    finally:
        aside.rename(path)


def answers(ask: Ask, monkeypatch: pytest.MonkeyPatch, *target: object) -> list[str]:
    monkeypatch.setattr(sys, "stdin", StringIO("abe\nmor\n"))
    status, result, err = ask("predict", *target)
    assert status == 0, err
    found: list[str] = result["answers"]
    return found


def test_a_run_needs_neither_its_data_nor_its_folder(
    home: Path, away: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(away)
    before = answers(ask, monkeypatch, "run")
    assert set(before) <= set(LABELS)
    _, expected, _ = ask("eval", "run")
    other = write_records(away / "others.csv", 37)
    with hidden(home / "records.csv"):
        for target in ("run", "model.safetensors"):
            assert answers(ask, monkeypatch, target) == before
            status, result, _ = ask("eval", target, "--data.held_out", other)
            assert status == 0 and result["samples"] == 37
            status, result, _ = ask("eval", target)
            assert status == 2 and "--data.held_out FILE" in result["error"] and "records.csv" in result["error"]
    # The same records in another place.
    shutil.copy(home / "records.csv", away / "moved.csv")
    with hidden(home / "records.csv"):
        status, result, _ = ask("eval", "run", "--data.path", "moved.csv")
        assert status == 0 and result["loss"] == expected["loss"]


def test_labels_renamed_after_training_change_no_answer(
    home: Path, away: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(ask, monkeypatch, away / "run")
    text = (home / "records.csv").read_text()
    (home / "records.csv").write_text(text.replace(",abend", ",zz_abend"))
    try:
        assert answers(ask, monkeypatch, away / "run") == before
        status, result, _ = ask("eval", away / "run")
        assert status == 2 and "is not what the model was trained with" in result["error"]
        status, result, _ = ask("eval", away / "run", "--data.held_out", home / "records.csv")
        assert status == 2
        assert "records.csv, line 2: expected one of the 2 labels" in result["error"]
        assert "('abend', 'morgen'), received 'zz_abend'" in result["error"]
    finally:
        (home / "records.csv").write_text(text)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--data.sequence_length=32", "data.sequence_length: expected 16, as the model was trained, received 32"),
        ("--model.hidden_size=32", "model.hidden_size: expected 16, as the model was trained, received 32"),
        ("--task=translation", "task: expected 'text_classification', as the model was trained"),
    ],
)
def test_what_contradicts_the_weights_is_refused(home: Path, ask: Ask, option: str, expected: str) -> None:
    for target in (home / "run", home / "run" / "model.safetensors"):
        status, result, _ = ask("eval", target, option)
        assert status == 2 and expected in result["error"]


def test_a_run_that_has_done_its_steps(away: Path, ask: Ask, capfd: pytest.CaptureFixture[str]) -> None:
    status, result, _ = ask("train", "--resume", "--out", away / "run", "--steps", "3")
    assert status == 2 and result["error"].startswith("training.steps: expected more than 4, ") and len(result) == 1
    status, done, err = ask("train", "--resume", "--out", away / "run")
    assert status == 0 and "nothing is left to do" in err
    assert cli.main(["train", "--resume", "--out", str(away / "run"), "--quiet"]) == 0
    assert (
        "no step was left to do; of the earlier run: 4 steps in layout single on 1 cpu rank, " in capfd.readouterr().out
    )
    assert done == json.loads((away / "run" / "summary.json").read_text())
    # Its evaluation was never done: it is made up for.
    (away / "run" / "summary.json").unlink()
    status, again, err = ask("train", "--resume", "--out", away / "run")
    assert status == 0 and "nothing is left to do" in err
    assert (again["loss"], again["steps"], again["tokens"], again["tokens_per_s"]) == (done["loss"], 4, 0, None)


def test_data_that_have_changed_are_not_gone_on_with(home: Path, away: Path, ask: Ask) -> None:
    go_on = ["train", "--resume", "--out", away / "run", "--steps", "5", "--quiet"]
    changed = away / "changed.csv"
    changed.write_text((home / "records.csv").read_text() + "one more,abend\n")
    status, result, _ = ask(*go_on, "--data.path", changed)
    assert status == 2
    assert (
        "the data have changed since the checkpoint of step 4: data.path was 1,969 bytes, and is 1,984"
        in (result["error"])
    )
    status, result, err = ask(*go_on, "--data.path", changed, "--allow-changed-data")
    assert status == 0 and result["resumed_from"] == 4 and "the data have changed" in err
    assert "the run goes on with them" in err and "--allow-changed-data" not in err
    # Elsewhere, but the same.
    shutil.copy(changed, away / "moved.csv")
    status, result, _ = ask(*go_on[:-2], "6", "--data.path", away / "moved.csv")
    assert status == 0 and result["resumed_from"] == 5


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(away: Path, ask: Ask) -> None:
    run = away / "run"
    last = run / "checkpoints" / "step-00000004"
    marker, tensors = last / "checkpoint.json", last / "__0_0.distcp"
    whole = {path: path.read_bytes() for path in (marker, tensors, last / ".metadata")}
    middle = len(whole[tensors]) // 2
    flipped = whole[tensors][:middle] + bytes([whole[tensors][middle] ^ 1]) + whole[tensors][middle + 1 :]
    for path, content, reason in (
        (tensors, flipped, "__0_0.distcp has changed since it was written"),
        (tensors, whole[tensors][:-9], "__0_0.distcp has "),
        (tensors, None, "__0_0.distcp is missing"),
        (last / ".metadata", b"", ".metadata has 0 bytes"),
        (marker, b"", "checkpoint.json is empty"),
        (marker, whole[marker][:99], "checkpoint.json is not JSON"),
        (marker, whole[marker].replace(b"abend", b"abenb"), "checkpoint.json is not what was written"),
    ):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        status, result, _ = ask("eval", run)
        error = result["error"]
        assert status == 2 and reason in error and "--from-step (there are: 2)" in error and "\n" not in error
        assert ask("train", "--resume", "--out", run, "--steps", "5", "--quiet")[1] == result
        path.write_bytes(whole[path])
    assert ask("eval", run, "--from-step", "3")[1]["error"].startswith("--from-step: expected the step of a checkpoint")
    tensors.write_bytes(flipped)
    assert ask("merge", run, "--from-step", "2")[0] == ask("eval", run, "--no-verify")[0] == 0
    status, result, err = ask("train", "--resume", "--out", run, "--steps", "3", "--from-step", "2")
    assert status == 0 and result["resumed_from"] == 2 and "a checkpoint after step 2 is set aside" in err
    # The damaged one is never again taken for the latest.
    assert ask("eval", run)[1]["step"] == 3


def test_a_damaged_merged_file_is_named(away: Path, ask: Ask) -> None:
    path = away / "model.safetensors"
    whole = path.read_bytes()
    for content, reason in (
        (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], "has changed since fusemesh merge wrote it"),
        (whole.replace(b"abend", b"abenb"), "has changed since fusemesh merge wrote it"),
        (whole[:-9], "cut off or damaged"),
        (b"", "cut off or damaged"),
    ):
        path.write_bytes(content)
        status, result, _ = ask("eval", path)
        assert status == 2 and reason in result["error"] and str(path) in result["error"]


def as_format_2(folder: Path) -> None:
    """Turn a checkpoint into what the version before wrote: neither checksums nor labels, data by a relative path."""
    content = json.loads((folder / "checkpoint.json").read_text())
    state = {"step": content["state"]["step"], "config": content["state"]["config"]}
    state["config"]["data"]["path"] = "records.csv"
    (folder / "checkpoint.json").write_text(json.dumps({"format": 2, "state": state}))


def test_a_checkpoint_of_the_version_before_takes_labels_from_the_data(
    home: Path, away: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(away)
    expected = answers(ask, monkeypatch, "run")
    for folder in checkpoint.all_checkpoints("run/checkpoints"):
        as_format_2(folder)
    tensors, state = checkpoint.read_merged("model.safetensors")
    saved = {"step": state["step"], "config": state["config"]}
    save_file(tensors, "old.safetensors", metadata={"format": "pt", "fusemesh": json.dumps(saved)})
    assert answers(ask, monkeypatch, "old.safetensors") == expected
    monkeypatch.setattr(sys, "stdin", StringIO("abe\nmor\n"))
    status, result, _ = ask("predict", "run")
    assert status == 2 and "name them by --data.path FILE" in result["error"] and "older version" in result["error"]
    assert answers(ask, monkeypatch, "run", "--data.path", home / "records.csv") == expected
    monkeypatch.chdir(home)
    status, _, err = ask("eval", away / "run")
    assert status == 0 and "did not keep its labels" in err
    assert ask("train", "--resume", "--out", away / "run", "--steps", "5", "--quiet")[0] == 0
    assert checkpoint.read_state(checkpoint.latest(away / "run" / "checkpoints"))["metadata"]["labels"] == [*LABELS]


def test_a_package_that_the_end_needs_is_missed_before_the_first_step(
    tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.txt").write_text("".join(f"number {n}\tnuméro {n}\n" for n in range(99)))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    data = f"--data.path={tmp_path / 'pairs.txt'}"
    status, result, _ = ask("train", "translation", *options(), data, "--out", tmp_path / "run")
    assert status == 2 and "install it with: pip install 'fusemesh[app]'" in result["error"]
    assert not (tmp_path / "run").exists()


def test_the_last_checkpoint_comes_before_what_may_fail(
    home: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusemesh.run import metrics, trainer

    def fails(*_: object) -> None:
        raise ValueError("no memory for this")

    data = f"--data.path={home / 'records.csv'}"
    command = ["train", "text_classification", *options(), data, "--quiet", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", fails)
        status, result, _ = ask(*command, tmp_path / "run")
    assert status == 1 and "the evaluation failed (ValueError: no memory for this)" in result["error"]
    assert f"fusemesh eval {tmp_path / 'run'}" in result["error"]
    assert ask("eval", tmp_path / "run")[1]["step"] == 4

    def cannot_write(_: object, step: int, __: object) -> None:
        if step == 4:
            raise OutputError("cannot write metrics.jsonl")

    monkeypatch.setattr(metrics.MetricsWriter, "write", cannot_write)
    status, result, _ = ask(*command, tmp_path / "other")
    assert status == 1 and result["error"] == "cannot write metrics.jsonl"
    assert ask("eval", tmp_path / "other")[1]["step"] == 4


def test_progress_is_said_where_there_is_no_terminal(away: Path, ask: Ask) -> None:
    _, _, err = ask("train", "--resume", "--out", away / "run", "--steps", "6")
    lines = [line for line in err.splitlines() if line.startswith(("fusemesh train: ", "step "))]
    assert (
        lines[0].startswith("fusemesh train: text_classification on ") and "steps 5 to 6 in layout single" in lines[0]
    )
    assert lines[1].startswith("step 6 of 6: loss ")
    assert ask("eval", away / "run")[2].startswith("fusemesh eval: step 6 of ")


def test_a_merged_file_is_for_others_and_replaces_nothing_else(away: Path, ask: Ask) -> None:
    run, output = away / "run", away / "out.safetensors"
    for mask in (0o022, 0o027):
        before = os.umask(mask)
        try:
            # The second time it replaces what it wrote.
            assert ask("merge", run, "-o", output)[0] == 0
        finally:
            os.umask(before)
        assert output.stat().st_mode & 0o777 == 0o666 & ~mask
    foreign = write_records(away / "over.csv")
    save_file({}, away / "other.safetensors")
    (away / "empty").touch()
    for path in (foreign, away / "other.safetensors", "/dev/null"):
        status, result, _ = ask("merge", run, "-o", path)
        assert status == 2 and result["error"] == (
            f"output: expected a new file, or one that fusemesh merge wrote, received {str(path)!r}, which holds "
            "something else; choose another name, or remove it first"
        )
    assert foreign.read_text().startswith("text,label") and not Path("/dev/null").is_file()
    assert ask("merge", run, "-o", away / "empty")[0] == 0
    for target in (run, run / "checkpoints", run / "checkpoints" / "step-00000002"):
        assert ask("merge", target)[1]["output"] == str(run / "model.safetensors")
    copied = shutil.copytree(run / "checkpoints" / "step-00000002", away / "copied")
    assert ask("merge", copied)[1]["output"] == str(copied / "model.safetensors")


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Within the block this process can write no file of more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_in_one_line(home: Path, away: Path, ask: Ask) -> None:
    run = away / "run"
    with at_most(30_000):
        status, result, _ = ask("train", "--resume", "--out", run, "--steps", "6", "--quiet")
        error = result["error"]
        assert status == 1 and "\n" not in error and f"cannot write '{run / 'checkpoints' / 'step-00000006'}'" in error
        assert " needed, " in error and " free, a limit of 30.0 kB a file" in error
        assert error.endswith("step-00000004 is whole")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    with at_most(10_000):
        status, result, _ = ask("merge", run, "-o", away / "new.safetensors")
    assert status == 2 and f"cannot write '{away / 'new.safetensors'}': the file would exceed" in result["error"]
    assert sorted(path.name for path in away.iterdir()) == ["model.safetensors", "run"]
    status, result, _ = ask("train", "text_classification", "--run.directory", home / "records.csv")
    assert status == 2 and "run.directory" in result["error"] and "a file stands where a folder" in result["error"]
