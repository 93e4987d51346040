"""Rows and files of results: the record of a machine, one row for each contender, tables of ratios, JSON on disk."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .timing import Roofline, Timing


def machine() -> dict[str, Any]:
    """Return where numbers come from: processor, GPU and its clocks, versions of packages, date."""
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
    """Return clocks, power and temperature as nvidia-smi reads them now, or None where it cannot be asked."""
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
    """Return a folder's name for a machine: its GPU, or its processor and cores."""
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
    """Return one measured row of a results file."""
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
    """Return the row of a contender whose result is wrong, or that cannot run: it holds no time."""
    return {"op": op, "direction": direction, "case": case, "contender": contender, "check": why}


def ratio_table(rows: Iterable[dict[str, Any]], peers: Sequence[str], ours: Sequence[str]) -> str:
    """Return a table: the time of each contender of each case, and how many times faster than the best peer it is.

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
