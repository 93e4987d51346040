"""Strong scaling: the same training job, same global batch, on more and more local processes of one thread each."""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusemesh import config as configuration
from fusemesh.config import Config
from fusemesh.hybrid.layout import AXES
from fusemesh.hybrid.ranks.local import LocalRanks
from fusemesh.kernels.measure import results as benchmark

# Steps that each run takes before those that count: buffers, plans and caches are made in them.
_WARM_UP = 2


def measure(config: Config, numbers: Sequence[int], *, axis: str = "dp", runs: int = 3) -> dict[str, Any]:
    """Time the configured job on each number of processes; write scaling.json and scaling.png into run.directory.

    Rows take turns, so that a machine that grows slower or is busy for a while does not favour one of them.

    Args:
        config: the job; ``training.steps`` counts the timed steps, ``training.global_batch_size`` is that of every row.
        numbers: of processes; the first is what the others are compared with.
        axis: of the layout, on which all processes of a row lie.
        runs: of each row; its time is the median over runs of the median step.

    Returns:
        ``rows`` of processes, layout, step_s, tokens_per_s, speed_up and efficiency (speed-up over the ratio of
        processes), with ``cores``, ``machine`` and the files written.

    Raises:
        ValueError: a number that the job cannot run on, before anything has started.
    """
    if axis not in AXES:
        raise ValueError(f"--axis: expected one of {', '.join(AXES)}, received {axis!r}")
    if runs < 1 or not numbers or min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise ValueError(f"--nproc, --runs: expected different numbers above 0, received {list(numbers)}, {runs}")
    from fusemesh.run.trainer import prepare

    jobs = {}
    with tempfile.TemporaryDirectory() as nowhere:
        for number in numbers:
            run = dataclasses.replace(config.run, threads=1, directory=nowhere)
            jobs[number] = dataclasses.replace(config, layout="single" if number == 1 else f"{axis}{number}", run=run)
            prepare(jobs[number], number, resume=False)
        seconds: dict[int, list[float]] = {number: [] for number in numbers}
        for turn in range(runs):
            order = list(numbers)
            random.Random(turn).shuffle(order)
            for number in order:
                with LocalRanks(number, {"OMP_NUM_THREADS": "1"}) as ranks:
                    taken = ranks.call(time_steps, configuration.as_dict(jobs[number]))
                seconds[number].append(statistics.median(max(step) for step in zip(*taken, strict=True)))
    tokens = config.training.global_batch_size * config.data.sequence_length
    base = statistics.median(seconds[numbers[0]])
    rows = []
    for number in numbers:
        step = statistics.median(seconds[number])
        rows.append(
            {
                "processes": number,
                "layout": jobs[number].layout,
                "step_s": step,
                "runs_s": seconds[number],
                "tokens_per_s": tokens / step,
                "speed_up": base / step,
                "efficiency": base / step * numbers[0] / number,
            }
        )
    folder = Path(config.run.directory)
    result = {"cores": cores(), "tokens_per_step": tokens, "machine": benchmark.machine(), "rows": rows}
    files = [str(benchmark.write_results(folder / "scaling.json", result))]
    if draw(result, folder / "scaling.png"):
        files.append(str(folder / "scaling.png"))
    return {**result, "files": files}


def time_steps(values: dict[str, Any]) -> list[float]:
    """Return the seconds of each step on this rank; all ranks begin a step together."""
    import torch
    import torch.distributed as dist

    from fusemesh.run.setup import joined
    from fusemesh.run.trainer import Trainer

    taken = []
    with joined(values) as run:
        trainer = Trainer(run, quiet=True)
        for step in range(_WARM_UP + run.config.training.steps):
            dist.barrier()
            began = time.perf_counter()
            trainer.train_step(step)
            if run.world.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    return taken[_WARM_UP:]


def cores() -> int:
    """Return the number of cores that this process may use; hardware threads of one core count once on Linux."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    found = set()
    for number in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            found.add(siblings.read_text())
        except OSError:
            found.add(str(number))
    return len(found)


def table(result: dict[str, Any]) -> str:
    """Return the rows as text, with the number of cores, which limits the speed-up."""
    lines = [
        f"{result['cores']} cores; one thread a process; {result['tokens_per_step']} tokens a step in every row",
        f"{'processes':>9}  {'layout':<8}  {'step':>9}  {'tokens/s':>9}  {'speed-up':>8}  {'efficiency':>10}",
    ]
    for row in result["rows"]:
        more = "" if row["processes"] <= result["cores"] else "  more processes than cores"
        lines.append(
            f"{row['processes']:>9}  {row['layout']:<8}  {row['step_s']:>7.3f} s  {row['tokens_per_s']:>9.0f}  "
            f"{row['speed_up']:>8.2f}  {row['efficiency']:>10.0%}{more}"
        )
    return "\n".join([*lines, *(f"written to {path}" for path in result.get("files", ()))])


def draw(result: dict[str, Any], path: Path) -> bool:
    """Draw the speed-up over processes as a PNG, beside the cores' limit; return False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = result["rows"]
    x, first = [row["processes"] for row in rows], rows[0]["processes"]
    limit = [min(n, result["cores"]) / min(first, result["cores"]) for n in x]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(x, [n / first for n in x], ":", color="tab:gray", label="one core more for each process")
    axes.plot(x, limit, "--", color="black", label=f"what {result['cores']} cores allow")
    axes.plot(x, [row["speed_up"] for row in rows], "o-", color="tab:blue", label="measured")
    for row in rows:
        axes.annotate(
            f"{row['efficiency']:.0%}", (row["processes"], row["speed_up"]), textcoords="offset points", xytext=(6, -14)
        )
    axes.margins(x=0.1)
    axes.set_xticks(x)
    axes.set(
        xlabel="processes",
        ylabel=f"speed-up over {first}",
        title=f"The same job on more processes ({result['machine']['cpu']})",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    return True
