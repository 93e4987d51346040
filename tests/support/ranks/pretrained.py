"""Functions that ranks run for test_pretrained_stages.py: Hugging Face models in stages. It holds no tests."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

import fusemesh
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.hugging_face.stages import as_trainable
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.pipeline_parallel import clip_gradients
from fusemesh.hybrid.ranks.join import World, build_mesh
from tests.support.hugging_face import KeepDouble
from tests.support.pretrained import training


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def own(x: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """This replica's samples."""
    return x.chunk(layout.replicas)[layout.replica_of(rank)]


def shortened(tokens: torch.Tensor, targets: torch.Tensor, inputs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The same padded to the longest of these texts alone."""
    longest = int(inputs["lengths"].max())
    cut = targets[:, :longest] if targets.shape[1] == tokens.shape[1] else targets
    segments = {name: x[:, :longest] for name, x in inputs.items() if name == "segments"}
    return tokens[:, :longest], cut, {**inputs, **segments}


def placed(world: World, text: str, name: str, kind: str, options: PipelineOptions, changed: dict[str, Any]) -> Any:
    layout = Layout.parse(text)
    model = training.build(name, kind, torch.float64, **changed)
    return as_trainable(fusemesh.parallelize(model, build_mesh(layout, world), layout, pipeline=options))


def learned(
    world: World, text: str, name: str, kind: str, options: PipelineOptions, changed: dict[str, Any]
) -> dict[str, Any]:
    """Two steps on a mesh; each replica pads its texts to the longest of its own."""
    layout = Layout.parse(text)
    with KeepDouble():
        model = placed(world, text, name, kind, options, changed)
        tokens, targets, inputs = training.batch(model)
        number = training.count(targets)
        mine = shortened(
            *(own(x, layout, world.rank) for x in (tokens, targets)),
            {key: own(x, layout, world.rank) for key, x in inputs.items()},
        )

        def step() -> torch.Tensor:
            loss = model.loss_and_gradients(mine[0], mine[1], number, **mine[2])
            return sum_over_replicas(loss, model.mesh)

        return training.learned(model, step, lambda: clip_gradients(model, training.MAX_NORM), whole)
