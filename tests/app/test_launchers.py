"""Layer: application, real commands. Whoever starts the ranks, the run is the same; docs/launching.md can be copied."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fusemesh import cli
from tests.support import tiny_run

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
COMMANDS: dict[str, list[str]] = {
    "fusemesh": [sys.executable],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "RANKS"],
    "mpiexec": [str(BIN / "mpiexec"), "--allow-run-as-root", "--oversubscribe", "-n", "RANKS", sys.executable],
}
PAGE, BATCH_FILE = ROOT / "docs/launching.md", ROOT / "examples/two_nodes.sbatch"
# A job of two nodes with one task each, both on this machine.
SRUN = """#!/bin/bash
tasks=2
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
export SLURM_STEP_ID=$$ SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_NODELIST=localhost SLURM_LOCALID=0
export SLURM_STEP_TASKS_PER_NODE="1(x$tasks)"
for ((rank = 0; rank < tasks; rank++)); do
    SLURM_PROCID=$rank SLURM_NODEID=$rank "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
exit $status
"""


def command_lines(path: Path) -> list[list[str]]:
    """The words of each command of a page or a batch file that starts ranks."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    joined = re.sub(r" \\\n\s*", " ", text)
    lines = [line.strip() for line in joined.splitlines() if re.match(r"\s*(torchrun|srun|mpirun)\b", line)]
    return [shlex.split(line.replace('"${RESUME[@]}" "$@"', "--resume")) for line in lines]


@pytest.mark.parametrize("path", [PAGE, BATCH_FILE], ids=lambda path: path.name)
def test_documented_commands_parse(path: Path) -> None:
    from torch.distributed.run import get_args_parser

    commands = command_lines(path)
    assert {words[0] for words in commands} == ({"torchrun", "srun", "mpirun"} if path == PAGE else {"srun"})
    for words in commands:
        at = words.index("-m")
        assert words[at + 1] == "fusemesh"
        cli.parser().parse_args(words[at + 2 :])
        if words[0] == "torchrun":
            parsed = get_args_parser().parse_args(words[1:])
            assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "4", "c10d")


def test_every_variable_that_is_read_is_documented() -> None:
    page = PAGE.read_text()
    read = {
        name
        for file in ("ranks/environment.py", "ranks/local.py", "compat.py")
        for name in re.findall(r'"([A-Z]{3,}_[A-Z_]+|RANK)"', (ROOT / "hybrid" / file).read_text())
    }
    assert len(read) > 30 and {"SLURM_STEP_ID", "PMI_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"} <= read
    assert not [name for name in read if f"`{name}`" not in page]


def run_of(folder: Path, out: str) -> list[float]:
    """The losses of a run, which printed one object."""
    (line,) = re.findall(r"^\{.*\}$", out, re.MULTILINE)
    assert json.loads(line) == json.loads((folder / "summary.json").read_text())
    steps = [json.loads(entry) for entry in (folder / "metrics.jsonl").read_text().splitlines()]
    return [step["loss"] for step in steps if "loss" in step] + [json.loads(line)["loss"]]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "ranks"), [("tp2", 2), ("dp2 x tp2", 4)])
def test_the_same_losses_under_each_launcher(layout: str, ranks: int, tmp_path: Path) -> None:
    text = tiny_run.write_text(tmp_path / "text")
    losses = {}
    for name, command in COMMANDS.items():
        folder = tmp_path / name
        options = tiny_run.options(text, folder, layout=layout)
        words = [str(ranks) if word == "RANKS" else word for word in command]
        done = subprocess.run(
            [*words, "-m", "fusemesh", "train", "--json", *options], capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        losses[name] = run_of(folder, done.stdout)
    assert len(losses["fusemesh"]) == 4
    assert losses["torchrun"] == losses["mpiexec"] == losses["fusemesh"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.write_text(tmp_path_factory.mktemp("text") / "documents")


@pytest.fixture(scope="module")
def alone(text: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run on local ranks."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "fusemesh", "train", "--json", *tiny_run.options(text, folder, layout="dp2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run_of(folder, done.stdout)


@pytest.mark.slow
def test_two_agents_of_torchrun(text: str, alone: list[float], tmp_path: Path) -> None:
    """The documented line, on two machines that are one: an agent each, with one rank."""
    (words,) = [words for words in command_lines(PAGE) if words[0] == "torchrun"]
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    own = {"--nproc-per-node": "1", "--rdzv-endpoint": endpoint}
    launcher = [own.get(before, word) for before, word in itertools.pairwise(words[: words.index("-m")])]
    command = [str(BIN / "torchrun"), *launcher, "-m", "fusemesh", "train", "--json"]
    options = tiny_run.options(text, tmp_path / "run", layout="dp2")
    agents = [
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    done = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], done
    assert run_of(tmp_path / "run", "".join(out for out, _ in done)) == alone


def test_the_batch_file_goes_on_from_whole_checkpoints_alone(tmp_path: Path) -> None:
    """Submitted again after a job that ended before its first checkpoint was whole, it was refused."""
    tools, checkpoints = tmp_path / "bin", tmp_path / "run/checkpoints"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tools / "srun").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    variables |= {"SLURM_SUBMIT_DIR": str(tmp_path), "OUT": str(tmp_path / "run")}
    resumed = []
    for folder in (".unfinished-step-00000002", "step-00000002"):
        (checkpoints / folder).mkdir(parents=True)
        if not folder.startswith("."):
            (checkpoints / folder / "checkpoint.json").touch()
        done = subprocess.run(["bash", str(BATCH_FILE)], capture_output=True, text=True, env=variables, check=True)
        resumed.append("--resume" in done.stdout)
    assert resumed == [False, True]


@pytest.mark.slow
def test_the_batch_file_on_two_nodes(text: str, alone: list[float], tmp_path: Path) -> None:
    """It trains and merges; submitted again with more steps, it goes on."""
    tools, folder = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    for name, script in (("srun", SRUN), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": f"test-{os.getpid()}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NTASKS": "2"}
    job |= {"LAYOUT": "dp2", "DATA": text, "OUT": str(folder), "SLURM_CPUS_PER_TASK": "1"}
    variables = {**os.environ, **job, "PATH": f"{tools}:{os.environ['PATH']}"}
    skipped = ("--layout=", "--data.path=", "--run.directory=")
    options = [option for option in tiny_run.options(text, folder) if not option.startswith(skipped)]
    for steps in ([], ["--training.steps=8"]):
        done = subprocess.run(
            ["bash", str(BATCH_FILE), *options, "--json", *steps],
            capture_output=True,
            text=True,
            timeout=300,
            env=variables,
        )
        assert done.returncode == 0, done.stderr
        if not steps:
            assert run_of(folder, done.stdout) == alone
    assert (folder / "model.safetensors").is_file()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 8
