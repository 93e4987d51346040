"""Layer: application, real commands. Runs whose ranks are killed or stopped at any moment end soon, and go on.

One run is hit again and again and resumed each time; what it consumed and where it ends are the uninterrupted run's.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.data import BatchOrder
from fusemesh.hybrid.layout import Layout
from fusemesh.tasks.language_model import Samples, load_corpus
from tests.support import tiny_run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc"),
]
COMMON = {
    "training__warmup_steps": "3",
    "run__checkpoint_every": "4",
    "run__keep_checkpoints": "2",
    "run__record_samples": "true",
    "evaluation__samples": "4",
}


def start(text: str, folder: Path, layout: str, steps: int) -> subprocess.Popen[str]:
    options = tiny_run.options(text, folder, layout=layout, training__steps=str(steps), **COMMON)
    resume = ["--resume"] if checkpoint.all_checkpoints(folder / "checkpoints") else []
    command = [sys.executable, "-m", "fusemesh", "train", "--json", "--quiet", *options, *resume]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children_of(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def ranks_of(launcher: int) -> list[int]:
    """The processes of the ranks, in rank order: forked by the one that the launcher spawned."""
    spawned = [pid for pid in children_of(launcher) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    return sorted(rank for nursery in spawned for rank in children_of(nursery))


def consumed(folder: Path) -> list[dict]:
    """Every record that any rank has written so far."""
    lines = [line for path in (folder / "samples").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def hit(run: subprocess.Popen[str], folder: Path, victim: int, number: signal.Signals, moment: float | None) -> None:
    """Send the signal ``moment`` seconds after the run takes its first step, or (None) while it writes a checkpoint."""
    before, deadline = len(consumed(folder)), time.monotonic() + 300
    while len(consumed(folder)) == before and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if moment is None:
        while run.poll() is None and not list((folder / "checkpoints").glob(".unfinished-*")):
            time.sleep(0.0005)
    else:
        time.sleep(moment)
    if run.poll() is None:
        os.kill(ranks_of(run.pid)[victim], number)


def ends_in_time(run: subprocess.Popen[str], victim: int, pids: list[int]) -> None:
    """Within 30 s, with status 1 and the rank's name, and no process is left."""
    began = time.monotonic()
    out, err = run.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert run.returncode == 1, err
    assert re.match(rf"1 of \d ranks failed, rank {victim} first", json.loads(out)["error"]), out
    assert json.loads(out)["error"].count("--- rank") == 1
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def weights(folder: Path, steps: int, tmp: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's model."""
    last = checkpoint.latest(folder / "checkpoints")
    assert checkpoint.step_of(last) == steps
    dcp_to_torch_save(last, tmp)
    return torch.load(tmp, weights_only=True)["model"]


def finish(run: subprocess.Popen[str]) -> dict:
    out, err = run.communicate(timeout=500)
    assert run.returncode == 0, err
    return json.loads(out)


def check_samples(text: str, folder: Path, steps: int) -> None:
    """Of each step the last attempt counts; its replicas together took what the order says: none lost, none twice."""
    order = BatchOrder(len(Samples(load_corpus(text).train, 16)), 8, seed=0)
    taken_in: dict[int, list[dict]] = {}
    for record in consumed(folder):
        taken_in.setdefault(record["step"], []).append(record)
    assert sorted(taken_in) == list(range(1, steps + 1))
    for step, records in taken_in.items():
        last = max(record["attempt"] for record in records)
        of_replica: dict[int, list[int]] = {}
        for record in records:
            if record["attempt"] == last:
                assert of_replica.setdefault(record["replica"], record["samples"]) == record["samples"]
        taken = [sample for replica in sorted(of_replica) for sample in of_replica[replica]]
        assert taken == order.step(step - 1).tolist(), step


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.write_text(tmp_path_factory.mktemp("text") / "documents")


def uninterrupted(text: str, folder: Path, steps: int, layout: str = "dp2 x tp2") -> dict:
    summary = finish(start(text, folder, layout, steps))
    check_samples(text, folder, steps)
    return summary


def hit_and_resume(text: str, folder: Path, layouts: list[str], moments: list[float | None], steps: int) -> dict:
    """Hit the run once for each moment, with random victims, each time in the next layout; then let it finish."""
    draw = random.Random(steps)
    for turn, moment in enumerate(moments):
        layout = layouts[turn % len(layouts)]
        run = start(text, folder, layout, steps)
        victim = draw.randrange(Layout.parse(layout).world_size)
        number = (signal.SIGKILL, signal.SIGSTOP)[turn % 2]
        hit(run, folder, victim, number, moment)
        assert run.poll() is None, "the run was over before it was hit; give it more steps"
        ends_in_time(run, victim, ranks_of(run.pid))
    summary = finish(start(text, folder, layouts[len(moments) % len(layouts)], steps))
    check_samples(text, folder, steps)
    return summary


def moments_of(count: int, seed: int) -> list[float | None]:
    """Half of them while a checkpoint is written."""
    draw = random.Random(seed)
    return [None if turn % 4 in (0, 3) else draw.uniform(0, 0.6) for turn in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "count", "steps"), [("dp2", 1, 16), ("dp2 x tp2", 10, 160)])
def test_a_run_that_is_hit_ends_as_if_it_had_not_been(
    layout: str, count: int, steps: int, text: str, tmp_path: Path
) -> None:
    """To the bit in the same layout."""
    whole = tmp_path / "whole"
    expected = uninterrupted(text, whole, steps, layout)
    summary = hit_and_resume(text, tmp_path / "run", [layout], moments_of(count, 0), steps)
    assert summary["loss"] == expected["loss"]
    found, exact = weights(tmp_path / "run", steps, tmp_path / "a.pt"), weights(whole, steps, tmp_path / "b.pt")
    assert found.keys() == exact.keys() and all(torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.slow
def test_and_in_another_layout_each_time(text: str, tmp_path: Path) -> None:
    """With other numbers of replicas and stages."""
    expected = uninterrupted(text, tmp_path / "whole", 80)
    layouts = ["dp4", "fsdp2 x tp2", "pp2 x dp2", "tp2"]
    summary = hit_and_resume(text, tmp_path / "run", layouts, moments_of(4, 1), 80)
    assert summary["loss"] == pytest.approx(expected["loss"], rel=1e-4)
