"""Documents as rows of one length, several in a row, which do not see each other."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from fusemesh.tasks.base import IGNORED, Batch, Indices

from .documents import DocumentSource

_WINDOW = 4096  # pieces that are packed together: what one row lacks, another of them has


class PackedRows:
    """A sample is a row of documents, each of which begins at position 0; a longer one goes on in another row, as new.

    Which documents share a row follows from their lengths, their order and the row's length alone: best fit, the
    longest first, among each few thousand of them (Johnson et al., 1974). What fills a row up is no target, and is not
    seen.

    Args:
        documents: at least one.
        length: of a row, in tokens.
        pad: the token that fills rows up.
    """

    def __init__(self, documents: DocumentSource, length: int, pad: int) -> None:
        self.documents, self.length, self.pad = documents, length, pad
        # A document's last token predicts nothing. The first token of the next piece is the last target of this one.
        inputs = np.maximum(documents.lengths - 1, 1)
        pieces = -(-inputs // length)
        self._numbers = np.repeat(np.arange(len(documents)), pieces)
        self._begins = (np.arange(len(self._numbers)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
        sizes = np.minimum(inputs[self._numbers] - self._begins, length)
        rows = pack(sizes, length)
        # The pieces in the order of rows, and of each row the first.
        self._pieces = np.argsort(rows, kind="stable")
        self._firsts = np.searchsorted(rows[self._pieces], np.arange(int(rows.max()) + 2))
        #: How many places of all rows are filled, and how many documents are cut into pieces.
        self.filled, self.in_pieces = int(sizes.sum()), int((pieces > 1).sum())

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, targets = np.full(self.length, self.pad, np.int64), np.full(self.length, IGNORED, np.int64)
        positions = np.zeros(self.length, np.int64)
        at = 0
        for piece in self._pieces[self._firsts[number] : self._firsts[number + 1]]:
            ids, counts = self.documents[int(self._numbers[piece])]
            window = slice(self._begins[piece], self._begins[piece] + self.length + 1)
            ids, counts = ids[window], counts[window]
            size = max(1, len(ids) - 1)
            tokens[at : at + size] = ids[:size]
            targets[at : at + len(ids) - 1] = np.where(counts[1:], ids[1:], IGNORED)
            positions[at : at + size] = np.arange(size)
            at += size
        positions[at:] = np.arange(self.length - at)
        return tokens, targets, positions

    def batch(self, indices: Indices) -> Batch:
        """Return tokens, targets and ``positions`` of these rows, each int64 [len(indices), length]."""
        tokens, targets, positions = zip(*(self._row(int(number)) for number in indices), strict=True)
        return Batch(np.stack(tokens), np.stack(targets), {"positions": np.stack(positions)})

    def targets_in(self, indices: Indices) -> int:
        """Return the number of targets of these rows."""
        return sum(int((self._row(int(number))[1] != IGNORED).sum()) for number in indices)


def pack(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return the row of each piece, int64 [N]; rows hold ``length``, and no piece is larger."""
    rows, used = np.zeros(len(sizes), np.int64), 0
    for start in range(0, len(sizes), _WINDOW):
        part = sizes[start : start + _WINDOW]
        free: list[tuple[int, int]] = []  # what rows have left, and their numbers, in order
        for piece in np.argsort(-part, kind="stable").tolist():
            size = int(part[piece])
            # Of the rows with least left that takes it, the first.
            place = bisect_left(free, (size, 0))
            if place < len(free):
                left, row = free.pop(place)
            else:
                left, row = length, used
                used += 1
            rows[start + piece] = row
            if left > size:
                insort(free, (left - size, row))
    return rows
