"""Does the planner rank layouts as they run, and is its memory right? A real training job on 1 to 4 local processes.

    python bench/planner_ranking.py [--runs 3] [--layouts "single,dp2,tp4"] [--hardware FILE]

Each layout trains the same model, whose parameters, gradients and optimizer states exceed 1 GiB, several times in a
shuffled order; its time is the median over runs of the median step. Beside the wall's time stands what the step would
have taken at least on an idle machine, by the processors' time: the busiest rank's, or all ranks' over the cores.

Memory is the most, over ranks, by which a rank's peak resident set exceeds what it held just before the model was
built, without the pages of library files that it touched since (forked ranks share them and find each at its first
use), in a run of its own in which glibc's malloc gives freed tensors back to the system (MALLOC_MMAP_THRESHOLD_, which
costs time). What it holds otherwise, holes included, stands beside it.

The result is a table, the rank correlations (Spearman) of predicted and measured times with and without the single
process, and planner.json in bench/results/<machine>.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fusemesh import config
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.planner import hardware as stated
from fusemesh.hybrid.planner import measure, search
from fusemesh.kernels.measure import results
from fusemesh.run import planning

LAYOUTS = (
    "single, dp2, fsdp2, tp2, pp2, dp4, fsdp4, tp4, pp4, dp2 x fsdp2, dp2 x tp2, fsdp2 x tp2, dp2 x pp2, fsdp2 x pp2, "
    "tp2 x pp2"
)
SETTINGS = {
    "model.hidden_size": "768",
    "model.num_layers": "12",
    "model.num_heads": "12",
    "model.num_kv_heads": "4",
    "model.intermediate_size": "2048",
    "data.sequence_length": "128",
    "training.global_batch_size": "4",
    "training.steps": "100",
    "run.device": "cpu",
}
STEPS = 2  # timed, after one that is not
# Larger allocations are mappings of their own, which end when they are freed.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}


def file_pages() -> int:
    """Bytes of files, libraries above all, that are resident in this process; ranks share them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


def train(values: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """One rank: seconds of each timed step, of them on a core, and bytes by which the peak exceeded the start."""
    import torch.distributed as dist

    from fusemesh.run.setup import joined
    from fusemesh.run.trainer import Trainer

    with joined(values) as run:
        before, files = measure.resident(), file_pages()
        # "5" sets the peak that the system keeps back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        trainer = Trainer(run, quiet=True)
        times, busy = [], []
        for step in range(STEPS + 1):
            dist.barrier()
            start, on_core = time.perf_counter(), time.process_time()
            trainer.train_step(step)
            times.append(time.perf_counter() - start)
            busy.append(time.process_time() - on_core)
        status, files = Path("/proc/self/status").read_text(), file_pages() - files
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return times[1:], busy[1:], peak - before - files


def run(configured: config.Config, env: dict[str, str]) -> tuple[float, float, int]:
    """Seconds of the median step, at least those by the processors' time, and the largest growth in bytes."""
    from fusemesh.hybrid.ranks.local import LocalRanks

    ranks = Layout.parse(configured.layout).world_size
    with LocalRanks(ranks, {"OMP_NUM_THREADS": "1", **env}) as started:
        results = started.call(train, config.as_dict(configured), timeout=600)
    # A step is over when the slowest rank is done.
    steps = [max(times) for times in zip(*(times for times, _, _ in results), strict=True)]
    cores = os.cpu_count() or 1
    busy = [max(*times, sum(times) / cores) for times in zip(*(busy for _, busy, _ in results), strict=True)]
    return statistics.median(steps), statistics.median(busy), max(grown for _, _, grown in results)


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of ranks; no ties are expected of measured times."""

    def ranked(values: list[float]) -> list[float]:
        order = sorted(values)
        return [float(order.index(value)) for value in values]

    return statistics.correlation(ranked(one), ranked(other))


def legal(names: list[str], base: config.Config) -> list[str]:
    """The layouts that this version trains in."""
    from fusemesh.run.settings import Settings

    found = []
    for name in (str(Layout.parse(name)) for name in names):
        try:
            settings = Settings.of(config.load(base={**config.as_dict(base), "layout": name}))
            settings.check(settings.layout.world_size)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--hardware", metavar="FILE", help="hardware as a measurement gave it; default: measure")
    parser.add_argument("--measured", metavar="FILE", help="an earlier planner.json: only its predictions are renewed")
    parser.add_argument("--memory", action="store_true", help="with --measured: measure the memory again, too")
    parser.add_argument("--output", metavar="FILE")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("\n\n".join(f"{number} is {number * number} squared" * 8 for number in range(400)))
        base = config.load(None, {**SETTINGS, "data.path": str(text), "run.directory": str(Path(folder, "run"))})
        earlier = json.loads(Path(options.measured).read_text())["rows"] if options.measured else None
        names = [row["layout"] for row in earlier] if earlier else legal(options.layouts.split(","), base)
        world = max(Layout.parse(name).world_size for name in names)
        model, job = planning.model_of(base), planning.job_of(base)
        machine = stated.find_hardware(options.hardware) if options.hardware else measure.measure(world)
        rows = earlier or measure_rows(names, base, options.runs)
        if earlier and options.memory:
            for row in rows:
                row["measured_bytes"] = run(
                    config.load(base={**config.as_dict(base), "layout": row["layout"]}), GIVE_BACK
                )[2]

    for row in rows:
        layout = Layout.parse(row["layout"])
        choice = search.consider(model, job, machine, layout)
        assert isinstance(choice, search.Choice), choice
        row["predicted_s"], row["by_kind"] = choice.cost.seconds, choice.cost.by_kind()
        row["predicted_bytes"], row["phases"] = choice.memory.tensors, dict(choice.memory.phases)
    result = summarise(rows)
    record = results.machine()
    path = Path(options.output or Path("bench", "results", results.machine_name(record), "planner.json"))
    written = results.write_results(
        path, {"stage": "planner", "machine": record, "settings": SETTINGS, "hardware": machine.as_dict(), **result}
    )
    print(table(result), f"written to {written}", sep="\n")
    return 0


def measure_rows(names: list[str], base: config.Config, runs: int) -> list[dict[str, Any]]:
    """Each layout's times and memory, over runs in a shuffled order."""
    measured: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    held: dict[str, int] = {}
    for turn in range(runs):
        for name in random.Random(turn).sample(names, len(names)):
            configured = config.load(base={**config.as_dict(base), "layout": name})
            measured[name].append(run(configured, {}))
            if turn == 0:
                held[name] = run(configured, GIVE_BACK)[2]
            wall, on_cores, most = measured[name][-1]
            print(
                f"{name:<16} {wall:.3f} s, {on_cores:.3f} s of processors, {most >> 20} MiB, {held[name] >> 20} MiB",
                file=sys.stderr,
                flush=True,
            )
    rows = []
    for name in names:
        times, busy, grown = zip(*measured[name], strict=True)
        rows.append(
            {
                "layout": name,
                "measured_s": statistics.median(times),
                "runs_s": list(times),
                "processors_s": statistics.median(busy),
                "measured_bytes": held[name],
                "measured_bytes_with_holes": statistics.median(grown),
            }
        )
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations, and how far memory is off."""
    for row in rows:
        row["least_s"] = min(row["runs_s"])
    groups = {"": rows, "_without_single": [row for row in rows if row["layout"] != "single"]}
    correlations = {
        f"spearman{key}{name}": spearman([r["predicted_s"] for r in group], [r[measured] for r in group])
        for name, group in groups.items()
        for key, measured in (("", "measured_s"), ("_of_least", "least_s"), ("_of_processors", "processors_s"))
    }
    sizes = [[row[key] for row in rows] for key in ("predicted_bytes", "measured_bytes")]
    return {
        "rows": rows,
        **correlations,
        "memory_errors": {row["layout"]: row["predicted_bytes"] / row["measured_bytes"] - 1 for row in rows},
        "memory_ratio": {"predicted": max(sizes[0]) / min(sizes[0]), "measured": max(sizes[1]) / min(sizes[1])},
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    heads = ("layout", "predicted", "measured", "spread", "processors")
    lines = [f"{heads[0]:<16} {heads[1]:>9} {heads[2]:>9}  {heads[3]:<15} {heads[4]:>10}   memory: predicted, measured"]
    for row in sorted(result["rows"], key=lambda row: row["measured_s"]):
        spread = f"{min(row['runs_s']):.2f} to {max(row['runs_s']):.2f}"
        lines.append(
            f"{row['layout']:<16} {row['predicted_s']:>7.3f} s {row['measured_s']:>7.3f} s  {spread:<15} "
            f"{row['processors_s']:>8.3f} s   {row['predicted_bytes'] / 2**20:>6.0f} MiB "
            f"{row['measured_bytes'] / 2**20:>6.0f} MiB {result['memory_errors'][row['layout']]:>+5.0%} "
            f"({row['measured_bytes_with_holes'] / 2**20:.0f} with holes)"
        )
    ratio = result["memory_ratio"]
    for what, key in (
        ("median times", ""),
        ("the least of the runs", "_of_least"),
        ("processors' times", "_of_processors"),
    ):
        lines.append(
            f"rank correlation with {what}: {result[f'spearman{key}']:.2f}, without the single process "
            f"{result[f'spearman{key}_without_single']:.2f}"
        )
    lines.append(f"most over least memory: predicted {ratio['predicted']:.2f}, measured {ratio['measured']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
