"""Documents as samples filled up to one length; and samples of several sources as those of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusemesh.tasks.base import IGNORED, Batch, Dataset, Indices

from .documents import DocumentSource


class PaddedRows:
    """A sample is a document, or a window of a longer one; what fills it up is no target.

    Args:
        documents: at least one.
        length: of a sample, in tokens.
        pad: the token that fills samples up.
    """

    def __init__(self, documents: DocumentSource, length: int, pad: int) -> None:
        self.documents, self.length, self.pad = documents, length, pad
        # The first token of the next window is the last target of this one.
        windows = np.maximum(1, -(-(documents.lengths - 1) // length))
        self._numbers = np.repeat(np.arange(len(documents)), windows)
        self._begins = (np.arange(len(self._numbers)) - np.repeat(np.cumsum(windows) - windows, windows)) * length

    def __len__(self) -> int:
        return len(self._numbers)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = self.documents[int(self._numbers[number])]
        window = slice(self._begins[number], self._begins[number] + self.length + 1)
        ids, counts = ids[window], counts[window]
        tokens, targets = np.full(self.length, self.pad, np.int64), np.full(self.length, IGNORED, np.int64)
        tokens[: len(ids)] = ids[: self.length]
        targets[: len(ids) - 1] = np.where(counts[1:], ids[1:], IGNORED)
        return tokens, targets

    def batch(self, indices: Indices) -> Batch:
        """Return tokens and targets of these samples, each int64 [len(indices), length]."""
        rows = [self._row(int(number)) for number in indices]
        return Batch(np.stack([tokens for tokens, _ in rows]), np.stack([targets for _, targets in rows]))

    def targets_in(self, indices: Indices) -> int:
        """Return the number of targets of these samples."""
        return sum(int((self._row(int(number))[1] != IGNORED).sum()) for number in indices)


class Mixture:
    """The samples of several datasets, one behind the other.

    ``sources``: of each its number of samples and its weight, from which :class:`fusemesh.hybrid.data.BatchOrder` takes
    the order.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[int]) -> None:
        self.datasets = list(datasets)
        self.sources = [(len(dataset), weight) for dataset, weight in zip(datasets, weights, strict=True)]
        self._ends = np.cumsum([size for size, _ in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _placed(self, indices: Indices) -> list[tuple[Dataset, np.ndarray, np.ndarray]]:
        """Return the datasets of these samples, their numbers there, and where these stand among the indices."""
        at = np.asarray(indices, np.int64)
        which = np.searchsorted(self._ends, at, side="right")
        begins = self._ends - [size for size, _ in self.sources]
        return [
            (self.datasets[number], at[which == number] - begins[number], np.flatnonzero(which == number))
            for number in np.unique(which)
        ]

    def batch(self, indices: Indices) -> Batch:
        """Return these samples."""
        parts = [(dataset.batch(numbers), places) for dataset, numbers, places in self._placed(indices)]
        order = np.argsort(np.concatenate([places for _, places in parts]))
        names = parts[0][0].inputs

        def joined(arrays: list[np.ndarray]) -> np.ndarray:
            found: np.ndarray = np.concatenate(arrays)[order]
            return found

        return Batch(
            joined([batch.tokens for batch, _ in parts]),
            joined([batch.targets for batch, _ in parts]),
            {name: joined([batch.inputs[name] for batch, _ in parts]) for name in names},
        )

    def targets_in(self, indices: Indices) -> int:
        """Return the number of targets of these samples."""
        return sum(dataset.targets_in(numbers) for dataset, numbers, _ in self._placed(indices))
