"""Suggestions for names that are misspelt: of commands, options, keys and values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# The least likeness of a guess, and that within the section which a dotted name gives.
_LEAST, _LEAST_IN_SECTION = 0.74, 0.6


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one most likely means; None if none is near.

    Case, leading dashes, and ``-`` for ``_`` make no difference. A dotted name is also found by its last part; names of
    the section that it gives come first.
    """
    best = max(((_score(_plain(name), _plain(candidate)), candidate) for candidate in known), default=(0.0, ""))
    return best[1] if best[0] else None


def _score(wanted: str, candidate: str) -> float:
    """Return how well a candidate fits; 0 for one that does not."""
    (section, _, last), (other, _, end) = wanted.rpartition("."), candidate.rpartition(".")
    likeness = _likeness(last, end)
    if section and section == other:
        return likeness + 1 if likeness >= _LEAST_IN_SECTION else 0.0
    # Of two candidates with the same last part the shorter one.
    likeness = max(_likeness(wanted, candidate), likeness) - len(candidate) / 1e4
    return likeness if likeness >= _LEAST else 0.0


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for a misspelt name, or "" if no known name is near."""
    found = closest(name, known)
    return "" if found is None else f"; did you mean {found}?"


def _plain(name: str) -> str:
    return name.lstrip("-").lower().replace("-", "_")


def _likeness(a: str, b: str) -> float:
    if a == b:
        return 1.0
    # Letters in another order, and words cut short, are the commonest slips, of which difflib thinks little.
    if sorted(a) == sorted(b) or (len(a) > 2 and b.startswith(a)):
        return 0.9
    return difflib.SequenceMatcher(None, a, b).ratio()
