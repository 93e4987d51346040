"""What ranks run for test_verify.py. It holds no tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.pretrained import folder
from fusemesh.pretrained.verify import verify


def verified(pool: RankPool, path: Path, kind: str, layout: str) -> dict[str, Any]:
    """Verify a folder as this auto class in a layout."""
    task = next(task for task, (auto, _) in folder.AUTO_CLASSES.items() if auto == kind)
    return pool.run(on_ranks, str(path), task, layout, ranks=Layout.parse(layout).world_size)[0]


def on_ranks(world: World, path: str, task: str, layout: str) -> dict[str, Any]:
    return verify(world, path, task, Layout.parse(layout))
