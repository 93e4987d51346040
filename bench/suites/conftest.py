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

from fusemesh import benchmark as fusemesh_benchmark
from fusemesh import peers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 0.7  # about how long one contender is measured on one case
ROWS = pytest.StashKey[list[dict[str, Any]]]()
_ROOFLINES: dict[torch.dtype, fusemesh_benchmark.Roofline] = {}

Contest = Callable[[peers.Case, str, peers.Contender], None]


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark's table has no FLOPs and no peers; ours stands at the end.
    config.option.benchmark_quiet = True
    config.stash[ROWS] = []


def contests(cases: list[peers.Case]) -> list[Any]:
    """Every (case, direction, contender), the contenders of one case side by side."""
    return [
        pytest.param(case, direction, contender, id=f"{case.name}-{direction}-{contender.name}".replace(" ", "_"))
        for case in cases
        for direction in peers.DIRECTIONS
        for contender in case.contenders(DEVICE)
        if direction == "forward" or contender.differentiable
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module names its CASES; a test that takes case, direction and contender gets them all."""
    if "contender" in metafunc.fixturenames:
        metafunc.parametrize(("case", "direction", "contender"), contests(metafunc.module.CASES))


@functools.lru_cache(maxsize=1)
def _prepared(case: peers.Case, direction: str) -> tuple[peers.Tensors, Any]:
    inputs = case.inputs(DEVICE)
    return inputs, case.expected(inputs, direction)


def _roofline(dtype: torch.dtype) -> fusemesh_benchmark.Roofline:
    if dtype not in _ROOFLINES:
        _ROOFLINES[dtype] = fusemesh_benchmark.measure_roofline(DEVICE, dtype)
    return _ROOFLINES[dtype]


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Contest]:
    """Check one contender on one case, then time it; a wrong result fails the test and no time is kept."""
    rows = request.config.stash[ROWS]

    def run(case: peers.Case, direction: str, contender: peers.Contender) -> None:
        where = (case.op, direction, case.name, contender.name)
        inputs, expected = _prepared(case, direction)
        try:
            case.check(case.outputs(contender, inputs, direction), expected)
        except AssertionError as error:
            rows.append(fusemesh_benchmark.refused(*where, f"WRONG: {error}"))
            raise
        roofline = _roofline(case.dtype)
        call = peers.timed_call(case, contender, inputs, direction)
        flush = fusemesh_benchmark.cache_flusher(DEVICE)

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
        timing = fusemesh_benchmark.summarise(benchmark.stats.stats.data)
        rows.append(
            fusemesh_benchmark.row(
                *where, timing, case.flops(direction), case.bytes_moved(direction), roofline, check="ok"
            )
        )

    yield run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("times, and ratios to the best of PyTorch's own ops")
    terminalreporter.write_line(fusemesh_benchmark.ratio_table(rows, peers.PEERS, peers.OURS))
    if config.getoption("keyword") or any("::" in str(argument) for argument in config.args):
        terminalreporter.write_line("a part of the suite ran: no results file written")
        return
    record = fusemesh_benchmark.machine()
    path = Path(__file__).parents[1] / "results" / fusemesh_benchmark.machine_name(record) / "bench.json"
    payload = {"machine": record, "rooflines": [vars(roofline) for roofline in _ROOFLINES.values()], "rows": rows}
    terminalreporter.write_line(f"written to {fusemesh_benchmark.write_results(path, payload)}")
