"""Layer: hybrid on a real GPU. One rank over NCCL runs the collectives of every layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusemesh.hybrid.ranks.join import distributed
from tests.support.ranks import collectives

pytestmark = pytest.mark.gpu


def test_the_collectives_of_every_layer(tmp_path: Path) -> None:
    with distributed("cuda") as world:
        collectives.check_layers(world)
        collectives.check_training(world, tmp_path)
        torch.cuda.synchronize()
