"""The C++ engine against PyTorch's attention, and against what else a CPU's user could install, in one run.

    python bench/cpu_engine.py [--only PATTERN] [--rounds 7] [--threads 2] [--no-save]

Every case is checked against the fp64 reference before it is timed; contenders take turns, and a ratio is the median of
the ratios of the rounds. The ceilings (FMA and bf16 dot products in registers, reading of memory) are measured by
bench/cpu/probe.cpp in the same run. Writes bench/results/<machine>/cpu_engine.json and a roofline plot beside it.

onnxruntime, openvino and jax are compared where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Run as a script, Python looks beside this file; the imports start at the clone's root.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])


import torch
from torch.nn import functional as F

from bench.peers import cpu as cpu_peers
from fusemesh.kernels import engine, measure
from fusemesh.kernels.measure import contest
from fusemesh.kernels.measure.cases import AttentionCase, DecodeCase, self_attention
from fusemesh.kernels.measure.cases.common import Inputs

HERE = Path(__file__).parent
TimedCall = Callable[[], Any]


@dataclass(frozen=True)
class Floor:
    """The floor of a row of the table: a ratio to PyTorch's time, or a share of a ceiling, whichever comes first."""

    ratio: float
    percent: float
    ceiling: str  # "compute" or "read"
    both: bool = False  # not either but both


@dataclass(frozen=True)
class Row:
    """One row of the table: a case, forward, backward or decode (one query), in a group with a floor."""

    group: str
    operation: str
    case: AttentionCase | DecodeCase

    @property
    def name(self) -> str:
        """The operation, and the case."""
        return f"{self.operation} {self.case.name}"

    @property
    def direction(self) -> str:
        """``forward`` or ``backward``."""
        return "backward" if self.operation == "backward" else "forward"


FLOORS = {
    "forward bf16": Floor(3.0, 65, "compute"),
    "backward bf16": Floor(1.8, 55, "compute"),
    "forward fp32": Floor(1.8, 75, "compute"),
    "backward fp32": Floor(1.6, 70, "compute"),
    "decode GQA bf16": Floor(35, 60, "read", both=True),
    "decode MHA fp32": Floor(1.4, 80, "read"),
    "decode MHA bf16": Floor(4, 80, "read"),
    "short": Floor(1.0, 1000, "compute"),
}


def table() -> list[Row]:
    """Return every row."""
    rows = []
    for operation in ("forward", "backward"):
        for dtype in ("bf16", "fp32"):
            for dim in (64, 128):
                for length in (1024, 2048, 4096, 8192):
                    for causal in (False, True):
                        case = self_attention(dtype, 1, 8, 8, length, dim, causal)
                        rows.append(Row(f"{operation} {dtype}", operation, case))
    rows.append(Row("decode GQA bf16", "decode", decode("bf16", 1, 16, 2, 32768)))
    for dtype in ("fp32", "bf16"):
        rows.append(Row(f"decode MHA {dtype}", "decode", decode(dtype, 4, 8, 8, 8192)))
    for operation in ("forward", "backward"):
        for dtype in ("bf16", "fp32"):
            for length in (64, 128, 256):
                rows.append(Row("short", operation, self_attention(dtype, 16, 8, 8, length, 64, False)))
            rows.append(Row("short", operation, AttentionCase(dtype, 3, 5, 5, 197, 333, 80, 80)))
            rows.append(Row("short", operation, self_attention(dtype, 2, 6, 6, 1001, 72, True)))
    return rows


def decode(dtype: str, batch: int, heads: int, kv_heads: int, keys: int) -> DecodeCase:
    """Return the case of one query over full caches."""
    return DecodeCase(dtype, heads, kv_heads, D=128, Dv=128, capacity=keys, lens=(keys,) * batch)


def contenders(row: Row, x: Inputs) -> dict[str, TimedCall]:
    """Return the timed calls by name: the engine, PyTorch, and others that are installed."""
    case = row.case
    causal, gqa = isinstance(case, AttentionCase) and case.causal, case.Hkv != case.H
    k, v = ("k_cache", "v_cache") if isinstance(case, DecodeCase) else ("k", "v")
    found = {
        "cpu": contest.our_backend(case, "cpu"),
        "torch": contest.Contender(
            "torch",
            False,
            lambda x: F.scaled_dot_product_attention(x["q"], x[k], x[v], is_causal=causal, enable_gqa=gqa),
        ),
    }
    if row.operation == "backward":
        return {name: contest.backward_call(case, contender, x) for name, contender in found.items()}
    calls: dict[str, TimedCall] = {name: partial(contender.forward, x) for name, contender in found.items()}
    # Some of the others take a minute for the longest.
    if case.Sq * x[k].shape[2] <= 2**22:
        calls |= cpu_peers.contenders({"q": x["q"], "k": x[k], "v": x[v]}, causal, case.dtype)
    return calls


def expected(row: Row, x: Inputs) -> Any:
    """Return the right results of the first head and the last, or None where they would take too long."""
    keys = x["k_cache" if isinstance(row.case, DecodeCase) else "k"].shape[2]
    if row.operation == "backward" and keys * row.case.Sq > 2**24:
        return None  # the same code is checked at smaller sizes
    return row.case.expected_at_ends(x, row.direction)


def check(row: Row, want: Any, result: Any) -> None:
    """Check that a contender's result is within the error budget; AssertionError where it is not."""
    names = ("dq", "dk", "dv") if row.operation == "backward" else ("out",)
    results = result if isinstance(result, tuple) else (result,)
    if want is not None:
        row.case.check({n: cpu_peers.tensor_of(r) for n, r in zip(names, results, strict=True)}, want)


def probe(threads: int) -> dict[str, float]:
    """FLOP/s in fp32 and bf16, and bytes/s read."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("bench/cpu_engine.py: expected a C++ compiler for the probe of the ceilings; install g++")
    with tempfile.TemporaryDirectory() as folder:
        built = str(Path(folder, "probe"))
        command = [
            compiler,
            "-O3",
            "-march=native",
            "-std=c++17",
            "-pthread",
            str(HERE / "cpu" / "probe.cpp"),
            "-o",
            built,
        ]
        subprocess.run(command, check=True)
        lines = subprocess.run([built, str(threads)], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(("fp32", "bf16", "read"), map(float, lines), strict=True))


def measured(row: Row, rounds: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Return one row of results: each contender's seconds, and the ratio of PyTorch's time to ours."""
    case, x = row.case, row.case.inputs()
    calls, want = contenders(row, x), expected(row, x)
    wrong = {}
    for name, call in list(calls.items()):
        try:
            check(row, want, call())
        except AssertionError as error:
            wrong[name] = str(error).splitlines()[0]
            if name == "cpu":
                raise
            if name != "torch":  # PyTorch's own error is what the budget is made of: it stays
                del calls[name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    inner = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        inner[name] = max(1, min(50, int(0.02 / (time.perf_counter() - start))))
    # Ours and PyTorch's take turns; the others come after them, for their threads go on spinning when a call is over.
    pair = {name: calls.pop(name) for name in ("cpu", "torch")}
    for turns in (pair, calls):
        for _ in range(rounds):
            for name, call in turns.items():
                start = time.perf_counter()
                for _ in range(inner[name]):
                    call()
                times[name].append((time.perf_counter() - start) / inner[name])
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(theirs / ours for ours, theirs in zip(times["cpu"], times["torch"], strict=True))
    floor = FLOORS[row.group]
    flops, moved = case.flops(row.direction), case.bytes_moved(row.direction)
    peak = ceilings["fp32"] if case.dtype == "fp32" or not ceilings["bf16"] else ceilings["bf16"]
    percent_compute = 100 * flops / seconds["cpu"] / peak
    percent_read = 100 * moved / seconds["cpu"] / ceilings["read"]
    percent = percent_compute if floor.ceiling == "compute" else percent_read
    reached = (ratio >= floor.ratio, percent >= floor.percent)
    return {
        "group": row.group,
        "case": row.name,
        "seconds": seconds,
        "ratio": ratio,
        "gflops": flops / seconds["cpu"] / 1e9,
        "torch_gflops": flops / seconds["torch"] / 1e9,
        "percent_of_compute": percent_compute,
        "percent_of_read": percent_read,
        "intensity": flops / moved,
        "floor_reached": all(reached) if floor.both else any(reached),
        "wrong": wrong,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    others = "  ".join(
        f"{name} {seconds / row['seconds']['cpu']:.2f}x"
        for name, seconds in row["seconds"].items()
        if name not in ("cpu", "torch")
    )
    mark = "" if row["floor_reached"] else "  BELOW"
    return (
        f"{row['case']:46} {row['seconds']['cpu'] * 1e3:9.3f} ms {row['gflops']:7.0f} GFLOP/s "
        f"{row['percent_of_compute']:4.0f} % {row['percent_of_read']:4.0f} % read  torch {row['torch_gflops']:5.0f}  "
        f"{row['ratio']:6.2f}x  {others}{mark}"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """The README's table: the range over each group of GFLOP/s, of the ceiling's share, and of the ratio to PyTorch."""

    def between(values: list[float], digits: int) -> str:
        low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        short = f"short {row['case'].split()[0]}" if row["group"] == "short" else row["group"]
        groups.setdefault(short, []).append(row)
    lines = []
    for name, part in groups.items():
        share = "percent_of_read" if FLOORS[part[0]["group"]].ceiling == "read" else "percent_of_compute"
        cells = ([row["gflops"] for row in part], [row[share] for row in part], [row["ratio"] for row in part])
        lines.append(f"| {name} | {between(cells[0], 0)} | {between(cells[1], 0)} % | {between(cells[2], 1)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], ceilings: dict[str, float], machine: str, path: Path) -> None:
    """Every case under its roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, ("fp32", "bf16"), strict=True):
        peak = ceilings[dtype] or ceilings["fp32"]
        intensities = [10 ** (i / 20) for i in range(-10, 81)]
        axis.loglog(intensities, [min(peak, i * ceilings["read"]) / 1e9 for i in intensities], "k-", linewidth=1)
        mine = [row for row in rows if f" {dtype} " in row["case"]]
        for operation, marker in (("forward", "o"), ("backward", "s"), ("decode", "^")):
            part = [row for row in mine if row["case"].startswith(operation)]
            for name, colour, key in (("FuseMesh", "tab:blue", "gflops"), ("PyTorch", "tab:orange", "torch_gflops")):
                points = ([row["intensity"] for row in part], [row[key] for row in part])
                axis.plot(*points, marker, color=colour, alpha=0.7, label=f"{name} {operation}", markersize=5)
        axis.set_title(f"{dtype}: peak {peak / 1e9:.0f} GFLOP/s, read {ceilings['read'] / 1e9:.0f} GB/s")
        axis.set_xlabel("FLOPs per byte of inputs and outputs")
        axis.grid(which="both", alpha=0.2)
    axes[0].set_ylabel("GFLOP/s")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Attention on {machine}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name or group matches this regular expression")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--threads", type=int, default=2, help="of every contender")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = measure.machine()
    print(f"{record['cpu']}, {options.threads} threads, torch {record['torch']}, engine {engine.build_info()['isa']}")
    ceilings = probe(options.threads)
    print(
        f"peaks: fp32 {ceilings['fp32'] / 1e9:.0f}, bf16 {ceilings['bf16'] / 1e9:.0f} GFLOP/s, "
        f"read {ceilings['read'] / 1e9:.1f} GB/s"
    )
    rows = []
    for row in table():
        if re.search(options.only, row.name) or re.search(options.only, row.group):
            rows.append(measured(row, options.rounds, ceilings))
            print(line(rows[-1]), flush=True)
    below = [row["case"] for row in rows if not row["floor_reached"]]
    print(f"{len(rows) - len(below)} of {len(rows)} cases at or above their floor")
    if not options.no_save:
        folder = HERE / "results" / measure.machine_name(record)
        if options.only and (folder / "cpu_engine.json").is_file():  # the others stay as they were
            renewed = {row["case"]: row for row in rows}
            earlier = json.loads((folder / "cpu_engine.json").read_text())["rows"]
            rows = [renewed.get(row["case"], row) for row in earlier]
        payload = {"machine": record, "engine": engine.build_info(), "ceilings": ceilings, "rows": rows}
        print(summary(rows))
        print(f"written to {measure.write_results(folder / 'cpu_engine.json', payload)}")
        plot(rows, ceilings, f"{record['cpu']}, {options.threads} threads", folder / "cpu_engine.png")


if __name__ == "__main__":
    main()
