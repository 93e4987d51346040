"""``fusemesh predict``: answer lines of standard input."""

from __future__ import annotations

import argparse
import sys

from fusemesh import config

from .options import Outcome
from .ranks import add_target, find_target

NAME = "predict"
SUMMARY = "answer lines of standard input: one in, one out"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_target(parser)


def run(options: argparse.Namespace) -> Outcome:
    """Answer each line as it comes in one process, and all lines together on several ranks."""
    from fusemesh.run.predictor import answer_rank, answer_stream

    target = find_target(options)
    ranks, values = target.ranks, config.as_dict(target.settings.config)
    if ranks.count == 1:

        def write(answer: str) -> None:
            if not options.json:
                print(answer, flush=True)

        return Outcome({"answers": answer_stream(str(target.path), values, sys.stdin, write, target.verify)})
    lines = sys.stdin.read().splitlines()
    if not lines:
        raise ValueError("standard input: expected a question a line, received nothing")
    answers = ranks.call(answer_rank, str(target.path), values, lines, target.verify)
    return Outcome(None) if answers is None else Outcome({"answers": answers}, "\n".join(answers))
