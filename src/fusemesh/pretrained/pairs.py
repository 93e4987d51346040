"""Two texts as the tokenizer of a pretrained model's folder makes one row of them, and where its tokens stand in the
second."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusemesh.hybrid.hugging_face.anatomy import ANATOMIES

from .folder import KEY, config_of
from .tokenizer import FolderTokens

_BATCH = 256  # pairs that are encoded together


@dataclass(frozen=True)
class Pair:
    """Two texts in one row, with what the tokenizer puts around and between them.

    ids: int32 [n]; segments: token types, int8 [n]; first, second: the numbers of each text's tokens; places: where
    each token of the second begins and ends in its text, in characters, int32 [len(second), 2].
    """

    ids: np.ndarray
    segments: np.ndarray
    first: range
    second: range
    places: np.ndarray

    def shortened(self, most: int) -> Pair:
        """Return the pair with at most ``most`` tokens of the first text."""
        gone = self.first[most:]
        if not gone:
            return self
        kept = np.delete(np.arange(len(self.ids)), gone)
        first, second = self.first[:most], self.second
        if second.start >= gone.stop:
            second = range(second.start - len(gone), second.stop - len(gone))
        return dataclasses.replace(self, ids=self.ids[kept], segments=self.segments[kept], first=first, second=second)

    def tokens_at(self, begin: int, end: int) -> tuple[int, int] | None:
        """Return the first and the last token of the second text, from 0, that hold its characters from ``begin`` to
        ``end``; None if there is none."""
        found = np.flatnonzero((self.places[:, 0] < end) & (self.places[:, 1] > begin))
        return (int(found[0]), int(found[-1])) if len(found) else None


def takes_segments(tokens: FolderTokens) -> bool:
    """Return whether a folder's model tells two texts apart by token types, and its tokenizer gives them."""
    config = config_of(tokens.path)
    anatomy = ANATOMIES.get(config.model_type)
    takes = anatomy is not None and anatomy.segments and getattr(config, "type_vocab_size", 0) > 1
    return takes and "token_type_ids" in tokens.tokenizer.model_input_names


def encode_pairs(tokens: FolderTokens, firsts: Sequence[str], seconds: Sequence[str]) -> Sequence[Pair]:
    """Return pairs of texts as the tokenizer joins them, uncut.

    Raises:
        ValueError: the tokenizer does not say where tokens stand in a text.
    """
    tokenizer = tokens.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{KEY}: expected a tokenizer that says where its tokens stand in a text, by which answers are cut "
            f"out, received a {type(tokenizer).__name__} in {tokens.path!r}, which does not; copy the model's "
            "tokenizer.json into the folder, as its fast tokenizer's save_pretrained() writes it"
        )
    digest = hashlib.sha256(tokens.path.encode())
    for text in (*firsts, *seconds):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d\0" % len(data))
        digest.update(data)
    key = digest.hexdigest()
    if key not in _encoded:
        # A process asks for the same few: to choose the length, for the longest answer, to train.
        while len(_encoded) >= 3:
            _encoded.pop(next(iter(_encoded)))
        found: list[Pair] = []
        for at in range(0, len(firsts), _BATCH):
            found += _encode(tokenizer, firsts[at : at + _BATCH], seconds[at : at + _BATCH])
        _encoded[key] = found
    return _encoded[key]


def _encode(tokenizer: Any, firsts: Sequence[str], seconds: Sequence[str]) -> list[Pair]:
    rows = tokenizer(
        list(firsts), list(seconds), return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    found = []
    for number, ids in enumerate(rows["input_ids"]):
        # None where a token is of neither.
        of = np.array([-1 if text is None else text for text in rows.sequence_ids(number)], np.int8)
        first, second = _run_of(of, 0), _run_of(of, 1)
        places = np.array(rows["offset_mapping"][number][second.start : second.stop], np.int32).reshape(-1, 2)
        segments = rows["token_type_ids"][number] if "token_type_ids" in rows else [0] * len(ids)
        found.append(Pair(np.array(ids, np.int32), np.array(segments, np.int8), first, second, places))
    return found


def _run_of(of: np.ndarray, text: int) -> range:
    """Return the numbers of a text's tokens, which stand side by side; of one without any, the row's end."""
    at = np.flatnonzero(of == text)
    if not len(at):
        return range(len(of), len(of))
    assert at[-1] - at[0] + 1 == len(at)
    return range(int(at[0]), int(at[-1]) + 1)


_encoded: dict[str, list[Pair]] = {}
