"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from fusemesh import config

_SHORT = {"training.steps": ("--steps",), "run.directory": ("--out",)}


class Outcome(NamedTuple):
    """The outcome of a command.

    result: what ``--json`` prints; None in a process that is not the first rank. text: for people; None prints nothing.
    status: of the process.
    """

    result: dict[str, Any] | None
    text: str | None = None
    status: int = 0


def add_configuration(command: argparse.ArgumentParser, *, short: bool = False) -> None:
    """Add every key of the configuration; with ``short``, the most used ones also by a short name."""
    keys = command.add_argument_group("configuration")
    for key, spec in config.fields_of(config.Config).items():
        text = spec.doc + (f" ({', '.join(spec.choices)})" if spec.choices else "")
        keys.add_argument(
            f"--{key}",
            *(_SHORT.get(key, ()) if short else ()),
            metavar=spec.type.__name__.upper(),
            help=f"{text}; default {spec.default!r}".replace("%", "%%"),
        )


def add_config_file(command: argparse.ArgumentParser) -> None:
    """Add ``--config``."""
    command.add_argument("--config", metavar="FILE", help="TOML file; the options below win over it")


def overrides(options: argparse.Namespace) -> dict[str, str]:
    """Return the keys of the configuration that the command line gives.

    Raises:
        ValueError: two tasks are named.
    """
    given = vars(options)
    found = {key: given[key] for key in config.fields_of(config.Config) if given.get(key) is not None}
    named = given.get("task_name")
    if named is not None and found.setdefault("task", named) != named:
        raise ValueError(f"--task: expected {named}, as named before, received {found['task']}; name it once")
    return found
