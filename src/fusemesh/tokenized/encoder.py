"""Records as documents, by the tokenizer of a pretrained model's folder; those without a target are left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from .document import Document
from .records import Chat, Completion, Entry, Text, is_blank

if TYPE_CHECKING:
    from fusemesh.pretrained.tokenizer import FolderTokens

_BATCH = 256  # records that are encoded together
LEFT_OUT = "without a target"


@dataclass
class Counts:
    """How many records came, how many are chats, how many have no target, and where the first of these stands."""

    records: int = 0
    chats: int = 0
    without_target: int = 0
    first: str = ""

    def leave_out(self, where: str) -> None:
        """Count a record without a target."""
        self.without_target += 1
        self.first = self.first or where

    def check(self) -> None:
        """Raise ValueError if no record has a target."""
        if self.records and self.without_target == self.records:
            raise ValueError(
                f"{self.first}: expected records with something to learn, received {self.records} {LEFT_OUT}; fill in "
                "their texts, completions or assistant's turns"
            )


class Encoder:
    """Makes documents of records."""

    def __init__(self, tokens: FolderTokens) -> None:
        self.tokens = tokens

    def documents(self, entries: Iterable[Entry], counts: Counts) -> Iterator[tuple[Entry, Document]]:
        """Yield records and what becomes of them; ``counts`` takes how many there are.

        Raises:
            ValueError: a record cannot become tokens, see :class:`ChatTemplate`.
        """
        rest = iter(entries)
        while batch := list(islice(rest, _BATCH)):
            counts.records += len(batch)
            kept = []
            for entry in batch:
                counts.chats += isinstance(entry.value, Chat)
                if is_blank(entry.value):
                    counts.leave_out(entry.where)
                else:
                    kept.append(entry)
            for entry, document in zip(kept, self._encode(kept), strict=True):
                if document.counts.any():
                    yield entry, document
                else:
                    counts.leave_out(entry.where)

    def _encode(self, entries: Sequence[Entry]) -> list[Document]:
        """Return records of one kind as documents."""
        if not entries:
            return []
        if isinstance(entries[0].value, Text):
            return [_whole(row) for row in self.tokens.encode([e.value.text for e in entries])]  # type: ignore[union-attr]
        if isinstance(entries[0].value, Completion):
            return self._completions(entries)
        return self.tokens.chats.documents(entries)

    def _completions(self, entries: Sequence[Entry]) -> list[Document]:
        """Return the tokens of prompts and completions, those of the prompts as when the prompt stands alone."""
        values = [entry.value for entry in entries if isinstance(entry.value, Completion)]
        prompts = self.tokens.beginning([value.prompt for value in values])
        wholes = self.tokens.encode([value.prompt + value.completion for value in values])
        found = []
        for entry, value, prompt, whole in zip(entries, values, prompts, wholes, strict=True):
            if whole[: len(prompt)] != prompt:
                # The end of the prompt and the beginning of the completion would be one token, of which a prompt that
                # stands alone has a part.
                whole = [*prompt, *self._alone(value, prompt, whole, entry.where)]
            counts = np.arange(len(whole)) >= max(1, len(prompt))
            found.append(Document(np.asarray(whole, np.int32), counts))
        return found

    def _alone(self, value: Completion, prompt: list[int], whole: list[int], where: str) -> list[int]:
        tokenizer = self.tokens.tokenizer
        row: list[int] = tokenizer(value.completion, add_special_tokens=False, verbose=False)["input_ids"]
        row = [*row, self.tokens.end]
        if tokenizer.decode([*prompt, *row]) != tokenizer.decode(whole):
            raise ValueError(
                f"{where}: expected a prompt whose tokens stay the same before its completion, received "
                f"{value.prompt[-12:]!r} before {value.completion[:12]!r}, which share a token; move blanks at the end "
                "of the prompt to the beginning of the completion"
            )
        return row


def _whole(row: Sequence[int]) -> Document:
    """Return the tokens of a text, all but the first of which count."""
    counts = np.ones(len(row), bool)
    counts[:1] = False
    return Document(np.asarray(row, np.int32), counts)
