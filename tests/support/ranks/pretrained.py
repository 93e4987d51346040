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


def whole_again(world: World, text: str, name: str, kind: str) -> list[str]:
    """What of logits, losses and states of a model on a mesh is not one process's; in batches of several shapes."""
    with KeepDouble():
        model = placed(world, text, name, kind, PipelineOptions(), {})
        alone = as_trainable(training.build(name, kind, torch.float64))
        found = []
        for length in (*range(9, 15), 9):
            tokens, targets, inputs = training.batch(alone, length=length)
            if not torch.allclose(
                model.logits(tokens, **inputs), alone.logits(tokens, **inputs), rtol=1e-12, atol=1e-13
            ):
                found.append(f"logits of {length}")
            want = alone.loss(tokens, targets, **inputs)
            if abs(model.loss(tokens, targets, **inputs) - want) > 1e-12 * want:
                found.append(f"loss of {length}")
        if model.pipeline is not None and len(model.pipeline._schedules) > 4:
            found.append("schedules")
        state = alone.state_dict()
        for shift in (0, 1):
            model.load_state_dict({key: x + shift for key, x in state.items()})
            again = fusemesh.whole_state_dict(model)
            if world.rank == 0:
                found += [f"state: {key}" for key in again.keys() ^ state.keys()]
                found += [f"state: {key}" for key in again if not torch.equal(again[key], state[key] + shift)]
    return found


def dropped(world: World, text: str, name: str, kind: str) -> tuple[float, dict[str, float]]:
    """By how much the dropout of the family's config changes the loss, and what then differs from one process."""
    layout = Layout.parse(text)
    with KeepDouble():
        alone, model = (training.build(name, kind, torch.float64).train() for _ in range(2))
        for each in (alone, model):
            each.set_attn_implementation("eager")
        as_trainable(fusemesh.parallelize(model, build_mesh(layout, world), layout))
        tokens, targets, inputs = training.batch(as_trainable(alone))
        found: dict[str, Any] = {}
        want: dict[str, Any] = {}
        for each, result in ((model, found), (alone, want)):
            result["losses"] = [float(each.loss_and_gradients(tokens, targets, 10, **inputs))]
            named = {key: x.grad for key, x in each.named_parameters() if x.grad is not None}
            result["gradients"] = {key: whole(x) for key, x in named.items()}
        without = float(alone.eval().loss(tokens, targets, **inputs))
    return abs(without / want["losses"][0] - 1), training.wrong(found, want, 1e-12)
