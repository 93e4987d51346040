"""``fusemesh predict``: answer lines of standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fusemesh import config, standard_output
from fusemesh.tasks.encodings import lines_of

from .chats import check_chats, writer_of
from .options import ASKING_NAMES, Outcome
from .ranks import add_target, find_target

if TYPE_CHECKING:
    from fusemesh.run.predictor import Answer

NAME = "predict"
SUMMARY = "answer lines of standard input: one in, one out"
USAGE = "TARGET [options] < FILE"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--chat", action="store_true", help="each line is a user's message, by the model's template")
    add_target(parser, shown=("data.encoding", "evaluation.batch_size", "evaluation.num_beams"), short=ASKING_NAMES)


def run(options: argparse.Namespace) -> Outcome:
    """Answer each line as it comes in one process, and all lines together on several ranks."""
    from fusemesh.run.predictor import answer_rank, answer_stream
    from fusemesh.tokenized.questions import as_chat

    target = find_target(options)
    ranks, values = target.ranks, config.as_dict(target.settings.config)
    path, verify = str(target.path), target.verify
    if options.chat:
        check_chats(target.settings.config)
    given: list[str] = []
    written = writer_of(target.settings.config)

    def questions() -> Iterator[str]:
        for number, line in enumerate(lines_of(sys.stdin, target.given.get("data.encoding", "")), 1):
            given.append(line)
            yield as_chat(line, f"line {number}") if options.chat else line

    if ranks.count == 1:

        def write(answer: Answer) -> None:
            if not options.json:
                standard_output.write(written(given[-1], answer.text))

        return _outcome(answer_stream(path, values, questions(), write, verify), None)
    asked = list(questions())
    answers = ranks.call(answer_rank, path, values, asked, verify) if asked else []
    if answers is None:
        return Outcome(None)
    return _outcome(answers, "\n".join(written(line, answer.text) for line, answer in zip(given, answers, strict=True)))


def _outcome(answers: list[Answer], text: str | None) -> Outcome:
    """Return the answers and their scores, each list in the order of the lines."""
    if not answers:
        raise ValueError("standard input: expected lines to answer, received nothing")
    return Outcome(
        {"answers": [answer.text for answer in answers], "scores": [answer.scores for answer in answers]}, text
    )
