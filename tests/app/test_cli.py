"""The command line: one JSON object, exit states, messages. Layers: one process; fresh processes; 2 gloo ranks."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import time

import pytest

from fusemesh import __version__, cli, config
from fusemesh.commands.ranks import Ranks
from fusemesh.kernels.measure import tune
from fusemesh.tasks.names import TASKS
from fusemesh.tasks.registry import task_class
from tests.support import fresh_process, tiny_run
from tests.support.engine_required import AUTO

DECODE = "cpu" if AUTO == "cpu" else "reference"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_run.write_text(tmp_path_factory.mktemp("text") / "documents")


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run that the command line trained in one process."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "--quiet", *tiny_run.options(text, folder, run__checkpoint_every="3")]) == 0
    return folder


def call(capfd, *arguments):
    """Exit status, the one JSON object on stdout, and stderr. By file descriptor, so that ranks' output counts too."""
    capfd.readouterr()
    status = cli.main([*map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and out.endswith("\n")
    return status, json.loads(out), err


def test_version_and_module():
    out = fresh_process.run(
        "import runpy, sys; sys.argv = ['fusemesh', '--version']; runpy.run_module('fusemesh', run_name='__main__')"
    )
    assert out == f"fusemesh {__version__}\n"


def test_train_eval_merge_in_one_process(run, text, capfd):
    assert config.load(run / "config.toml").training.steps == 6
    assert (run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    status, evaluated, _ = call(capfd, "eval", run)
    assert status == 0 and evaluated["step"] == 6 and evaluated["targets"] == 21 * 16
    assert evaluated["loss"] == json.loads((run / "summary.json").read_text())["held_out"]["loss"]
    _, earlier, _ = call(capfd, "eval", run / "checkpoints" / "step-00000003")
    assert earlier["step"] == 3 and earlier["loss"] > evaluated["loss"]
    for place, cause in (
        ("/proc/x", "permission|not there"),
        (run, "it is a folder, and a file is needed"),
        (".", "is"),
    ):
        status, refused, _ = call(capfd, "merge", run, "--out", place)
        assert status == 2 and re.match(rf"cannot write '{place}': .*({cause})", refused["error"])
    status, refused, _ = call(capfd, "merge", run, "--dtype", "bf16")
    assert status == 2 and refused["error"].startswith("--dtype: expected none for ")
    status, merged, _ = call(capfd, "merge", run)
    assert status == 0 and merged["output"] == str(run / "model.safetensors")
    assert merged["checkpoint"].endswith("step-00000006")
    status, alone, _ = call(capfd, "eval", merged["output"], "--evaluation.samples", "21")
    assert status == 0 and alone["layout"] == "single"
    assert alone["loss"] == pytest.approx(evaluated["loss"], rel=1e-6)
    _, fewer, _ = call(capfd, "eval", merged["output"], "--evaluation.samples=3")
    assert fewer["targets"] == 48 and fewer["loss"] != alone["loss"]
    assert cli.main(["eval", merged["output"], "--evaluation.samples=1"]) == 0
    assert capfd.readouterr().out.endswith(" over 1 sample\n")


def test_text_for_people(run, capfd):
    for arguments, expected in (
        (["eval", run], "step 6, layout single: held-out loss "),
        (["merge", run, "-o", run / "other.safetensors"], "parameters of "),
        (["doctor"], f"auto on cpu     attention: {AUTO}, linear: torch, loss: torch, decode: {DECODE}"),
    ):
        capfd.readouterr()
        assert cli.main(list(map(str, arguments))) == 0
        assert expected in capfd.readouterr().out


@pytest.mark.distributed
def test_local_ranks_follow_from_the_layout_and_resume_takes_the_saved_configuration(run, text, tmp_path, capfd):
    folder = tmp_path / "run"
    options = tiny_run.options(text, folder, run__checkpoint_every="3", layout="dp2")
    status, summary, _ = call(capfd, "train", *options)
    assert status == 0 and summary["world_size"] == 2 and summary["layout"] == "dp2"
    status, longer, _ = call(
        capfd, "train", "--resume", "--run.directory", folder, "--training.steps=8", "--layout=single"
    )
    assert status == 0 and (longer["resumed_from"], longer["steps"], longer["world_size"]) == (6, 8, 1)
    assert longer["held_out"]["targets"] == 21 * 16
    assert longer["tokens"] == 2 * 8 * 16


@pytest.mark.distributed
def test_a_run_in_stages(text, tmp_path, capfd):
    """train, merge, and eval of the merged file, by the command line."""
    folder = tmp_path / "run"
    options = tiny_run.options(text, folder, layout="pp2", pipeline__schedule="gpipe", pipeline__microbatches="2")
    status, summary, _ = call(capfd, "train", "--nproc", "2", *options)
    assert status == 0 and (summary["layout"], summary["world_size"]) == ("pp2", 2)
    _, merged, _ = call(capfd, "merge", folder)
    _, alone, _ = call(capfd, "eval", merged["output"])
    assert (merged["parameters"], alone["layout"]) == (summary["parameters"], "single")
    assert alone["loss"] == pytest.approx(summary["held_out"]["loss"], rel=1e-6)


def test_doctor(capfd):
    status, findings, _ = call(capfd, "doctor")
    assert status == 0
    assert findings["fusemesh"] == __version__ and findings["libraries"]["numpy"]
    assert findings["devices"][0]["device"] == "cpu" and findings["devices"][0]["cores"] >= 1
    assert set(findings["backends"]["cpu"]) == {"reference", "torch", "cpu", "triton"}
    assert findings["backends"]["cpu"]["torch"] is None
    assert "TRITON_INTERPRET=1" in findings["backends"]["cpu"]["triton"]
    assert findings["auto"]["cpu"] == {"attention": AUTO, "linear": "torch", "loss": "torch", "decode": DECODE}
    assert findings["process_groups"]["gloo"] is True
    assert findings["engine"]["available"] is (findings["backends"]["cpu"]["cpu"] is None)


# Python without triton and without the `app` extras.
BARE = (
    fresh_process.WITHOUT_TRITON.replace('== "triton"', "in HIDDEN")
    + '\nHIDDEN = {"triton", "safetensors", "tqdm", "tensorboard", "matplotlib"}\n'
)


def test_doctor_and_training_without_triton_and_extras(text, tmp_path):
    options = tiny_run.options(text, tmp_path / "run")
    code = f"""
        import json
        from fusemesh import cli
        assert cli.main(["doctor"]) == 0
        assert cli.main(["train", *{options!r}]) == 0
        assert cli.main(["eval", {str(tmp_path / "run")!r}]) == 0
        assert cli.main(["merge", {str(tmp_path / "run")!r}, "--json"]) == 2
        import sys
        assert not HIDDEN & sys.modules.keys()
        """
    out = fresh_process.run(code, preamble=BARE)
    assert "triton absent, numpy" in out and "safetensors absent" in out
    assert "no: triton is not installed (pip install triton; Linux only)" in out
    assert "merge needs safetensors; install it with: pip install 'fusemesh[app]'" in out
    assert (tmp_path / "run" / "metrics.jsonl").is_file() and not (tmp_path / "run" / "tensorboard").exists()


WRONG = [
    (["train", "--training.steps", "x"], "--training.steps: expected a whole number, received 'x'"),
    (["train", "--nproc", "3", "--layout", "dp2"], "layout: dp2 needs 2 ranks and 3 were started"),
    (["train", "--nproc", "0"], "--nproc: expected at least 1, received 0"),
    (["train", "--layout", "ep2"], "received 'ep2' with the unknown axis 'ep'"),
    (["train", "--config", "/nowhere.toml"], "config: expected a TOML file, received '/nowhere.toml'"),
    (["train", "--resume", "--run.directory", "/nowhere"], "checkpoint: expected a folder step-* with checkpoint.json"),
    (["eval", "/nowhere"], "or a .safetensors file, received '/nowhere', which does not exist"),
    (["merge", "/nowhere"], "received '/nowhere', which does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_requests_end_with_2_and_one_message(capfd, arguments, message):
    status, result, err = call(capfd, *arguments)
    assert status == 2
    assert result.keys() == {"error"} and message in result["error"]
    assert err.startswith(f"fusemesh {arguments[0]}: error: ") and message in err


GENERATE = [
    (["--beams", "0"], "--beams: expected at least 1, received 0"),
    (["--beams", "2", "--temperature", "1"], "--temperature: expected without --beams 2, .* received 1; leave one"),
    (["--beams", "2", "--top-k", "3"], "--top-k: expected without --beams 2, "),
    (["--temperature", "0"], "--temperature: expected a positive number, received 0.0"),
    (["--top-p", "2"], "--top-p: expected above 0 and at most 1"),
    (["--top-k", "-1"], "--top-k: expected at least 0"),
]


@pytest.mark.parametrize(("options", "message"), GENERATE)
def test_options_of_a_generation_are_named_as_they_were_typed(options, message, run, capfd):
    status, result, _ = call(capfd, "generate", run, "--prompt", "line", *options)
    assert status == 2 and re.match(message, result["error"]) and "Sampling" not in result["error"], result


def test_a_merged_file_is_not_evaluated_as_another_model(run, capfd):
    call(capfd, "merge", run)
    status, result, _ = call(capfd, "eval", run / "model.safetensors", "--model.num_layers", "3")
    expected = "model.num_layers: expected 2, as the model was trained, received 3; leave it out"
    assert status == 2 and expected in result["error"]


def test_a_model_is_not_taken_for_one_of_another_task(run, capfd):
    for name in TASKS:
        status, result, _ = call(capfd, "generate", run, "--task", name, "--tokens", "0")
        expected = (
            "--tokens: expected 1 to 15"
            if task_class(name).continues_texts
            else f"task: expected 'language_model', as the model was trained, received '{name}'"
        )
        assert status == 2 and expected in result["error"]


def test_bench_writes_beneath_runs_or_where_it_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tuned = {"rows": [], "left_out": [], "minutes": 0}
    monkeypatch.setattr(tune, "why_not_here", lambda: None)
    monkeypatch.setattr(tune, "tune_tiles", lambda *_: tuned)
    monkeypatch.setattr(tune, "table", lambda rows: "no rows")
    assert cli.main(["bench", "--tune"]) == 0
    (written,) = tmp_path.rglob("*.json")
    assert written.relative_to(tmp_path).parts[:2] == ("bench", "results") and written.name == "tune.json"
    assert f"written to {written.relative_to(tmp_path)}" in capfd.readouterr().out
    status, result, _ = call(capfd, "bench", "--tune", "--out", tmp_path / "other.json")
    assert status == 0 and result["written"] == str(tmp_path / "other.json") and (tmp_path / "other.json").is_file()
    # Where it cannot write, it tunes nothing.
    monkeypatch.setattr(tune, "tune_tiles", None)
    status, result, _ = call(capfd, "bench", "--tune", "--out", tmp_path / "other.json" / "x.json")
    assert status == 2 and result["error"].startswith(f"--out: cannot write '{tmp_path}/other.json': a file stands")


def test_nproc_is_refused_under_a_launcher(monkeypatch, capfd):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    # The other rank, which would hear of it, never comes.
    monkeypatch.setattr("fusemesh.hybrid.ranks.meeting._LINGER_REFUSED", 0.0)
    status, result, _ = call(capfd, "train", "--nproc", "2", "--layout", "dp2")
    assert status == 2 and "--nproc: expected to be absent under torchrun, which started 2 ranks" in result["error"]
    assert "leave it out, and give the number of ranks to the launcher" in result["error"]


@contextlib.contextmanager
def unwritable(full):
    """A standard output that is full, or whose reader has gone."""
    if full:
        number = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, number = os.pipe()
        os.close(reader)
    file = os.fdopen(number, "w")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


PRINTING = [
    "",
    "--version",
    "plan --model llama3-8b --world 8 --gpu h100",
    "plan --help",
    "doctor --json",
    "merge RUN",
    "eval RUN",
    "predict RUN",
    "predict RUN --json",
    "generate RUN --prompt line",
]


@pytest.mark.parametrize("arguments", PRINTING)
def test_outputs_that_nobody_reads_and_full_ones(run, arguments, monkeypatch, capfd):
    words = [str(run) if word == "RUN" else word for word in arguments.split()]
    full_one = "error: standard output: cannot write to it: No space left on device"
    for full, status, told in ((False, 141, ""), (True, 2, full_one)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("line 1\nline 2\n"))
        capfd.readouterr()
        with unwritable(full) as output, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", output)
            assert cli.main(words) == status
        err = [line for line in capfd.readouterr().err.splitlines() if " error: " in line or "Traceback" in line]
        assert len(err) == bool(told) and told in "".join(err)


def test_nothing_to_answer(run, monkeypatch, capfd):
    for more in ([], ["--layout", "dp2"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        status, result, _ = call(capfd, "predict", run, *more)
        assert (status, result) == (2, {"error": "standard input: expected lines to answer, received nothing"})
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    status, result, _ = call(capfd, "generate", run)
    assert (status, result) == (2, {"error": "standard input: expected a text to continue, received nothing"})


def test_an_interruption_says_how_to_go_on(run, text, tmp_path, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ranks, "call", interrupted)
    status, result, _ = call(capfd, "train", *tiny_run.options(text, tmp_path / "run"))
    assert (status, result["error"]) == (130, "interrupted; no checkpoint has been saved")
    status, result, _ = call(capfd, "train", "--resume", "--out", run, "--steps", "8")
    assert (status, result["error"]) == (130, "interrupted; go on from step-00000006 with --resume")


def test_sigterm_ends_a_run_like_an_interruption(run, monkeypatch, capfd):
    def terminated(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    # Not this process, if the command leaves the signal as it is.
    monkeypatch.setattr(Ranks, "call", terminated)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        status, result, _ = call(capfd, "train", "--resume", "--out", run, "--steps", "8")
        assert (status, result["error"]) == (143, "terminated; go on from step-00000006 with --resume")
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("command", ["train", "scaling"])
def test_a_folder_that_cannot_be_made(command, text, tmp_path, capfd):
    (tmp_path / "file").touch()
    places = {
        "/proc/x": "its folder is not there and cannot be made",
        tmp_path / "file": "a file stands where a folder",
    }
    for place, cause in places.items():
        status, result, _ = call(capfd, command, *tiny_run.options(text, place), "--nproc", "1")
        assert status == 2 and result["error"].startswith(f"run.directory: cannot write '{place}': {cause}")
