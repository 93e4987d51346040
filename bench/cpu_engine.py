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
from pathlib import Path
from typing import Any

# Run as a script, Python looks beside this file; the imports start at the clone's root.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])


import torch
from torch.nn import functional as F

import fusemesh
from bench.cpu import peers as cpu_peers
from fusemesh import benchmark
from fusemesh.kernels import engine
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.testing import attention as expectations

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Floor:
    """What a row of the table promises: a ratio to PyTorch's time, or a share of a ceiling, whichever comes first."""

    ratio: float
    percent: float
    ceiling: str  # "compute" or "read"
    both: bool = False  # not either but both


@dataclass(frozen=True)
class Case:
    """One shape of one operation: forward, backward or decode (one query)."""

    group: str
    operation: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = False

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        lengths = f"S{self.keys}" if self.queries == self.keys else f"Sq{self.queries} S{self.keys}"
        kind = " causal" if self.causal else ""
        return f"{self.operation} {self.dtype} B{self.batch} {heads} {lengths} D{self.dim}{kind}"

    @property
    def flops(self) -> float:
        """4 B H Sq Sk D, half of it when causal, backward 2.5 times."""
        forward = 4.0 * self.batch * self.heads * self.queries * self.keys * self.dim * (0.5 if self.causal else 1)
        return 2.5 * forward if self.operation == "backward" else forward

    @property
    def bytes_moved(self) -> float:
        """Inputs once and outputs once."""
        size = DTYPES[self.dtype].itemsize
        rows = 2 * self.batch * self.kv_heads * self.keys + 2 * self.batch * self.heads * self.queries
        return size * rows * self.dim * (2 if self.operation == "backward" else 1)


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


def cases() -> list[Case]:
    """Every row of the table."""
    found = []
    for operation in ("forward", "backward"):
        for dtype in ("bf16", "fp32"):
            for dim in (64, 128):
                for length in (1024, 2048, 4096, 8192):
                    for causal in (False, True):
                        shape = (1, 8, 8, length, length, dim, causal)
                        found.append(Case(f"{operation} {dtype}", operation, dtype, *shape))
    found.append(Case("decode GQA bf16", "decode", "bf16", 1, 16, 2, 1, 32768, 128))
    for dtype in ("fp32", "bf16"):
        found.append(Case(f"decode MHA {dtype}", "decode", dtype, 4, 8, 8, 1, 8192, 128))
    for operation in ("forward", "backward"):
        for dtype in ("bf16", "fp32"):
            for length in (64, 128, 256):
                found.append(Case("short", operation, dtype, 16, 8, 8, length, length, 64))
            found.append(Case("short", operation, dtype, 3, 5, 5, 197, 333, 80))
            found.append(Case("short", operation, dtype, 2, 6, 6, 1001, 1001, 72, True))
    return found


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    shapes = {"q": (case.heads, case.queries), "k": (case.kv_heads, case.keys), "v": (case.kv_heads, case.keys)}
    shapes["do"] = shapes["q"]
    return {n: torch.randn(case.batch, *s, case.dim, generator=generator).to(dtype) for n, s in shapes.items()}


def contenders(case: Case, x: dict[str, torch.Tensor]) -> dict[str, Run]:
    """What is timed, by name: the engine, PyTorch, and others that are installed."""
    found: dict[str, Run] = {}
    align = "top_left" if case.causal else None
    if case.operation == "decode":
        lengths = torch.full((case.batch,), case.keys, dtype=torch.int32)
        found["cpu"] = lambda: fusemesh.flash_attention_decode(
            x["q"], x["k"], x["v"], cache_lens=lengths, backend="cpu"
        )
    else:
        found["cpu"] = lambda: fusemesh.flash_attention(
            x["q"], x["k"], x["v"], causal=case.causal, align=align, backend="cpu"
        )
    gqa = case.heads != case.kv_heads
    found["torch"] = lambda: F.scaled_dot_product_attention(
        x["q"], x["k"], x["v"], is_causal=case.causal, enable_gqa=gqa
    )
    if case.operation == "backward":
        return {name: gradients(call, x) for name, call in found.items()}
    # Some of the others take a minute for the longest.
    others = cpu_peers.contenders(x, case.causal, case.dtype) if case.queries * case.keys <= 2**22 else {}
    return {**found, **others}


def gradients(forward: Run, x: dict[str, torch.Tensor]) -> Run:
    """The backward of a forward that ran once."""
    leaves = [x[name].requires_grad_() for name in "qkv"]
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, x["do"], retain_graph=True)


def check(case: Case, x: dict[str, torch.Tensor], result: Any) -> None:
    """AssertionError unless the first head of a contender's result is within the error budget."""
    plain = {name: tensor.detach()[:1, :1] for name, tensor in x.items()}
    spec = AttentionSpec(case.dim**-0.5, window_right=0 if case.causal else None)
    do = plain["do"] if case.operation == "backward" else None
    if case.keys * case.queries > 2**24 and do is not None:
        return  # the reference's matrices would not fit the time; the same code was checked at smaller sizes
    want = expectations.expected(plain["q"], plain["k"], plain["v"], Call(spec), do=do)
    names = ("dq", "dk", "dv") if do is not None else ("out",)
    results = result if isinstance(result, tuple) else (result,)
    expectations.check({n: cpu_peers.tensor_of(r)[:1, :1] for n, r in zip(names, results, strict=True)}, want)


def probe(threads: int) -> dict[str, float]:
    """FLOP/s in fp32 and bf16, and bytes/s read."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("bench/cpu_engine.py: expected a C++ compiler for the probe of the ceilings; install g++")
    with tempfile.TemporaryDirectory() as folder:
        built = str(Path(folder, "probe"))
        command = [compiler, "-O3", "-march=native", "-std=c++17", "-pthread", str(HERE / "probe.cpp"), "-o", built]
        subprocess.run(command, check=True)
        lines = subprocess.run([built, str(threads)], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(("fp32", "bf16", "read"), map(float, lines), strict=True))


def measure(case: Case, rounds: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """One row: each contender's seconds, and the ratio of PyTorch's time to ours."""
    x = inputs(case)
    calls = contenders(case, x)
    wrong = {}
    for name, call in list(calls.items()):
        try:
            check(case, x, call())
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
    floor = FLOORS[case.group]
    peak = ceilings["fp32"] if case.dtype == "fp32" or not ceilings["bf16"] else ceilings["bf16"]
    percent_compute = 100 * case.flops / seconds["cpu"] / peak
    percent_read = 100 * case.bytes_moved / seconds["cpu"] / ceilings["read"]
    percent = percent_compute if floor.ceiling == "compute" else percent_read
    reached = (ratio >= floor.ratio, percent >= floor.percent)
    return {
        "group": case.group,
        "case": case.name,
        "seconds": seconds,
        "ratio": ratio,
        "gflops": case.flops / seconds["cpu"] / 1e9,
        "torch_gflops": case.flops / seconds["torch"] / 1e9,
        "percent_of_compute": percent_compute,
        "percent_of_read": percent_read,
        "intensity": case.flops / case.bytes_moved,
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
    record = benchmark.machine()
    print(f"{record['cpu']}, {options.threads} threads, torch {record['torch']}, engine {engine.build_info()['isa']}")
    ceilings = probe(options.threads)
    print(
        f"peaks: fp32 {ceilings['fp32'] / 1e9:.0f}, bf16 {ceilings['bf16'] / 1e9:.0f} GFLOP/s, "
        f"read {ceilings['read'] / 1e9:.1f} GB/s"
    )
    rows = []
    for case in cases():
        if re.search(options.only, case.name) or re.search(options.only, case.group):
            rows.append(measure(case, options.rounds, ceilings))
            print(line(rows[-1]), flush=True)
    below = [row["case"] for row in rows if not row["floor_reached"]]
    print(f"{len(rows) - len(below)} of {len(rows)} cases at or above their floor")
    if not options.no_save:
        folder = HERE / "results" / benchmark.machine_name(record)
        if options.only and (folder / "cpu_engine.json").is_file():  # the others stay as they were
            measured = {row["case"]: row for row in rows}
            earlier = json.loads((folder / "cpu_engine.json").read_text())["rows"]
            rows = [measured.get(row["case"], row) for row in earlier]
        payload = {"machine": record, "engine": engine.build_info(), "ceilings": ceilings, "rows": rows}
        print(summary(rows))
        print(f"written to {benchmark.write_results(folder / 'cpu_engine.json', payload)}")
        plot(rows, ceilings, f"{record['cpu']}, {options.threads} threads", folder / "cpu_engine.png")


if __name__ == "__main__":
    main()
