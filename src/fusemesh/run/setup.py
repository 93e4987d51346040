"""Set-up of a run: the ranks join, the model is built or loaded, and is placed on the mesh of the configured layout."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
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
from fusemesh.kernels import backends
from fusemesh.models.registry import maker_of
from fusemesh.run.agreement import check_same, entries_of
from fusemesh.run.folder import is_model_folder, task_of_folder
from fusemesh.run.settings import Settings
from fusemesh.tasks.base import Task
from fusemesh.tasks.registry import build_task, task_class

logger = logging.getLogger("fusemesh")


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

    def place(self, model: Any) -> tuple[Any, DeviceMesh]:
        """Return ``model`` parallelized in the layout, and its mesh."""
        mesh = build_mesh(self.layout, self.world)
        model = parallelize(
            model,
            mesh,
            self.layout,
            sequence_parallel=self.config.run.sequence_parallel,
            dtype=_computed_in(self.config),
            pipeline=self.settings.pipeline,
            recompute=self.config.training.recompute,
        )
        return model, mesh

    def load(self, target: str | os.PathLike[str], *, verify: bool = True) -> Loaded:
        """Return the model of a run, a checkpoint, a merged file or a Hugging Face folder in the layout; every rank
        calls it.

        Args:
            verify: compare what is read with its checksums.
        """
        path = Path(target)
        if path.is_file():
            tensors, state = checkpoint.read_merged(path, verify=verify)
            task = task_of(state, self.config)
            model = plain_model(task)
            _load_whole(model, tensors)
            return Loaded(task, *self.place(model), state)
        if checkpoint.on_first_rank(lambda: is_model_folder(path)):
            task = task_of_folder(self.config)
            model, mesh = self.place(plain_model(task))
            maker_of(task.config).fill(model)
            return Loaded(task, model, mesh, {})
        folder = checkpoint.on_first_rank(lambda: checkpoint_of(path))
        task = task_of(checkpoint.read_state(folder), self.config)
        model, mesh = self.place(plain_model(task))
        maker_of(task.config).give_memory(model, self.world.device)
        return Loaded(task, model, mesh, checkpoint.load(folder, model, verify=verify))


@dataclass(frozen=True)
class Loaded:
    """A trained model on its mesh, its task, and the state saved with it, nothing with a Hugging Face folder."""

    task: Task
    model: Any
    mesh: DeviceMesh
    state: dict[str, Any]


def task_of(state: dict[str, Any], config: Config) -> Task:
    """Return the task of a trained model, which reads no data unless it is asked for held-out samples.

    Args:
        state: saved with the model.
        config: of the use that is made of it.

    Raises:
        ValueError: the model is of an older version, its data are needed, and they cannot be read.
    """
    metadata = state.get("metadata", task_class(config.task).old_metadata)
    if metadata is not None:
        return build_task(config, metadata)
    training = dataclasses.replace(config.data, path=config.data.path or state["config"]["data"]["path"], held_out="")
    try:
        found = build_task(dataclasses.replace(config, data=training))
    except ValueError as error:
        raise ValueError(
            "model: of an older version, which did not keep its labels with it; they are in the data that it was "
            f"trained on, which cannot be used ({error}); name them by --data.path FILE"
        ) from error
    if checkpoint.rank() == 0:
        logger.warning(
            "this model is of an older version, which did not keep its labels with it: they are taken from %s, and are "
            "right if that has not changed since; train on by --resume to have them kept",
            training.path or "the default corpus",
        )
    return build_task(config, found.metadata)


@contextlib.contextmanager
def joined(values: dict[str, Any], further: Mapping[str, Any] | None = None) -> Iterator[Run]:
    """Join the other ranks and yield the run; leave them at the end.

    Args:
        values: the configuration, as ``config.as_dict`` gives it.
        further: what the command decides beside it, by the names that errors say.

    Raises:
        ValueError: on every rank, if one has another configuration or decides otherwise.
    """
    settings = Settings.of(configuration.load(base=values))
    if settings.config.run.threads:
        torch.set_num_threads(settings.config.run.threads)
    with distributed(settings.config.run.device) as world:
        check_same(entries_of(settings, world.device.type, further or {}))
        # A Hugging Face model's layers name none; "auto" leaves it to FUSEMESH_BACKEND.
        backend = settings.config.run.backend
        with contextlib.nullcontext() if backend == "auto" else backends.use_backend(backend):
            yield Run(settings, world)


def plain_model(task: Task) -> Any:
    """Return the task's model, whole, on the CPU or on meta, as every rank makes it before it is cut."""
    return maker_of(task.config).build(task)


def load_file(path: str | os.PathLike[str], config: Config, *, verify: bool = True) -> tuple[Task, Any, dict[str, Any]]:
    """Return the task and the plain model of a merged file, on the configured device and in the dtype of its
    computation, and the state saved with it."""
    kind = config.run.device
    where = torch.device("cuda" if kind == "auto" and torch.cuda.is_available() else kind.replace("auto", "cpu"))
    tensors, state = checkpoint.read_merged(path, verify=verify)
    task = task_of(state, config)
    model = plain_model(task)
    _load_whole(model, tensors)
    return task, model.to(where, _computed_in(config)), state


def _computed_in(config: Config) -> torch.dtype | None:
    """Return the dtype of the computation; None where it is the parameters' own."""
    return torch.bfloat16 if config.training.dtype == "bfloat16" else None


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


def state_of(target: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state saved with a run directory, a checkpoint or a merged file: ``step``, ``config`` (the ``base`` of
    ``config.load``), and, but for models of older versions, ``metadata`` of the task and ``data`` (its fingerprint).

    Raises:
        ValueError: it is none of these.
    """
    path = Path(target)
    _check_exists(path)
    state = checkpoint.read_merged_state(path) if path.is_file() else checkpoint.read_state(checkpoint_of(path))
    if not isinstance(state.get("config"), dict):
        raise checkpoint.CheckpointError(
            f"model: expected what fusemesh train saved, received {str(path)!r}: it has no configuration"
        )
    return state


def _check_exists(target: Path) -> None:
    if not target.exists():
        raise checkpoint.CheckpointError(
            f"model: expected a run directory, a checkpoint, a Hugging Face folder or a .safetensors file, received "
            f"{str(target)!r}, which does not exist (a model of the hub is fetched by `hf download NAME --local-dir "
            "DIR`)"
        )


def config_of(target: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the configuration saved with a model; see :func:`state_of`."""
    saved: dict[str, Any] = state_of(target)["config"]
    return saved


def checkpoint_of(target: str | os.PathLike[str], from_step: int | None = None) -> Path:
    """Return the checkpoint of a run directory (its latest), of a folder of checkpoints (the latest), or ``target``.

    Args:
        from_step: the step whose checkpoint is taken in place of the latest.

    Raises:
        ValueError: there is none.
    """
    path = Path(target)
    _check_exists(path)
    if path.is_file():
        raise checkpoint.CheckpointError(
            f"model: expected a run directory or a checkpoint, received {str(path)!r}, which is a file"
        )
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return checkpoint.latest(folder) if from_step is None else checkpoint.at_step(folder, from_step)
