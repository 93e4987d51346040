"""Text classification: which of some labels a text has. By default, in which language names and dates are written.

The default corpus is the Unicode consortium's locale data as Babel carries it: names of territories, languages and
currencies, and dates, in seventeen languages of the Latin alphabet. What is held out is held out in all languages (a
territory, a day), so that no answer can be looked up; what several languages write alike is left out.

Metrics: accuracy, and macro F1 (the mean over labels of each one's F1), beside those of answering the most frequent
label of the training data every time.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Batch, Examples, Task, encode, hash_of, is_held_out, padded
from .records import Record, load_records

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.transformer import Transformer, TransformerConfig

FIELDS = ("text", "label")
DEFAULTS: Mapping[str, Any] = {
    "data.sequence_length": 48,
    "model.num_layers": 3,
    "training.steps": 400,
    "training.global_batch_size": 64,
    "training.learning_rate": 2e-3,
    "training.min_learning_rate": 1e-4,
    "evaluation.batch_size": 64,
}
LANGUAGES = ("ca", "cs", "da", "de", "en", "es", "fi", "fr", "hu", "it", "nb", "nl", "pl", "pt", "ro", "sv", "tr")
_DAYS = 240  # in every language


class TextClassification(Task):
    """See the module."""

    metric = "accuracy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        train, held_out = load_records(config.data, FIELDS, locale_names)
        self.source = config.data.path or "locale data of Babel"
        self.labels = sorted({record.values[1] for record in train})
        if len(self.labels) < 2:
            raise ValueError(f"data.path: expected at least 2 labels, received {len(self.labels)} in {self.source}")
        for record in held_out:
            if record.values[1] not in self.labels:
                raise ValueError(
                    f"{record.where}: expected one of the {len(self.labels)} labels of the training data, received "
                    f"{record.values[1]!r}; add records of it to the training data, or drop the line"
                )
        self.train, self.held_out = self._examples(train), self._examples(held_out)
        self._expected = self.held_out.targets[:, 0]
        self._most_frequent = Counter(self.train.targets[:, 0].tolist()).most_common(1)[0][0]

    def _examples(self, records: Sequence[Record]) -> Examples:
        number = {label: index for index, label in enumerate(self.labels)}
        targets = np.array([[number[record.values[1]]] for record in records], np.int64)
        return self._texts([record.values[0] for record in records], targets)

    def _texts(self, texts: Sequence[str], targets: np.ndarray) -> Examples:
        length = self.config.data.sequence_length
        tokens, lengths = padded([encode(text.strip(), length) for text in texts], length)
        return Examples(tokens, targets, lengths=lengths)

    def model_config(self) -> TransformerConfig:
        return self.sizes(architecture="encoder", output="class", num_classes=len(self.labels))

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the number of the most probable label, [B, 1]."""
        import torch

        inputs: dict[str, Any] = {name: torch.from_numpy(x).to(device) for name, x in batch.inputs.items()}
        return model.logits(torch.from_numpy(batch.tokens).to(device), **inputs).argmax(-1)

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        assert predictions is not None
        expected = self._expected[:count]
        guess = np.full(count, self._most_frequent)
        return {
            "accuracy": accuracy(predictions[:, 0], expected),
            "macro_f1": macro_f1(predictions[:, 0], expected),
            "majority_accuracy": accuracy(guess, expected),
            "majority_macro_f1": macro_f1(guess, expected),
        }

    def confusion(self, predictions: np.ndarray) -> np.ndarray:
        """Return the confusion matrix, int64 [labels, labels]: texts of label i that were given label j."""
        found = np.zeros((len(self.labels), len(self.labels)), np.int64)
        np.add.at(found, (self._expected[: len(predictions)], predictions[:, 0]), 1)
        return found

    def draw(self, predictions: np.ndarray, folder: Path) -> None:
        """Write the confusion matrix as ``confusion.png``."""
        from fusemesh.run.metrics import draw_matrix

        right = accuracy(predictions[:, 0], self._expected[: len(predictions)])
        title = f"{len(predictions)} held-out texts of {self.source}: {right:.1%} right"
        draw_matrix(self.confusion(predictions), self.labels, folder / "confusion.png", title=title)

    def examples_of(self, lines: Sequence[str]) -> Examples:
        return self._texts(lines, np.zeros((len(lines), 1), np.int64))

    def answer(self, prediction: np.ndarray, line: str) -> str:
        return self.labels[int(prediction[0])]


def accuracy(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of equal elements."""
    return float((found == expected).mean())


def macro_f1(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the mean, over the labels that occur in either, of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in np.union1d(found, expected):
        hits = ((found == label) & (expected == label)).sum()
        scores.append(2 * hits / ((found == label).sum() + (expected == label).sum()))
    return float(np.mean(scores))


def locale_names() -> tuple[list[Record], list[Record]]:
    """Return the default corpus: records (text, language) to train on, and held out.

    Raises:
        ValueError: Babel is not installed.
    """
    try:
        from babel import Locale, dates
    except ImportError as error:
        raise ValueError(
            "data.path: the default corpus is made from Babel's locale data; install it with: pip install "
            "'fusemesh[app]', or give a file of your own"
        ) from error
    first = datetime.date(1990, 1, 1)
    days = [first + datetime.timedelta(days=hash_of(f"day {number}") % 14000) for number in range(_DAYS)]
    written: dict[str, set[tuple[str, str]]] = {}
    for language in LANGUAGES:
        locale = Locale.parse(language)
        for kind in ("territories", "languages", "currencies"):
            for code, name in getattr(locale, kind).items():
                if not code.isdigit():
                    written.setdefault(name, set()).add((language, f"{kind} {code}"))
        for day in days:
            text = dates.format_date(day, "full", locale=locale)
            written.setdefault(text, set()).add((language, f"day {day}"))
    parts: tuple[list[Record], list[Record]] = ([], [])
    for text, places in sorted(written.items()):
        if len({language for language, _ in places}) == 1:
            language, key = min(places)
            parts[is_held_out(key)].append(Record((text, language), "Babel", 0))
    # The first of the held-out records are a choice of all.
    parts[1].sort(key=lambda record: hash_of(record.values[0]))
    return parts
