"""Spans of words in texts of any script: where words are, where an answer stands, and how answers are compared.

A word is letters and digits with their combining marks; a punctuation mark is one by itself. In scripts that put no
spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan), and in Korean, whose endings adhere to
nouns, each character is a word: an answer may begin and end at any.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Thai, Lao; Tibetan, Burmese; Hangul's letters; Khmer; iteration mark and kana; Han; Hangul; Han of old texts; kana of
# half width; the planes of rare Han.
_ALONE = (
    "\u0e00-\u0eff\u0f00-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u3131-\u318e\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")
_IS_ALONE = re.compile(rf"[{_ALONE}]")
_PIECE = re.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+")
_STOPS = "\u3002\uff01\uff1f"
_JOINERS = "\u200c\u200d"


def spans_of(text: str) -> list[tuple[int, int]]:
    """Return the start and end of each word or mark of a text."""
    found = [match.span() for match in _WORD.finditer(text)]
    if text.isascii():
        return found
    spans: list[tuple[int, int]] = []
    for start, end in found:
        if spans and spans[-1][1] == start and _belongs(text, spans[-1][0], start):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def _belongs(text: str, begin: int, at: int) -> bool:
    """Return whether what stands at a place is of the word from ``begin`` up to there: a combining mark, or letters
    behind one."""
    if _is_mark(text[at]):
        return True
    is_alone = _IS_ALONE.match(text[begin]) or _IS_ALONE.match(text[at])
    return _is_mark(text[at - 1]) and text[begin].isalnum() and text[at].isalnum() and not is_alone


def _is_mark(letter: str) -> bool:
    return letter > "\x7f" and (letter in _JOINERS or unicodedata.category(letter)[0] == "M")


def end_of_marks(text: str, at: int) -> int:
    """Return where the combining marks end that stand at a place; the place itself if none does."""
    while 0 < at < len(text) and _is_mark(text[at]):
        at += 1
    return at


def cut(passage: str, span: Sequence[int] | np.ndarray) -> str:
    """Return the text from the first to the last word of a span."""
    words = spans_of(passage)
    last = min(int(span[1]), len(words) - 1)
    return passage[words[int(span[0])][0] : words[last][1]] if words else ""


def find_answer(passage: str, answer: str, start: str, where: str) -> tuple[int, int]:
    """Return the first and the last word of an answer in its passage.

    Where ``start`` says so the answer may begin or end within a word, which is then part of the span. Arguments and
    errors are those of :func:`place_of_answer`.
    """
    begin, end = place_of_answer(passage, answer, start, where)
    inside = [index for index, (first, last) in enumerate(spans_of(passage)) if first < end and begin < last]
    return inside[0], inside[-1]


def place_of_answer(passage: str, answer: str, start: str, where: str) -> tuple[int, int]:
    """Return where an answer, without blanks around it, begins and ends in its passage, in characters.

    Args:
        start: the answer's offset, in characters of the passage from 0; "" if the record has none. There the answer
            may begin or end within a word.
        where: file and line, for messages.

    Raises:
        ValueError: the answer does not stand there; or without an offset, in several places or within words alone.
    """
    text = answer.strip()
    if start.strip():
        try:
            at = int(start)
        except ValueError:
            raise ValueError(
                f"{where}: expected a whole number as answer_start, received {start!r}; give the character of the "
                "passage at which the answer begins, from 0, or leave it out"
            ) from None
        at += len(answer) - len(answer.lstrip())
        if at < 0 or not passage.startswith(text, at):
            there = passage[max(0, at) :][: len(text)]
            raise ValueError(
                f"{where}: expected {text!r} at answer_start, received {there!r} at character {at} of the passage; "
                "count characters, from 0"
            )
        return at, at + len(text)
    words = spans_of(passage)
    begins, ends = {begin for begin, _ in words}, {end for _, end in words}
    places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", passage)]
    found = [(at, at + len(text)) for at in places if at in begins and at + len(text) in ends]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{where}: expected an answer that stands in the passage once, received {answer!r}, which stands there "
            f"{len(found)} times; give the place of the right one as answer_start, in characters from 0"
        )
    if places:
        word = next(passage[begin:end] for begin, end in words if begin <= places[0] < end)
        raise ValueError(
            f"{where}: expected an answer of whole words of the passage, received {answer!r}, which stands there only "
            f"within words, first {word!r}; give whole words, or its place as answer_start"
        )
    raise ValueError(
        f"{where}: expected an answer that stands in the passage, received {answer!r}; quote it as it is written there"
    )


def normalised(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, without punctuation and articles, with single spaces.

    Unlike there, the punctuation of all scripts is taken out.
    """
    kept = "".join(
        letter
        for letter in text.lower()
        if letter not in string.punctuation and (letter <= "\x7f" or unicodedata.category(letter)[0] != "P")
    )
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def pieces_of(text: str) -> list[str]:
    """Return what F1 counts of a normalised text: words, single characters of scripts without spaces."""
    return _PIECE.findall(text)


def exact_match(found: str, expected: str) -> float:
    """Return 1 if the normalised answers are equal, else 0."""
    return float(normalised(found) == normalised(expected))


def f1(found: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall of the normalised answers' pieces; 1 if both have none."""
    a, b = pieces_of(normalised(found)), pieces_of(normalised(expected))
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def overlap_guess(question: str, passage: str) -> str:
    """Return the answer of a baseline: the last word of the first sentence that shares most words with the question."""
    words = set(pieces_of(normalised(question)))
    sentences = [part for part in re.split(rf"(?<=[.!?])\s+|(?<=[{_STOPS}])\s*", passage) if part.strip()] or [passage]
    best = max(sentences, key=lambda sentence: len(words & set(pieces_of(normalised(sentence)))))
    return (pieces_of(normalised(best)) or [""])[-1]
