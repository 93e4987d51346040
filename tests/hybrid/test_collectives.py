"""Layer: hybrid, one process over gloo: what tests/gpu/test_nccl.py runs over NCCL."""

from __future__ import annotations

from pathlib import Path

from fusemesh.hybrid.ranks.join import distributed
from tests.support.ranks import collectives


def test_the_collectives_of_every_layer(tmp_path: Path) -> None:
    with distributed("cpu") as world:
        collectives.check_layers(world)
        collectives.check_training(world, tmp_path)
