"""The token file: documents of a corpus on disk, mapped into memory, so that only their lengths are held there.

A mark, arrays that each begin at a multiple of 64 bytes, a header in JSON, and at the end the header's length and
SHA-256 and a second mark. The arrays: ``offsets`` int64 [N + 1]; ``ids`` uint16 or int32 [T]; ``counts``, bits [T], and
``first_targets`` int32 [N], which are left out where all tokens but the first of each document count; ``held_out``,
bits [N].
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .document import Document

ENDING = ".tokens"
_BEGIN, _END = b"FMTOKENS", b"FMTOKEND"
_ALIGNED = 64
_TAIL = 8 + 32 + 8  # the header's length, its SHA-256, the second mark
_FORMAT = 1
VERIFIED_BYTES = 4 << 30  # a larger file's arrays are not hashed before each run
_BLOCK = 1 << 24


class TokenFile:
    """Documents of a token file by number; see :class:`fusemesh.tokenized.documents.DocumentSource`.

    Args:
        path: of the file.

    Raises:
        ValueError: it is no token file, or not the whole of one; says how to make it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self.header = read_header(path)
        offsets = self._array("offsets")
        self.lengths = np.diff(offsets)
        self._offsets, self._ids, self._counts = offsets, self._array("ids"), self._array("counts")
        if len(self.lengths) != self.header["documents"] or offsets[-1] != len(self._ids) or (self.lengths < 2).any():
            raise ValueError(f"{_damaged(self.path)}: its offsets do not fit its tokens")
        firsts = self._array("first_targets")
        ones = np.ones(len(self.lengths), np.int64)
        self.first_targets: np.ndarray = ones if firsts is None else firsts.astype(np.int64)
        bits = self._array("held_out")
        #: Which documents are held out, bool [N].
        self.held_out = np.unpackbits(bits, count=len(self.lengths), bitorder="little").astype(bool)

    def _array(self, name: str) -> Any:
        entry = self.header["arrays"].get(name)
        if entry is None:
            return None
        if not entry["size"]:
            return np.zeros(0, entry["dtype"])
        return np.memmap(self.path, np.dtype(entry["dtype"]), "r", entry["at"], (entry["size"],))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Document:
        begin, end = int(self._offsets[number]), int(self._offsets[number + 1])
        ids = np.asarray(self._ids[begin:end], np.int32)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.header["vocabulary"]:
            raise ValueError(f"{_damaged(self.path)}: document {number} has tokens that the tokenizer does not have")
        if self._counts is None:
            counts = np.ones(len(ids), bool)
            counts[:1] = False
            return Document(ids, counts)
        bits = np.unpackbits(self._counts[begin // 8 : -(-end // 8)], bitorder="little")
        return Document(ids, bits[begin % 8 : begin % 8 + len(ids)].astype(bool))

    def check_tokenizer(self, hashes: Mapping[str, str], model: str) -> None:
        """Check that the tokens are those of a tokenizer.

        Args:
            hashes: of the tokenizer.
            model: its folder, for messages.

        Raises:
            ValueError: they are another's.
        """
        own, wanted = self.header["tokenizer"], ""
        if not any(own.get(kind) == hashes.get(kind, "") for kind in ("files", "behaviour")):
            wanted = "tokens by the tokenizer"
        elif self.header["chats"] and own["template"] != hashes["template"]:
            wanted = "chats by the chat template"
        if wanted:
            raise ValueError(
                f"data.path: expected {wanted} of {model!r}, received {self.path!r}, which another one has made; make "
                f"it again: fusemesh tokenize DATA --model {model} -o FILE"
            )


def is_token_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names a token file: by its ending, or by its beginning."""
    if str(path).endswith(ENDING):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the header of a token file; raise ValueError as :class:`TokenFile`."""
    header: dict[str, Any] = json.loads(header_bytes(path))
    if header["format"] != _FORMAT:
        raise ValueError(
            f"data.path: expected a token file of format {_FORMAT}, received {str(path)!r} of format "
            f"{header['format']}; make it again by fusemesh tokenize"
        )
    return header


def header_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a token file's header, in which the arrays' SHA-256 stands; raise ValueError as
    :class:`TokenFile`."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(_BEGIN)) != _BEGIN:
                found = "an empty file" if not size else "another kind of file"
                raise ValueError(
                    f"data.path: expected a token file, which fusemesh tokenize makes, received {str(path)!r}, "
                    f"{found}; give the text or the records themselves, or make one"
                )
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
            length = int.from_bytes(tail[:8], "little")
            if tail[-8:] != _END or not 0 < length <= size - _TAIL:
                raise ValueError(f"{_damaged(path)}: its end is missing")
            file.seek(size - _TAIL - length)
            content = file.read(length)
    except OSError as error:
        raise ValueError(
            f"data.path: expected a token file that can be read, received {str(path)!r}: {error.strerror}"
        ) from None
    if hashlib.sha256(content).digest() != tail[8:40] or json.loads(content)["bytes"] != size:
        raise ValueError(f"{_damaged(path)}: its header is not as it was written")
    return content


def verify(path: str | os.PathLike[str]) -> None:
    """Check the SHA-256 of a token file's arrays; raise ValueError if it is another than its header says."""
    header, digest = read_header(path), hashlib.sha256()
    with open(path, "rb") as file:
        left = header["header_at"]
        while left and (block := file.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    if digest.hexdigest() != header["sha256"]:
        raise ValueError(f"{_damaged(path)}: its tokens are not as they were written")


def _damaged(path: str | os.PathLike[str]) -> str:
    return (
        f"data.path: expected a whole token file, received {str(path)!r}, which is damaged or cut off (make it "
        "again by fusemesh tokenize, or copy it again)"
    )


class Writer:
    """Writes a token file to a path that does not exist, one array behind the other; the file is whole when
    :meth:`finish` has returned."""

    def __init__(self, path: Path) -> None:
        self.path, self._temporary = path, path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO = self._temporary.open("wb")
        self._digest, self._at = hashlib.sha256(), 0
        self._arrays: dict[str, dict[str, Any]] = {}
        self._put(_BEGIN)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._at += len(data)

    def add(self, name: str, dtype: str, parts: Iterable[np.ndarray]) -> None:
        """Write an array that comes in parts."""
        self._put(b"\0" * (-self._at % _ALIGNED))
        at, size = self._at, 0
        for part in parts:
            self._put(np.ascontiguousarray(part, np.dtype(dtype)).tobytes())
            size += len(part)
        self._arrays[name] = {"dtype": dtype, "at": at, "size": size}

    def finish(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """Write the header and give the file its name; return the whole header."""
        whole = {
            "format": _FORMAT,
            **header,
            "arrays": self._arrays,
            "header_at": self._at,
            "sha256": self._digest.hexdigest(),
        }
        content = _with_size(whole, self._at)
        digest = hashlib.sha256(content).digest()
        self._file.write(content + len(content).to_bytes(8, "little") + digest + _END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return dict(json.loads(content))

    def drop(self) -> None:
        """Remove what has been written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _with_size(header: Mapping[str, Any], before: int) -> bytes:
    """Return the header with the size of the whole file, of which the header is a part."""
    size = 0
    while True:
        content = json.dumps({**header, "bytes": size}, ensure_ascii=False, sort_keys=True).encode()
        if before + len(content) + _TAIL == size:
            return content
        size = before + len(content) + _TAIL


def packed_bits(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the bytes of a row of bools that comes in parts, the first in the lowest bit."""
    rest = np.zeros(0, bool)
    for part in parts:
        bits = np.concatenate([rest, part])
        whole = len(bits) // 8 * 8
        yield np.packbits(bits[:whole], bitorder="little")
        rest = bits[whole:]
    yield np.packbits(rest, bitorder="little")
