"""The command line before anything runs: help, names, guesses, failures as JSON. Layer: application, one process."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusemesh import cli, config
from fusemesh.commands import doctor
from fusemesh.commands.options import Outcome, overrides
from fusemesh.run.settings import load_config
from fusemesh.spelling import closest
from fusemesh.tasks.names import TASKS
from fusemesh.tasks.registry import build_task, defaults_of
from tests.support import tiny_run


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The status and the message of a command that fails, told once as JSON and once in words."""
    status = cli.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    message = json.loads(line)["error"]
    assert err.endswith(f"error: {message}\n")
    return status, message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "command: expected one of doctor, tokenize, train, .*, received 'trian'; did you mean train"),
        (["train", "--lrr", "3"], "--lrr: no option of fusemesh train; did you mean --lr"),
        (["train", "--learning-rate=3"], "did you mean --training.learning_rate"),
        (["train", "--training.stepz", "3"], "did you mean --training.steps"),
        (["train", "--optimizer", "adam"], "--optimizer: no option of fusemesh train; see fusemesh train --help"),
        (["eval", "x", "--evaluation.smaples", "3"], "did you mean --evaluation.samples"),
        (["plan", "--wrold", "3"], "did you mean --world"),
        (["train", "text_clasification"], "task: .*, received 'text_clasification'; did you mean text_classification"),
        (["train", "--run.device", "cdua"], "run.device: .*, received 'cdua'; did you mean cuda"),
        (["scaling", "--axis", "fdsp"], "--axis: .*, received 'fdsp'; did you mean fsdp"),
        (["train", "--data.path"], "--data.path: expected a value, received none; see fusemesh train --help"),
        (["eval"], "TARGET: expected a value, received none"),
        (["train", "--nproc", "two"], "--nproc: expected a whole number, received 'two'"),
        (["eval", "a", "b"], "expected only options from here on, received 'b'"),
    ],
    ids=str,
)
def test_a_misspelt_word_is_guessed_and_told_as_json(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = failed(capsys, *arguments)
    assert (status == 2 and re.match(message, told)) or re.search(message, told), told


def test_nothing_is_guessed_from_afar() -> None:
    assert closest("spets", ["steps"]) == "steps" and closest("foo", ["steps", "data.path"]) is None
    keys = config.fields_of(config.Config)
    for name, key in {
        "training.batch_size": "training.global_batch_size",
        "training.optimizer": None,
        "data.seq_len": "data.sequence_length",
        "trainin.steps": "training.steps",
        "run.steps": "training.steps",
        "run.dir": "run.directory",
        "evaluation.beams": "evaluation.num_beams",
        "model.num_head": "model.num_heads",
    }.items():
        assert closest(name, keys) == key, name
    for short, key in {"training.lr": "training.learning_rate", "run.out": "run.directory"}.items():
        with pytest.raises(ValueError, match=rf"{short}: not a key .*; did you mean {key}\?"):
            config.load(None, {short: "1"})


@pytest.mark.parametrize("given", ["bf16", "torch.bfloat16", "BFloat16", "bfloat16"])
def test_a_dtype_by_any_of_its_names(given: str, tmp_path: Path) -> None:
    assert config.load(None, {"training.dtype": given}).training.dtype == "bfloat16"
    (tmp_path / "run.toml").write_text(f'[training]\ndtype = "{given}"\n')
    assert config.load(tmp_path / "run.toml").training.dtype == "bfloat16"
    assert cli.parse(["plan", "--dtype", given]).dtype == "bfloat16"


def test_float16_is_refused_by_name() -> None:
    assert config.load(None, {"training.dtype": "fp64"}).training.dtype == "float64"
    for name in ("half", "fp16"):
        with pytest.raises(ValueError, match=r"training\.dtype: expected .*, received float16, .*use bfloat16"):
            config.load(None, {"training.dtype": name})


def test_short_names() -> None:
    words = ["--lr", "1e-4", "--batch-size", "8", "--steps", "5", "--out", "x"]
    for command in ("train", "scaling"):
        assert overrides(cli.parse([command, "translation", *words])) == {
            "task": "translation",
            "training.learning_rate": "1e-4",
            "training.global_batch_size": "8",
            "training.steps": "5",
            "run.directory": "x",
        }
    assert overrides(cli.parse(["eval", "x", "--batch-size", "8"])) == {"evaluation.batch_size": "8"}


def test_epochs_become_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tiny_run.write_text(tmp_path / "text")
    options = [word for word in tiny_run.options(text, tmp_path / "run") if "training.steps" not in word]
    samples = len(build_task(tiny_run.settings(text, tmp_path / "run")).train)
    # Three ranks cannot run dp2: what is said before is all that happens.
    assert cli.main(["train", *options, "--epochs", "1.5", "--nproc", "3", "--layout", "dp2"]) == 2
    steps = math.ceil(1.5 * samples / 8)
    assert f"1.5 times the {samples} samples, 8 a step, are {steps} steps" in capsys.readouterr().err
    status, message = failed(capsys, "train", *options, "--epochs", "2", "--steps", "7")
    assert (status, message) == (2, "--epochs: expected it or --steps, received both, 2 and 7")
    assert failed(capsys, "train", *options, "--epochs", "0")[1] == "--epochs: expected more than 0, received 0"


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_tasks_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for name in TASKS:
        expected = load_config(None, {"task": name})
        assert not defaults_of(name) or expected != config.Config(task=name)
        for arguments in (("train", name), ("train", f"--task={name}"), ("scaling", name)):
            text = helped(capsys, *arguments)
            assert f"samples per step over all ranks; default {expected.training.global_batch_size} " in text
            assert f"peak of AdamW's learning rate; default {expected.training.learning_rate} " in text
    assert "optimizer steps; default 8 " in helped(capsys, "scaling")


@pytest.mark.parametrize(("name", "own"), [("eval", "--from-step"), ("predict", "--nproc"), ("generate", "--prompt")])
def test_help_shows_a_commands_own_options_first_and_what_applies(
    name: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = helped(capsys, name)
    assert text.startswith(f"usage: fusemesh {name} TARGET [options]")
    assert text.index(own) < text.index("configuration:") < text.index("--layout")
    assert not re.search(r"--training\.(steps|learning_rate)|--model\.|--run\.directory|--evaluation\.every", text)


def test_without_arguments_a_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 20
    assert {command.NAME for command in cli.COMMANDS} <= {line.split()[0] for line in lines if line.startswith("  ")}


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("x: wrong"), 2, "x: wrong"),
        (RuntimeError("it broke"), 1, "it broke"),
        (KeyError("ours"), 1, "KeyError: 'ours'"),
    ],
    ids=repr,
)
def test_every_failure_is_one_object(
    raised: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(options: object) -> None:
        raise raised

    monkeypatch.setattr(doctor, "run", fail)
    assert failed(capsys, "doctor") == (status, message)


def test_another_rank_of_a_launcher_prints_no_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    for rank, objects in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", "--steps", "x", "--json"]) == 2
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == objects and "--training.steps: expected a whole number" in err


def test_an_answer_that_the_output_cannot_spell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run", lambda options: Outcome({}, "正面"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert cli.main(["doctor"]) == 2
    assert "standard output: expected an encoding that has '\\u6b63', received latin-1" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "spelt"), [("utf-8", "正面"), ("latin-1", r"\u6b63\u9762")])
def test_json_spells_what_the_output_can_spell(encoding: str, spelt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for outcome in (Outcome({"answer": "正面"}), ValueError("正面")):
        monkeypatch.setattr(doctor, "run", lambda options, outcome=outcome: _given(outcome))
        output = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", output)
        cli.main(["doctor", "--json"])
        output.seek(0)
        assert f'"{spelt}"' in output.read()


def _given(outcome: Outcome | Exception) -> Outcome:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_a_process_quietly(unbuffered: str) -> None:
    """Also at Python's own end, which flushes once more."""
    with subprocess.Popen(
        [sys.executable, "-m", "fusemesh", "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141
