"""Shared by all tests. Two runs of pytest make the suite (Makefile): interpreter tests, and everything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fusemesh.hybrid.testing import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Four gloo ranks on CPU for every test that needs some; they start with the first such test.

    The backend is the call's own, and the contents of tensors are checked. A test whose ranks need other environment
    variables starts a pool of its own.
    """
    # Some of the tests run where torch is absent.
    from fusemesh.hybrid.testing import RankPool

    with RankPool(4, env={"FUSEMESH_CHECK": "1"}) as ranks:
        yield ranks


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under ``pytest --dist loadgroup`` one process runs all tests that share a pool, so that no second one starts."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if any(name.endswith("pool") for name in getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.xdist_group("ranks"))
