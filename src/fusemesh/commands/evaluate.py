"""``fusemesh eval``: held-out loss and metrics of a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusemesh import config

from .options import ASKING_NAMES, Outcome
from .ranks import add_target, find_target, metrics_text

NAME = "eval"
SUMMARY = "held-out loss and metrics of a run, a checkpoint or a merged file"
USAGE = "TARGET [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_target(parser, shown=("data.", "evaluation."), short=ASKING_NAMES)


def run(options: argparse.Namespace) -> Outcome:
    """Evaluate on the held-out samples."""
    from fusemesh.run.evaluator import evaluate_file, evaluate_rank

    settings, ranks = find_target(options)
    if Path(options.target).is_file() and ranks.count == 1:
        result = evaluate_file(options.target, settings.config)
    else:
        result = ranks.call(evaluate_rank, options.target, config.as_dict(settings.config))
    if result is None:
        return Outcome(None)
    return Outcome(
        result,
        f"step {result['step']}, layout {result['layout']}: held-out loss {result['loss']:.6f}, "
        f"{metrics_text(result)} over {result['samples']} samples",
    )
