"""Ranks of a command: started here, or this process is one of a launcher's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusemesh import config as configuration

from .options import LOADING, add_configuration, overrides

if TYPE_CHECKING:
    from fusemesh.hybrid.layout import Layout
    from fusemesh.run.settings import Settings


@dataclass(frozen=True)
class Ranks:
    """The number of ranks, and whether this process starts them rather than being one of them."""

    count: int
    start: bool

    @property
    def is_first(self) -> bool:
        """Whether this process is the first rank, or starts them."""
        from fusemesh.hybrid.ranks.join import find_place

        place = find_place()
        return place is None or place.rank == 0

    def call(self, function: Any, *arguments: Any) -> Any:
        """Run a function on every rank and return the result of rank 0; None in a process that is another rank."""
        from fusemesh.hybrid.ranks.join import launch_local

        if self.start:
            return launch_local(self.count, function, *arguments)[0]
        result = function(*arguments)
        return result if self.is_first else None


def add_nproc(command: argparse.ArgumentParser) -> None:
    """Add ``--nproc``."""
    command.add_argument(
        "--nproc", type=int, metavar="N", help="local ranks to start; default: as many as the layout has"
    )


def find_ranks(options: argparse.Namespace, layout: Layout) -> Ranks:
    """Return the ranks of a launcher, of ``--nproc``, or as many as the layout has.

    Raises:
        ValueError: ``--nproc`` is below 1, or given under a launcher.
    """
    from fusemesh.hybrid.ranks.join import find_place

    place = find_place()
    if place is not None:
        if options.nproc is not None:
            raise ValueError(
                f"--nproc: expected to be absent under {place.launcher}, which started {place.world_size} ranks "
                f"already, received {options.nproc}; leave it out, and give the number of ranks to the launcher"
            )
        return Ranks(place.world_size, False)
    nproc = options.nproc if options.nproc is not None else layout.world_size
    if nproc < 1:
        raise ValueError(f"--nproc: expected at least 1, received {nproc}")
    return Ranks(nproc, nproc > 1)


def add_checks(command: argparse.ArgumentParser) -> None:
    """Add ``--from-step`` and ``--no-verify``, of every command that reads checkpoints."""
    command.add_argument(
        "--from-step", type=int, metavar="N", help="take the checkpoint of this step in place of the latest"
    )
    command.add_argument(
        "--no-verify", action="store_true", help="do not compare what is read with its checksums, which reads it twice"
    )


def add_target(
    command: argparse.ArgumentParser, *, shown: Sequence[str] = (), short: Mapping[str, str] | None = None
) -> None:
    """Add what :func:`find_target` reads: a trained model, the options of ranks and checks, and the configuration.

    Args:
        shown: beginnings of the keys that the help shows beside those of every trained model.
        short: short names by key.
    """
    command.add_argument(
        "target", metavar="TARGET", help="run directory, checkpoint, .safetensors file, or folder with config.json"
    )
    add_checks(command)
    add_nproc(command)
    add_configuration(command, shown=(*LOADING, *shown), short=short)


@dataclass(frozen=True)
class Target:
    """A trained model as a command uses it.

    path: of the checkpoint, the merged file or the Hugging Face folder; state: saved with it, nothing with a folder;
    given: the keys of the configuration that the command line gives; verify: whether checksums are compared.
    """

    path: Path
    state: dict[str, Any]
    given: dict[str, str]
    settings: Settings
    ranks: Ranks
    verify: bool

    @property
    def is_merged(self) -> bool:
        """Whether it is a merged file."""
        return self.path.is_file()


def find_target(options: argparse.Namespace, *, reads_data: bool = False) -> Target:
    """Return a trained model, in its own layout unless the command line says another, and the ranks to run it.

    Args:
        reads_data: whether the command evaluates it on held-out samples.

    Raises:
        ValueError: there is no such model, the ranks cannot run it, or the command line says that it is another.
    """
    from fusemesh.models.registry import maker_of
    from fusemesh.run.folder import is_model_folder
    from fusemesh.run.settings import MODEL_KEYS, Settings, first_change, load_config
    from fusemesh.run.setup import checkpoint_of, state_of

    given, path = overrides(options), Path(options.target)
    merged, is_folder = path.is_file(), is_model_folder(path)
    if (merged or is_folder) and options.from_step is not None:
        raise ValueError(
            f"--from-step: expected a run directory with checkpoints, received the {'file' if merged else 'folder'} "
            f"{options.target!r}, which holds one model; leave it out"
        )
    if is_folder:
        return _of_folder(options, given, reads_data)
    if not merged:
        path = checkpoint_of(path, options.from_step)
    state = state_of(path)
    if {"data.path", "data.held_out"} & given.keys():
        # Other files, of which the encoding of the run's own says nothing.
        given.setdefault("data.encoding", "")
    # A merged file is no longer spread over ranks, unless the command line asks for it.
    config = load_config(None, {**({"layout": "single"} if merged else {}), **given}, base=state["config"])
    if change := first_change(configuration.load(base=state["config"]), config, MODEL_KEYS):
        key, old, new = change
        raise ValueError(f"{key}: expected {old!r}, as the model was trained, received {new!r}; leave it out")
    # What of a pretrained model the run has kept, wherever the run is now.
    settings = Settings.of(config if merged else maker_of(config).found_in(path.parent))
    ranks = find_ranks(options, settings.layout)
    settings.check(ranks.count)
    return Target(path, state, given, settings, ranks, not options.no_verify)


def _of_folder(options: argparse.Namespace, given: dict[str, str], reads_data: bool) -> Target:
    """Return the model of a Hugging Face folder; the arguments are those of :func:`find_target`."""
    from fusemesh.run.folder import config_of_folder
    from fusemesh.run.settings import Settings

    settings = Settings.of(config_of_folder(options.target, given, reads_data=reads_data))
    ranks = find_ranks(options, settings.layout)
    settings.check(ranks.count)
    return Target(Path(options.target), {}, given, settings, ranks, verify=False)


def run_of(target: Path) -> Path:
    """Return the run directory of a folder of checkpoints or of one checkpoint; any other folder is one itself."""
    whole = target.absolute()
    return next((folder.parent for folder in (whole, whole.parent) if folder.name == "checkpoints"), target)


def say(name: str, text: str, options: argparse.Namespace) -> None:
    """Write on stderr, once over all ranks, what a command is about to do; nothing with ``--quiet``."""
    from fusemesh.hybrid.ranks.join import find_place

    place = find_place()
    if not getattr(options, "quiet", False) and (place is None or place.rank == 0):
        print(f"fusemesh {name}: {text}", file=sys.stderr, flush=True)


def metrics_text(evaluation: dict[str, Any]) -> str:
    """Return the task's metrics of an evaluation as text."""
    known = ("task", "step", "layout", "loss", "targets", "samples", "seconds", "cut")
    return ", ".join(f"{name} {value:.4f}" for name, value in evaluation.items() if name not in known)
