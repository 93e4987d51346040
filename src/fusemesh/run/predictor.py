"""Answers of a trained model: to a user's lines, or the continuation of a text, in one process or any layout."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusemesh import standard_output
from fusemesh.models.registry import maker_of
from fusemesh.run.agreement import lines_entry, options_entries
from fusemesh.run.evaluator import predict_scored
from fusemesh.run.setup import Run, Share, joined
from fusemesh.tasks.base import Task
from fusemesh.transformer.generation import Sampling

logger = logging.getLogger("fusemesh")


class Answer(NamedTuple):
    """An answer, and how sure the model is of it, as JSON; see :meth:`Task.named_scores`."""

    text: str
    scores: dict[str, Any]


@dataclass(frozen=True)
class _Loaded:
    """A model on its mesh, ready to answer.

    lengths: of each line that it has answered, the tokens that it takes uncut.
    """

    run: Run
    task: Task
    model: Any
    share: Share
    lengths: list[int] = field(default_factory=list)

    def answers(self, lines: Sequence[str]) -> list[Answer]:
        """Return an answer for each line, the same on every rank; each replica computes its share."""
        samples = self.task.examples_of(lines, len(self.lengths) + 1)
        self.lengths.extend(samples.whole.tolist())
        size = min(self.task.config.evaluation.batch_size, -(-len(lines) // self.share.replicas))
        rows, scores = predict_scored(self.model, self.task, samples, len(lines), size, self.share)
        return [
            Answer(self.task.answer(row, line), self.task.named_scores(score))
            for row, score, line in zip(rows, scores, lines, strict=True)
        ]


@contextlib.contextmanager
def _loaded(
    target: str, values: dict[str, Any], verify: bool, asked: Mapping[str, Any] | None = None
) -> Iterator[_Loaded]:
    with joined(values, {"model": Path(target).name, **(asked or {})}) as run:
        found = run.load(target, verify=verify)
        found.model.eval()
        loaded = _Loaded(run, found.task, found.model, run.share(found.mesh))
        yield loaded
        if run.world.is_first and (text := found.task.say_cut_lengths(loaded.lengths)):
            logger.warning("lines: %s", text)


def answer_rank(target: str, values: dict[str, Any], lines: list[str], verify: bool = True) -> list[Answer]:
    """Do one rank's part of answering lines; return the answers, the same on every rank.

    Args:
        target: see :func:`fusemesh.run.setup.config_of`.
        values: the configuration, as ``config.as_dict`` gives it.
        verify: compare what is read with its checksums first.

    Raises:
        ValueError: a line that the task cannot read, by its number.
    """
    with _loaded(target, values, verify, lines_entry(lines)) as loaded:
        return loaded.answers(lines)


def answer_stream(
    target: str, values: dict[str, Any], lines: Iterable[str], write: Callable[[Answer], None], verify: bool = True
) -> list[Answer]:
    """Answer each line as it comes, in this process alone; raise as :func:`answer_rank` does."""
    found: list[Answer] = []
    with _loaded(target, values, verify) as loaded:
        for line in lines:
            found += loaded.answers([line])
            write(found[-1])
    return found


@dataclass(frozen=True)
class Continuation:
    """A text to continue, and how.

    prompt: its beginning; if that is too long, the end of it counts. tokens: how many to add. sampling: None takes the
    most probable token. num_beams, seed: of :func:`fusemesh.generate`. stream: whether the first rank writes it to
    stdout. chat: the prompt is a user's message, which the chat template renders, and is never cut.
    """

    prompt: str
    tokens: int
    sampling: Sampling | None = None
    num_beams: int = 1
    seed: int = 0
    stream: bool = False
    chat: bool = False


def generate_rank(target: str, values: dict[str, Any], asked: Continuation, verify: bool = True) -> dict[str, Any]:
    """Do one rank's part of continuing a text; the result is the same on every rank.

    Args:
        target, values, verify: see :func:`answer_rank`.

    Returns:
        ``{"prompt", "text", "tokens", "log_likelihood"}``: the prompt as the model saw it, the text added, its number
        of tokens and their log-probability; ``"unwritten"``, an errno, if the stream to stdout failed.
    """
    with _loaded(target, values, verify, options_entries(asked)) as loaded:
        task, world = loaded.task, loaded.run.world
        maker = maker_of(task.config)
        prompt, ends = _beginning(task, asked, max(1, maker.longest - asked.tokens), world.is_first)
        streaming = asked.stream and world.is_first and asked.num_beams == 1
        decode = task.token_decoder()

        lost: dict[str, int] = {}

        def write(text: str) -> None:
            # The other ranks go on with the text, so this one does, too.
            if not lost:
                try:
                    standard_output.write(text, end="")
                except OSError as error:
                    lost["unwritten"] = error.errno or 0

        scores = [0.0]
        added = maker.generate(
            loaded.model,
            [torch.tensor(prompt, device=world.device)],
            max_new_tokens=asked.tokens,
            ends=ends,
            sampling=asked.sampling,
            num_beams=asked.num_beams,
            seed=asked.seed,
            on_token=(lambda _, token: write(decode([token], False))) if streaming else None,
            on_score=scores.__setitem__,
        )[0].tolist()
        if streaming:
            write(decode([], True))
        seen, text = (task.token_decoder()(tokens, True) for tokens in (prompt, added))
    return {
        "prompt": asked.prompt if asked.chat else seen,
        "text": text,
        "tokens": len(added),
        "log_likelihood": scores[0],
        **lost,
    }


def _beginning(task: Task, asked: Continuation, most: int, is_first: bool) -> tuple[list[int], Sequence[int]]:
    """Return the tokens to continue, at most ``most``, and those that end the continuation."""
    if asked.chat:
        chat = task.encode_chat(asked.prompt)
        if len(chat.ids) > most:
            raise ValueError(
                f"--prompt: expected a message of at most {most} tokens with those of the chat template, which "
                f"the model's positions leave beside --tokens {asked.tokens}, received {len(chat.ids)}; "
                "shorten one of them"
            )
        return chat.ids, chat.ends
    prompt = task.encode_prompt(asked.prompt, most)
    whole = len(task.encode_prompt(asked.prompt, sys.maxsize))
    if is_first and len(prompt) < whole:
        logger.warning("--prompt: the model sees the last %d of its %d tokens, beside those to add", len(prompt), whole)
    return prompt, task.ends
