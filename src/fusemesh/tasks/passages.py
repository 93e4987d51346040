"""How questions about passages become samples, and predictions answers: by words here, by a tokenizer in windows.py."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import IGNORED, PAD, SEPARATOR, Batch, Examples, hash_of
from .records import Record
from .spans import cut, find_answer, spans_of

if TYPE_CHECKING:
    import torch

    from .record_task import RecordTask

WORDS = 4096
MOST_WORDS = 16  # of an answer, unless the training data have longer ones


class Passages(ABC):
    """See the module. The task has configuration and metadata; a pair is a question and its passage."""

    def __init__(self, task: RecordTask) -> None:
        self.task = task

    @property
    def length(self) -> int:
        """The tokens of a sample."""
        return self.task.config.data.sequence_length

    @abstractmethod
    def metadata(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Return the metadata that these records to train on give."""

    @abstractmethod
    def lengths(self, records: Sequence[Record]) -> list[int]:
        """Return the ``data.sequence_length`` that each record takes uncut in one sample."""

    @abstractmethod
    def to_train_on(self, records: Sequence[Record]) -> Examples:
        """Return :meth:`to_answer`, without records whose answers are cut off, from which there is nothing to learn."""

    @abstractmethod
    def to_answer(self, records: Sequence[Record]) -> Examples:
        """Return records as samples; answers that are cut off are no targets."""

    @abstractmethod
    def questions(self, pairs: Sequence[Sequence[str]]) -> Examples:
        """Return pairs as samples without targets."""

    @abstractmethod
    def predict_scored(self, model: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`fusemesh.tasks.base.Task.predict_scored`."""

    @abstractmethod
    def answer(self, prediction: np.ndarray, passage: str) -> str:
        """Return the text of a prediction."""

    def shown(self, samples: Any) -> str:
        """Return one sample as text, its answer between marks; "" if tokens are no text."""
        return ""

    @abstractmethod
    def no_answer_fits(self) -> ValueError:
        """Return the error of a length that cuts every answer."""

    def _too_short(self, what: str) -> ValueError:
        return ValueError(
            f"data.sequence_length: expected enough {what}, received {self.length}, which cuts every answer in "
            f"{self.task.source}"
        )


class WordPassages(Passages):
    """A sample is a question and the beginning of its passage; tokens are hashes of words."""

    def metadata(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Return how many words tokens tell apart, and how many an answer may have."""
        most = MOST_WORDS
        if self.task.config.data.path:
            most = max(most, *(last - first + 1 for first, last in map(_span_of, records)))
        return {"words": WORDS, "answer_words": most}

    def lengths(self, records: Sequence[Record]) -> list[int]:
        return [_length(len(spans_of(record.values[0])), len(spans_of(record.values[1]))) for record in records]

    def to_train_on(self, records: Sequence[Record]) -> Examples:
        examples = self.to_answer(records)
        kept = np.flatnonzero(examples.targets[:, 0] != IGNORED)
        if not len(kept):
            raise self.no_answer_fits()
        inputs = {name: values[kept] for name, values in examples.inputs.items()}
        found = Examples(examples.tokens[kept], examples.targets[kept], whole=examples.whole, **inputs)
        found.counts = examples.counts
        return found

    def to_answer(self, records: Sequence[Record]) -> Examples:
        spans, cut_off, within = [], 0, 0
        for record in records:
            first, last = _span_of(record)
            before = len(self._question(tokens_of(record.values[0])))
            # An answer behind the end of a passage that was cut: nothing to learn from it.
            fits = before + last < self.length
            spans.append((before + first, before + last) if fits else (IGNORED, IGNORED))
            cut_off += not fits
            # Without an offset they stand at its borders.
            within += bool(record.values[3:]) and cut(record.values[1], (first, last)) != record.values[2].strip()
        found = self._texts([record.values[:2] for record in records], np.array(spans, np.int64))
        found.counts = {"answers_cut_off": cut_off, "answers_within_words": within}
        return found

    def questions(self, pairs: Sequence[Sequence[str]]) -> Examples:
        return self._texts(pairs, np.full((len(pairs), 2), IGNORED, np.int64))

    def _question(self, tokens: Sequence[int]) -> list[int]:
        return [*tokens[: self.length // 2], SEPARATOR]

    def _texts(self, pairs: Sequence[Sequence[str]], targets: np.ndarray) -> Examples:
        tokens = np.full((len(pairs), self.length), PAD, np.uint16)
        lengths, starts = np.zeros(len(pairs), np.int64), np.zeros(len(pairs), np.int64)
        whole = []
        for row, (question, passage) in enumerate(pairs):
            asked, said = tokens_of(question), tokens_of(passage)
            beginning = self._question(asked)
            found = [*beginning, *said][: self.length]
            tokens[row, : len(found)], lengths[row], starts[row] = found, len(found), len(beginning)
            whole.append(_length(len(asked), len(said)))
        return Examples(tokens, targets, whole=whole, lengths=lengths, span_starts=starts)

    def predict_scored(self, model: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return first and last word, in the passage, of the most probable span of no more words than answers have,
        [B, 2], and its probability among all of these, [B, 1]."""
        import torch

        inputs: dict[str, Any] = {name: torch.from_numpy(x).to(device) for name, x in batch.inputs.items()}
        logits = model.logits(torch.from_numpy(batch.tokens).to(device), **inputs)
        spans, best, pairs = best_spans(logits, self.task.metadata["answer_words"])
        # An empty passage has no span, and every probability in it is NaN.
        probability = pairs.double().softmax(-1).gather(1, best[:, None]).nan_to_num()
        return spans - inputs["span_starts"][:, None], probability

    def answer(self, prediction: np.ndarray, passage: str) -> str:
        return cut(passage, prediction)

    def no_answer_fits(self) -> ValueError:
        return self._too_short("words to hold a question and a passage up to its answer")


def best_spans(logits: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the spans of at most ``most`` tokens with the largest sums of their logits, of several the first.

    Args:
        logits: [B, 2, S], of where a span starts and ends.

    Returns:
        First and last token of the best, [B, 2]; its number among all spans, [B]; their sums, [B, spans].
    """
    import torch

    most = min(most, logits.shape[-1])
    ends = torch.nn.functional.pad(logits[:, 1], (0, most - 1), value=float("-inf")).unfold(1, most, 1)
    # [B, first token, number of tokens beyond it]: small also where passages are long.
    pairs = (logits[:, 0, :, None] + ends).flatten(1)
    best = pairs.argmax(-1)
    first, beyond = best // most, best % most
    return torch.stack((first, first + beyond), dim=-1), best, pairs


def _span_of(record: Record) -> tuple[int, int]:
    """Return the first and the last word of a record's answer in its passage; raise as :func:`find_answer` does."""
    _, passage, answer, *start = record.values
    return find_answer(passage, answer, start[0] if start else "", record.where)


def _length(question: int, passage: int) -> int:
    """Return the length that holds so many words of a question, which has one half at most, and of a passage."""
    return max(2 * question, question + 1 + passage)


def tokens_of(text: str) -> list[int]:
    """Return the words and marks of a text as hashes, none of which is a control token."""
    return [_token(text[start:end].lower()) for start, end in spans_of(text)]


@functools.lru_cache(maxsize=1 << 16)
def _token(word: str) -> int:
    return SEPARATOR + 1 + hash_of(word) % (WORDS - SEPARATOR - 1)
