"""Ranks of a command: started here, or this process is one of a launcher's."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import LOADING, add_configuration, overrides

if TYPE_CHECKING:
    from fusemesh.hybrid.layout import Layout
    from fusemesh.run.settings import Settings


@dataclass(frozen=True)
class Ranks:
    """The number of ranks, and whether this process starts them rather than being one of them."""

    count: int
    start: bool

    def call(self, function: Any, *arguments: Any) -> Any:
        """Run a function on every rank and return the result of rank 0; None in a process that is another rank."""
        from fusemesh.hybrid.ranks.join import find_place, launch_local

        if self.start:
            return launch_local(self.count, function, *arguments)[0]
        place = find_place()
        result = function(*arguments)
        return result if place is None or place.rank == 0 else None


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
                f"already, received {options.nproc}"
            )
        return Ranks(place.world_size, False)
    nproc = options.nproc if options.nproc is not None else layout.world_size
    if nproc < 1:
        raise ValueError(f"--nproc: expected at least 1, received {nproc}")
    return Ranks(nproc, nproc > 1)


def add_target(
    command: argparse.ArgumentParser, *, shown: Sequence[str] = (), short: Mapping[str, str] | None = None
) -> None:
    """Add what :func:`find_target` reads: a trained model, ``--nproc`` and the configuration.

    Args:
        shown: beginnings of the keys that the help shows beside those of every trained model.
        short: short names by key.
    """
    command.add_argument("target", metavar="TARGET", help="run directory, checkpoint folder or .safetensors file")
    add_nproc(command)
    add_configuration(command, shown=(*LOADING, *shown), short=short)


def find_target(options: argparse.Namespace) -> tuple[Settings, Ranks]:
    """Return the settings of a trained model, in its own layout unless the command line says another, and its ranks.

    Raises:
        ValueError: there is no such model, or the ranks cannot run it.
    """
    from fusemesh.run.settings import Settings, load_config
    from fusemesh.run.setup import config_of

    base, given = config_of(options.target), overrides(options)
    # A merged file is no longer spread over ranks, unless the command line asks for it.
    merged = Path(options.target).is_file()
    settings = Settings.of(load_config(None, {**({"layout": "single"} if merged else {}), **given}, base=base))
    ranks = find_ranks(options, settings.layout)
    settings.check(ranks.count)
    return settings, ranks


def metrics_text(evaluation: dict[str, Any]) -> str:
    """Return the task's metrics of an evaluation as text."""
    known = ("task", "step", "layout", "loss", "targets", "samples", "seconds")
    return ", ".join(f"{name} {value:.4f}" for name, value in evaluation.items() if name not in known)
