"""``fusemesh train``: train a model for a task in any layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fusemesh import config
from fusemesh.tasks.names import TASKS

from .options import Outcome, add_config_file, add_configuration, overrides
from .ranks import add_checks, add_nproc, find_ranks, metrics_text, say

NAME = "train"
SUMMARY = "train a model for a task in any layout"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "task_name", nargs="?", metavar="TASK", help=f"{', '.join(TASKS)}; default: the configuration's"
    )
    add_config_file(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of run.directory, in any layout"
    )
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="with --resume: go on although the data have changed; samples may be left out or taken twice",
    )
    add_checks(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no lines of progress")
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
    for option in ("from_step", "no_verify", "allow_changed_data"):
        if getattr(options, option) and not options.resume:
            raise ValueError(f"--{option.replace('_', '-')}: expected with --resume alone, received it without")
    settings = Settings.of(_with_chosen_layout(load_config(source, given), options))
    ranks = find_ranks(options, settings.layout)

    from fusemesh.run.checks import Resume, check_run, summary_of
    from fusemesh.run.trainer import train_rank

    resume = Resume(options.from_step, not options.no_verify, options.allow_changed_data) if options.resume else None
    done = check_run(settings, ranks.count, resume=resume)
    configured = settings.config
    if done == configured.training.steps:
        say(NAME, f"nothing is left to do: {configured.run.directory} stands at training.steps = {done}", options)
        if (finished := summary_of(configured.run.directory, done)) is not None:
            return Outcome(finished if ranks.is_first else None, _text(finished))
    else:
        say(
            NAME,
            f"{configured.task} on {configured.data.path or 'the default corpus'}, steps {done + 1} to "
            f"{configured.training.steps} in layout {settings.layout}, into {configured.run.directory}",
            options,
        )
    summary = ranks.call(train_rank, config.as_dict(configured), resume, options.quiet)
    return Outcome(None) if summary is None else Outcome(summary, _text(summary))


def _text(summary: dict[str, Any]) -> str:
    return (
        f"{summary['steps']} steps in layout {summary['layout']} on {summary['world_size']} {summary['device']} ranks, "
        f"{summary['tokens_per_s'] or 0:.0f} tokens/s\n"
        f"held-out loss {summary['loss']:.4f}, {metrics_text(summary['held_out'])}\n"
        f"saved in {summary['directory']}"
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
