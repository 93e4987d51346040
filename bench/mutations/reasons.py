"""Why a change of a kernel's text that nothing notices changes nothing: by kind, kernel, source and evidence."""

from __future__ import annotations

import re
from typing import Any

_COPY_AHEAD = "a copy ahead for a round that the loop does not have: it copies nothing, and nobody reads its place"
_REPLICA = "two warps hold each value, and the predicate chooses which of them writes it: the other writes the same"
_ORDERED = (
    "orders nothing that another barrier does not: with it gone, and with all such ones gone at once where it says so, "
    "happens-before, which knows no order of warps but by barriers, still orders every two accesses to a word"
)
_ROUND = (
    "one round more than there are tiles: the copies of a tile that is not there have size 0 and fill its place with "
    "zeros, which add nothing"
)
_SWITCHED_OFF = (
    "lengths are multiples of 16 in this text, so it differs only where nothing is left of the row, and there the copy "
    "is switched off by the bound of its round"
)
_MULTIPLE = "lengths are multiples of 16 in this text: what the guard could hide always exists"
# (kind, kernel, code of the source's line, evidence, reason): regular expressions; the first that matches counts.
REASONS: list[tuple[str, str, str, str, str]] = [
    ("barrier deleted", "", "", "", _ORDERED),
    ("predicate flipped|guard dropped", "attention_delta", r"tl\.store\(values\.", "", _REPLICA),
    ("predicate flipped|guard dropped", "attention_dkdv", r"tl\.load\(values\.", "", _REPLICA),
    (
        "bound|select swapped|copy deleted|guard dropped",
        "attention",
        r"tl\.load\(p_tile|m_tile =",
        "in all",
        _COPY_AHEAD,
    ),
    ("bound", "attention_(dkdv|dq)", r"for i_loop in tl\.range", "", _ROUND),
    ("bound", "linear", r"^for [nkm] in range", "runs", _ROUND),
    ("bound", "linear", r"^for [nkm] in range|^m_k = o_k <", "in all", "no size is 0, for which alone it differs"),
    ("bound", "linear", r"^m_[nkm] = o_[nkm] < ", "", _SWITCHED_OFF),
    ("bound", "linear", r"^m_[nk] = \(o_[nk] < ", "in all", _MULTIPLE),
    ("guard dropped", "linear", r"tl\.load\(p_bias", "in all", _MULTIPLE),
]


def reason(survivor: dict[str, Any]) -> str:
    """Return why a survivor is none of the emulator's failures, or ""."""
    for kind, kernel, code, evidence, why in REASONS:
        fields = ((kind, "kind"), (kernel, "kernel"), (code, "code"), (evidence, "evidence"))
        if all(re.search(pattern, survivor[name]) for pattern, name in fields):
            return why
    return ""
