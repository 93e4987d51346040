"""Tasks by name: their defaults, their classes, and the configured one with its data."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusemesh.models.registry import maker_of
from fusemesh.spelling import suggestion

from .names import TASKS

if TYPE_CHECKING:
    from fusemesh.config import Config

    from .base import Task


def defaults_of(name: str) -> Mapping[str, Any]:
    """Return a task's own defaults of the configuration, by dotted key.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, received {name!r}{suggestion(name, TASKS)}")
    found: Mapping[str, Any] = importlib.import_module(f".{name}", __package__).DEFAULTS
    return found


def task_class(name: str) -> type[Task]:
    """Return the class of a task."""
    found: type[Task] = getattr(
        importlib.import_module(f".{name}", __package__), "".join(part.capitalize() for part in name.split("_"))
    )
    return found


def build_task(config: Config, metadata: Mapping[str, Any] | None = None) -> Task:
    """Return the configured task with its data; or, given the metadata of a trained model, without them.

    Raises:
        ValueError: its model cannot be made, or the data cannot be used; names the key, or file and line, and the
            remedy.
    """
    maker_of(config).check()
    return task_class(config.task)(config, metadata)


def with_length(config: Config) -> Config:
    """Return the configuration with a ``data.sequence_length`` of 0 decided by the data; raise as :func:`build_task`.

    Once, before any rank starts: what a run saves holds the number.
    """
    # With metadata of any kind a task reads no more than the choice takes.
    return config if config.data.sequence_length else build_task(config, {}).config
