"""Passages as a pretrained model sees them: in as many windows as they take, each with the question.

Neighbouring windows share half of their tokens of the passage, 128 at most. One that does not hold the whole answer has
the row's first token for its target, the usual sign of no answer here (Devlin et al., 2018). The answer to a record is
the span with the largest sum of logits in any of its windows, its probability that among all spans of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .base import IGNORED, Batch, Examples, Indices
from .passages import Passages, best_spans
from .records import Record
from .spans import end_of_marks, place_of_answer

if TYPE_CHECKING:
    import torch

    from fusemesh.pretrained.pairs import Pair
    from fusemesh.pretrained.tokenizer import FolderTokens

MOST_TOKENS = 30  # of an answer, unless the training data have longer ones; transformers' own choice
_MOST_SHARED = 128
_NO_ANSWER = (0, 0)


class _Window(NamedTuple):
    """Some tokens of a record's passage: from number ``begin`` on, ``size`` of them, from token ``at`` of a row on."""

    record: int
    begin: int
    size: int
    at: int


class Windows(Examples):
    """Samples of which each is a window of a record's passage; all of a record's stand side by side."""

    def __init__(
        self,
        tokens: np.ndarray,
        targets: np.ndarray,
        windows: Sequence[_Window],
        places: Sequence[np.ndarray],
        *,
        whole: Sequence[int],
        **inputs: np.ndarray,
    ) -> None:
        """Keep the samples.

        Args:
            windows: what each is.
            places: of each record, where its passage's tokens begin and end in it, in characters.
            whole: of each record, the tokens that it takes uncut.
        """
        super().__init__(tokens, targets, whole=whole, **inputs)
        self.windows = np.array(windows, np.int64).reshape(-1, 4)
        self.places = places
        self._first = np.searchsorted(self.windows[:, 0], np.arange(len(places) + 1))

    @property
    def records(self) -> int:
        """The number of records."""
        return len(self.places)

    def batch(self, indices: Indices) -> Batch:
        found = super().batch(indices)
        _, _, size, at = self.windows[np.asarray(indices, np.int64)].T
        found.aside["passage"] = np.stack([at, at + size], 1)
        return found

    def windows_of(self, records: int) -> int:
        """Return how many windows the first records have."""
        return int(self._first[records])

    def joined(self, found: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the best span of each record, in characters of its passage, and its probability.

        Args:
            found, scores: of all windows of the first records, as :meth:`TokenPassages.predict_scored` gives them.
        """
        records = int(np.searchsorted(self._first, len(found)))
        assert self._first[records] == len(found)
        spans, probability = np.zeros((records, 2), np.int64), np.zeros((records, 1))
        for record in range(records):
            own = np.arange(self._first[record], self._first[record + 1])
            # Of equal ones the first.
            best = int(own[np.argmax(scores[own, 0])])
            _, begin, size, at = self.windows[best].tolist()
            if not size or scores[best, 0] == -np.inf:
                continue
            first, last = np.clip(found[best] - at, 0, size - 1) + begin
            spans[record] = _characters(self.places[record][first : last + 1])
            probability[record] = np.exp(scores[best, 0] - np.logaddexp.reduce(scores[own, 1]))
        return spans, probability


class TokenPassages(Passages):
    """See the module."""

    @functools.cached_property
    def _tokens(self) -> FolderTokens:
        from fusemesh.pretrained.tokenizer import FolderTokens

        tokens = self.task.maker.tokens()
        assert isinstance(tokens, FolderTokens)
        return tokens

    def _pairs(self, pairs: Sequence[Sequence[str]]) -> Sequence[Pair]:
        from fusemesh.pretrained.pairs import encode_pairs

        return encode_pairs(self._tokens, [pair[0].strip() for pair in pairs], [pair[1] for pair in pairs])

    def metadata(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Return how many tokens an answer may have."""
        answers = map(_answer_in, records, self._pairs([record.values for record in records]))
        return {"answer_tokens": max([MOST_TOKENS, *(last - first + 1 for first, last in answers)])}

    def lengths(self, records: Sequence[Record]) -> list[int]:
        return [_length(pair) for pair in self._pairs([record.values for record in records])]

    def to_train_on(self, records: Sequence[Record]) -> Windows:
        found = self._windows(records, drop=True)
        if not len(found):
            raise self.no_answer_fits()
        # Only where there are predictions.
        found.places = ()
        return found

    def to_answer(self, records: Sequence[Record]) -> Windows:
        return self._windows(records, drop=False)

    def questions(self, pairs: Sequence[Sequence[str]]) -> Windows:
        return self._made(self._pairs(pairs), [None] * len(pairs), drop=False)

    def _windows(self, records: Sequence[Record], *, drop: bool) -> Windows:
        pairs = self._pairs([record.values for record in records])
        answers = list(map(_answer_in, records, pairs))
        found = self._made(pairs, answers, drop=drop)
        within = 0
        for record, pair, (first, last) in zip(records, pairs, answers, strict=True):
            span = _characters(pair.places[first : last + 1])
            within += self.answer(np.array(span), record.values[1]) != record.values[2].strip()
        found.counts["answers_within_words"] = within
        return found

    def _made(self, pairs: Sequence[Pair], answers: Sequence[tuple[int, int] | None], *, drop: bool) -> Windows:
        """Return pairs as windows.

        Args:
            answers: first and last token in each passage.
            drop: leave records out whose answer no window holds.
        """
        most = self.length // 2
        windows: list[_Window] = []
        rows: list[np.ndarray] = []
        segments: list[np.ndarray] = []
        targets: list[tuple[int, int]] = []
        cut_off = 0
        for number, (pair, answer) in enumerate(zip(pairs, answers, strict=True)):
            pair = pair.shortened(most)
            own = self._windows_of(number, pair)
            spans = [_within(window, answer) for window in own]
            if all(span == _NO_ANSWER for span in spans):
                cut_off += 1
                if drop:
                    continue
                spans = [(IGNORED, IGNORED)] * len(own)
            for window in own:
                rows.append(_row(pair, pair.ids, window))
                segments.append(_row(pair, pair.segments, window))
            windows += own
            targets += spans
        found = Windows(
            _filled(rows, self.length, self._tokens.pad, np.int32),
            np.array(targets, np.int64).reshape(-1, 2),
            windows,
            [pair.places for pair in pairs],
            whole=[_length(pair) for pair in pairs],
            lengths=np.array([len(row) for row in rows], np.int64),
            **({"segments": _filled(segments, self.length, 0, np.int8)} if self._takes_segments else {}),
        )
        found.counts = {"questions_cut": sum(len(pair.first) > most for pair in pairs), "answers_cut_off": cut_off}
        return found

    @functools.cached_property
    def _takes_segments(self) -> bool:
        from fusemesh.pretrained.pairs import takes_segments

        return takes_segments(self._tokens)

    def _windows_of(self, record: int, pair: Pair) -> list[_Window]:
        """Return the windows of a record's passage; one without tokens if the passage has none."""
        tokens, at = len(pair.second), pair.second.start
        room = self.length - (len(pair.ids) - tokens)
        if room < 1:
            raise ValueError(
                f"data.sequence_length: expected more than {self.length - room} tokens, which a question, up to half "
                f"of a sample, and the tokenizer's own take, received {self.length}; give more"
            )
        step = room - min(_MOST_SHARED, room // 2)
        begins = [0, *range(step, tokens - room + step, step)]
        return [_Window(record, begin, min(room, tokens - begin), at) for begin in begins]

    def predict_scored(self, model: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return first and last token of the best span of a window, [B, 2], and its sum of logits with the logarithm
        of the sum of all spans' exponentials, [B, 2]."""
        import torch

        inputs: dict[str, Any] = {name: torch.from_numpy(x).to(device) for name, x in batch.inputs.items()}
        logits = model.logits(torch.from_numpy(batch.tokens).to(device), **inputs).double()
        begin, end = torch.from_numpy(batch.aside["passage"]).to(device)[:, :, None].unbind(1)
        at = torch.arange(logits.shape[-1], device=device)
        logits = logits.masked_fill(((at < begin) | (at >= end))[:, None], float("-inf"))
        # Of a model that was exported without its metadata, the least.
        spans, best, pairs = best_spans(logits, self.task.metadata.get("answer_tokens", MOST_TOKENS))
        return spans, torch.stack((pairs.gather(1, best[:, None])[:, 0], pairs.logsumexp(-1)), 1)

    def answer(self, prediction: np.ndarray, passage: str) -> str:
        begin, end = prediction.tolist()
        # Tokens of bytes begin with the blank before a word; of accents that were dropped there are none.
        return passage[begin : end_of_marks(passage, end)].strip()

    def no_answer_fits(self) -> ValueError:
        return self._too_short("tokens for a window to hold a question and an answer")

    def shown(self, samples: Windows) -> str:
        row = int(np.argmax(samples.targets[:, 0] > 0))
        ids, (first, last) = samples.tokens[row][: samples.inputs["lengths"][row]].tolist(), samples.targets[row]
        parts = [ids[:first], ids[first : last + 1], ids[last + 1 :]]
        before, answer, behind = (self._tokens.tokenizer.decode(part) for part in parts)
        return f"{before} ⟦{answer}⟧ {behind}"


def _answer_in(record: Record, pair: Pair) -> tuple[int, int]:
    """Return the first and the last token of a record's answer in its passage; raise as :func:`place_of_answer` does,
    and where the tokenizer has no token for it."""
    _, passage, answer, *start = record.values
    found = pair.tokens_at(*place_of_answer(passage, answer, start[0] if start else "", record.where))
    if found is None:
        raise ValueError(
            f"{record.where}: expected an answer that the tokenizer has tokens for, received {answer!r}, of which it "
            "drops every character; drop the line"
        )
    return found


def _row(pair: Pair, values: np.ndarray, window: _Window) -> np.ndarray:
    """Return those of a pair's values that stand in a window's row."""
    first = pair.second.start + window.begin
    return np.concatenate([values[: window.at], values[first : first + window.size], values[pair.second.stop :]])


def _length(pair: Pair) -> int:
    """Return the length that holds a pair whole, of which a question has one half at most."""
    return max(2 * len(pair.first), len(pair.ids))


def _within(window: _Window, answer: tuple[int, int] | None) -> tuple[int, int]:
    """Return the target of a window: where an answer stands in its row, or that it does not hold the whole of one."""
    if answer is None or answer[0] < window.begin or answer[1] >= window.begin + window.size:
        return _NO_ANSWER
    return window.at + answer[0] - window.begin, window.at + answer[1] - window.begin


def _characters(places: np.ndarray) -> tuple[int, int]:
    """Return the characters from the first to the last of some tokens; tokens that stand for none do not count."""
    real = places[places[:, 1] > places[:, 0]]
    return (int(real[:, 0].min()), int(real[:, 1].max())) if len(real) else (0, 0)


def _filled(rows: Sequence[np.ndarray], length: int, fill: int, dtype: Any) -> np.ndarray:
    """Return rows [n, length], filled up."""
    found = np.full((len(rows), length), fill, dtype)
    for whole, row in zip(found, rows, strict=True):
        whole[: len(row)] = row
    return found
