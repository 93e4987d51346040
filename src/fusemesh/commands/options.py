"""Options that several commands share."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from fusemesh import config, standard_output
from fusemesh.tasks.names import TASKS

# Short names of keys where a model is asked; where one is trained they are config.SHORT_NAMES.
ASKING_NAMES = {"evaluation.batch_size": "--batch-size"}
# Keys that apply wherever a trained model is loaded.
LOADING = (
    "layout",
    "training.dtype",
    "pipeline.schedule",
    "pipeline.virtual_stages",
    "run.device",
    "run.backend",
    "run.sequence_parallel",
    "run.threads",
)
_NUMBERS = {"int": "a whole number", "float": "a number"}


class Outcome(NamedTuple):
    """The outcome of a command.

    result: what ``--json`` prints; None in a process that is not the first rank. text: for people; None prints nothing.
    status: of the process.
    """

    result: dict[str, Any] | None
    text: str | None = None
    status: int = 0


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError with one line.

    words: the command line, which says which task's defaults the help shows.
    """

    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("expected one argument", "expected a value, received none")
        message = re.sub("^the following arguments are required: (.*)", r"\1: expected a value, received none", message)
        for kind, expected in _NUMBERS.items():
            message = re.sub(rf": invalid {kind} value: ", f": expected {expected}, received ", message)
        raise ValueError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own says nothing where it cannot write.
        if file in (None, sys.stdout):
            standard_output.write(message, end="")
        else:
            print(message, end="", file=file)

    def option_names(self) -> list[str]:
        """Return the options that the help shows, without those of one dash."""
        return re.findall(r"(?<![\w-])--\w[\w.-]*", self.format_help())


def add_configuration(
    command: argparse.ArgumentParser,
    *,
    short: Mapping[str, str] | None = None,
    shown: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add every key of the configuration.

    Args:
        short: short names by key.
        shown: beginnings of the keys that the command's help shows; None: all. The others are taken all the same.
        defaults: the command's own, by key, over those of the task that the command line names.
    """
    from fusemesh.tasks.registry import defaults_of

    task = _named_task(getattr(command, "words", ()))
    values = {**(defaults_of(task) if task else {}), **(defaults or {})}
    if shown is not None:
        title, text = "configuration", "as the model was trained, where no other value is given"
    elif task is None:
        title, text = "configuration", f"with a task before --help its own defaults are shown: {', '.join(TASKS)}"
    else:
        title, text = f"configuration, with the defaults of {task}", "a TOML file has the same keys"
    keys = command.add_argument_group(title, text)
    for key, spec in config.fields_of(config.Config).items():
        name = (short or {}).get(key)
        doc = spec.doc + (f" ({', '.join(spec.choices)})" if spec.choices else "")
        if shown is None:
            default = values.get(key, task if key == "task" and task else spec.default)
            doc += f"; default {default!r}" if spec.type is str else f"; default {default}"
        keys.add_argument(
            *([name] if name else []),
            f"--{key}",
            dest=key,
            metavar=spec.type.__name__.upper(),
            help=doc.replace("%", "%%") if shown is None or key.startswith(tuple(shown)) else argparse.SUPPRESS,
        )


def add_task(command: argparse.ArgumentParser) -> None:
    """Add the positional TASK."""
    command.add_argument(
        "task_name", nargs="?", metavar="TASK", help=f"{', '.join(TASKS)}; default: the configuration's"
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


def counted(number: int, thing: str) -> str:
    """Return "1 sample", "2 samples"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _named_task(words: Sequence[str]) -> str | None:
    """Return the first task that stands on the command line, for the help."""
    return next((name for word in words if (name := word.removeprefix("--task=")) in TASKS), None)
