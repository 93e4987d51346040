"""Strong scaling: the same training job, same global batch, on more and more local processes of one thread each."""

from __future__ import annotations

import dataclasses
import logging
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
from fusemesh.hybrid.outputs import make_folder, writing
from fusemesh.hybrid.ranks.local import LocalRanks
from fusemesh.kernels.measure import results as benchmark
from fusemesh.run.drawing import draw_speed_up
from fusemesh.run.metrics import OUT
from fusemesh.spelling import suggestion

logger = logging.getLogger("fusemesh")

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
        raise ValueError(f"--axis: expected one of {', '.join(AXES)}, received {axis!r}{suggestion(axis, AXES)}")
    if runs < 1 or not numbers or min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise ValueError(f"--nproc, --runs: expected different numbers above 0, received {list(numbers)}, {runs}")
    from fusemesh.run.trainer import prepare
    from fusemesh.tasks.registry import with_length

    config = with_length(config)
    folder = make_folder(config.run.directory, what=OUT)
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
    result = {"cores": cores(), "tokens_per_step": tokens, "machine": benchmark.machine(), "rows": rows}
    with writing(folder / "scaling.json", what=OUT):
        files = [str(benchmark.write_results(folder / "scaling.json", result))]
    try:
        draw_speed_up(result, folder / "scaling.png")
        files.append(str(folder / "scaling.png"))
    except (ValueError, OSError) as error:
        logger.warning("scaling.png is not drawn: %s", error)
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
