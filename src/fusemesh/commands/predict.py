"""``fusemesh predict``: answer lines of standard input."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fusemesh import config, standard_output
from fusemesh.tasks.encodings import lines_of

from .options import ASKING_NAMES, Outcome
from .ranks import add_target, find_target

if TYPE_CHECKING:
    from fusemesh.run.predictor import Answer

NAME = "predict"
SUMMARY = "answer lines of standard input: one in, one out"
USAGE = "TARGET [options] < FILE"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_target(parser, shown=("data.encoding", "evaluation.batch_size", "evaluation.num_beams"), short=ASKING_NAMES)


def run(options: argparse.Namespace) -> Outcome:
    """Answer each line as it comes in one process, and all lines together on several ranks."""
    from fusemesh.run.predictor import answer_rank, answer_stream

    target = find_target(options)
    ranks, values = target.ranks, config.as_dict(target.settings.config)
    path, verify = str(target.path), target.verify
    lines = lines_of(sys.stdin, target.given.get("data.encoding", ""))
    if ranks.count == 1:

        def write(answer: Answer) -> None:
            if not options.json:
                standard_output.write(answer.text)

        return _outcome(answer_stream(path, values, lines, write, verify), None)
    questions = list(lines)
    answers = ranks.call(answer_rank, path, values, questions, verify) if questions else []
    return Outcome(None) if answers is None else _outcome(answers, "\n".join(answer.text for answer in answers))


def _outcome(answers: list[Answer], text: str | None) -> Outcome:
    """Return the answers and their scores, each list in the order of the lines."""
    if not answers:
        raise ValueError("standard input: expected lines to answer, received nothing")
    return Outcome(
        {"answers": [answer.text for answer in answers], "scores": [answer.scores for answer in answers]}, text
    )
