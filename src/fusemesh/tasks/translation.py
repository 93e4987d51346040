"""Translation: text to text, with an encoder-decoder. By default numbers in English words to French words.

A new model's tokens are bytes, a pretrained one's those of its tokenizer; see tokens.py.

The default corpus is made by num2words: every number from 0 to 9999, of which one in sixteen, by hash, is held out.
French counts by twenties above sixty and agrees in number, so that words cannot be replaced one by one.

Metrics over all held-out pairs: BLEU (Papineni et al., 2002) and chrF (Popovic, 2015) by sacrebleu, and the share of
translations that are exactly right; beside them those of copying the source.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import IGNORED, Batch, Examples, hash_of, is_held_out, padded_rows
from .record_task import RecordTask
from .records import Record

if TYPE_CHECKING:
    import torch

    from fusemesh.transformer import Transformer, TransformerConfig

    from .tokens import Tokens

FIELDS = ("source", "target")
DEFAULTS: Mapping[str, Any] = {
    "data.sequence_length": 56,
    "model.num_layers": 2,
    "training.steps": 600,
    "training.global_batch_size": 64,
    "training.learning_rate": 3e-3,
    "training.min_learning_rate": 1e-4,
    "evaluation.batch_size": 64,
    "evaluation.samples": 256,
}
LARGEST = 9999


class Translation(RecordTask):
    """See the module."""

    metric = "bleu"
    stacks = 2
    fields = FIELDS
    corpus = "number words, English to French"

    @staticmethod
    def default_records() -> tuple[list[Record], list[Record]]:
        return number_words()

    @staticmethod
    def default_version() -> str:
        return f"num2words {version('num2words')}"

    def check_packages(self) -> None:
        text_scores(["a"], ["a"])

    @functools.cached_property
    def _tokens(self) -> Tokens:
        return self.maker.tokens()

    def examples(self, records: Sequence[Record]) -> Examples:
        length = self.config.data.sequence_length
        rows, whole = self._tokens.targets([record.values[1].strip() for record in records], length)
        # The decoder sees what stands before each target.
        seen, lengths = padded_rows([[self._tokens.begin, *row[:-1]] for row in rows], length, self._tokens.pad)
        expected, _ = padded_rows(rows, length, self._tokens.pad)
        targets = np.where(np.arange(length) < lengths[:, None], expected, IGNORED)
        return self._sources([record.values[0] for record in records], targets, seen, whole)

    def length_of(self, record: Record) -> int:
        source, target = ([value.strip()] for value in record.values)
        return max(self._tokens.whole(source, sys.maxsize)[1][0], self._tokens.targets(target, sys.maxsize)[1][0])

    def _sources(
        self, sources: Sequence[str], targets: np.ndarray, seen: np.ndarray, target_lengths: Sequence[int]
    ) -> Examples:
        length = self.config.data.sequence_length
        rows, source_lengths = self._tokens.whole([source.strip() for source in sources], length)
        tokens, lengths = padded_rows(rows, length, self._tokens.pad)
        whole = [max(pair) for pair in zip(source_lengths, target_lengths, strict=True)]
        return Examples(tokens, targets, whole=whole, lengths=lengths, target_tokens=seen)

    def model_config(self) -> TransformerConfig:
        return self.sizes(architecture="encoder-decoder")

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the tokens of the translations, [B, S], filled up."""
        return self.predict_scored(model, batch, device)[0]

    def predict_scored(
        self, model: Transformer, batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same, and the log-likelihood of each, [B, 1]."""
        import torch

        length = self.config.data.sequence_length
        # A sample that only fills the batch up may be empty.
        sources = [
            torch.from_numpy(row[: max(1, size)]).to(device)
            for row, size in zip(batch.tokens, batch.inputs["lengths"], strict=True)
        ]
        scores = [0.0] * len(sources)
        found = self.maker.generate(
            model,
            sources,
            max_new_tokens=length,
            begin=self._tokens.begin,
            ends=self._tokens.target_ends,
            num_beams=self.config.evaluation.num_beams,
            on_score=scores.__setitem__,
        )
        pad = self._tokens.pad
        rows = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=pad) for row in found])
        return rows, torch.tensor([[score] for score in scores], dtype=torch.float64, device=device)

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        assert predictions is not None
        found = [self._tokens.target_text(row) for row in predictions]
        records = self.held_out_records[:count]
        expected = [record.values[1].strip() for record in records]
        sources = [record.values[0].strip() for record in records]
        result = {}
        for name, answers in (("", found), ("copy_", sources)):
            result.update({f"{name}{key}": value for key, value in text_scores(answers, expected).items()})
        return result

    def examples_of(self, lines: Sequence[str], first: int = 1) -> Examples:
        shape = (len(lines), self.config.data.sequence_length)
        nothing = np.full(shape, IGNORED, np.int64), np.full(shape, self._tokens.pad, np.int32)
        return self._sources(lines, *nothing, [0] * len(lines))

    def answer(self, prediction: np.ndarray, line: str) -> str:
        return self._tokens.target_text(prediction)


def text_scores(found: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Return ``bleu`` and ``chrf`` (0 to 100, over the whole corpus) and ``exact_match`` (0 to 1).

    Raises:
        ValueError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ValueError(
            "task: translation is scored by sacrebleu; install it with: pip install 'fusemesh[app]'"
        ) from error
    return {
        "bleu": sacrebleu.corpus_bleu(list(found), [list(expected)]).score,
        "chrf": sacrebleu.corpus_chrf(list(found), [list(expected)]).score,
        "exact_match": float(np.mean([a == b for a, b in zip(found, expected, strict=True)])),
    }


def number_words() -> tuple[list[Record], list[Record]]:
    """Return the default corpus: records (English, French) to train on, and held out.

    Raises:
        ValueError: num2words is not installed.
    """
    try:
        from num2words import num2words
    except ImportError as error:
        raise ValueError(
            "data.path: the default corpus is made by num2words; install it with: pip install 'fusemesh[app]', or give "
            "a file of your own"
        ) from error
    parts: tuple[list[Record], list[Record]] = ([], [])
    for number in sorted(range(LARGEST + 1), key=lambda number: hash_of(f"order of {number}")):
        words = (num2words(number, lang="en"), num2words(number, lang="fr"))
        parts[is_held_out(f"number {number}")].append(Record(words, "num2words", number))
    return parts
