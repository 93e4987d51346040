"""Without a GPU these tests are deselected (and counted as such), not skipped one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    kept = [item for item in items if HERE not in item.path.parents]
    config.hook.pytest_deselected(items=[item for item in items if HERE in item.path.parents])
    items[:] = kept
