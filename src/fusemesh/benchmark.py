"""Timing, roofline, the record of a machine, and results on disk: the core of bench/.

What is timed, and against whom, is :mod:`fusemesh.peers`. A time is a median; on a GPU it is taken with events, after
the L2 cache was overwritten, with a pause before each case so that one case does not heat the next.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


class Clock:
    """The time that a stage of several cases may take."""

    def __init__(self, minutes: float) -> None:
        self._start = time.monotonic()
        self._seconds = 60 * minutes
        self._longest = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds that remain; 0 once they are used up."""
        return max(self._seconds - self.elapsed, 0.0)

    def allows_another(self) -> bool:
        """Whether a case as slow as the slowest so far still fits."""
        return self.elapsed + self._longest <= self._seconds

    def took(self, seconds: float) -> None:
        """Note how long a case took."""
        self._longest = max(self._longest, seconds)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile over ``runs`` calls."""

    median: float
    low: float
    high: float
    runs: int


def time_call(
    fn: Callable[[], Any],
    device: torch.device | str,
    *,
    seconds: float = 0.2,
    least: int = 5,
    most: int = 200,
    pause: float = 0.1,
) -> Timing:
    """Time ``fn``.

    Args:
        fn: the call; its result is dropped.
        device: where it runs. On ``cuda`` each call is timed by two events, its inputs flushed from the L2 cache before
            the first; on ``cpu`` by the host's clock.
        seconds: about how long to measure for, after warming up (two calls).
        least, most: bounds of the number of measured calls.
        pause: seconds of rest before the case.
    """
    device = torch.device(device)
    once = _cuda_timer(device) if device.type == "cuda" else _cpu_timer
    for _ in range(2):
        estimate = once(fn)
    time.sleep(pause)
    runs = max(least, min(most, int(seconds / max(estimate, 1e-9))))
    return summarise([once(fn) for _ in range(runs)])


def summarise(samples: Sequence[float]) -> Timing:
    """The :class:`Timing` of measured seconds; at least one."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


def _cpu_timer(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def cache_flusher(device: torch.device | str) -> Callable[[], None]:
    """A call that evicts from a GPU's L2 cache what the call before left there (on a CPU it does nothing)."""
    device = torch.device(device)
    if device.type != "cuda":
        return lambda: None
    # Twice the cache and never less than 256 MB.
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    written = torch.empty(max(2 * cache, 1 << 28), dtype=torch.int8, device=device)

    def flush() -> None:
        written.zero_()

    return flush


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    flush = cache_flusher(device)

    def once(fn: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return once


@dataclass(frozen=True)
class Roofline:
    """The two ceilings of a machine, as measured on it, and where."""

    dtype: str
    matmul_flops: float  # per second, of PyTorch's own product of two square matrices in dtype
    copy_bytes: float  # per second, read plus written, of a large copy

    def percent(self, flops: float, bytes_moved: float, seconds: float) -> dict[str, float]:
        """How near a call came: percent of each ceiling."""
        return {
            "percent_of_matmul_peak": 100 * flops / seconds / self.matmul_flops,
            "percent_of_copy_bandwidth": 100 * bytes_moved / seconds / self.copy_bytes,
        }


def measure_roofline(device: torch.device | str, dtype: torch.dtype, size: int | None = None) -> Roofline:
    """Measure both ceilings, on random data (zeros run faster: less of the chip switches).

    ``size`` is that of the matrices, and the copy has size^2 * 16 bytes; by default 8192 on a GPU and 1024 on a CPU.
    """
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 1024)
    copied = 16 * size**2
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = time_call(lambda: a @ b, device)
    source = torch.randint(0, 100, (copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device)
    return Roofline(str(dtype).removeprefix("torch."), 2 * size**3 / product.median, 2 * copied / copy.median)


def machine() -> dict[str, Any]:
    """What a reader needs to know about where a number comes from: processor, GPU and its clocks, versions, date."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in ("fusemesh", "torch", "triton", "numpy"):
        try:
            record[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            record[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "gpu_state": gpu_state(),
        }
    return record


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and temperature as nvidia-smi reads them now; None where it cannot be asked."""
    fields = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    )
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def machine_name(record: dict[str, Any]) -> str:
    """A folder's name for a machine: its GPU, or its processor and cores."""
    name = record.get("gpu") or f"{record['cpu']} {record['cores']} cores"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def write_results(path: Path, payload: dict[str, Any]) -> Path:
    """Write one JSON file, its folder too; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    return path


def row(
    op: str,
    direction: str,
    case: str,
    contender: str,
    timing: Timing,
    flops: float,
    bytes_moved: float,
    roofline: Roofline,
    check: str,
) -> dict[str, Any]:
    """One measured line of a results file."""
    return {
        "op": op,
        "direction": direction,
        "case": case,
        "contender": contender,
        "check": check,  # "ok", or why the result is wrong; then there are no times
        "seconds": timing.median,
        "seconds_low": timing.low,
        "seconds_high": timing.high,
        "runs": timing.runs,
        "tflops": flops / timing.median / 1e12,
        **roofline.percent(flops, bytes_moved, timing.median),
    }


def refused(op: str, direction: str, case: str, contender: str, why: str) -> dict[str, Any]:
    """The line of a contender whose result is wrong, or who cannot run: no time stands in it."""
    return {"op": op, "direction": direction, "case": case, "contender": contender, "check": why}


def ratio_table(rows: Iterable[dict[str, Any]], peers: Sequence[str], ours: Sequence[str]) -> str:
    """Lines of text: each case's own times, the best peer's, and how many times faster than it each of ours is.

    Args:
        rows: from :func:`row` and :func:`refused`. Only right results are compared.
        peers, ours: contenders' names, PyTorch's and FuseMesh's.
    """
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for entry in rows:
        cases.setdefault((entry["op"], entry["direction"], entry["case"]), {})[entry["contender"]] = entry
    lines = [("case", "contender", "ms", "TFLOP/s", "% of peak", "x best peer")]
    for (op, direction, case), entries in cases.items():
        best = min((entries[p]["seconds"] for p in peers if "seconds" in entries.get(p, {})), default=None)
        for name in (*ours, *peers):
            if name not in entries:
                continue
            entry = entries[name]
            label = f"{op} {direction} {case}"
            if "seconds" not in entry:
                lines.append((label, name, "-", "-", "-", entry["check"].splitlines()[0][:60]))
                continue
            ratio = "-" if best is None else f"{best / entry['seconds']:.2f}"
            percent = f"{entry['percent_of_matmul_peak']:.0f}"
            lines.append((label, name, f"{entry['seconds'] * 1e3:.3f}", f"{entry['tflops']:.3g}", percent, ratio))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
