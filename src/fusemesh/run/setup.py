"""Set-up of a run: the ranks join, the model is built or loaded, and is placed on the mesh of the configured layout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fusemesh import config as configuration
from fusemesh.config import Config
from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh, distributed
from fusemesh.run.settings import Settings
from fusemesh.tasks.base import Task
from fusemesh.transformer import Transformer


@dataclass(frozen=True)
class Share:
    """The part of the samples that a rank computes: those of its replica of the model.

    device: of the model; mesh: of a parallelized model, None in one process; replica: from 0, below ``replicas``.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    replica: int = 0
    replicas: int = 1


@dataclass(frozen=True)
class Run:
    """A run on this rank, whose process group exists.

    Raises:
        ValueError: the ranks cannot run the settings, see :meth:`Settings.check`.
    """

    settings: Settings
    world: World

    def __post_init__(self) -> None:
        self.settings.check(self.world.world_size)

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.settings.config

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.settings.layout

    def share(self, mesh: DeviceMesh) -> Share:
        """Return this rank's share of the samples."""
        return Share(self.world.device, mesh, self.layout.replica_of(self.world.rank), self.layout.replicas)

    def place(self, model: Transformer) -> tuple[Transformer, DeviceMesh]:
        """Return ``model`` parallelized in the layout, and its mesh."""
        mesh = build_mesh(self.layout, self.world)
        model = parallelize(
            model,
            mesh,
            self.layout,
            sequence_parallel=self.config.run.sequence_parallel,
            dtype=torch.bfloat16 if self.config.training.dtype == "bfloat16" else None,
            pipeline=self.settings.pipeline,
        )
        return model, mesh

    def load(self, target: str | os.PathLike[str], task: Task) -> tuple[Transformer, DeviceMesh, dict[str, Any]]:
        """Return the model of a run, a checkpoint or a merged file in the layout, its mesh, and the saved state."""
        model, path = plain_model(task), Path(target)
        if path.is_file():
            tensors, state = checkpoint.read_merged(path)
            _load_whole(model, tensors)
            return *self.place(model), state
        model, mesh = self.place(model)
        return model, mesh, checkpoint.load(checkpoint_of(path), model)


@contextlib.contextmanager
def joined(values: dict[str, Any]) -> Iterator[Run]:
    """Join the other ranks and yield the run; leave them at the end.

    Args:
        values: the configuration, as ``config.as_dict`` gives it.
    """
    settings = Settings.of(configuration.load(base=values))
    if settings.config.run.threads:
        torch.set_num_threads(settings.config.run.threads)
    with distributed(settings.config.run.device) as world:
        yield Run(settings, world)


def plain_model(task: Task) -> Transformer:
    """Return the task's model, whole, on the CPU, as every rank makes it before it is cut."""
    config = task.config
    return Transformer(
        task.model_config(),
        backend=config.run.backend,
        seed=config.training.seed,
        dtype=torch.float64 if config.training.dtype == "float64" else torch.float32,
    )


def load_file(path: str | os.PathLike[str], task: Task) -> tuple[Transformer, dict[str, Any]]:
    """Return the plain model of a merged file, on the configured device, and the state that was saved with it."""
    kind = task.config.run.device
    where = torch.device("cuda" if kind == "auto" and torch.cuda.is_available() else kind.replace("auto", "cpu"))
    tensors, state = checkpoint.read_merged(path)
    model = plain_model(task)
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


def config_of(target: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the configuration saved with a run directory, a checkpoint or a merged file: ``base`` of ``config.load``.

    Raises:
        ValueError: it is none of these.
    """
    path = _existing(target)
    if path.is_file():
        return checkpoint.read_merged_state(path)["config"]
    if not path.is_dir():
        raise ValueError(
            f"model: expected a run directory, a checkpoint or a .safetensors file, received {str(path)!r}"
        )
    return checkpoint.read_state(checkpoint_of(path))["config"]


def _existing(target: str | os.PathLike[str]) -> Path:
    path = Path(target)
    if not path.exists():
        raise ValueError(
            f"model: expected a run directory, a checkpoint or a .safetensors file, received {str(path)!r}, which does "
            "not exist"
        )
    return path


def checkpoint_of(target: str | os.PathLike[str]) -> Path:
    """Return the checkpoint of a run directory (its latest), of a folder of checkpoints (the latest), or ``target``.

    Raises:
        ValueError: there is none.
    """
    path = _existing(target)
    return checkpoint.latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
