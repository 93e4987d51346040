"""Tests of the tests: the long sweep's parts are all of its tests, each once; long tests do not come last."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from tests.support import schedule

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(eq=False)
class Item:
    nodeid: str
    markers: tuple[str, ...] = ()

    def get_closest_marker(self, name: str) -> object | None:
        return name if name in self.markers else None


def collected() -> list[Item]:
    """Return ten tests of each file that is known to take long, every third of them slow, and 400 others."""
    tests = [
        Item(f"{file}::test[{number}]", ("slow",) if number % 3 == 0 else ())
        for file in schedule.SECONDS
        for number in range(10)
    ]
    return tests + [Item(f"tests/test_others.py::test[{number}]") for number in range(400)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_test_is_in_one_part_and_parts_take_as_long(count: int) -> None:
    tests = collected()
    parts = [schedule.part(tests, number, count) for number in range(1, count + 1)]
    assert sorted(test.nodeid for part in parts for test in part) == sorted(test.nodeid for test in tests)
    for part in parts:
        assert part == [test for test in tests if test in part], "the order of collection"
        assert part == schedule.part(reversed(tests), parts.index(part) + 1, count)[::-1]
    times = [sum(map(schedule.seconds, part)) for part in parts]
    longest = max(map(schedule.seconds, tests))
    assert max(times) - min(times) <= longest


def test_parts_of_few_tests() -> None:
    tests = [Item("a"), Item("b")]
    assert [len(schedule.part(tests, number, 5)) for number in range(1, 6)] == [1, 1, 0, 0, 0]


def test_a_part_is_parsed() -> None:
    assert schedule.parse_part("2/3") == (2, 3)


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "a/b", "1/0", "-1/2", "1/2/3", "1.0/2"])
def test_no_part(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--part: expected i/n with i from 1 to n, received {text!r}")):
        schedule.parse_part(text)


def test_files_stay_whole_and_long_ones_come_first_in_either_half() -> None:
    tests = [
        *(Item(f"tests/test_others_{number}.py::test[{n}]") for number in range(40) for n in range(10)),
        *(Item(f"tests/kernels/test_aot.py::test[{n}]") for n in range(10)),
        *(Item(f"tests/hybrid/test_launch.py::test[{n}]") for n in range(10)),
        *(Item(f"tests/hybrid/test_parity.py::test[{n}]", ("distributed",) if n == 5 else ()) for n in range(10)),
    ]
    found = schedule.in_order(tests)
    assert len(found) == len(tests) and set(map(id, found)) == set(map(id, tests))
    files = [schedule.file_of(test) for test in found]
    assert sum(a != b for a, b in itertools.pairwise(files)) == len(set(files)) - 1
    for file in set(files):
        assert [t for t in found if schedule.file_of(t) == file] == [t for t in tests if schedule.file_of(t) == file]
    assert files[0] == "tests/hybrid/test_parity.py"
    half = files.index("tests/kernels/test_aot.py")
    assert len(tests) // 2 - 10 < half <= len(tests) // 2 and files[half + 10] == "tests/hybrid/test_launch.py"


def test_the_files_that_are_known_exist() -> None:
    assert [file for file in schedule.SECONDS if not (ROOT / file).is_file()] == []
