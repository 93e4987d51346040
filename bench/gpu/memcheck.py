"""Every kernel under compute-sanitizer's memcheck, which sees each read and write outside of the memory allocated.

bench/on_gpu.py --stage memcheck starts the tool, which starts this file as a program of its own: it runs small cases
with odd sizes and prints a line for each. PyTorch's caching allocator is off in it, so that each tensor is an
allocation by itself and one element beyond it is outside. Another run has a kernel that does write beyond: where the
tool does not find that, its finding nothing else tells nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, Python looks beside this file; the imports start at the clone's root.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])


import torch

from bench.gpu import dry_run, tables
from bench.gpu.verification import recorded, verify
from fusemesh.kernels.measure import Clock
from fusemesh.kernels.measure.cases import Case

TOOL = "compute-sanitizer"
NO_TOOL = (
    f"{TOOL}: expected it in PATH, under CUDA_HOME or CUDA_PATH, or in /usr/local/cuda*, received none; install it "
    "(it is part of NVIDIA's CUDA toolkit, package cuda-sanitizer) or add its folder to PATH"
)
# A line of a case in what the program prints.
_MARK = "CASE "
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?")
# What the tool takes to start, beside the cases' own time.
_MARGIN = 60.0

CASES: tuple[Case, ...] = (
    tables.attention(Sq=67, Sk=131, causal=True, align="bottom_right", dlse=True),
    tables.linear(m=67, n=113, k=131, activation="silu", gated=True),
    tables.attention("fp32", Sq=33, Sk=65, D=40, Dv=72, bias="hmn", mask="bhmn"),
    tables.linear("fp32", m=33, n=65, k=17, activation="gelu"),
    tables.attention(Sq=129, Sk=129, D=128, softcap=3.0, alibi="bh", sinks=True, dropout=0.2, causal=True),
    tables.attention("fp16", Sq=65, Sk=33, D=80, mod=True, window=(20, 3), origin=(7, 2, 1, 0), layout="padded"),
    tables.attention(Sq=65, Sk=67, bias="n", mask="mn"),
    tables.attention("fp16", Sq=1, Sk=113, bias="bhmn", D=16),
    tables.attention(Sq=65, Sk=65, bias="bm", D=192, Dv=128, window=(None, 5), layout="bshd"),
    tables.linear("fp16", m=1, n=17, k=113, has_bias=False, columns=True),
    tables.linear(m=129, n=65, k=65, activation="relu2"),
    tables.decode(lens=(301, 1), added=1, page=16, causal=True),
    tables.decode(lens=(130,), D=576, Dv=512, H=16, Hkv=1, latent=True),
    tables.packed(lens_q=(67, 0, 33), lens_k=(65, 9, 70), bias="bhmn", causal=True, softcap=3.0),
    tables.attention(Sq=130, Sk=130, D=256, causal=True),
    tables.loss(n=67, v=403, e=80, has_bias=True, softcap=3.0),
    tables.loss("fp32", n=33, v=65, e=17, ignored=1),
)


@dataclass(frozen=True)
class Findings:
    """The output of the tool: the errors it counted, None where it came to no end, and the first of them."""

    errors: int | None
    first: tuple[str, ...]


def parse(text: str) -> Findings:
    """Read the tool's output. Several processes have a summary each; their errors add up."""
    counts = [int(count) for count in _SUMMARY.findall(text)]
    lines = [line.lstrip("= ").rstrip() for line in text.splitlines() if line.startswith("=========")]
    notes = [line for line in lines if line and not line.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY"))]
    return Findings(sum(counts) if counts else None, tuple(notes[:12]))


def find_tool() -> str | None:
    """The tool's path, or None: in PATH, in the CUDA toolkit that the environment names, in the usual places."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += [*sorted(glob.glob("/usr/local/cuda*"), reverse=True), "/opt/cuda", sys.prefix]
    places = [f"{root}/{folder}" for root in roots for folder in ("bin", "compute-sanitizer", f"extras/{TOOL}")]
    return shutil.which(TOOL) or shutil.which(TOOL, path=os.pathsep.join(places))


def run_under_tool(clock: Clock, *, tool: str | None, is_dry: bool = False) -> dict[str, Any]:
    """The planted error, then every case, each in a process of its own under the tool (in a dry run without it).

    Returns:
        {"tool", "planted_errors", "errors", "first_errors", "rows": one for each case, "left_out"}.
    """
    prefix = [] if tool is None else [tool, "--tool", "memcheck"]
    planted = parse(_run([*prefix, *_program(is_dry), "--planted"], clock.left + _MARGIN))
    text = _run([*prefix, *_program(is_dry), "--minutes", f"{clock.left / 60:.3f}"], clock.left + _MARGIN)
    found = parse(text)
    rows = [json.loads(line.removeprefix(_MARK)) for line in text.splitlines() if line.startswith(_MARK)]
    seen = {(row["op"], row["case"]) for row in rows}
    return {
        "tool": tool,
        "planted_errors": planted.errors,
        "errors": found.errors,
        "first_errors": list(found.first),
        "rows": rows,
        "left_out": [f"{case.op} {case.name}" for case in CASES if (case.op, case.name) not in seen],
        # Where no summary came, the end of the output is the only clue.
        "output_end": text[-2000:] if found.errors is None or not rows else "",
    }


def _program(is_dry: bool) -> list[str]:
    return [sys.executable, "-u", str(Path(__file__).resolve()), *(["--dry-run"] if is_dry else [])]


def _run(command: list[str], seconds: float) -> str:
    """Return the output of the command, both streams in one; it and its children are ended after ``seconds``."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def verdict(payload: dict[str, Any]) -> str | None:
    """Return the fault that was found, or None."""
    if not payload["planted_errors"]:
        return (
            f"the tool did not find the planted write beyond a tensor ({payload['planted_errors']} errors), so what "
            f"else it says tells nothing; {payload['output_end'][-300:]}"
        )
    if payload["errors"] is None:
        return f"the tool ended without a summary; {payload['output_end'][-300:]}"
    if payload["errors"]:
        first = "; ".join(payload["first_errors"][:3])
        return f"{payload['errors']} reads or writes outside of the memory allocated; the first: {first}"
    if not payload["rows"]:
        return f"no case ran; {payload['output_end'][-300:]}"
    wrong = [row for row in payload["rows"] if row["check"] != "ok"]
    if wrong:
        return f"{len(wrong)} cases are wrong or did not run; the first: {wrong[0]['case']}: {wrong[0]['check'][:300]}"
    return None


def line(payload: dict[str, Any]) -> str:
    """The stage's one line."""
    right = sum(row["check"] == "ok" for row in payload["rows"])
    return (
        f"memcheck: {payload['errors']} errors in {len(payload['rows'])} of {len(CASES)} cases, {right} of them right; "
        f"the planted error gave {payload['planted_errors']}"
    )


def run_cases(device: torch.device, clock: Clock, is_dry: bool) -> None:
    """Run the cases and print a line for each; the program's own side."""
    for case in CASES:
        if not clock.allows_another():
            break
        begin = clock.elapsed
        row = {"op": case.op, "case": case.name, "contender": "triton", "check": "ok"}
        try:
            dry_run.verify(case, device) if is_dry else verify(case, device)
        except AssertionError as error:
            row["check"] = f"WRONG: {error}"
        except Exception as error:
            row["check"] = f"did not run: {type(error).__name__}: {error}"
        clock.took(clock.elapsed - begin)
        print(_MARK + json.dumps(row), flush=True)


def plant(device: torch.device) -> None:
    """Write one element beyond a tensor."""
    # Triton's language is needed nowhere else in this file.
    from bench.gpu.planted import write_beyond

    write_beyond(torch.zeros(256, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """The program that the tool runs."""
    parser = argparse.ArgumentParser(description="The cases of the memcheck stage; started by bench/on_gpu.py.")
    parser.add_argument("--planted", action="store_true", help="write beyond a tensor instead")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, launches recorded only")
    parser.add_argument("--minutes", type=float, default=5.0, help="time after which no further case starts")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.set_num_threads(1)
    if options.dry_run:
        # In the tool's place, and in its words.
        print(f"========= ERROR SUMMARY: {int(options.planted)} error{'' if options.planted else 's'}", flush=True)
    if options.planted:
        with recorded() if options.dry_run else contextlib.nullcontext():
            plant(device)
        return 0
    run_cases(device, Clock(options.minutes), options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
