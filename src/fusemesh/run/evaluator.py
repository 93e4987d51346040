"""Held-out loss and metrics: over all ranks of any layout, or of a merged model in one process; one answer for all."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fusemesh import config as configuration
from fusemesh.config import Config
from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.data import evaluation_batches
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.ranks.join import World, build_mesh, distributed
from fusemesh.tasks import build_task, task_class
from fusemesh.tasks.base import IGNORED, Batch, Dataset, Task
from fusemesh.transformer import Transformer


@dataclass(frozen=True)
class Evaluation:
    """loss: mean, nats per target; metrics: of the task; targets, samples: how many it is the mean of; seconds: wall
    time; predictions: int64 [samples, width], if the task's metrics are of them."""

    loss: float
    metrics: dict[str, float]
    targets: int
    samples: int
    seconds: float
    predictions: np.ndarray | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For reports, without the predictions."""
        return {
            "loss": self.loss,
            **self.metrics,
            "targets": self.targets,
            "samples": self.samples,
            "seconds": round(self.seconds, 3),
        }


def plain_model(config: Config, task: Task) -> Transformer:
    """The task's model, whole, on the CPU, as every rank makes it before it is cut."""
    return Transformer(
        task.model_config(),
        backend=config.run.backend,
        seed=config.training.seed,
        dtype=torch.float64 if config.training.dtype == "float64" else torch.float32,
    )


def place(model: Transformer, config: Config, world: World) -> tuple[Transformer, DeviceMesh]:
    """``model`` parallelized by the configured layout, and the mesh it is on."""
    layout = Layout.parse(config.layout)
    mesh = build_mesh(layout, world)
    dtype = torch.bfloat16 if config.training.dtype == "bfloat16" else None
    model = parallelize(
        model,
        mesh,
        layout,
        sequence_parallel=config.run.sequence_parallel,
        dtype=dtype,
        pipeline=pipeline_options(config),
    )
    return model, mesh


def pipeline_options(config: Config) -> PipelineOptions:
    """The configured options of pp.

    Raises:
        ValueError: they do not fit each other; named by their keys.
    """
    return PipelineOptions(**configuration.as_dict(config)["pipeline"])


def check_layout(config: Config, world_size: int) -> Layout:
    """The configured layout, if this many ranks can run this model with it.

    Raises:
        ValueError: they cannot; named by the key to change. No communication has happened.
    """
    layout, options = Layout.parse(config.layout), pipeline_options(config)
    layout.validate(
        world_size=world_size,
        num_layers=config.model.num_layers * task_class(config.task).stacks,
        num_heads=config.model.num_heads,
        num_kv_heads=config.model.num_kv_heads,
        intermediate_size=config.model.intermediate_size,
        sequence_length=config.data.sequence_length,
        sequence_parallel=config.run.sequence_parallel,
        virtual_stages=options.virtual_stages,
    )
    if layout.pp > 1:
        options.evaluating().microbatches_of(layout.pp, config.evaluation.batch_size, "evaluation.batch_size")
    return layout


def held_out_samples(config: Config, samples: Dataset) -> int:
    """How many of the held-out samples an evaluation takes."""
    return min(config.evaluation.samples or len(samples), len(samples))


def on_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens, targets and further inputs of a batch as tensors."""
    inputs = {name: torch.from_numpy(values).to(device) for name, values in batch.inputs.items()}
    return torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.targets).to(device), inputs


@torch.no_grad()
def evaluate(
    model: Transformer,
    task: Task,
    *,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    replica: int = 0,
    replicas: int = 1,
) -> Evaluation:
    """The model's mean loss and the task's metrics on the held-out samples; every rank calls it, with one answer.

    Each replica takes its share of the samples. Sums are taken in fp64 over targets and divided once, so that the
    layout enters only through the rounding of the losses themselves; metrics are of all replicas' predictions together.

    Args:
        mesh: of a parallelized model; None for a model in one process.
    """
    began = time.perf_counter()
    training = model.training
    model.eval()
    samples, batch_size = task.held_out, task.config.evaluation.batch_size
    count = held_out_samples(task.config, samples)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for indices, valid in evaluation_batches(count, batch_size, replicas, replica):
        tokens, targets, inputs = on_device(samples.batch(indices), device)
        targets[valid:] = IGNORED
        total += model.loss(tokens, targets, **inputs).double()
    if mesh is not None:
        total = sum_over_replicas(total, mesh)
    predictions = None
    if task.metric:
        predictions = predict(
            model, task, samples, count, batch_size, device=device, mesh=mesh, replica=replica, replicas=replicas
        )
    model.train(training)
    targets_counted = samples.targets_in(range(count))
    loss = total.item() / targets_counted
    metrics = task.score(loss, predictions, count)
    return Evaluation(loss, metrics, targets_counted, count, time.perf_counter() - began, predictions)


def predict(
    model: Transformer,
    task: Task,
    samples: Dataset,
    count: int,
    batch_size: int,
    *,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    replica: int = 0,
    replicas: int = 1,
) -> np.ndarray:
    """What the task's model answers to the first ``count`` samples, int64 [count, width], the same on every rank.

    Each replica answers its share.
    """
    found: torch.Tensor | None = None
    for indices, valid in evaluation_batches(count, batch_size, replicas, replica):
        own = task.predict(model, samples.batch(indices), device)
        if found is None:
            found = own.new_zeros((count, own.shape[1]))
        found[torch.from_numpy(indices[:valid]).to(device)] = own[:valid]
    assert found is not None
    # Each row is filled in by one replica.
    return (found if mesh is None else sum_over_replicas(found, mesh)).cpu().numpy()


def config_of(target: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration saved with a run directory, a checkpoint or a merged file: the ``base`` of ``config.load``.

    Raises:
        ValueError: it is none of these.
    """
    return _state_of(Path(target))["config"]


def checkpoint_of(target: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by a run directory (its latest), a folder of checkpoints (the latest), or a checkpoint.

    Raises:
        ValueError: there is none.
    """
    path = Path(target)
    return checkpoint.latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def _state_of(path: Path) -> dict[str, Any]:
    if path.is_file():
        return checkpoint.read_merged_state(path)
    if not path.is_dir():
        raise ValueError(
            f"model: expected a run directory, a checkpoint or a .safetensors file, received {str(path)!r}"
        )
    return checkpoint.read_state(checkpoint_of(path))


def evaluate_file(path: str | os.PathLike[str], config: Config) -> dict[str, Any]:
    """Evaluate a merged file in this process alone: no process group, no mesh, the plain model.

    Returns:
        :meth:`Evaluation.as_dict` with ``step`` and ``layout``.
    """
    task = build_task(config)
    model, state = load_file(path, task)
    result = evaluate(model, task, device=next(model.parameters()).device)
    return {"task": config.task, "step": state["step"], "layout": "single", **result.as_dict()}


def load_file(path: str | os.PathLike[str], task: Task) -> tuple[Transformer, dict[str, Any]]:
    """The plain model of a merged file, on the configured device, and what was saved with it."""
    kind = task.config.run.device
    where = torch.device("cuda" if kind == "auto" and torch.cuda.is_available() else kind.replace("auto", "cpu"))
    tensors, state = checkpoint.read_merged(path)
    model = plain_model(task.config, task)
    _load_whole(model, tensors)
    return model.to(where), state


def _load_whole(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if own != given:
        differ = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise ValueError(
            f"model: the file holds another model ({len(differ)} tensors differ), first {differ[0]}: "
            f"expected {own.get(differ[0])}, received {given.get(differ[0])}; leave the model.* keys as they were saved"
        )
    model.load_state_dict(tensors)


def evaluate_rank(target: str, values: dict[str, Any]) -> dict[str, Any]:
    """One rank's part of evaluating a run, a checkpoint or a merged file in the configured layout.

    Args:
        target: see :func:`config_of`.
        values: the configuration, as ``config.as_dict`` gives it.

    Returns:
        The same on every rank: :meth:`Evaluation.as_dict` with ``step`` and ``layout``.
    """
    config = configuration.load(base=values)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with distributed(config.run.device) as world:
        layout = check_layout(config, world.world_size)
        task = build_task(config)
        model, mesh, state = load_parallel(target, task, world)
        result = evaluate(
            model,
            task,
            device=world.device,
            mesh=mesh,
            replica=layout.replica_of(world.rank),
            replicas=layout.replicas,
        )
    return {"task": config.task, "step": state["step"], "layout": str(layout), **result.as_dict()}


def load_parallel(
    target: str | os.PathLike[str], task: Task, world: World
) -> tuple[Transformer, DeviceMesh, dict[str, Any]]:
    """The model of a run, a checkpoint or a merged file in the configured layout, and what was saved with it."""
    model, path = plain_model(task.config, task), Path(target)
    if path.is_file():
        tensors, state = checkpoint.read_merged(path)
        _load_whole(model, tensors)
        return *place(model, task.config, world), state
    model, mesh = place(model, task.config, world)
    return model, mesh, checkpoint.load(checkpoint_of(path), model)
