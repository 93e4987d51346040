"""Everything that only a GPU can show, in one command on a GPU machine without a network.

    pip install --no-index --no-deps --no-build-isolation .
    python bench/on_gpu.py --stage correctness     # the kernels against fp64, forward and gradients
    python bench/on_gpu.py --stage sweep           # the kernels against every peer that is installed
    python bench/on_gpu.py --stage memcheck        # the kernels under compute-sanitizer
    python bench/on_gpu.py --stage emulator        # PTX instructions against their specification and the emulator
    python bench/on_gpu.py --stage tune            # tiles around the shipped ones: which is fastest here
    python bench/on_gpu.py --stage tune --only "attention dbias"       # a part: what a run before had no time for

A stage writes one JSON file (machine, versions, clocks, every row) under --out, prints one short table, and ends within
its minutes, which by default leave it less than 10 in all: the most telling cases come first, and what there was no
time for is named. With --only the file's name says so, and the whole stage's is left alone. A wrong result makes it
exit non-zero, after everything is written.
--dry-run goes through every step on a CPU with small shapes, and records the launches instead of starting them.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, Python looks beside this file; the imports start at the clone's root.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])


import torch

from bench.gpu import dry_run, emulation, memcheck, tables
from bench.gpu.verification import recorded, verify
from bench.peers import torch_ops
from fusemesh.kernels import backends, env, measure
from fusemesh.kernels.measure import contest, tune
from fusemesh.kernels.measure.cases import AttentionCase, LinearCase, self_attention
from fusemesh.kernels.proof import first_use

OURS = ("triton",)
PEERS = (*torch_ops.NAMES, "triton tutorial")
# torch.compile takes some 20 s for each shape of flex's, so it runs where it tells most.
FLEX_LENGTHS, FLEX_HEAD_DIM = (4096,), 128


def correctness(device: torch.device, clock: measure.Clock, is_dry: bool, only: str = "") -> dict[str, Any]:
    """Run every case of the tables on the Triton backend; return rows, and the names of cases without time."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for case in tables.all_cases(device, is_dry):
        if only not in f"{case.op} {case.name}":
            continue
        if not clock.allows_another():
            left_out.append(f"{case.op} {case.name}")
            continue
        start = time.monotonic()
        row: dict[str, Any] = {"op": case.op, "case": case.name, "contender": "triton", "check": "ok"}
        repeats = tables.REPEATS if case in tables.REPEATED and not is_dry else 0
        try:
            measured = dry_run.verify(dry_run.tiny(case), device) if is_dry else verify(case, device, repeats=repeats)
            shares = {b.name: round(b.share, 4) for b in measured}
            row |= {"repeats": repeats, "share_of_budget": shares}
        except AssertionError as error:
            row["check"] = f"WRONG: {error}"
        except Exception as error:
            row["check"] = f"did not run: {type(error).__name__}: {error}"
        row["seconds_with_compilation"] = round(time.monotonic() - start, 3)
        clock.took(row["seconds_with_compilation"])
        rows.append(row)
    return {"rows": rows, "left_out": left_out}


def sweep_cases(has_fp8: bool = True) -> list[AttentionCase | LinearCase]:
    """Return the sweep of DESIGN: 16384 tokens, H * D = 2048, D 64, 128, 256, causal or not; GQA; linear layers."""

    def attention(dtype: str, lengths: tuple[int, ...]) -> list[AttentionCase]:
        return [
            self_attention(dtype, 16384 // length, heads, kv_heads, length, d, causal)
            for length in lengths
            for heads, kv_heads, d in ((16, 16, 128), (32, 32, 64), (64, 8, 128), (8, 8, 256))
            for causal in (True, False)
        ]

    linear = [
        LinearCase("bf16", 8192, 4096, 14336, "silu", gated=True),
        LinearCase("bf16", 8192, 2048, 8192, "gelu"),
        LinearCase("bf16", 8192, 14336, 4096),
        LinearCase("bf16", 8192, 8192, 8192),
        LinearCase("bf16", 512, 4096, 14336, "silu", gated=True),
    ]
    # The forward of fp8 alone, in sizes that bf16 runs too: rows to compare.
    fp8 = attention("fp8", (4096, 16384)) if has_fp8 else []
    return tables.in_turn(linear, attention("bf16", (4096, 16384, 1024, 8192, 2048, 512)), fp8)


def sweep(device: torch.device, clock: measure.Clock, is_dry: bool, only: str = "") -> dict[str, Any]:
    """Every case of the sweep, forward and backward, every contender: rows, and what there was no time for."""
    dtype = torch.float32 if is_dry else torch.bfloat16
    roofline = measure.measure_roofline(device, dtype, size=64 if is_dry else None)
    times: dict[str, Any] = {"seconds": 0.12, "pause": 0.05}
    if is_dry:
        times = {"seconds": 0.0, "least": 1, "pause": 0.0, "outputs": dry_run.known_outputs}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    cases = sweep_cases(bool(tables.fp8_cases(device, is_dry)))
    for case in dict.fromkeys(dry_run.small(case) for case in cases) if is_dry else cases:
        for direction in case.directions:
            name = f"{case.op} {direction} {case.name}"
            if only not in name:
                continue
            if not clock.allows_another():
                left_out.append(name)
                continue
            start = time.monotonic()
            contenders = [contest.our_backend(case, "triton"), *torch_ops.peers(case, device), *_tutorial(case)]
            if not _flex_tells(case) and any(c.name == "flex" for c in contenders):
                left_out.append(f"{name}: flex (it would be compiled for this shape)")
                contenders = [c for c in contenders if c.name != "flex"]
            with recorded() if is_dry else contextlib.nullcontext():
                measured = contest.compare(case, direction, device, roofline, contenders, **times)
            rows += [dry_run.without_times(row) for row in measured] if is_dry else measured
            if device.type == "cuda":
                torch.cuda.empty_cache()
            clock.took(time.monotonic() - start)
    return {"roofline": None if is_dry else vars(roofline), "rows": rows, "left_out": left_out}


def _tutorial(case: AttentionCase | LinearCase) -> list[contest.Contender]:
    """Triton's own tutorial, where it takes the case."""
    if not isinstance(case, AttentionCase) or case.dtype == "fp8":
        return []
    # The kernel is defined on import, which needs Triton.
    from bench.peers import tutorial_attention

    contender = tutorial_attention.contender(case)
    return [] if contender is None else [contender]


def memory(device: torch.device, clock: measure.Clock, is_dry: bool, only: str = "") -> dict[str, Any]:
    """Every kernel under compute-sanitizer; all cases, because a part of them would tell nothing of the others."""
    return memcheck.run_under_tool(clock, tool=None if is_dry else memcheck.find_tool(), is_dry=is_dry)


def tuning(device: torch.device, clock: measure.Clock, is_dry: bool, only: str = "") -> dict[str, Any]:
    """Tiles around the shipped ones."""
    chosen = [job for job in tune.jobs() if only in job.name]
    if not is_dry:
        return tune.tune_tiles(device, clock, chosen=chosen)
    with recorded():
        chosen = [tune.small(job) for job in chosen]
        return tune.tune_tiles(device, clock, chosen=chosen, measure=dry_run.measure_tile)


def _flex_tells(case: AttentionCase | LinearCase) -> bool:
    return isinstance(case, AttentionCase) and case.Sq in FLEX_LENGTHS and case.D == FLEX_HEAD_DIM


def correctness_table(rows: list[dict[str, Any]]) -> str:
    """One line for each op and dtype, then one for each wrong case."""
    lines = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"].split()[0]), []).append(row)
    for (op, dtype), members in sorted(groups.items()):
        right = [row for row in members if row["check"] == "ok"]
        share = max((max(row["share_of_budget"].values()) for row in right), default=float("nan"))
        repeated = sum(row["repeats"] > 0 for row in right)
        lines.append(
            f"{op:10} {dtype}  {len(right):3} of {len(members):3} right, nearest to its budget {share:.2f}, "
            f"{repeated} bit-equal over {tables.REPEATS} repeats"
        )
    lines += [f"{row['op']} {row['case']}: {row['check'][:300]}" for row in rows if row["check"] != "ok"]
    return "\n".join(lines)


@dataclass(frozen=True)
class Stage:
    """One stage: its function, and the one that prints its result."""

    run: Callable[[torch.device, measure.Clock, bool, str], dict[str, Any]]
    text: Callable[[dict[str, Any]], str]


STAGES = {
    "correctness": Stage(correctness, lambda payload: correctness_table(payload["rows"])),
    "sweep": Stage(sweep, lambda payload: measure.ratio_table(payload["rows"], PEERS, OURS)),
    "memcheck": Stage(memory, memcheck.line),
    "emulator": Stage(emulation.run, emulation.table),
    "tune": Stage(tuning, lambda payload: tune.table(payload["rows"])),
}


def verdict(stage: str, payload: dict[str, Any], path: Path) -> tuple[int, str]:
    """The exit status, and what to tell the user."""
    wrong = [row for row in payload["rows"] if row["contender"] in (*OURS, "emulator") and row["check"] != "ok"]
    if wrong and stage == "emulator":
        return 1, f"{len(wrong)} programs returned what PTX does not specify, or did not run; see {path}"
    if wrong and stage != "memcheck":
        return 1, f"{len(wrong)} of FuseMesh's results are wrong or did not run; see {path}"
    if not payload["rows"] and stage != "memcheck":
        if payload["only"] and not payload["left_out"]:
            return 1, f"no case has {payload['only']!r} in its name, as the tables print it"
        return 1, "there was no time for a single case; give it more --minutes"
    if stage == "memcheck":
        fault = memcheck.verdict(payload)
        if fault is not None:
            return 1, f"{fault}; see {path}"
        if payload["left_out"]:
            return 0, "no error as far as it went, but cases were left out: run it again with more --minutes"
        return 0, "every step ran but the tool" if payload["dry_run"] else f"no error; see {path}"
    if payload["dry_run"]:
        return 0, f"every step ran, no kernel did; see {path}"
    if stage not in ("correctness", "emulator"):
        return 0, f"every FuseMesh result was checked before it was timed; all rows are in {path}"
    if payload["left_out"] or payload["only"]:
        return 0, "right as far as it went, but cases were left out: run it again with more --minutes and no --only"
    return 0, f"every case is right; see {path}"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stage", required=True, choices=tuple(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, small shapes, launches recorded only")
    parser.add_argument("--minutes", type=float, default=7.5, help="time after which no further case starts")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name, as tables print it")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<machine>)")
    options = parser.parse_args(arguments)
    if env.INTERPRET:
        parser.error("TRITON_INTERPRET: expected it unset, received 1; unset it: on a GPU the kernels are compiled")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; run on a machine with one, or pass --dry-run")
    reason = backends.why_unavailable("triton", "cpu" if options.dry_run else "cuda")
    if reason is not None and not options.dry_run:
        parser.error(reason)
    if options.stage == "memcheck" and options.only:
        parser.error("--only: expected nothing with --stage memcheck; its cases are few, leave it out")
    if options.stage == "memcheck" and not options.dry_run and memcheck.find_tool() is None:
        parser.error(memcheck.NO_TOOL)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.dry_run:
        # On such small tensors threads only wait for each other.
        torch.set_num_threads(1)
    clock = measure.Clock(options.minutes)
    record = measure.machine()
    name = measure.machine_name(record)
    out = options.out or Path(__file__).parent / "results" / (f"dry-run-{name}" if options.dry_run else name)
    payload = {"stage": options.stage, "dry_run": options.dry_run, "only": options.only, "machine": record}
    # Every result is checked and shown, right or wrong, and a kernel alone is timed.
    with first_use.mode(first_use.OFF):
        payload |= STAGES[options.stage].run(device, clock, options.dry_run, options.only)
    payload["machine_after"] = measure.gpu_state()
    payload["seconds"] = round(clock.elapsed, 1)
    part = f"-{'-'.join(re.findall('[A-Za-z0-9]+', options.only))}" if options.only else ""
    path = measure.write_results(out / f"{options.stage}{part}.json", payload)
    print(STAGES[options.stage].text(payload))
    for missing in payload["left_out"]:
        print(f"left out: {missing}")
    status, message = verdict(options.stage, payload, path)
    print(f"{options.stage}: {message} ({payload['seconds']:.0f} s on {name})")
    return status


if __name__ == "__main__":
    sys.exit(main())
