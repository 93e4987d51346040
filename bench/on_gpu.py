"""Everything that only a GPU can show, in one command on a GPU machine without a network.

    pip install --no-index --no-deps --no-build-isolation .
    python bench/on_gpu.py --stage correctness     # the kernels against fp64, forward and gradients
    python bench/on_gpu.py --stage sweep           # the kernels against every peer that is installed

A stage writes one JSON file (machine, versions, clocks, every row) under --out, prints one short table, and ends within
its minutes: what there was no time for is named. A wrong result makes it exit non-zero, after everything is written.
--dry-run goes through every step on a CPU with small shapes, and records the launches instead of starting them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_cases
import torch

from fusemesh import benchmark, peers
from fusemesh.kernels import backends, env

OURS = ("triton",)
# torch.compile takes some 20 s for each shape of flex's, so it runs where it tells most.
FLEX_LENGTHS, FLEX_HEAD_DIM = (4096,), 128


class Clock:
    """The time that a stage may take."""

    def __init__(self, minutes: float) -> None:
        self._start = time.monotonic()
        self._seconds = 60 * minutes
        self._longest = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def allows_another(self) -> bool:
        """Whether a case as slow as the slowest so far still fits."""
        return self.elapsed + self._longest <= self._seconds

    def took(self, seconds: float) -> None:
        """Note how long a case took."""
        self._longest = max(self._longest, seconds)


def correctness(device: torch.device, clock: Clock, dry_run: bool) -> dict[str, Any]:
    """Every case of gpu_cases on the Triton backend: rows, and what there was no time for."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    # Turn by turn, so that a stage that runs out of time has seen something of both.
    for case in _alternate(gpu_cases.ATTENTION, gpu_cases.LINEAR):
        if not clock.allows_another():
            left_out.append(f"{case.op} {case.name}")
            continue
        start = time.monotonic()
        row: dict[str, Any] = {"op": case.op, "case": case.name, "contender": "triton", "check": "ok"}
        try:
            measured = _dry_verify(case.tiny(), device) if dry_run else gpu_cases.verify(case, device)
            shares = {
                b.name: round(max(_share(b.actual_max, b.allowed_max), _share(b.actual_mean, b.allowed_mean)), 4)
                for b in measured
            }
            row |= {"repeats": 0 if dry_run else case.repeats, "share_of_budget": shares}
        except AssertionError as error:
            row["check"] = f"WRONG: {error}"
        except Exception as error:
            row["check"] = f"did not run: {type(error).__name__}: {error}"
        row["seconds_with_compilation"] = round(time.monotonic() - start, 3)
        clock.took(row["seconds_with_compilation"])
        rows.append(row)
    return {"rows": rows, "left_out": left_out}


def _share(actual: float, allowed: float) -> float:
    return actual / allowed if allowed else float(actual > 0)


def _alternate(*groups: Iterable[Any]) -> Iterable[Any]:
    iterators = [iter(group) for group in groups]
    while iterators:
        for iterator in list(iterators):
            try:
                yield next(iterator)
            except StopIteration:
                iterators.remove(iterator)


def _dry_verify(case: gpu_cases.Case, device: torch.device) -> list[Any]:
    """What verify does, with eager PyTorch's values in place of those that no kernel has computed."""
    x = case.inputs(device, 0)
    want = case.expected(x)
    with gpu_cases.recorded() as names:
        outputs = case.compute(x)
    if len(names) < 2:
        raise AssertionError(f"expected a launch forward and at least one backward, recorded {names}")
    eager = _stand_in(case, want)
    for name, value in outputs.items():
        if value.shape != eager[name].shape or value.dtype != eager[name].dtype:
            raise AssertionError(
                f"{name}: expected {eager[name].shape} {eager[name].dtype}, received {value.shape} {value.dtype}"
            )
    return case.check({name: eager[name] for name in outputs}, want)


def _stand_in(case: gpu_cases.Case, want: Any) -> peers.Tensors:
    return want.eager if isinstance(case, gpu_cases.Attention) else {**want["forward"][1], **want["backward"][1]}


def sweep_cases() -> list[peers.Case]:
    """DESIGN's sweep: 16384 tokens, H * D = 2048, D 64, 128, 256, causal or not; 64 query heads on 8; linear layers."""
    bf16 = torch.bfloat16
    attention = [
        peers.AttentionCase(16384 // length, heads, kv_heads, length, d, causal, bf16)
        for length in (4096, 16384, 1024, 8192, 2048, 512)
        for heads, kv_heads, d in ((16, 16, 128), (32, 32, 64), (64, 8, 128), (8, 8, 256))
        for causal in (True, False)
    ]
    linear = [
        peers.LinearCase(8192, 4096, 14336, "silu", True, bf16),
        peers.LinearCase(8192, 2048, 8192, "gelu", False, bf16),
        peers.LinearCase(8192, 14336, 4096, None, False, bf16),
        peers.LinearCase(8192, 8192, 8192, None, False, bf16),
        peers.LinearCase(512, 4096, 14336, "silu", True, bf16),
    ]
    return list(_alternate(linear, attention))


class _DryAttention(peers.AttentionCase):
    def outputs(self, contender: peers.Contender, inputs: peers.Tensors, direction: str) -> peers.Tensors:
        return _dry_outputs(super().outputs, self.ours("reference"), contender, inputs, direction)


class _DryLinear(peers.LinearCase):
    def outputs(self, contender: peers.Contender, inputs: peers.Tensors, direction: str) -> peers.Tensors:
        return _dry_outputs(super().outputs, self.ours("torch"), contender, inputs, direction)


def _dry_outputs(compute: Any, known: peers.Contender, contender: Any, inputs: Any, direction: str) -> peers.Tensors:
    """A contender's own outputs, except those of kernels that were recorded: a known backend's, same shapes."""
    outputs = compute(contender, inputs, direction)
    if contender.name not in OURS:
        return outputs
    right = compute(known, inputs, direction)
    assert {n: (x.shape, x.dtype) for n, x in outputs.items()} == {n: (x.shape, x.dtype) for n, x in right.items()}
    return right


def _dry_case(case: peers.Case) -> peers.Case:
    if isinstance(case, peers.AttentionCase):
        groups = case.heads // case.kv_heads
        return _DryAttention(1, 2 * groups, 2, 33, 16, case.causal, torch.float32)
    return _DryLinear(33, 16, 24, case.activation, case.gated, torch.float32)


def sweep(device: torch.device, clock: Clock, dry_run: bool) -> dict[str, Any]:
    """Every case of the sweep, forward and backward, every contender: rows, and what there was no time for."""
    dtype = torch.float32 if dry_run else torch.bfloat16
    roofline = benchmark.measure_roofline(device, dtype, size=64 if dry_run else None)
    timing: dict[str, Any] = {"seconds": 0.0, "least": 1, "pause": 0.0} if dry_run else {"seconds": 0.12, "pause": 0.05}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    cases = sweep_cases()
    for case in dict.fromkeys(_dry_case(case) for case in cases) if dry_run else cases:
        for direction in peers.DIRECTIONS:
            name = f"{case.op} {direction} {case.name}"
            if not clock.allows_another():
                left_out.append(name)
                continue
            start = time.monotonic()
            contenders = [case.ours("triton"), *(c for c in case.contenders(device) if not c.ours)]
            if not _flex_tells(case) and any(c.name == "flex" for c in contenders):
                left_out.append(f"{name}: flex (it would be compiled for this shape)")
                contenders = [c for c in contenders if c.name != "flex"]
            with gpu_cases.recorded() if dry_run else contextlib.nullcontext():
                measured = peers.compare(case, direction, device, roofline, contenders, **timing)
            # Where no kernel ran, a time says nothing.
            rows += [_without_times(row) for row in measured] if dry_run else measured
            if device.type == "cuda":
                torch.cuda.empty_cache()
            clock.took(time.monotonic() - start)
    return {"roofline": None if dry_run else vars(roofline), "rows": rows, "left_out": left_out}


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return benchmark.refused(row["op"], row["direction"], row["case"], row["contender"], row["check"])


def _flex_tells(case: peers.Case) -> bool:
    return isinstance(case, peers.AttentionCase) and case.length in FLEX_LENGTHS and case.head_dim == FLEX_HEAD_DIM


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
            f"{repeated} bit-equal over {gpu_cases.REPEATS} repeats"
        )
    lines += [f"{row['op']} {row['case']}: {row['check'][:300]}" for row in rows if row["check"] != "ok"]
    return "\n".join(lines)


def verdict(stage: str, payload: dict[str, Any], path: Path) -> tuple[int, str]:
    """The exit status, and what to tell the user."""
    wrong = [row for row in payload["rows"] if row["contender"] in OURS and row["check"] != "ok"]
    if wrong:
        return 1, f"{len(wrong)} of FuseMesh's results are wrong or did not run; see {path}"
    if not payload["rows"]:
        return 1, "there was no time for a single case; give it more --minutes"
    if stage != "correctness":
        return 0, f"every FuseMesh result was checked before it was timed; all rows are in {path}"
    if payload["left_out"]:
        return 0, "right as far as it went, but cases were left out: run it again with more --minutes"
    if payload["dry_run"]:
        return 0, f"every step ran, no kernel did; see {path}"
    major, minor = torch.cuda.get_device_capability(0)
    lines = [f'    ("{op}", "sm_{major}{minor}"): "{path.as_posix()}",' for op in ("attention", "linear")]
    return (
        0,
        "right. To let backend='auto' choose Triton here, enter in PROVEN_ON_GPU (kernels/backends.py):\n"
        + "\n".join(lines),
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stage", required=True, choices=("correctness", "sweep"))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, small shapes, launches recorded only")
    parser.add_argument("--minutes", type=float, default=7.5, help="time after which no further case starts")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<machine>)")
    options = parser.parse_args(arguments)
    if env.INTERPRET:
        parser.error("TRITON_INTERPRET: expected it unset, received 1; unset it: on a GPU the kernels are compiled")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; run on a machine with one, or pass --dry-run")
    reason = backends.why_unavailable("triton", "cpu" if options.dry_run else "cuda")
    if reason is not None and not options.dry_run:
        parser.error(reason)
    device = torch.device("cpu" if options.dry_run else "cuda")
    clock = Clock(options.minutes)
    record = benchmark.machine()
    name = benchmark.machine_name(record)
    out = options.out or Path(__file__).parent / "results" / (f"dry-run-{name}" if options.dry_run else name)
    stage = correctness if options.stage == "correctness" else sweep
    payload = {"stage": options.stage, "dry_run": options.dry_run, "machine": record}
    payload |= stage(device, clock, options.dry_run)
    payload["machine_after"] = benchmark.gpu_state()
    payload["seconds"] = round(clock.elapsed, 1)
    path = benchmark.write_results(out / f"{options.stage}.json", payload)
    if options.stage == "correctness":
        print(correctness_table(payload["rows"]))
    else:
        print(benchmark.ratio_table(payload["rows"], peers.PEERS, OURS))
    for missing in payload["left_out"]:
        print(f"left out: {missing}")
    status, message = verdict(options.stage, payload, path)
    print(f"{options.stage}: {message} ({payload['seconds']:.0f} s on {name})")
    return status


if __name__ == "__main__":
    sys.exit(main())
