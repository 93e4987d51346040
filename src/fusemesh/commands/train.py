"""``fusemesh train``: train a model for a task in any layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusemesh import config
from fusemesh.tasks.names import TASKS

from .options import Outcome, add_config_file, add_configuration, overrides
from .ranks import add_nproc, find_ranks, metrics_text

NAME = "train"
SUMMARY = "train a model for a task in any layout"
USAGE = "[TASK] [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "task_name", nargs="?", metavar="TASK", help=f"{', '.join(TASKS)}; default: the configuration's"
    )
    add_config_file(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of run.directory, in any layout"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_nproc(parser)
    add_configuration(parser, short=True)


def run(options: argparse.Namespace) -> Outcome:
    """Train, evaluate and save."""
    from fusemesh.run.settings import Settings, load_config

    given = overrides(options)
    source = options.config
    if options.resume and source is None:
        given.setdefault("run.directory", config.fields_of(config.Config)["run.directory"].default)
        saved = Path(given["run.directory"], "config.toml")
        source = saved if saved.is_file() else None
    settings = Settings.of(_with_chosen_layout(load_config(source, given), options))
    ranks = find_ranks(options, settings.layout)

    from fusemesh.run.trainer import check_run, train_rank

    check_run(settings, ranks.count, resume=options.resume)
    summary = ranks.call(train_rank, config.as_dict(settings.config), options.resume, options.quiet)
    if summary is None:
        return Outcome(None)
    return Outcome(
        summary,
        f"{summary['steps']} steps in layout {summary['layout']} on {summary['world_size']} {summary['device']} ranks, "
        f"{summary['tokens_per_s'] or 0:.0f} tokens/s\n"
        f"held-out loss {summary['loss']:.4f}, {metrics_text(summary['held_out'])}\n"
        f"saved in {summary['directory']}",
    )


def _with_chosen_layout(configured: config.Config, options: argparse.Namespace) -> config.Config:
    """Return the configuration with a layout of "auto" decided, before any rank starts."""
    if configured.layout.strip().lower() != "auto":
        return configured
    from fusemesh.hybrid.ranks.join import find_place
    from fusemesh.run.planning import resolve_auto

    place = find_place()
    world = options.nproc if place is None else place.world_size
    chosen, line = resolve_auto(configured, world, launched=place is not None)
    print(f"fusemesh {NAME}: {line}", file=sys.stderr)
    return chosen
