"""Layer: application, real commands. Whoever starts the ranks, the run is the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny_run

pytestmark = pytest.mark.distributed
BIN = Path(sys.executable).parent
COMMANDS: dict[str, list[str]] = {
    "fusemesh": [sys.executable],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "RANKS"],
    "mpiexec": [str(BIN / "mpiexec"), "--allow-run-as-root", "--oversubscribe", "-n", "RANKS", sys.executable],
}


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
        # One rank prints one object.
        (line,) = re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)
        assert json.loads(line) == json.loads((folder / "summary.json").read_text())
        steps = [json.loads(entry) for entry in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [step["loss"] for step in steps if "loss" in step] + [json.loads(line)["loss"]]
    assert len(losses["fusemesh"]) == 4
    assert losses["torchrun"] == losses["mpiexec"] == losses["fusemesh"]
