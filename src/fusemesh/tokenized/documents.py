"""Documents by number, in memory; the token file of file.py has the same interface."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from .document import Document


class DocumentSource(Protocol):
    """Documents by number.

    ``lengths``, int64 [N], are in tokens. ``first_targets``, int64 [N], are the places of the first tokens that count,
    the length where none does.
    """

    lengths: np.ndarray
    first_targets: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Document: ...


class Documents:
    """Documents in memory, one behind the other."""

    def __init__(self, documents: Iterable[Document]) -> None:
        kept = list(documents)
        self.lengths = np.array([len(document.ids) for document in kept], np.int64)
        self.first_targets = np.array([first_target(document) for document in kept], np.int64)
        self._ends = np.cumsum(self.lengths)
        self._ids = np.concatenate([np.zeros(0, np.int32), *(document.ids for document in kept)])
        self._counts = np.concatenate([np.zeros(0, bool), *(document.counts for document in kept)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Document:
        end = self._ends[number]
        part = slice(int(end - self.lengths[number]), int(end))
        return Document(self._ids[part], self._counts[part])


class Selection:
    """Some documents of others, each at most ``most`` tokens long."""

    def __init__(self, documents: DocumentSource, numbers: np.ndarray, most: int | None = None) -> None:
        self.documents, self.numbers, self.most = documents, numbers, most
        lengths, first_targets = documents.lengths[numbers], documents.first_targets[numbers]
        self.lengths = lengths if most is None else np.minimum(lengths, most)
        self.first_targets = np.minimum(first_targets, self.lengths)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Document:
        ids, counts = self.documents[int(self.numbers[number])]
        return Document(ids[: self.most], counts[: self.most])


def first_target(document: Document) -> int:
    """Return the place of the first token that counts; the length if none does."""
    return int(document.counts.argmax()) if document.counts.any() else len(document.ids)
