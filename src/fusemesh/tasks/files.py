"""A user's files as bytes: those that are absent, folders, compressed or of a kind that nobody reads, by name."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

TABLES = ".csv, .tsv, .jsonl, .ndjson, .json or text with tabs"
# Endings of what is no text, and what to do about it.
_UNREAD = {
    **dict.fromkeys((".parquet", ".feather", ".arrow", ".orc", ".pkl", ".npz"), "convert it to one of them"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as .csv, in UTF-8"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"), "unpack it"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt"), "save it as text"),
}
_BEGINNINGS = (
    (b"PAR1", ".parquet"),
    (b"ARROW1", ".arrow"),
    (b"PK\x03\x04", ".zip"),
    (b"\xd0\xcf\x11\xe0", ".xls"),
    (b"BZh", ".bz2"),
    (b"\xfd7zXZ", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"%PDF-", ".pdf"),
)


class GzipError(ValueError):
    """A file is not the whole of what gzip wrote, though its name or its beginning says so."""


def kind_of(path: Path) -> str:
    """Return the ending of a file's name in lower case, before ``.gz``."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def find_file(path: str, key: str, kind: str) -> Path:
    """Return the path of a file that is there.

    Args:
        path: as the configuration gives it.
        key: of the configuration.
        kind: of file, for messages.

    Raises:
        ValueError: nothing is there, or a folder.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise ValueError(f"{key}: expected {kind}, received a folder, {path!r}; name a file in it")
    found = "neither file nor folder" if file.exists() else "not found"
    raise ValueError(f"{key}: expected {kind}, received {path!r}: {found}")


def read_bytes(path: Path, key: str, accepted: str) -> bytes:
    """Return the content of a file, decompressed if it is gzip's.

    Args:
        key: of the configuration.
        accepted: the kinds of files that are read, for messages.

    Raises:
        ValueError: it cannot be read, or is of a kind that is none of them.
        GzipError: it is compressed and broken, or is named ``.gz`` without being gzip's.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{key}: expected a file that can be read, received {str(path)!r}: {error.strerror}") from None
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise GzipError(f"{path}: expected a whole gzip file, received a broken one ({error}); copy it") from None
    elif path.name.lower().endswith(".gz"):
        raise GzipError(f"{path}: expected a gzip file, as .gz says, received another kind; rename it, or compress it")
    found = kind_of(path)
    if found not in _UNREAD:
        found = next((ending for begin, ending in _BEGINNINGS if content.startswith(begin)), "")
    if found in _UNREAD:
        raise ValueError(
            f"{key}: expected {accepted}, each also as .gz, received {str(path)!r}, which is {found}; {_UNREAD[found]}"
        )
    return content
