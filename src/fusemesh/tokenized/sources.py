"""The files of a corpus in parts that are read one by one: records of JSON lines, text files, folders of both.

Parts follow from names and sizes alone, so they are the same whoever reads them, in whatever order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fusemesh.tasks.corpus import check_found, in_utf8, lines_of, paths_in, root_of
from fusemesh.tasks.corpus import parts_of as paragraphs_of
from fusemesh.tasks.encodings import check_line_ends, decode_text, is_wide
from fusemesh.tasks.files import GzipError, kind_of, read_bytes

from .records import ENDINGS, Columns, Entry, Text, entries_of, kind_in

PART_BYTES = 8 << 20  # of a source's files, that are read at once
_TEXT = "text, or records in .jsonl"
_LINE = re.compile(r", line (\d+)(?=:|$|, message)")


@dataclass(frozen=True)
class Part:
    """Some of a source's bytes, in files: name, path, first byte and the byte behind the last (-1: to the end)."""

    files: tuple[tuple[str, str, int, int], ...]
    size: int
    is_records: bool = False


@dataclass
class Read:
    """Counts of what was read: texts, and the errors of files in another encoding."""

    texts: int = 0
    undecoded: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A file or a folder of a language model's data.

    Args:
        path: "": the standard library.
        columns: of records.
        encoding: of all files; "": UTF-8, or as a byte order mark says.
        key: of the configuration, for messages.
        divided: a text of one paragraph becomes its lines, so that some can be held out.
    """

    path: str
    columns: Columns = field(default_factory=Columns)
    encoding: str = ""
    key: str = "data.path"
    divided: bool = False

    def parts(self, size: int = PART_BYTES) -> list[Part]:
        """Return the parts in order, of about ``size`` bytes each; raise ValueError if there is nothing to read."""
        root = root_of(self.path)
        if root.is_file():
            return self._of_records(root.name, root, size) if is_records(root) else [_whole(root.name, root)]
        if not root.is_dir():
            found = "neither file nor folder" if root.exists() else "not found"
            raise ValueError(
                f"{self.key}: expected a file of text or records, or a folder of them, received {self.path!r}: {found}"
            )
        parts: list[Part] = []
        group: list[tuple[str, str, int, int]] = []
        total = 0
        for name, path in sorted(paths_in(root)):
            if is_records(path):
                parts += self._of_records(name, path, size)
                continue
            group.append((name, str(path), 0, -1))
            total += path.stat().st_size if path.is_file() else 0
            if total >= size:
                parts.append(Part(tuple(group), total))
                group, total = [], 0
        if group:
            parts.append(Part(tuple(group), total))
        if not parts:
            check_found(0, [], self.path, self.key, self.encoding)
        return parts

    def _of_records(self, name: str, path: Path, size: int) -> list[Part]:
        """Return the parts of a file of records: cut behind newlines, where bytes of 10 are newlines alone."""
        total = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(4)
            if beginning.startswith(b"\x1f\x8b") or path.suffix == ".gz" or is_wide(beginning, self.encoding):
                return [_whole(name, path)]
            cuts = [0]
            while total - cuts[-1] > size:
                file.seek(cuts[-1] + size - 1)
                file.readline()
                cuts.append(min(file.tell(), total))
        if cuts[-1] < total or total == 0:
            cuts.append(total)
        pairs = itertools.pairwise(cuts)
        return [Part(((name, str(path), begin, end),), end - begin, True) for begin, end in pairs]

    def entries(self, part: Part, read: Read) -> Iterator[Entry]:
        """Yield the records of a part; errors as :func:`fusemesh.tokenized.records.entries_of` raises."""
        if part.is_records:
            yield from self._records(part)
        elif self.path and not root_of(self.path).is_dir():
            yield from self._paragraphs(part, read)
        else:
            yield from self._files(part, read)

    def _records(self, part: Part) -> Iterator[Entry]:
        ((_, path, begin, end),) = part.files
        file = Path(path)
        content = _range(file, begin, end) if end >= 0 else read_bytes(file, self.key, _TEXT)
        try:
            text = decode_text(content, self.encoding, path)
            check_line_ends(text, path)
            kind = self._kind(file) if begin else None
            if not begin and not text.strip():
                found = "blank lines alone" if text else "an empty file"
                raise ValueError(f"{path}: expected records, received {found}; give one object a line")
            yield from entries_of(text, path, self.columns, kind=kind)
        except ValueError as error:
            raise ValueError(located(str(error), part)) from None

    def _kind(self, file: Path) -> type | None:
        """Return the kind of a file's first record."""
        with file.open("rb") as opened:
            for line in opened:
                if line.strip():
                    return kind_in(decode_text(line, self.encoding, str(file)), str(file), self.columns)
        return None

    def _paragraphs(self, part: Part, read: Read) -> Iterator[Entry]:
        ((name, path, _, _),) = part.files
        text = decode_text(read_bytes(Path(path), self.key, _TEXT), self.encoding, path).encode()
        if not text or b"\0" in text:
            what = "which holds bytes of 0" if text else "an empty file"
            raise ValueError(f"{self.key}: expected text, received {self.path!r}, {what}; give another")
        found = paragraphs_of(name, text)
        if self.divided and len(found) == 1:
            found = lines_of(name, text)
        for title, content in found.items():
            read.texts += 1
            yield Entry(Text(content.decode("utf-8", "replace")), f"{path}, {title[len(name) :]}", title)

    def _files(self, part: Part, read: Read) -> Iterator[Entry]:
        for name, path, _, _ in part.files:
            try:
                content = read_bytes(Path(path), self.key, _TEXT)
            except GzipError as error:
                read.undecoded.append(str(error))
                continue
            except ValueError:
                continue
            try:
                text = in_utf8(content, self.encoding, name) if self.path else content
            except ValueError as error:
                read.undecoded.append(str(error))
                continue
            # A NUL byte marks a binary file.
            if text and b"\0" not in text:
                read.texts += 1
                yield Entry(Text(text.decode("utf-8", "replace")), path, name)

    def check(self, read: Read, parts: list[Part]) -> None:
        """Check what all parts hold; raise ValueError where it is no text, or most is in another encoding."""
        if any(not part.is_records for part in parts) and root_of(self.path).is_dir():
            records = any(part.is_records for part in parts)
            check_found(read.texts or int(records), read.undecoded, self.path, self.key, self.encoding)


def is_records(path: Path) -> bool:
    """Return whether a file's name says that it holds JSON lines."""
    return kind_of(path) in ENDINGS


def has_records(path: str) -> bool:
    """Return whether a path stands for JSON lines, or for a folder with some."""
    root = root_of(path)
    # A file that has gone is what its name says.
    return bool(path) and (any(is_records(file) for _, file in paths_in(root)) if root.is_dir() else is_records(root))


def located(message: str, part: Part) -> str:
    """Return a message about a line of a part with the number of that line in its file."""
    _, path, begin, _ = part.files[0]
    if not begin or (found := _LINE.search(message)) is None:
        return message
    with open(path, "rb") as file:
        before = sum(block.count(b"\n") for block in _blocks(file, begin))
    return f"{message[: found.start(1)]}{int(found[1]) + before}{message[found.end(1) :]}"


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(size, 1 << 24))):
        size -= len(block)
        yield block


def _range(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _whole(name: str, path: Path) -> Part:
    return Part(((name, str(path), 0, -1),), path.stat().st_size, is_records(path))
