"""A user's records from CSV, TSV, JSON lines or plain text; errors name file, line and remedy."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .base import is_held_out

if TYPE_CHECKING:
    from fusemesh.config import DataConfig


@dataclass(frozen=True)
class Record:
    """One record: its values in the order of the task's fields, and where it stands."""

    values: tuple[str, ...]
    file: str
    line: int

    @property
    def where(self) -> str:
        """File and line for messages."""
        return f"{self.file}, line {self.line}"


def read_records(path: str, fields: Sequence[str], columns: str = "") -> list[Record]:
    """Return the records of a file: ``.csv`` or ``.tsv`` with a heading, ``.jsonl`` with one object a line; other files
    have fields separated by tabs.

    Args:
        path: the file, in UTF-8.
        fields: names of the values that a record has.
        columns: names of the columns that hold them, separated by commas, in the order of ``fields``; "": the fields'.

    Raises:
        ValueError: the file is not there, empty, in another encoding, lacks a column, or has a broken line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"data.path: expected a file of records, received {path!r}: not found")
    names = [name.strip() for name in columns.split(",")] if columns else list(fields)
    if len(names) != len(fields):
        raise ValueError(
            f"data.columns: expected {len(fields)} names, of {', '.join(fields)}, received {columns!r}; separate them "
            "by commas"
        )
    text = _text(file)
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        rows = _separated(file, text, names, "," if kind == ".csv" else "\t")
    elif kind in (".jsonl", ".ndjson"):
        rows = _json_lines(file, text, names)
    else:
        rows = _plain(file, text, fields)
    records = [Record(values, str(file), line) for line, values in rows]
    if not records:
        raise ValueError(f"{file}: expected records, received an empty file; give one record a line")
    for record in records:
        for name, value in zip(fields, record.values, strict=True):
            if not value.strip():
                raise ValueError(f"{record.where}: expected a {name}, received nothing; fill it in, or drop the line")
    return records


def load_records(
    data: DataConfig, fields: Sequence[str], default: Callable[[], tuple[list[Record], list[Record]]], key: int = 0
) -> tuple[list[Record], list[Record]]:
    """Return records to train on, and held out ones: of the user's files, or by ``default``.

    Args:
        key: of which field the hash decides that a record is held out, where no file of them is given.

    Raises:
        ValueError: see :func:`read_records`; or one of the two is empty.
    """
    if not data.path:
        train, held_out = default()
    elif data.held_out:
        train, held_out = (read_records(path, fields, data.columns) for path in (data.path, data.held_out))
    else:
        records = read_records(data.path, fields, data.columns)
        train, held_out = ([r for r in records if is_held_out(r.values[key]) == part] for part in (False, True))
    for part, found in (("to train on", train), ("held out", held_out)):
        if not found:
            raise ValueError(
                f"data.path: expected enough records to hold some out, received none {part} in {data.path!r}; give "
                "more, or a file of them as data.held_out"
            )
    return train, held_out


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{file}, line {line}: expected UTF-8, received the byte 0x{data[error.start]:02x}; convert the file, for "
            f"instance with: iconv -f latin1 -t utf-8 {file.name}"
        ) from None


def _separated(file: Path, text: str, names: Sequence[str], separator: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        heading = [name.strip() for name in next(reader, [])]
        for name in names:
            if heading and name not in heading:
                raise ValueError(
                    f"{file}, line 1: expected a column {name!r}, received {', '.join(map(repr, heading))}; rename it, "
                    "or name the columns by data.columns"
                )
        at = [heading.index(name) for name in names] if heading else []
        for row in reader:
            if not row:
                continue
            if len(row) != len(heading):
                raise ValueError(
                    f"{file}, line {reader.line_num}: expected {len(heading)} values, as in the heading, received "
                    f"{len(row)}; put values that hold a {'comma' if separator == ',' else 'tab'} between quotes"
                )
            yield reader.line_num, tuple(row[index] for index in at)
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {reader.line_num}: expected a record, received what is broken ({error}); check its quotes"
        ) from None


def _json_lines(file: Path, text: str, names: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: expected a JSON object, received what is broken ({error.msg} at column "
                f"{error.colno}); write one object a line"
            ) from None
        if not isinstance(found, dict):
            raise ValueError(
                f"{file}, line {number}: expected a JSON object, received a {type(found).__name__}; write one object "
                "a line"
            )
        for name in names:
            if name not in found:
                raise ValueError(
                    f"{file}, line {number}: expected a key {name!r}, received {', '.join(map(repr, found))}; rename "
                    "it, or name the keys by data.columns"
                )
        yield number, tuple(str(found[name]) for name in names)


def _plain(file: Path, text: str, fields: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        yield number, split_line(line, fields, f"{file}, line {number}")


def split_line(line: str, fields: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the fields of a line of plain text.

    Raises:
        ValueError: it has more or fewer; begins with ``where``.
    """
    values = tuple(line.rstrip("\r\n").split("\t"))
    if len(values) != len(fields):
        raise ValueError(
            f"{where}: expected {', '.join(fields)}, separated by tabs, received {len(values)} value(s); separate them "
            "by single tabs"
        )
    return values
