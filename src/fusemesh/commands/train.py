"""``fusemesh train``: train a model for a task in any layout."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusemesh import config

from .options import Outcome, add_config_file, add_configuration, add_task, counted, overrides
from .ranks import add_checks, add_nproc, find_ranks, metrics_text, say

NAME = "train"
SUMMARY = "train a model for a task in any layout"
USAGE = "[TASK] [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_task(parser)
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
    parser.add_argument("--epochs", type=float, metavar="N", help="passes over the data, instead of --steps")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no lines of progress")
    add_nproc(parser)
    add_configuration(parser, short=config.SHORT_NAMES)


class Terminated(KeyboardInterrupt):
    """SIGTERM has ended the command."""


def run(options: argparse.Namespace) -> Outcome:
    """Train, evaluate, save, and draw the loss."""
    from fusemesh.run.settings import load_config

    given = overrides(options)
    source = options.config
    if options.resume and source is None:
        given.setdefault("run.directory", config.fields_of(config.Config)["run.directory"].default)
        saved = Path(given["run.directory"], "config.toml")
        source = saved if saved.is_file() else None
    for option in ("from_step", "no_verify", "allow_changed_data"):
        if getattr(options, option) and not options.resume:
            raise ValueError(f"--{option.replace('_', '-')}: expected with --resume alone, received it without")
    loaded = load_config(source, given)
    # Behind the configuration: it imports torch, without which a wrong option is told.
    with _ending_at_sigterm():
        configured = _with_length(loaded, options)
        if options.epochs is not None:
            # Defaults may follow from the number of steps.
            given["training.steps"] = str(_steps_of(configured, options, given))
            configured = replace(load_config(source, given), data=configured.data)
        return _run(configured, options)


def _run(configured: config.Config, options: argparse.Namespace) -> Outcome:
    from fusemesh.models.registry import maker_of
    from fusemesh.run.settings import Settings

    settings = Settings.of(_with_chosen_layout(configured, options))
    ranks = find_ranks(options, settings.layout)

    from fusemesh.run.checks import Resume, check_run, summary_of
    from fusemesh.run.trainer import train_rank

    resume = Resume(options.from_step, not options.no_verify, options.allow_changed_data) if options.resume else None
    done = check_run(settings, ranks.count, resume=resume)
    configured = settings.config
    earlier = done == configured.training.steps
    if earlier:
        say(NAME, f"nothing is left to do: {configured.run.directory} stands at training.steps = {done}", options)
        if (finished := summary_of(configured.run.directory, done)) is not None:
            return Outcome(finished if ranks.is_first else None, _text(finished, earlier))
    else:
        say(
            NAME,
            f"{configured.task} on {configured.data.path or 'the default corpus'}, steps {done + 1} to "
            f"{configured.training.steps} in layout {settings.layout}, into {configured.run.directory}",
            options,
        )
        if line := maker_of(configured).say_settings():
            say(NAME, line, options)
    folder = Path(configured.run.directory)
    with _failing_as_a_run(folder):
        summary = ranks.call(train_rank, config.as_dict(configured), resume, options.quiet)
    if summary is None:
        return Outcome(None)
    _draw_loss(summary, folder)
    return Outcome(summary, _text(summary, earlier))


def _text(summary: dict[str, Any], earlier: bool) -> str:
    """Return a summary as text; ``earlier``: the run had done its steps before."""
    speed = "" if summary["tokens_per_s"] is None else f", {summary['tokens_per_s']:.0f} tokens/s"
    return (
        f"{'no step was left to do; of the earlier run: ' if earlier else ''}{counted(summary['steps'], 'step')} in "
        f"layout {summary['layout']} on {counted(summary['world_size'], summary['device'] + ' rank')}{speed}\n"
        f"held-out loss {summary['loss']:.4f}, {metrics_text(summary['held_out'])}\n"
        f"saved in {summary['directory']}"
        + (f"; a Hugging Face folder in {summary['exported']}" if "exported" in summary else "")
    )


def _with_length(configured: config.Config, options: argparse.Namespace) -> config.Config:
    """Return the configuration with a length of samples that suits the data, if it has none; say which.

    A run that goes on keeps its own.
    """
    if configured.data.sequence_length:
        return configured
    saved = Path(configured.run.directory, "config.toml")
    if options.resume and saved.is_file():
        length = config.load(saved).data.sequence_length
        return replace(configured, data=replace(configured.data, sequence_length=length))
    from fusemesh.tasks.registry import with_length

    chosen = with_length(configured)
    say(NAME, f"data.sequence_length: {chosen.data.sequence_length} chosen from the data", options)
    return chosen


def _steps_of(configured: config.Config, options: argparse.Namespace, given: dict[str, str]) -> int:
    """Return the number of steps of the epochs that are asked for; say how many."""
    epochs = options.epochs
    if "training.steps" in given:
        raise ValueError(f"--epochs: expected it or --steps, received both, {epochs:g} and {given['training.steps']}")
    if not 0 < epochs < math.inf:
        raise ValueError(f"--epochs: expected more than 0, received {epochs:g}")
    from fusemesh.tasks.registry import build_task

    samples, batch = len(build_task(configured).train), configured.training.global_batch_size
    steps = math.ceil(epochs * samples / batch)
    say(
        NAME,
        f"{epochs:g} times the {counted(samples, 'sample')}, {batch} a step, are {counted(steps, 'step')}",
        options,
    )
    return steps


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`Terminated`, unless a launcher has started this process."""
    from fusemesh.hybrid.ranks.join import find_place

    # A launcher's rank may wait in a collective, which no exception ends.
    if find_place() is not None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise Terminated("terminated")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _failing_as_a_run(folder: Path) -> Iterator[None]:
    """Let an interruption say how to go on with the run in ``folder``, and a failed write be the run's failure."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RuntimeError(str(error)) from error
    except KeyboardInterrupt as error:
        from fusemesh.run.progress import last_checkpoint

        saved = last_checkpoint(folder)
        advice = "no checkpoint has been saved" if saved is None else f"go on from {saved} with --resume"
        raise type(error)(f"{str(error) or 'interrupted'}; {advice}") from None


def _draw_loss(summary: dict[str, Any], folder: Path) -> None:
    """Draw the loss over the steps; a run is none the worse for a drawing that cannot be made."""
    from fusemesh.run.metrics import BITS_PER_BYTE, draw_loss_curve

    unit = BITS_PER_BYTE if "bits_per_byte" in summary["held_out"] else "nats per target"
    title = f"{summary['task']}: {summary['data']}, layout {summary['layout']}"
    try:
        draw_loss_curve(folder, folder / "loss_curve.png", baselines={}, title=title, unit=unit)
    except OSError as error:
        print(f"fusemesh {NAME}: {error}", file=sys.stderr)
    except ValueError:
        # Without matplotlib, as was said before the first step.
        return


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
