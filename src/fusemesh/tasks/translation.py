"""Translation: text to text, with an encoder-decoder. By default numbers in English words to French words.

The default corpus is made by num2words: every number from 0 to 9999, of which one in sixteen, by hash, is held out.
French counts by twenties above sixty and agrees in number, so that words cannot be replaced one by one.

Metrics over all held-out pairs: BLEU (Papineni et al., 2002) and chrF (Popovic, 2015) by sacrebleu, and the share of
translations that are exactly right; beside them those of copying the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import BEGIN, END, IGNORED, PAD, Batch, Examples, decode, encode, hash_of, is_held_out, padded, shortened
from .record_task import RecordTask
from .records import Record

if TYPE_CHECKING:
    import torch

    from fusemesh.transformer import Transformer, TransformerConfig

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

    def examples(self, records: Sequence[Record]) -> Examples:
        length = self.config.data.sequence_length
        data = [encode(record.values[1].strip()) for record in records]
        targets = [shortened(target, length - 1) for target in data]
        seen, lengths = padded([bytes([BEGIN]) + target for target in targets], length)
        expected, _ = padded([target + bytes([END]) for target in targets], length)
        counted = np.arange(length) < lengths[:, None]
        labels = np.where(counted, expected.astype(np.int64), IGNORED)
        return self._sources([record.values[0] for record in records], labels, seen, [len(target) for target in data])

    def length_of(self, record: Record) -> int:
        source, target = (len(encode(value.strip())) for value in record.values)
        return max(source, target + 1)

    def _sources(
        self, sources: Sequence[str], targets: np.ndarray, seen: np.ndarray, target_lengths: Sequence[int]
    ) -> Examples:
        length = self.config.data.sequence_length
        data = [encode(source.strip()) for source in sources]
        tokens, lengths = padded([shortened(source, length) for source in data], length)
        # A target keeps room for its end.
        whole = [max(len(source), target + 1) for source, target in zip(data, target_lengths, strict=True)]
        return Examples(tokens, targets, whole=whole, lengths=lengths, target_tokens=seen)

    def model_config(self) -> TransformerConfig:
        return self.sizes(architecture="encoder-decoder")

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the bytes of the translations, [B, S], filled up with PAD."""
        return self.predict_scored(model, batch, device)[0]

    def predict_scored(
        self, model: Transformer, batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same, and the log-likelihood of each, [B, 1]."""
        import torch

        from fusemesh.transformer.generation import generate

        length = self.config.data.sequence_length
        # A sample that only fills the batch up may be empty.
        sources = [
            torch.from_numpy(row[: max(1, size)]).to(device)
            for row, size in zip(batch.tokens, batch.inputs["lengths"], strict=True)
        ]
        scores = [0.0] * len(sources)
        found = generate(
            model,
            sources,
            max_new_tokens=length,
            begin=BEGIN,
            end=END,
            num_beams=self.config.evaluation.num_beams,
            on_score=scores.__setitem__,
        )
        rows = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=PAD) for row in found])
        return rows, torch.tensor([[score] for score in scores], dtype=torch.float64, device=device)

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        assert predictions is not None
        found = [decode(row) for row in predictions]
        records = self.held_out_records[:count]
        expected = [record.values[1].strip() for record in records]
        sources = [record.values[0].strip() for record in records]
        result = {}
        for name, answers in (("", found), ("copy_", sources)):
            result.update({f"{name}{key}": value for key, value in text_scores(answers, expected).items()})
        return result

    def examples_of(self, lines: Sequence[str], first: int = 1) -> Examples:
        shape = (len(lines), self.config.data.sequence_length)
        nothing = np.full(shape, IGNORED, np.int64), np.full(shape, PAD, np.uint8)
        return self._sources(lines, *nothing, [0] * len(lines))

    def answer(self, prediction: np.ndarray, line: str) -> str:
        return decode(prediction)


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
