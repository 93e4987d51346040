"""Suggestions for names that are misspelt: of commands, options, keys and values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one most likely means; None if none is near.

    Case, leading dashes, and ``-`` for ``_`` make no difference. A dotted name is also found by its last part.
    """
    wanted = _plain(name)
    whole = {_plain(candidate): candidate for candidate in known}
    # Of two keys with the same last part the first counts.
    last: dict[str, str] = {}
    for plain, candidate in whole.items():
        last.setdefault(plain.rpartition(".")[2], candidate)
    for table, text in ((whole, wanted), (last, wanted.rpartition(".")[2])):
        if text in table:
            return table[text]
    scored = [
        (difflib.SequenceMatcher(None, text, plain).ratio(), candidate)
        for table, text in ((whole, wanted), (last, wanted.rpartition(".")[2]))
        for plain, candidate in table.items()
    ]
    ratio, best = max(scored, key=lambda pair: pair[0], default=(0.0, ""))
    return best if ratio >= 0.65 else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for a misspelt name, or "" if no known name is near."""
    found = closest(name, known)
    return "" if found is None else f"; did you mean {found}?"


def _plain(name: str) -> str:
    return name.lstrip("-").lower().replace("-", "_")
