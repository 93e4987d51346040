"""Suggestions for names that are misspelt: of commands, options, keys and values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LEAST = 0.74


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one most likely means; None if none is near.

    Case, leading dashes, and ``-`` for ``_`` make no difference. A dotted name is also found by its last part.
    """
    wanted = _plain(name)
    # Of two keys with the same last part the first counts.
    whole: dict[str, str] = {}
    last: dict[str, str] = {}
    for candidate in known:
        plain = _plain(candidate)
        whole[plain] = candidate
        last.setdefault(plain.rpartition(".")[2], candidate)
    tables = ((whole, wanted), (last, wanted.rpartition(".")[2]))
    scored = [(_likeness(text, plain), candidate) for table, text in tables for plain, candidate in table.items()]
    likeness, best = max(scored, key=lambda pair: pair[0], default=(0.0, ""))
    return best if likeness >= _LEAST else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for a misspelt name, or "" if no known name is near."""
    found = closest(name, known)
    return "" if found is None else f"; did you mean {found}?"


def _plain(name: str) -> str:
    return name.lstrip("-").lower().replace("-", "_")


def _likeness(a: str, b: str) -> float:
    # Letters in another order are the commonest slip, and difflib's smallest likeness.
    return 0.99 if a != b and sorted(a) == sorted(b) else difflib.SequenceMatcher(None, a, b).ratio()
