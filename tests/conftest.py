"""Shared by all tests. Two runs of pytest make the suite (Makefile): interpreter tests, and everything else."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support import schedule

if TYPE_CHECKING:
    from fusemesh.hybrid.ranks.testing import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Four gloo ranks on CPU for every test that needs some; they start with the first such test.

    The backend is the call's own, and the contents of tensors are checked. A test whose ranks need other environment
    variables starts a pool of its own.
    """
    # Some of the tests run where torch is absent.
    from fusemesh.hybrid.ranks.testing import RankPool

    with RankPool(4, env={"FUSEMESH_CHECK": "1"}) as ranks:
        yield ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="i/n", help="run the i-th of n parts of the selected tests (make test-all)")


def pytest_configure() -> None:
    # Before anything is imported that reads it: verdicts and preferences of this user are neither read nor written.
    os.environ["FUSEMESH_CACHE"] = tempfile.mkdtemp(prefix="fusemesh-tests-")
    # Everything that collection makes stays: Python's collector need not look for garbage in it, now or later.
    gc.disable()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["FUSEMESH_CACHE"], ignore_errors=True)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Skip what this process cannot run, with the command that runs it; then choose the part, and the order.

    Triton's interpreter is on or off for a whole process, so the suite is two runs (``make test``).
    """
    is_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if not is_interpreting and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason="run it by TRITON_INTERPRET=1 pytest -m interpreter"))
        if is_interpreting and item.get_closest_marker("aot"):
            item.add_marker(pytest.mark.skip(reason="run it without TRITON_INTERPRET"))
    yield
    if text := config.getoption("--part"):
        try:
            number, count = schedule.parse_part(text)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        chosen = schedule.part(items, number, count)
        kept = {item.nodeid for item in chosen}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = chosen
    items[:] = schedule.in_order(items)
