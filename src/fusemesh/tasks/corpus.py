"""The corpus of a language model: text files, or the Python standard library's own source, as two streams of bytes.

Documents go to one or the other as a whole, by a hash of their relative path, so that no held-out text has a part in
training and the split is the same on every rank and in every run.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .base import PAD, hash_of, held_out_names
from .encodings import decode_text, is_wide
from .files import GzipError, read_bytes

SEPARATOR = PAD  # ends every document; NUL does not occur in source text

# Not the library's source: installed packages, compiled files, tests, and text that a program wrote.
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
_EXCLUDED_PREFIX = "_sysconfigdata"
_SOURCE_SUFFIX = ".py"
_SHOWN = 3  # files in a message


@dataclass(frozen=True)
class Corpus:
    """Two streams of bytes, or of other tokens; each document is followed by one that separates it from the next.

    train, held_out: integers [tokens]. train_documents, held_out_documents: how many documents each holds.
    source: where the text came from, for reports. train_left_out, held_out_left_out: files of each that have another
    encoding, and why.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_documents: int
    held_out_documents: int
    source: str
    train_left_out: tuple[str, ...] = ()
    held_out_left_out: tuple[str, ...] = ()


def standard_library() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_version() -> str:
    """Return the name and the version of the default corpus."""
    return f"Python {platform.python_version()} standard library"


def in_bytes(documents: Sequence[bytes]) -> np.ndarray:
    """Return documents as one stream of bytes, uint8 [bytes]."""
    return np.frombuffer(b"".join(text + bytes([SEPARATOR]) for text in documents), dtype=np.uint8)


def load_corpus(
    path: str = "",
    held_out: str = "",
    *,
    encoding: str = "",
    join: Callable[[Sequence[bytes]], np.ndarray] = in_bytes,
) -> Corpus:
    """Read a corpus.

    Args:
        path: a text file, a folder of text files, or "" for the standard library's source.
        held_out: the same for the held-out part; "": one in 16 of the documents, but at least one, by hash.
        encoding: of the files, see :func:`fusemesh.tasks.encodings.decode_text`.
        join: makes a stream of tokens of documents in UTF-8.

    Raises:
        ValueError: nothing is there, it is in another encoding, or one document has no two lines to divide.
    """
    documents, left_out = read_documents(path, "data.path", encoding)
    others: tuple[str, ...] = ()
    if held_out:
        held_out_documents, others = read_documents(held_out, "data.held_out", encoding)
        parts = [documents, held_out_documents]
    else:
        documents = _at_least_two(documents)
        chosen = held_out_names(documents)
        if not chosen:
            raise ValueError(
                f"data.path: expected enough documents to hold some out, received {len(documents)} of one line in "
                f"{path!r}; give more text, or some to evaluate on as data.held_out"
            )
        parts = [{n: text for n, text in documents.items() if (n in chosen) == part} for part in (False, True)]
    streams = [join(in_order(part)) for part in parts]
    return Corpus(streams[0], streams[1], len(parts[0]), len(parts[1]), source_of(path), left_out, others)


def in_order(documents: Mapping[str, bytes]) -> list[bytes]:
    """Return documents in the order of their names' hashes: the first part of them is then a random choice of all."""
    return [documents[name] for name in sorted(documents, key=lambda name: hash_of(name))]


def source_of(path: str) -> str:
    """Return where a corpus is from, for reports."""
    return str(root_of(path)) if path else library_version()


def root_of(path: str) -> Path:
    """Return the file or the folder of a path; "": the standard library's."""
    return Path(path).expanduser().resolve() if path else standard_library()


def read_documents(path: str, key: str, encoding: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the documents of a file or a folder by name, in UTF-8, and which files have another encoding."""
    root = root_of(path)
    if root.is_file():
        text = decode_text(read_bytes(root, key, "text"), encoding, str(root)).encode()
        if not text or b"\0" in text:
            what = "which holds bytes of 0" if text else "an empty file"
            raise ValueError(f"{key}: expected text, received {path!r}, {what}; give another")
        return parts_of(root.name, text), ()
    if not root.is_dir():
        is_there = "neither file nor folder" if root.exists() else "not found"
        raise ValueError(f"{key}: expected a text file or a folder of text files, received {path!r}: {is_there}")
    found: dict[str, bytes] = {}
    undecoded: list[str] = []
    for name, content in _files(root, undecoded):
        try:
            text = in_utf8(content, encoding, name) if path else content
        except ValueError as error:
            undecoded.append(str(error))
            continue
        # A NUL byte marks a binary file, and would be taken for the end of a document.
        if text and b"\0" not in text:
            found[name] = text
    check_found(len(found), undecoded, path, key, encoding)
    return found, tuple(undecoded)


def check_found(found: int, undecoded: Sequence[str], path: str, key: str, encoding: str) -> None:
    """Check that a folder has text, and most of it in the encoding.

    Args:
        found: how many files have.
        undecoded: the errors of the others.
        path, key: the folder, and the key of the configuration that names it.
        encoding: as ``data.encoding`` says.

    Raises:
        ValueError: it has none, or most has another encoding.
    """
    if len(undecoded) > found:
        share = f"{len(undecoded)} of {len(undecoded) + found} files"
        raise ValueError(
            f"{key}: expected text in {encoding or 'UTF-8'}, received {share} in {path!r} that are not: "
            f"{some_of(undecoded)}"
        )
    if not found:
        raise ValueError(f"{key}: expected a folder of text files, received {path!r}, which has no text; give another")


def some_of(errors: Sequence[str]) -> str:
    """Return the first of some errors, and how many others there are."""
    more = f"; and {len(errors) - _SHOWN} others" if len(errors) > _SHOWN else ""
    return "; ".join(sorted(errors)[:_SHOWN]) + more


def files_of(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield the files that a path stands for, see :meth:`fusemesh.tasks.base.Task.files_of`."""
    root = root_of(path)
    if not root.is_dir():
        yield "", root.read_bytes()
    for name, content in sorted(_files(root)):
        if content and (b"\0" not in content or is_wide(content, "")):
            yield name, content


def _files(root: Path, broken: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield (relative path, content) of a folder's files; unreadable and hidden ones are left out.

    Args:
        broken: takes the errors of those that are not gzip's, as they should be.
    """
    for name, path in paths_in(root):
        try:
            yield name, read_bytes(path, "data.path", "text")
        except GzipError as error:
            if broken is not None:
                broken.append(str(error))
        except ValueError:
            continue


def paths_in(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield relative names and paths of a folder's files, but for hidden ones and installed packages."""
    suffix = _SOURCE_SUFFIX if root == standard_library() else ""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS and not name.startswith(".")]
        for name in files:
            if name.endswith(suffix) and not name.startswith((_EXCLUDED_PREFIX, ".")):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def in_utf8(content: bytes, encoding: str, name: str) -> bytes:
    """Return a document in UTF-8; a binary one, which holds bytes of 0, as it is."""
    if b"\0" in content and not is_wide(content, encoding):
        return content
    return decode_text(content, encoding, name).encode()


def parts_of(name: str, text: bytes) -> dict[str, bytes]:
    """Return the paragraphs of a text as documents by name."""
    blank = b"\r\n\r\n" if b"\r\n" in text else b"\n\n"
    return {f"{name}#{number}": part + blank for number, part in enumerate(text.split(blank)) if part.strip()}


def _at_least_two(documents: dict[str, bytes]) -> dict[str, bytes]:
    """Return the documents; of a single one its paragraphs, or its lines."""
    for cut in (parts_of, lines_of):
        if len(documents) == 1:
            ((name, text),) = documents.items()
            documents = cut(name, text)
    return documents


def lines_of(name: str, text: bytes) -> dict[str, bytes]:
    """Return the lines of a text as documents by name."""
    return {f"{name}:{number}": line + b"\n" for number, line in enumerate(text.split(b"\n")) if line.strip()}
