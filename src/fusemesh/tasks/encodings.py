"""Bytes to text: UTF-8, by a byte order mark or a named encoding; errors say which encoding other bytes may have."""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16, whose mark is the beginning of this one.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Of each encoding the two-byte codes of its common characters, as ranges of the first byte (second byte from 0xA1 on if
# the flag is set), and its most frequent characters: they decide where another encoding would give common ones, too.
_KANA = "のにはをたがでとしれさるいないこあるすらりもかっなよン"
_TWO_BYTES: dict[str, tuple[tuple[tuple[int, int], ...], bool, str]] = {
    "gb18030": (((0xA1, 0xA3), (0xB0, 0xD7)), True, "的一是不了在人有我他这中大来上个国和地到说们为子出要时会可也你"),
    "big5": (((0xA1, 0xA3), (0xA4, 0xC6)), False, "的一是不了在人有我他這中大來上個國和地到說們為子出要時會可也你"),
    "shift_jis": (((0x81, 0x83), (0x88, 0x97)), False, _KANA),
    "euc_jp": (((0xA1, 0xA1), (0xA3, 0xA5), (0xB0, 0xCF)), True, _KANA),
    "euc_kr": (((0xA1, 0xA3), (0xB0, 0xC8)), True, "이다의는에가을를하고한은로도지사기대서리나어자아라시"),
}
# Quotation marks, dashes, ellipsis, euro; guillemets, signs of Latin-1, numero sign.
_PUNCTUATION = "\u2018\u2019\u201c\u201d\u201e\u2013\u2014\u2026\u20ac\xab\xbb\xb0\xa7\xa9\xae\xa1\xbf\xb7\xa0\u2116"
_ONE_BYTE = {"cp1252": (0xC0, 0x24F), "cp1251": (0x400, 0x45F)}  # the letters that they are for
_WIDER = {"big5": "big5hkscs", "shift_jis": "cp932", "euc_kr": "cp949"}  # tried where the narrower one fails
_LEAST_LIKELY = 0.75
_SAMPLE = 1 << 16  # characters that are looked at


def decode_text(content: bytes, encoding: str, where: str) -> str:
    """Return bytes as text, without a byte order mark.

    Args:
        encoding: as ``data.encoding`` says; "": UTF-8, or as a byte order mark says.
        where: the file, for messages.

    Raises:
        ValueError: the bytes have another encoding; names the line, and the encodings that they may have.
    """
    check_encoding(encoding)
    marked = next((name for mark, name in _MARKS if content.startswith(mark)), "")
    # A mark of the named encoding, or any mark where none is named, is no part of the text.
    name = marked if marked and (not encoding or _same(marked, encoding)) else encoding or "utf-8"
    try:
        text = content.decode(name)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].decode(name, "ignore").count("\n") + 1
        raise _refusal(content, error, encoding, where, line) from None
    if not encoding and "\0" in text and (likely := _unmarked_utf16(content)):
        raise ValueError(
            f"{where}, line 1: expected UTF-8, received every other byte as 0; it is likely {likely} without a mark: "
            f"give --data.encoding {likely}"
        )
    return text


def _refusal(content: bytes, error: UnicodeDecodeError, encoding: str, where: str, line: int) -> ValueError:
    kind = f"{encoding}, as data.encoding says" if encoding else "UTF-8"
    byte = error.object[error.start]
    if _is_cut_off(error, encoding):
        return ValueError(
            f"{where}, line {line}: expected {kind}, received its last character cut off (0x{byte:02x} is no whole "
            "one); give the text to its end, or cut it between two characters"
        )
    return ValueError(f"{where}, line {line}: expected {kind}, received the byte 0x{byte:02x}; {remedy(content)}")


def _is_cut_off(error: UnicodeDecodeError, encoding: str) -> bool:
    """Return whether all of the bytes are text in their encoding, but for the beginning of a character at their end."""
    try:
        codecs.getincrementaldecoder(error.encoding)().decode(error.object)
    except (UnicodeError, LookupError):
        return False
    # Without a named encoding a lone byte of another one looks like that, too.
    return bool(encoding) or not error.object[: error.start].isascii()


def check_encoding(encoding: str) -> None:
    """Check that ``data.encoding`` names an encoding that Python knows.

    Raises:
        ValueError: it does not.
    """
    try:
        "a".encode(encoding or "utf-8")
    except (LookupError, ValueError):
        raise ValueError(
            "data.encoding: expected the name of a text encoding, such as gb18030, utf-16 or cp1252, received "
            f"{encoding!r}; leave it out for UTF-8"
        ) from None


def remedy(content: bytes) -> str:
    """Return what to do about bytes that are no UTF-8: the encodings that they may have, the likeliest first."""
    text = content[: 16 * _SAMPLE].decode(errors="replace")
    damaged, foreign = text.count("\ufffd"), sum(letter > "\x7f" for letter in text)
    if foreign > 10 * damaged:
        return "the rest is UTF-8: mend the line" if damaged else "it is UTF-8: leave --data.encoding out"
    found = likely_encodings(content)
    if not found:
        return "no encoding that is tried decodes it as text; give its own by --data.encoding, if it is text"
    others = f" ({', '.join(found[1:])} would decode it, too)" if found[1:] else ""
    return f"it is likely {found[0]}{others}: give --data.encoding {found[0]}, or convert the file to UTF-8"


def likely_encodings(content: bytes) -> list[str]:
    """Return the encodings, of some, that decode bytes to characters which are common in texts, the likeliest first."""
    if utf16 := _unmarked_utf16(content):
        return [utf16]
    scores: dict[str, float] = {}
    for name in (*_TWO_BYTES, *_ONE_BYTE):
        for tried in (name, _WIDER.get(name, name)):
            text = _decoded(content, tried)
            if text:
                score = _two_byte_score(text, name, tried) if name in _TWO_BYTES else _one_byte_score(text, name)
                scores[tried] = score
                break
    return sorted((name for name in scores if scores[name] >= _LEAST_LIKELY), key=lambda name: -scores[name])


def _decoded(content: bytes, name: str) -> str:
    """Return the beginning of the text, "" if not all of the bytes are text in this encoding."""
    try:
        return content.decode(name)[:_SAMPLE]
    except UnicodeDecodeError:
        return ""


def _two_byte_score(text: str, name: str, encoding: str) -> float:
    """Return which share of the characters beyond ASCII is common; more than 1 where frequent ones are among them."""
    ranges, high, frequent = _TWO_BYTES[name]
    letters = [letter for letter in text if letter > "\x7f"]
    if not letters:
        return 0.0
    codes = [letter.encode(encoding) for letter in letters]
    common = sum(
        len(code) == 2 and any(a <= code[0] <= b for a, b in ranges) and (not high or code[1] >= 0xA1) for code in codes
    )
    return common / len(letters) + sum(letter in frequent for letter in letters) / len(letters)


def _one_byte_score(text: str, name: str) -> float:
    """Return which share of the characters beyond ASCII are letters as a word has them, or punctuation."""
    first, last = _ONE_BYTE[name]
    found = right = 0
    for at, letter in enumerate(text):
        if letter <= "\x7f":
            continue
        found += 1
        before = text[at - 1 : at]
        if not letter.isalpha():
            right += letter in _PUNCTUATION
        elif first <= ord(letter) <= last or letter in "ŠšŽžŒœŸƒ":
            # A capital within a word is another letter's byte; so is the third letter beyond ASCII in a row of Latin
            # ones, and a Cyrillic letter beside a Latin one.
            if name == "cp1252":
                is_odd = at > 1 and text[at - 2] > "\x7f" and before > "\x7f"
            else:
                is_odd = any(other.isascii() and other.isalpha() for other in (before, text[at + 1 : at + 2]))
            right += not (is_odd or (letter.isupper() and before.isalpha() and before.islower()))
    return right / found if found else 0.0


def _unmarked_utf16(content: bytes) -> str:
    """Return utf-16-le or utf-16-be if every other byte of most characters is 0, else ""."""
    sample = content[:_SAMPLE] if len(content) % 2 == 0 else b""
    for name, zeros, others in (("utf-16-le", sample[1::2], sample[::2]), ("utf-16-be", sample[::2], sample[1::2])):
        if zeros and zeros.count(0) > 0.5 * len(zeros) and not others.count(0):
            return name
    return ""


def is_wide(content: bytes, encoding: str) -> bool:
    """Return whether a text in this encoding, "" for its own, may hold bytes of 0."""
    if encoding:
        return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    return bool(_unmarked_utf16(content)) or any(content.startswith(mark) for mark, _ in _MARKS[1:])


def _same(name: str, other: str) -> bool:
    """Return whether a marked encoding is the named one, whatever its order of bytes."""
    return codecs.lookup(other).name.startswith(name.replace("-sig", ""))


def check_characters(text: str, where: str) -> None:
    """Check that a text has characters alone, and no half of a surrogate pair, which no encoding can write.

    Raises:
        ValueError: it has one.
    """
    if text.isascii():
        return
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        return
    half = ord(next(letter for letter in text if "\ud800" <= letter <= "\udfff"))
    if 0xDC80 <= half <= 0xDCFF:
        # By this Python stands for a byte of the command line that it could not decode.
        raise ValueError(f"{where}: expected UTF-8, received the byte 0x{half - 0xDC00:02x}; write the text in UTF-8")
    raise ValueError(
        f"{where}: expected characters, received \\u{half:04x}, one half of a surrogate pair; write the character "
        "itself, or both halves"
    )


def check_line_ends(text: str, where: str) -> None:
    """Check that lines, if there are several, end at newlines.

    Raises:
        ValueError: it has carriage returns alone, as files of old Macs.
    """
    if "\n" not in text and "\r" in text.rstrip("\r"):
        raise ValueError(
            f"{where}: expected lines that end at newlines, received carriage returns alone (0x0d, as of old Macs); "
            "convert them: tr '\\r' '\\n' < OLD > NEW"
        )


def read_stream(stream: Any, encoding: str = "", where: str = "standard input") -> str:
    """Return all text of a stream; arguments and errors as those of :func:`lines_of`."""
    if not hasattr(stream, "buffer"):
        text = stream.read()
    else:
        text = decode_text(stream.buffer.read(), _own_encoding(stream, encoding), where)
    check_characters(text, where)
    return str(text)


def lines_of(stream: Any, encoding: str = "", where: str = "standard input") -> Iterator[str]:
    """Yield the lines of a stream as they come; they end at newlines alone, and come without.

    Args:
        stream: of text, such as sys.stdin; its bytes are taken where it has some.
        encoding: "": the stream's own, UTF-8 if that is ASCII's.
        where: for messages.

    Raises:
        ValueError: a line is in another encoding, by its number.
    """
    parts: Iterable[Any] = stream
    if hasattr(stream, "buffer"):
        name, first = _own_encoding(stream, encoding), stream.buffer.readline()
        marked = any(first.startswith(mark) for mark, _ in _MARKS)
        if marked or "\n".encode(name or "utf-8") != b"\n":
            # Bytes of another character may be those of a newline.
            parts = io.StringIO(decode_text(first + stream.buffer.read(), name, where), newline="\n")
        else:
            parts = itertools.chain([first] if first else [], stream.buffer)
    for number, part in enumerate(parts, 1):
        try:
            line = part.decode(name or "utf-8") if isinstance(part, bytes) else part
        except UnicodeDecodeError as error:
            raise _refusal(part, error, name, where, number) from None
        if number == 1:
            check_line_ends(line, where)
        check_characters(line, f"{where}, line {number}")
        yield line.removesuffix("\n").removesuffix("\r")


def _own_encoding(stream: Any, encoding: str) -> str:
    """Return the named encoding, or the stream's own; "" for UTF-8."""
    check_encoding(encoding)
    own = codecs.lookup(encoding or stream.encoding or "utf-8").name
    return "" if own in ("ascii", "utf-8") else own
