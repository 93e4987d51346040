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
_SUM = "after the butterfly each of these lanes holds the sum: whichever of them writes it, or all, writes the same"
_SPLITS = "there is one split at least, and a round behind the last would load -inf and 0, which add nothing"
_ENTRY = "it reads the table's entry of a key that is not there, whose row is not read whatever the entry is"
_COLUMN = "what stands in a column behind the last key goes into no element of the gradient that is stored"
_HIDDEN = (
    "a round more, or a copy ahead of one, for a tile in which no query sees a key: it adds nothing, and what is "
    "copied for a round that the loop does not have is not read"
)
_TWO_TILES = (
    "the part with masks has two tiles at most, copied before its loop: the loop itself never copies, nor counts so far"
)
_UNREAD_BIT = "the bit is not read: of the first of 16 entries the comparison itself is asked"
_NO_TILE = "a range whose first column is its end has no tile, or one in which nothing is seen and which adds nothing"
_NO_ROW = "a program of which no row exists stores nothing"
_CAUSAL = "causal, aligned at the last key: a query that exists does not see these keys without this bound either"
_NOT_READ = "a copy ahead for a round that the loop does not have: nobody reads its place"
_ALL_ROWS = "the tile has as many rows as there are: none is hidden, and no index is the bound"
_HIDDEN_KEY = "a key that is not there is hidden whatever its slot holds; of values the same change is noticed"
_SAME = "a row's value is held by four lanes alike: both shuffles bring the same"
_NEXT_ROW = "behind the last column stand the next row's first elements, whose products are not stored"
_FIRST_HEAD = (
    "read ahead for the first of the heads that are summed: behind its last row stand the next head's rows, whose "
    "terms are not stored; of the last head the same change is noticed"
)
_TERMS = "without a window each tile is seen by some query: none stands at the end, and each has a term"
# (kind, kernel, code of the source, statement | evidence, reason): regular expressions, the first match counts.
REASONS: list[tuple[str, str, str, str, str]] = [
    ("barrier deleted", "", "", "", _ORDERED),
    ("predicate flipped|guard dropped", "attention_delta", r"tl\.store\(values\.", "", _REPLICA),
    ("predicate flipped|guard dropped", "attention_dkdv", r"tl\.load\(values\.", "", _REPLICA),
    (
        "bound|select swapped|copy deleted|guard dropped",
        "attention_forward",
        r"tl\.load\(p_tile|m_tile =",
        "in all",
        _COPY_AHEAD,
    ),
    ("bound", "attention_(dkdv|dq)", r"for i_loop in tl\.range", "", _ROUND),
    ("guard dropped", "", r"tl\.(sum|max)\(", "in all", "there are as many partial sums as threads that read them"),
    ("predicate flipped|guard dropped", "", r"tl\.(sum|max)\(", "", _SUM),
    ("swizzle|predicate flipped|guard dropped", "decode_split", r"tl\.store\(results\.p_stats", "", _REPLICA),
    ("bound", "decode_split", r"m_n = \(o_n >= first\)", "", _ENTRY),
    (
        "bound",
        "attention_dbias",
        r"m_tile = \(o_m < place\.Sq\)",
        "in all",
        "no column of these is a multiple of 16, as keys are",
    ),
    ("bound", "attention_dbias", r"m_tile = \(o_m < place\.Sq\)", "", _COLUMN),
    ("bound", "decode_combine", r"for i_s in range\(0, splits", "in all", _SPLITS),
    (
        "bound",
        "",
        r"tl\.log2\(b_l\)",
        "in all",
        "a sum of exponentials is no more than the number of keys, never infinite",
    ),
    ("bound", "attention_forward", r"for i_loop in tl\.range", r", 2 \|.*in all", _TWO_TILES),
    ("bound", "attention_forward", r"for i_loop in tl\.range", "", _HIDDEN),
    ("select swapped", "attention_forward", r"tl\.load\(p_tile, mask", r"selp\.b32 .*, 16, 0", _TWO_TILES),
    ("bound", "attention_dq", r"b_tile = tl\.load\(p_tile\)", "in all", _COPY_AHEAD),
    ("select swapped", "attention_dkdv", r"tl\.where\(o_n <= o_m", r"selp\.b16 .*, 1, 0", _UNREAD_BIT),
    ("bound", "attention_dkdv", r"end = tl\.where\(first < end", "", _NO_TILE),
    ("bound", "attention_forward", r"if i_m >= place\.Sq", "", _NO_ROW),
    ("bound", "attention_forward", r"b_s = tl\.where\(o_n < place\.Sk", "", _CAUSAL),
    ("bound", "attention_dbias", r"terms = tl\.where|for i_term in", "in all", _TERMS),
    ("guard dropped", "attention_dbias", r"tl\.load\(p_tile, mask", "", _FIRST_HEAD),
    ("bound", "decode_split", r"for i_n in tl\.range", "", _NOT_READ),
    ("bound", "decode_split", r"^m_r = ", "in all", _ALL_ROWS),
    (
        "guard dropped",
        "decode_split",
        r"tl\.load\(p_tile|tl\.store\(results\.p_part",
        "hides no thread in all",
        _ALL_ROWS,
    ),
    ("guard dropped", "decode_split", r"tl\.load\(p_table", "", _ENTRY),
    ("guard dropped", "decode_split", r"tl\.load\(p_tile", r"cp\.async", _HIDDEN_KEY),
    ("select swapped", "decode_split", r"tl\.store\(results\.p_stats", "in all", _SAME),
    ("predicate flipped|guard dropped", "decode_combine", r"tl\.store\(", "", _REPLICA),
    ("guard dropped", "linear_dgrad", r"b_w = tl\.load", "", _NEXT_ROW),
    ("bound", "linear", r"^for [nkm] in range", "runs", _ROUND),
    ("bound", "linear", r"^for [nkm] in range", ", [01] .*in all", "no size is 0, for which alone it differs"),
    ("bound", "linear", r"^m_[nk] = o_[nk] < ", "", _SWITCHED_OFF),
    ("bound", "linear", r"^m_[nk] = \(o_[nk] < ", "in all", _MULTIPLE),
    ("guard dropped", "linear", r"tl\.load\(p_bias", "in all", _MULTIPLE),
]


def reason(survivor: dict[str, Any]) -> str:
    """Return why a survivor is none of the emulator's failures, or ""."""
    for kind, kernel, code, evidence, why in REASONS:
        known = f"{survivor['text']} | {survivor['evidence']}"
        fields = (
            (kind, survivor["kind"]),
            (kernel, survivor["kernel"]),
            (code, survivor["code"]),
            (evidence, known),
        )
        if all(re.search(pattern, text) for pattern, text in fields):
            return why
    return ""
