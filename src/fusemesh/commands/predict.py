"""``fusemesh predict``: answer lines of standard input."""

from __future__ import annotations

import argparse
import sys

from fusemesh import config

from .options import ASKING_NAMES, Outcome
from .ranks import add_target, find_target

NAME = "predict"
SUMMARY = "answer lines of standard input: one in, one out"
USAGE = "TARGET [options] < FILE"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_target(parser, shown=("evaluation.batch_size", "evaluation.num_beams"), short=ASKING_NAMES)


def run(options: argparse.Namespace) -> Outcome:
    """Answer each line as it comes in one process, and all lines together on several ranks."""
    from fusemesh.run.predictor import answer_rank, answer_stream

    settings, ranks = find_target(options)
    values = config.as_dict(settings.config)
    if ranks.count == 1:

        def write(answer: str) -> None:
            if not options.json:
                print(answer, flush=True)

        return Outcome({"answers": answer_stream(options.target, values, sys.stdin, write)})
    lines = sys.stdin.read().splitlines()
    if not lines:
        raise ValueError("standard input: expected a question a line, received nothing")
    answers = ranks.call(answer_rank, options.target, values, lines)
    return Outcome(None) if answers is None else Outcome({"answers": answers}, "\n".join(answers))
