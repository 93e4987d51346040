"""A Hugging Face folder that is asked and evaluated as it is: told from a run, its configuration, its task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from fusemesh.config import Config
from fusemesh.hybrid.outputs import UserError
from fusemesh.models.registry import maker_of
from fusemesh.run.settings import load_config
from fusemesh.tasks.base import Task
from fusemesh.tasks.registry import build_task, task_class, with_length

_CONFIG, _WEIGHTS = "config.json", "*.safetensors"
_OF_RUNS = ("checkpoints", "checkpoint.json", "step-*/checkpoint.json")


class NoModelError(UserError, ValueError):
    """A folder is neither a run's nor a model's; says what is missing."""


def is_model_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is a model of Hugging Face, and not a run's or a checkpoint.

    Raises:
        NoModelError: it is none of these.
    """
    place = Path(path)
    if not place.is_dir() or any(any(place.glob(name)) for name in _OF_RUNS):
        return False
    if (place / _CONFIG).is_file():
        return True
    there = "*.safetensors alone" if any(place.glob(_WEIGHTS)) else "none of these files"
    raise NoModelError(
        "model: expected a run directory with checkpoints, a checkpoint, a .safetensors file, or a Hugging Face folder "
        f"with {_CONFIG} and *.safetensors, received {str(path)!r}, a folder with {there}; give the --out of a "
        "training, the model/ in it, or what `hf download NAME --local-dir DIR` wrote"
    )


def config_of_folder(path: str, given: Mapping[str, str], *, reads_data: bool) -> Config:
    """Return the configuration by which a folder is asked.

    Args:
        given: by key, from the command line.
        reads_data: whether held-out samples are needed, by which the length of samples is chosen as a run's is.

    Raises:
        ValueError: the folder cannot be asked, or the data are missing or cannot be used.
    """
    from fusemesh.pretrained import folder

    if "model.pretrained" in given:
        raise ValueError(
            f"model.pretrained: expected nothing beside the folder {path!r}, received {given['model.pretrained']!r}; "
            "leave it out"
        )
    task = given.get("task") or folder.own_task(folder.config_of(path))
    config = load_config(None, {"layout": "single", **given, "task": task, "model.pretrained": path})
    data = config.data
    if reads_data and not (data.path or data.held_out):
        raise ValueError(
            f"data.held_out: expected the file of records to evaluate {path!r} on, which keeps no data, received "
            "nothing; give --data.held_out FILE for all of its records, or --data.path FILE for those that a run "
            "trained on it holds out"
        )
    maker_of(config).check()
    maker_of(config).check_whole(task_of_folder(config, length=1))
    if data.sequence_length:
        return config
    if not reads_data:
        return _with_length(config, maker_of(config).usual_length)
    # Without data to train on it is what the held-out ones need.
    chosen = dataclasses.replace(config, data=dataclasses.replace(data, path=data.path or data.held_out))
    return _with_length(config, with_length(chosen).data.sequence_length)


def task_of_folder(config: Config, *, length: int = 0) -> Task:
    """Return the task of a folder, which reads no data unless it is asked for held-out samples.

    Args:
        length: ``data.sequence_length`` where the configuration has none.
    """
    if length and not config.data.sequence_length:
        config = _with_length(config, length)
    return build_task(config, task_class(config.task).metadata_of_folder(config))


def _with_length(config: Config, length: int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=length))
