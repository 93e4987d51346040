"""Text classification: which of some labels a text has. By default, in which language names and dates are written.

The default corpus is the Unicode consortium's locale data as Babel carries it: names of territories, languages and
currencies, and dates, in seventeen languages of the Latin alphabet. What is held out is held out in all languages (a
territory, a day), so that no answer can be looked up; what several languages write alike is left out.

Metrics: accuracy, and macro F1 (the mean over labels of each one's F1), beside those of answering the most frequent
label of the training data every time.
"""

from __future__ import annotations

import datetime
import functools
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemesh.models.registry import maker_of

from .base import Batch, Examples, hash_of, is_held_out, padded_rows
from .record_task import RecordTask
from .records import Record

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.transformer import Transformer, TransformerConfig

    from .tokens import Tokens

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
_SHOWN = 8  # labels in a message
_MULTIPLE = 16  # of tokens in a sample that is fitted to its text


class TextClassification(RecordTask):
    """See the module. The metadata are the labels in the model's order, and how often each was in the training data."""

    metric = "accuracy"
    fields = FIELDS
    corpus = "locale data of Babel"
    old_metadata = None

    @staticmethod
    def default_records() -> tuple[list[Record], list[Record]]:
        return locale_names()

    @staticmethod
    def default_version() -> str:
        return f"Babel {version('babel')}"

    def metadata_of(self, records: Sequence[Record]) -> Mapping[str, Any]:
        counts = Counter(label_of(record) for record in records)
        if len(counts) < 2:
            raise ValueError(f"data.path: expected at least 2 labels, received {len(counts)} in {self.source}")
        labels = sorted(counts, key=self._order_of())
        return {"labels": labels, "counts": [counts[label] for label in labels]}

    @classmethod
    def metadata_of_folder(cls, config: Config) -> Mapping[str, Any]:
        """Return the labels of the folder's head; how often each was in the training data is not known."""
        labels = maker_of(config).labels()
        if len(labels) < 2:
            raise ValueError(
                f"model: expected the folder of a classifier, with at least 2 labels in its config.json, received "
                f"{config.model.pretrained!r} {'with one' if labels else 'without such a head'}; train one by fusemesh "
                f"train text_classification --model.pretrained {config.model.pretrained}"
            )
        return {"labels": labels}

    def _order_of(self) -> Callable[[str], Any]:
        """Return by what labels are sorted: their places in a pretrained head that has all of them, or themselves."""
        known = {plain_label(label): number for number, label in enumerate(self.maker.labels())}
        return lambda label: (known.get(label, len(known)), label)

    def pretrained_config(self) -> dict[str, Any]:
        return {"id2label": dict(enumerate(self.labels)), "label2id": {label: n for n, label in enumerate(self.labels)}}

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the model's outputs."""
        found: list[str] = self.metadata["labels"]
        return found

    @property
    def _numbers(self) -> dict[str, int]:
        """The model's outputs by label as :func:`label_of` gives it, whatever an older version kept of it."""
        numbers: dict[str, int] = {}
        for number, label in enumerate(self.labels):
            numbers.setdefault(plain_label(label), number)
        return numbers

    def examples(self, records: Sequence[Record]) -> Examples:
        self._check_labels(records)
        numbers = self._numbers
        targets = np.array([[numbers[label_of(record)]] for record in records], np.int64)
        return self._texts([record.values[0] for record in records], targets)

    def _check_labels(self, records: Sequence[Record]) -> None:
        known = self._numbers
        for record in records:
            if label_of(record) not in known:
                shown = ", ".join(map(repr, self.labels[:_SHOWN])) + (", ..." if len(self.labels) > _SHOWN else "")
                raise ValueError(
                    f"{record.where}: expected one of the {len(self.labels)} labels of the training data ({shown}), "
                    f"received {label_of(record)!r}; add records of it to the training data, or drop the line"
                )

    def length_of(self, record: Record) -> int:
        return self._tokens.whole([record.values[0].strip()], sys.maxsize)[1][0]

    @functools.cached_property
    def _tokens(self) -> Tokens:
        return self.maker.tokens()

    def balanced(self, train: list[Record], held_out: list[Record]) -> tuple[list[Record], list[Record]]:
        """Return the parts with the records of labels that only the held-out one had moved to those to train on."""
        known = {label_of(record) for record in train}
        moved = [record for record in held_out if label_of(record) not in known]
        kept = [record for record in held_out if label_of(record) in known]
        if "metadata" in vars(self):
            # A trained model's, of which these may be no records at all.
            self._check_labels(moved)
        if not kept:
            raise ValueError(
                f"data.path: expected enough records to hold some out, and each label in those to train on, received "
                f"{len(train) + len(held_out)} in {self.source}; give more, or a file of them as data.held_out"
            )
        return [*train, *moved], kept

    def _texts(self, texts: Sequence[str], targets: np.ndarray, *, fitted: bool = False) -> Examples:
        """Return texts as samples, of ``data.sequence_length`` tokens, or of no more than the longest needs."""
        length = self.config.data.sequence_length
        rows, whole = self._tokens.whole([text.strip() for text in texts], length)
        if fitted:
            length = min(length, -(-max(map(len, rows)) // _MULTIPLE) * _MULTIPLE)
        tokens, lengths = padded_rows(rows, length, self._tokens.pad)
        return Examples(tokens, targets, whole=whole, lengths=lengths)

    def model_config(self) -> TransformerConfig:
        return self.sizes(architecture="encoder", output="class", num_classes=len(self.labels))

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the number of the most probable label, [B, 1]."""
        return self.predict_scored(model, batch, device)[0]

    def predict_scored(
        self, model: Transformer, batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the number of the most probable label, and the probabilities of all, [B, labels]."""
        import torch

        inputs: dict[str, Any] = {name: torch.from_numpy(x).to(device) for name, x in batch.inputs.items()}
        logits = model.logits(torch.from_numpy(batch.tokens).to(device), **inputs)
        return logits.argmax(-1), logits[:, 0].double().softmax(-1)

    def named_scores(self, scores: np.ndarray) -> dict[str, Any]:
        return {"probabilities": dict(zip(self.labels, scores.tolist(), strict=True))}

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        assert predictions is not None
        expected = self._expected(count)
        found = {
            "accuracy": accuracy(predictions[:, 0], expected),
            "macro_f1": macro_f1(predictions[:, 0], expected),
        }
        if "counts" in self.metadata:
            guess = np.full(count, int(np.argmax(self.metadata["counts"])))
            found |= {"majority_accuracy": accuracy(guess, expected), "majority_macro_f1": macro_f1(guess, expected)}
        return found

    def _expected(self, count: int) -> np.ndarray:
        """Return the labels of the first held-out samples, by number."""
        return self.held_out.batch(range(count)).targets[:, 0]

    def confusion(self, predictions: np.ndarray) -> np.ndarray:
        """Return the confusion matrix, int64 [labels, labels]: texts of label i that were given label j."""
        found = np.zeros((len(self.labels), len(self.labels)), np.int64)
        np.add.at(found, (self._expected(len(predictions)), predictions[:, 0]), 1)
        return found

    def draw(self, predictions: np.ndarray, folder: Path) -> None:
        """Write the confusion matrix as ``confusion.png``."""
        from fusemesh.run.drawing import draw_matrix

        right = accuracy(predictions[:, 0], self._expected(len(predictions)))
        title = f"{len(predictions)} held-out texts of {self.source}: {right:.1%} right"
        draw_matrix(self.confusion(predictions), self.labels, folder / "confusion.png", title=title)

    def examples_of(self, lines: Sequence[str], first: int = 1) -> Examples:
        # A pretrained model may take many tokens, and lines be short.
        return self._texts(lines, np.zeros((len(lines), 1), np.int64), fitted=self.maker.refines)

    def answer(self, prediction: np.ndarray, line: str) -> str:
        return self.labels[int(prediction[0])]


def plain_label(label: str) -> str:
    """Return a label without spaces around it and in Unicode's form NFC, so that equal ones are one class."""
    return unicodedata.normalize("NFC", label.strip())


def label_of(record: Record) -> str:
    """Return a record's label as :func:`plain_label` does."""
    return plain_label(record.values[1])


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
