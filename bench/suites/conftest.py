"""The bench suites: every contender on every case, checked before it is timed; then one JSON and a table of ratios.

Run by `make bench` (python -m pytest bench). Times are medians by the host's clock, a GPU synchronised and its cache
flushed; bench/on_gpu.py times with events.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.peers import torch_ops
from fusemesh.kernels import measure
from fusemesh.kernels.measure import contest
from fusemesh.kernels.measure.cases.common import DIRECTIONS, Inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 0.7  # about how long one contender is measured on one case
ROWS = pytest.StashKey[list[dict[str, Any]]]()
_ROOFLINES: dict[torch.dtype, measure.Roofline] = {}

Contest = Callable[[contest.TimedCase, str, contest.Contender], None]


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark's table has no FLOPs and no peers; ours stands at the end.
    config.option.benchmark_quiet = True
    config.stash[ROWS] = []


def contests(cases: list[contest.TimedCase]) -> list[Any]:
    """Every (case, direction, contender), the contenders of one case side by side."""
    return [
        pytest.param(case, direction, contender, id=f"{case.name}-{direction}-{contender.name}".replace(" ", "_"))
        for case in cases
        for direction in DIRECTIONS
        for contender in torch_ops.contenders(case, DEVICE)
        if direction == "forward" or contender.differentiable
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module names its CASES; a test that takes case, direction and contender gets them all."""
    if "contender" in metafunc.fixturenames:
        metafunc.parametrize(("case", "direction", "contender"), contests(metafunc.module.CASES))


@functools.lru_cache(maxsize=1)
def _prepared(case: contest.TimedCase, direction: str) -> tuple[Inputs, Any]:
    inputs = case.inputs(DEVICE)
    return inputs, case.expected_at_ends(inputs, direction)


def _roofline(dtype: torch.dtype) -> measure.Roofline:
    if dtype not in _ROOFLINES:
        _ROOFLINES[dtype] = measure.measure_roofline(DEVICE, dtype)
    return _ROOFLINES[dtype]


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Contest]:
    """Check one contender on one case, then time it; a wrong result fails the test and no time is kept."""
    rows = request.config.stash[ROWS]

    def run(case: contest.TimedCase, direction: str, contender: contest.Contender) -> None:
        where = (case.op, direction, case.name, contender.name)
        inputs, expected = _prepared(case, direction)
        try:
            case.check(contest.outputs(case, contender, inputs, direction), expected)
        except AssertionError as error:
            rows.append(measure.refused(*where, f"WRONG: {error}"))
            raise
        roofline = _roofline(case.torch_dtype)
        call = contest.timed_call(case, contender, inputs, direction)
        flush = measure.cache_flusher(DEVICE)

        def timed() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        start = time.perf_counter()
        timed()
        rounds = max(5, min(100, int(SECONDS / (time.perf_counter() - start))))
        benchmark.group = " ".join(where[:3])
        benchmark.extra_info.update(contender=contender.name, flops=case.flops(direction))
        benchmark.pedantic(timed, setup=flush, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable: checked, not timed
            return
        timing = measure.summarise(benchmark.stats.stats.data)
        rows.append(
            measure.row(*where, timing, case.flops(direction), case.bytes_moved(direction), roofline, check="ok")
        )

    yield run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("times, and ratios to the best of PyTorch's own ops")
    terminalreporter.write_line(measure.ratio_table(rows, torch_ops.NAMES, contest.OURS))
    if config.getoption("keyword") or any("::" in str(argument) for argument in config.args):
        terminalreporter.write_line("a part of the suite ran: no results file written")
        return
    record = measure.machine()
    path = Path(__file__).parents[1] / "results" / measure.machine_name(record) / "bench.json"
    payload = {"machine": record, "rooflines": [vars(roofline) for roofline in _ROOFLINES.values()], "rows": rows}
    terminalreporter.write_line(f"written to {measure.write_results(path, payload)}")
