"""The order in which tests run, and the parts into which the long sweep is cut, by how long tests are known to take."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

# Mean seconds of a core that one test of a file takes; of the files that are not here, next to nothing.
SECONDS = {
    "tests/app/test_carried.py": 0.3,
    "tests/app/test_cli.py": 0.5,
    "tests/app/test_demo.py": 4.0,
    "tests/app/test_drawing.py": 0.2,
    "tests/app/test_planning.py": 0.3,
    "tests/app/test_proving.py": 0.5,
    "tests/app/test_tasks.py": 1.5,
    "tests/app/test_trainer.py": 1.0,
    "tests/app/test_trials.py": 0.5,
    "tests/app/test_trials_in_python.py": 0.5,
    "tests/bench/test_on_gpu.py": 0.2,
    "tests/bench/test_verification.py": 0.3,
    "tests/hybrid/pretrained/test_export_faults.py": 0.5,
    "tests/hybrid/pretrained/test_pretrained_export.py": 1.5,
    "tests/hybrid/test_architectures.py": 2.0,
    "tests/hybrid/test_checkpoint.py": 2.0,
    "tests/hybrid/test_consistency.py": 0.4,
    "tests/hybrid/test_launch.py": 0.6,
    "tests/hybrid/test_meeting.py": 0.3,
    "tests/hybrid/test_parity.py": 1.2,
    "tests/hybrid/test_pipeline_parallel.py": 0.6,
    "tests/hybrid/test_placed.py": 0.6,
    "tests/hybrid/test_planner.py": 0.2,
    "tests/hybrid/test_planner_models.py": 0.3,
    "tests/hybrid/test_tensor_parallel.py": 0.3,
    "tests/hybrid/test_tensor_plan.py": 0.6,
    "tests/hybrid/test_watchdog.py": 0.5,
    "tests/integrations/test_parallel_transformers.py": 3.0,
    "tests/kernels/attention/test_export.py": 0.4,
    "tests/kernels/attention/test_mask_tiles.py": 0.6,
    "tests/kernels/attention/test_module_triton.py": 0.1,
    "tests/kernels/attention/test_ops.py": 0.2,
    "tests/kernels/attention/test_triton.py": 0.2,
    "tests/kernels/attention/test_varlen.py": 0.2,
    "tests/kernels/decode/test_aot.py": 2.0,
    "tests/kernels/decode/test_decode.py": 0.1,
    "tests/kernels/emulator/test_every_kernel.py": 0.7,
    "tests/kernels/engine/test_matrix.py": 0.2,
    "tests/kernels/matmul/test_aot.py": 1.5,
    "tests/kernels/matmul/test_parallel.py": 0.3,
    "tests/kernels/proof/test_preferences.py": 0.2,
    "tests/kernels/proof/test_store.py": 0.1,
    "tests/kernels/test_aot.py": 2.5,
    "tests/kernels/test_without_triton.py": 1.0,
    "tests/packaging/test_installation.py": 60.0,
    "tests/packaging/test_packaging.py": 2.0,
    "tests/test_imports.py": 0.05,
}
_OTHERS = 0.01
# A test of the long sweep takes so many times as long as its file's others.
_SLOW = 3.0


class Item(Protocol):
    """The part of ``pytest.Item`` that is read here."""

    nodeid: str

    def get_closest_marker(self, name: str) -> object | None: ...


def file_of(test: Item) -> str:
    return test.nodeid.split("::")[0]


def seconds(test: Item) -> float:
    """Return the time that the test is taken to need."""
    return SECONDS.get(file_of(test), _OTHERS) * (_SLOW if test.get_closest_marker("slow") else 1.0)


def in_order(tests: Sequence[Item]) -> list[Item]:
    """Return the tests, file by file, in the order that ends earliest on two workers of ``--dist worksteal``.

    Each worker begins with one half of the tests and takes from the end of the other's when it has done its own. So the
    first half begins with the files that start ranks, the second with the longest of the others: four ranks share the
    cores with one process, and nothing long comes last.
    """
    files: dict[str, list[Item]] = {}
    for test in tests:
        files.setdefault(file_of(test), []).append(test)
    longest_first = sorted(files.values(), key=lambda found: -sum(map(seconds, found)))
    first = [found for found in longest_first if any(test.get_closest_marker("distributed") for test in found)]
    second = [found for found in longest_first if not any(found is other for other in first)]
    left = len(tests) // 2 - sum(map(len, first))
    while second and left >= len(second[-1]):
        first.append(second.pop())
        left -= len(first[-1])
    return [test for found in first + second for test in found]


def parse_part(text: str) -> tuple[int, int]:
    """Return i and n of ``"i/n"``, the i-th of n parts.

    Raises:
        ValueError: ``text`` is not of that form, or i is not from 1 to n.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part: expected i/n with i from 1 to n, received {text!r}")
    return int(number), int(count)


def part(tests: Iterable[Item], number: int, count: int, weigh: Callable[[Item], float] = seconds) -> list[Item]:
    """Return the tests of part ``number`` of ``count``, in their order.

    The longest is dealt first, each to the part with the least so far, so that parts take about as long. The deal
    depends on the collected tests alone, so that the parts together are all of them, each once.
    """
    tests = list(tests)
    parts = [(0.0, index) for index in range(1, count + 1)]
    own = set()
    for test in sorted(tests, key=lambda test: (-weigh(test), test.nodeid)):
        total, index = heapq.heappop(parts)
        heapq.heappush(parts, (total + weigh(test), index))
        if index == number:
            own.add(test.nodeid)
    return [test for test in tests if test.nodeid in own]
