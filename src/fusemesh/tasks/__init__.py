"""What a model is trained for: data, kind of model, and metric of each task, one file a task."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusemesh.config import Config

    from .base import Task

# The name of a task is that of its file; its class is the name in camel case.
TASKS = ("language_model", "text_classification", "translation", "question_answering")


def defaults_of(name: str) -> Mapping[str, Any]:
    """By dotted key, what a task's configuration holds where nobody says otherwise.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, received {name!r}")
    found: Mapping[str, Any] = importlib.import_module(f".{name}", __package__).DEFAULTS
    return found


def task_class(name: str) -> type[Task]:
    """The class of a task."""
    found: type[Task] = getattr(
        importlib.import_module(f".{name}", __package__), "".join(part.capitalize() for part in name.split("_"))
    )
    return found


def build_task(config: Config) -> Task:
    """The configured task with its data.

    Raises:
        ValueError: the data cannot be used; names the key, or file and line, and the remedy.
    """
    return task_class(config.task)(config)
