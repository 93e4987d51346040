"""Shared by all tests. Two runs of pytest make the suite (Makefile): interpreter tests, and everything else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What a plain ``pytest`` cannot run in this process is skipped, with the command that runs it.

    Triton's interpreter is on or off for a whole process, so the suite is two runs (``make test``).
    """
    is_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if not is_interpreting and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason="run it by TRITON_INTERPRET=1 pytest -m interpreter"))
        if is_interpreting and item.get_closest_marker("aot"):
            item.add_marker(pytest.mark.skip(reason="run it without TRITON_INTERPRET"))
