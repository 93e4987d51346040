"""The three tasks by their defaults, each trained from scratch in several layouts: time, metric, baseline; and one of
the merged checkpoints evaluated in every layout, which must give the same metric to the last digit.

    python bench/task_metrics.py [--tasks text_classification,translation,question_answering]
        [--layouts "single,dp2,dp2 x tp2,pp2"] [--keep FOLDER]

Writes bench/results/<machine>/tasks.json and prints a table. One thread per process, as local ranks have it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fusemesh.kernels.measure import results
from fusemesh.run.settings import load_config

TASKS = "text_classification,translation,question_answering"
LAYOUTS = "single,dp2,dp2 x tp2,pp2"


def fusemesh(*arguments: str) -> dict[str, Any]:
    """One command's JSON; its messages pass through."""
    done = subprocess.run([sys.executable, "-m", "fusemesh", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"bench/task_metrics.py: {' '.join(arguments)} ended with {done.returncode}: {done.stdout}")
    return json.loads(done.stdout)


def metrics_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Everything of an evaluation that must not depend on the layout."""
    return {key: value for key, value in answer.items() if isinstance(value, (int, float)) and "second" not in key}


def task_rows(task: str, layouts: list[str], folder: Path) -> dict[str, Any]:
    """Train in each layout, then evaluate one merged checkpoint in all."""
    rows = []
    for layout in layouts:
        out = folder / f"{task}-{layout.replace(' ', '')}"
        start = time.perf_counter()
        summary = fusemesh("train", task, "--layout", layout, "--out", str(out), "--quiet")
        seconds = time.perf_counter() - start
        rows.append({"layout": layout, "minutes": seconds / 60, "held_out": summary["held_out"], "folder": str(out)})
        print(f"{task:22} {layout:10} {seconds / 60:4.1f} min  {rows[-1]['held_out']}", flush=True)
    merged = fusemesh("merge", rows[-1]["folder"])["output"]
    answers = {layout: metrics_of(fusemesh("eval", merged, "--layout", layout)) for layout in layouts}
    losses = [answer.pop("loss") for answer in answers.values()]
    same = all(answer == answers[layouts[0]] for answer in answers.values())
    print(
        f"{task:22} one checkpoint in all layouts: {'the same metrics' if same else answers}; losses {losses}",
        flush=True,
    )
    return {"task": task, "steps": load_config(None, {"task": task}).training.steps, "rows": rows, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--keep", metavar="FOLDER", help="where the runs stay; default: nowhere")
    options = parser.parse_args()
    layouts = [layout.strip() for layout in options.layouts.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary)
        found = [task_rows(task.strip(), layouts, folder) for task in options.tasks.split(",")]
    record = results.machine()
    # Runs that stand in the file of an earlier call stay, unless they were made again.
    path = Path(__file__).parent / "results" / results.machine_name(record) / "tasks.json"
    earlier = json.loads(path.read_text())["tasks"] if path.is_file() else []
    found += [task for task in earlier if task["task"] not in {made["task"] for made in found}]
    print(f"written to {results.write_results(path, {'machine': record, 'tasks': found})}")


if __name__ == "__main__":
    main()
