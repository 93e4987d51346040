"""Faults that trials as a new user found, each shown through the command line alone.

It imports nothing else of the project, so that this file can be run against older versions, too, and shows there what
was wrong. Where the mend is an option or a function that is new, the older version does not know its name.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fusemesh import cli

pytestmark = pytest.mark.slow

SMALL = (
    "--model.hidden_size=16 --model.num_layers=1 --model.num_heads=2 --model.num_kv_heads=1 "
    "--model.intermediate_size=24 --training.steps=4 --training.global_batch_size=8 --training.warmup_steps=1 "
    "--evaluation.num_beams=1 --run.log_every=2 --run.device=cpu --quiet"
)
Ask = Callable[..., tuple[int, dict[str, Any], str]]


def table(labels: str = "正负", count: int = 96) -> bytes:
    """Records of two classes as CSV."""
    return "\n".join(["text,label", *(f"{n} 次{'坏好'[n % 2]},{labels[n % 2]}" for n in range(count)), ""]).encode()


FILES: dict[str, bytes] = {
    "records.csv": table(),
    "other.csv": table("ab"),
    "packed.csv.gz": gzip.compress(table()),
    "long.csv": b"text,label\n%s,\xe6\xad\xa3\n" % (b"long " * 30000),
    "cut.csv": table("ab") + ("长" * 3000 + ",a\n").encode(),
    "gbk.csv": "text,label\n这家餐厅的服务很好,正\n还可以,负\n".encode("gbk"),
    "null.jsonl": b"".join(b'{"text": "%d", "label": %s}\n' % (n, b"null" if n == 1 else b'"x"') for n in range(99)),
    "list.jsonl": b"".join(b'{"text": %s, "label": %d}\n' % (b"%d" % n if n else b"[0]", n % 2) for n in range(99)),
    "half.jsonl": b'{"text": "a", "label": "x"}\n{"text": "\\ud800", "label": "y"}\n',
    "a.parquet": b"PAR1" * 9,
    "pairs.txt": b"".join(b"number %d\tnumero %d\n" % (n, n) for n in range(99)),
    "within.txt": ("who?\tThey started at noon.\tart\n" * 40).encode(),
    "twice.txt": ("who?\tAnna saw Anna.\tAnna\n" * 40).encode(),
    "chinese.txt": "".join(f"谁在第{n}天来了\t张三在北京见到了李四、然后回家了。\t李四\n" for n in range(40)).encode(),
    "text.txt": b"".join(b"line %d\n\n" % n for n in range(200)),
    **{f"few/{name}.md": b"".join(b"line %d\n" % n for n in range(40)) for name in "abc"},
}


def in_process(command: str, lines: bytes = b"") -> int:
    """The status of a command whose standard input are these bytes; training is of a tiny model."""
    words = command.split()
    if words[0] == "train":
        words[1:] = [*([] if words[1].startswith("-") else [words.pop(1)]), *SMALL.split(), *words[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        try:
            return cli.main(words)
        except SystemExit as end:
            return int(end.code or 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files, a run of 4 steps on records.csv, its merged file, and the warnings while it trained."""
    folder = tmp_path_factory.mktemp("home")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as found:
        patch.chdir(folder)
        warnings.simplefilter("always")
        options = "--data.sequence_length 32 --run.checkpoint_every 2"
        train = f"train text_classification --data.path {folder}/records.csv --out {folder}/run"
        assert in_process(f"{train} {options}") == 0
        assert in_process("merge run") == 0
    (folder / "warnings.txt").write_text("\n".join(str(warning.message) for warning in found))
    return folder


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a copy of that folder; what waits for ever fails."""

    def stop(*_: object) -> None:
        raise TimeoutError("still running after 150 s")

    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(150)
    yield tmp_path / "here"
    signal.alarm(0)


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Ask:
    """Run a command with ``--json``: its status, its object (empty if there is none), and all that it says."""

    def call(command: str, lines: bytes = b"") -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        caplog.clear()
        status = in_process(f"{command} --json", lines)
        out, err = capfd.readouterr()
        printed = out.strip().splitlines()
        result = json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
        told = [record.getMessage() for record in caplog.records if record.name.startswith("fusemesh")]
        return status, result, "\n".join([out, err, *told])

    return call


CLASSIFY = "train text_classification --out x --data.path"
ANSWER = "train question_answering --out x --data.path"
CONTINUE = "train language_model --out x --data.sequence_length 32 --data.path"
TRANSLATE = "train translation --out x --data.path"
PLAN = "plan --gpu h100 --world 64 --model"
# The status of a command, and what it says (after "!": what it must not say). NONE is a file that is not there.
TOLD = {
    "labels never seen": ("eval run --data.path other.csv", 2, "other.csv"),
    "steps that are done": ("train --resume --out run --steps 3", 2, "training.steps: .* 4"),
    "texts cut in silence": (f"{CLASSIFY} cut.csv", 0, r"\bcut\b.*\b9000\b"),
    "no document held out": (f"{CONTINUE} few", 0, ""),
    "no held-out text": (f"{CONTINUE} text.txt --data.held_out few/a.md", 0, ""),
    "a false encoding": (f"{CLASSIFY} gbk.csv", 2, "gb18030"),
    "a plan of tp for gpt2": (f"{PLAN} gpt2", 0, r'"layout": "[^"]*tp\d[^}]*step_s'),
    "a plan of pp for llama": (f"{PLAN} llama3-8b", 0, r'"layout": "[^"]*pp\d[^}]*step_s'),
    "a folder that cannot be made": ("train text_classification --out /proc/x", 2, "run.directory: .*/proc/x"),
    "nothing to answer": ("predict run", 2, '"error": "standard input'),
    "an answer within a word": (f"{ANSWER} within.txt --data.held_out within.txt", 2, "within.txt, line 1"),
    "an answer in two places": (f"{ANSWER} twice.txt --data.held_out twice.txt", 2, "twice.txt, line 1"),
    "null as a label": (f"{CLASSIFY} null.jsonl", 2, "null.jsonl, line 2"),
    "a list as a text": (f"{CLASSIFY} list.jsonl", 2, "list.jsonl, line 1"),
    "half a character": (f"{CLASSIFY} half.jsonl", 2, "half.jsonl, line 2"),
    "a long text": ("eval run --data.held_out long.csv", 0, ""),
    "memory without a unit": (f"{PLAN} gpt2 --memory 80", 2, "80GB"),
    "bf16": (f"{TRANSLATE} NONE --training.dtype bf16", 2, "data.path: .*NONE"),
    "short names": (f"{TRANSLATE} NONE --lr 1e-3 --batch-size 4 --epochs 1", 2, "data.path: .*NONE"),
    "a misspelt command": ("trian", 2, "did you mean train"),
    "a misspelt option": ("plan --wrold 3", 2, "did you mean --world"),
    "a misspelt key": ("train --training.stepz 3", 2, "did you mean --training.steps"),
    "defaults of a task": ("train text_classification --help", 0, r"(?s)--data.sequence_length.*default\s+48.*-steps"),
    "options that do not apply": ("eval run --help", 0, "!--training.steps"),
    "a task of scaling": ("scaling translation --nproc 1 --data.path NONE", 2, "data.path: .*NONE"),
    "a format that is not read": (f"{CLASSIFY} a.parquet", 2, r"\.parquet; convert it"),
    "a packed file": ("eval run --data.held_out packed.csv.gz", 0, ""),
    "a folder in a file's place": (f"{TRANSLATE} few", 2, "a folder"),
    "a run that is not there": ("eval NONE", 2, "NONE.*not exist"),
    "no checkpoint to go on from": (f"{CLASSIFY} records.csv --training.learning_rate 1e38", 1, "!--resume"),
}


@pytest.mark.parametrize("fault", list(TOLD))
def test_a_command_tells_of(fault: str, ask: Ask) -> None:
    command, expected, said = TOLD[fault]
    status, _, text = ask(command)
    assert status == expected and "Traceback" not in text, text
    assert not re.search(said[1:], text) if said.startswith("!") else re.search(said, text), text


QUESTIONS = "1 次好\n2 次坏\n".encode()


@contextlib.contextmanager
def records(home: Path, content: bytes | None) -> Iterator[None]:
    """Within the block the file that was trained on holds something else, or is gone."""
    path = home / "records.csv"
    path.unlink() if content is None else path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(FILES["records.csv"])


def test_labels_are_the_models_and_not_the_files(home: Path, ask: Ask) -> None:
    before = ask("predict run", QUESTIONS)[1]["answers"]
    with records(home, table("az")):
        assert ask("predict run", QUESTIONS)[1]["answers"] == before
    Path("run/model.safetensors").rename("alone.safetensors")
    with records(home, None):
        status, result, text = ask("predict alone.safetensors", QUESTIONS)
    assert status == 0 and result["answers"] == before, text


def test_answers_come_with_scores(ask: Ask) -> None:
    _, result, _ = ask("predict run", QUESTIONS)
    assert [sum(score["probabilities"].values()) for score in result["scores"]] == pytest.approx([1, 1])


def test_a_line_in_another_encoding_is_named(ask: Ask) -> None:
    status, result, _ = ask("predict run", b"a\n\xe9t\xe9\n")
    assert status == 2 and result["error"].startswith("standard input, line 2")


@pytest.mark.distributed
def test_lines_end_at_newlines_alone_on_two_ranks(ask: Ask) -> None:
    _, result, text = ask("predict run --layout dp2", "a\fb\na\u2028b\na\u0085b\n".encode())
    assert len(result["answers"]) == 3, text


def test_a_full_disk_is_told_in_one_line(here: Path, ask: Ask) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        status, result, text = ask(f"train --resume --out {here}/run --steps 6")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = result.get("error", text)
    assert status == 1 and "\n" not in error and f"{here}/run/checkpoints" in error and "whole" in error, error


def test_changed_data_are_not_gone_on_with(home: Path, ask: Ask) -> None:
    with records(home, table("正负", 97)):
        status, _, text = ask("train --resume --out run --data.sequence_length 32 --steps 6")
    assert status == 2 and "changed" in text, text


@pytest.mark.parametrize("name", ["__0_0.distcp", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named(name: str, ask: Ask) -> None:
    """A changed byte of the weights, half a marker; an option that is new takes an older one."""
    (path,) = Path("run/checkpoints").glob(f"*4/{name}")
    whole = path.read_bytes()
    path.write_bytes(whole[:50] if name.endswith("json") else whole[:-2000] + bytes([whole[-2000] ^ 1]) + whole[-1999:])
    status, result, text = ask("eval run")
    assert status == 2 and "damaged" in result["error"] and name in result["error"] and "Traceback" not in text
    assert ask("predict run --from-step 2", QUESTIONS)[0] == 0


def test_what_a_run_needs_is_missed_before_it_trains(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    status, _, _ = ask("train translation --data.path pairs.txt --data.sequence_length 16 --out x")
    assert status != 0 and (not Path("x/metrics.jsonl").exists() or list(Path("x/checkpoints").glob("step-*")))


def test_an_answer_in_a_script_without_spaces_is_learnt(ask: Ask) -> None:
    data = "--data.path chinese.txt --data.held_out chinese.txt --data.sequence_length 48 --out x"
    status, result, text = ask(f"train question_answering {data} --steps 40 --training.learning_rate 0.01")
    assert status == 0 and result["held_out"]["exact_match"] == 1, text


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("Llama", {"attention_bias": True}),
        ("Llama", {"mlp_bias": True}),
        ("Mistral", {"attention_bias": True}),
        ("Qwen2", {"attention_bias": False}),
    ],
)
def test_parameters_are_those_of_the_class(family: str, flags: dict[str, bool], ask: Ask) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, intermediate_size=96, vocab_size=99)
    Path("config.json").write_text(json.dumps({**config.to_dict(), **flags}))
    config = transformers.AutoConfig.from_pretrained(".")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    _, _, text = ask("plan --model config.json --world 2 --gpu h100 --sequence 64 --batch 8")
    assert f" {sum(parameter.numel() for parameter in model.parameters()):,} parameters" in text, text


def test_drawings_of_labels_and_losses(home: Path) -> None:
    assert "Glyph" not in (home / "warnings.txt").read_text()
    assert (home / "run" / "loss_curve.png").is_file() and (home / "run" / "confusion.png").is_file()


SLURM = {"SLURM_JOB_ID": f"test-{os.getpid()}", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
SLURM |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(words or ("-m", "fusemesh", "eval", "run", "--layout", "dp2"))]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, **pipes)


def ended(process: subprocess.Popen[str], seconds: float) -> str:
    """What a process has said; one that goes on for longer is ended."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.terminate()
        return f"still running after {seconds:.0f} s: {process.communicate(timeout=50)[1]}"


@pytest.mark.distributed
def test_the_first_of_a_list_of_nodes_is_looked_up_at_once() -> None:
    names = {"SLURM_STEP_NODELIST": "rack[1-2]node[3-4]", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert "cannot resolve 'rack1node3'" in ended(start(**{**SLURM, **names}), 60)


@pytest.mark.distributed
def test_a_wait_says_for_whom() -> None:
    text = ended(start(**{**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}), 30)
    assert re.search(r"\d s for rank 0\b", text), text


@pytest.mark.distributed
def test_two_steps_of_a_job_meet_apart() -> None:
    steps = [
        start(**{**SLURM, "SLURM_STEP_ID": step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for step in "01"
        for rank in "01"
    ]
    deadline = time.monotonic() + 60
    said = [ended(process, max(1, deadline - time.monotonic())) for process in steps]
    assert [process.returncode for process in steps] == [0] * 4, said


def test_a_shell_of_slurm_is_one_process(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    for name, value in {**SLURM, **one}.items():
        monkeypatch.setenv(name, value)
    status, _, text = ask("eval run --nproc 1")
    assert status == 0, text


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for task in tasks for child in task.read_text().split())


@pytest.mark.distributed
def test_the_rank_that_died_first_is_blamed_alone() -> None:
    train = f"train text_classification {SMALL} --data.path records.csv --layout dp2 --steps 100000 --out x"
    process = start("-m", "fusemesh", *train.split())
    deadline = time.monotonic() + 80
    while not Path("x/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    # Ranks are forked by a process that the command starts.
    ranks = [rank for child in children(process.pid) for rank in children(child)]
    os.kill(ranks[-1], signal.SIGKILL)
    text = ended(process, 60)
    assert "1 of 2 ranks failed, rank 1 first" in text and "--- rank 0" not in text, text


def test_a_reader_of_a_pipe_may_go() -> None:
    process = start("-m", "fusemesh", "plan", "--model", "gpt2", "--world", "8", "--gpu", "h100")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "BrokenPipe" not in process.stderr.read()
    process.wait()
