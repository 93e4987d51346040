"""Layer: application. Which documents share a row: all tokens once, few left empty, and the same rows every time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fusemesh.tasks.base import IGNORED
from fusemesh.tokenized.document import Document
from fusemesh.tokenized.documents import Documents
from fusemesh.tokenized.packing import PackedRows, pack

LENGTHS = (1, 2, 5, 30, 17, 40, 3, 9, 16, 17, 33)


def documents() -> list[Document]:
    draw = np.random.default_rng(0)
    return [Document(draw.integers(1, 99, n).astype(np.int32), draw.random(n) < 0.8) for n in LENGTHS]


def test_rows_hold_every_target_once_behind_its_own_document() -> None:
    found = documents()
    rows = PackedRows(Documents(found), 16, 0)
    batch = rows.batch(range(len(rows)))
    positions = batch.inputs["positions"]
    assert batch.tokens.shape == batch.targets.shape == positions.shape == (len(rows), 16)
    pieces = []
    for row in range(len(rows)):
        assert positions[row, 0] == 0
        starts = [*np.flatnonzero(positions[row] == 0), 16]
        for start, end in itertools.pairwise(starts):
            assert positions[row, start:end].tolist() == list(range(end - start))
            pieces.append((batch.tokens[row, start:end].tolist(), batch.targets[row, start:end].tolist()))
    for document in found:
        n = len(document.ids)
        for begin in range(0, max(n - 1, 1), 16):
            ids, counts = document.ids[begin : begin + 17], document.counts[begin : begin + 17]
            want = np.where(counts[1:], ids[1:], IGNORED).tolist() or [IGNORED]
            pieces.remove((ids[: max(1, len(ids) - 1)].tolist(), want))
    # What is left fills rows up.
    assert all(set(tokens) == {0} and set(targets) == {IGNORED} for tokens, targets in pieces)
    assert rows.targets_in(range(len(rows))) == (batch.targets != IGNORED).sum()


@pytest.mark.parametrize("mean", [3, 5])
def test_few_places_stay_empty(mean: int) -> None:
    sizes = np.minimum(1024, np.random.default_rng(0).lognormal(mean, 1, 20000).astype(np.int64) + 1)
    rows = pack(sizes, 1024)
    assert np.bincount(rows, weights=sizes).max() <= 1024
    assert sizes.sum() / (1024 * (rows.max() + 1)) > 0.98
    assert np.array_equal(rows, pack(sizes, 1024))


def test_the_row_with_least_left_takes_a_piece() -> None:
    # 9 and 7 fill one row, 8 and 5 leave 3 of another, of which the last piece of 3 is the best.
    assert pack(np.array([9, 8, 7, 5, 3]), 16).tolist() == [0, 1, 0, 1, 1]
