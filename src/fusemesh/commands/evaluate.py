"""``fusemesh eval``: held-out loss and metrics of a trained model."""

from __future__ import annotations

import argparse
from dataclasses import replace

from fusemesh import config

from .options import ASKING_NAMES, Outcome, counted
from .ranks import add_target, find_target, metrics_text, say

NAME = "eval"
SUMMARY = "held-out loss and metrics of a run, a checkpoint, a merged file or a Hugging Face folder"
USAGE = "TARGET [options]"
_DATA = ("data.path", "data.held_out", "data.columns", "data.encoding")
# All but evaluation.every, which is of training.
_EVALUATION = ("evaluation.samples", "evaluation.batch_size", "evaluation.num_beams")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_target(parser, shown=(*_DATA, *_EVALUATION), short=ASKING_NAMES)


def run(options: argparse.Namespace) -> Outcome:
    """Evaluate on the held-out samples."""
    from fusemesh.run.evaluator import evaluate_file, evaluate_rank
    from fusemesh.run.fingerprint import check_evaluated

    target = find_target(options, reads_data=True)
    configured, given = target.settings.config, target.given
    if "data.held_out" in given and "evaluation.samples" not in given:
        # All of the user's own records; the number saved is one of the run's.
        configured = replace(configured, evaluation=replace(configured.evaluation, samples=0))
    check_evaluated(target.state.get("data"), configured, given)
    step = f"step {target.state['step']} of " if "step" in target.state else ""
    say(NAME, f"{step}{options.target}, on {_source(configured)}", options)
    if target.is_merged and target.ranks.count == 1:
        result = evaluate_file(target.path, configured, target.verify)
    else:
        result = target.ranks.call(evaluate_rank, str(target.path), config.as_dict(configured), target.verify)
    if result is None:
        return Outcome(None)
    return Outcome(
        result,
        f"{step.replace(' of ', ', ')}layout {result['layout']}: held-out loss {result['loss']:.6f}, "
        f"{metrics_text(result)} over {counted(result['samples'], 'sample')}",
    )


def _source(configured: config.Config) -> str:
    data = configured.data
    if data.held_out:
        return data.held_out
    return f"the held-out part of {data.path or 'the default corpus'}"
