"""A user's records from CSV, TSV, JSON lines, JSON or plain text; errors name file, line and remedy."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .base import held_out_names
from .encodings import check_characters, check_line_ends, decode_text
from .files import TABLES, find_file, kind_of, read_bytes

if TYPE_CHECKING:
    from fusemesh.config import DataConfig

_Row = tuple[int, tuple[str, ...]]
_BLANKS = re.compile(r"\s*")
_RETURN = re.compile(r"\r(?!\n)")


@dataclass(frozen=True)
class Record:
    """One record: its values in the order of the task's fields, optional ones last, and where it stands.

    unit: in which ``line`` counts.
    """

    values: tuple[str, ...]
    file: str
    line: int
    unit: str = "line"

    @property
    def where(self) -> str:
        """File and line for messages."""
        return f"{self.file}, {self.unit} {self.line}"


class Fields(NamedTuple):
    """The names of a record's values: those that each has, and those that it may have, "" where it has not."""

    needed: Sequence[str]
    optional: Sequence[str] = ()

    def named(self, columns: str) -> Fields:
        """Return the names of the columns that hold them.

        Args:
            columns: as ``data.columns`` gives them, separated by commas, in the order of the fields; "": the fields'.

        Raises:
            ValueError: they are too few or too many.
        """
        if not columns:
            return self
        names = [name.strip() for name in columns.split(",")]
        least = len(self.needed)
        if not least <= len(names) <= least + len(self.optional):
            more = f", and may be of {', '.join(self.optional)}" if self.optional else ""
            raise ValueError(
                f"data.columns: expected {least} names, of {', '.join(self.needed)}{more}, received {columns!r}; "
                "separate them by commas"
            )
        return Fields(names[:least], [*names[least:], *self.optional[len(names) - least :]])


def read_records(
    path: str, fields: Fields | Sequence[str], columns: str = "", *, encoding: str = "", key: str = "data.path"
) -> list[Record]:
    """Return the records of a file: ``.csv`` or ``.tsv`` with a heading, ``.jsonl`` with one object a line, ``.json``
    with an array of objects or in SQuAD's form; other files have fields separated by tabs. Each may be gzip's.

    Args:
        path: the file.
        fields: names of the values that a record has.
        columns: see :meth:`Fields.named`.
        encoding: of the file, see :func:`fusemesh.tasks.encodings.decode_text`.
        key: of the configuration that names the file.

    Raises:
        ValueError: the file is not there, empty, in another encoding, lacks a column, or has a broken line.
    """
    fields = fields if isinstance(fields, Fields) else Fields(fields)
    file, names = find_file(path, key, "a file of records"), fields.named(columns)
    text = decode_text(read_bytes(file, key, TABLES), encoding, str(file))
    kind, unit = kind_of(file), "line"
    if kind != ".json":
        check_line_ends(text, str(file))
    if kind in (".csv", ".tsv"):
        rows = _separated(file, text, names, "," if kind == ".csv" else "\t")
    elif kind in (".jsonl", ".ndjson"):
        rows = _json_lines(file, text, names)
    elif kind == ".json" and text.lstrip().startswith("{"):
        rows, unit = _squad(file, text, names), "question"
    elif kind == ".json":
        rows = _json_array(file, text, names)
    else:
        rows = _plain(file, text, fields)
    records = [Record(values, str(file), line, unit) for line, values in rows]
    if not records:
        found = _nothing_in(text, kind)
        raise ValueError(f"{file}: expected records, received {found}; give one record a line")
    for record in records:
        for name, value in zip(fields.needed, record.values, strict=False):
            check_characters(value, record.where)
            if not value.strip():
                raise ValueError(
                    f"{record.where}: expected a value of {name!r}, received nothing; fill it in, or drop the line"
                )
    return records


def _nothing_in(text: str, kind: str) -> str:
    """Return what a file has in the place of records, for the message."""
    if not text.strip():
        return "blank lines alone" if text else "an empty file"
    return "a heading alone" if kind in (".csv", ".tsv") else "none in its JSON"


def load_records(
    data: DataConfig,
    fields: Fields | Sequence[str],
    default: Callable[[], tuple[list[Record], list[Record]]],
    key: int = 0,
) -> tuple[list[Record], list[Record]]:
    """Return records to train on, and held out ones: of the user's files, or by ``default``.

    Args:
        key: of which field the hash decides that a record is held out, where no file of them is given.

    Raises:
        ValueError: see :func:`read_records`; or one of the two is empty.
    """
    if not data.path:
        train, held_out = default()
        return train, read_held_out(data, fields) if data.held_out else held_out
    records = read_records(data.path, fields, data.columns, encoding=data.encoding)
    if data.held_out:
        return records, read_held_out(data, fields)
    needed = fields.needed if isinstance(fields, Fields) else fields
    names = {record.values[key] for record in records}
    if len(names) < 2:
        raise ValueError(
            f"data.path: expected enough records to hold some out, received {len(records)} with one {needed[key]} in "
            f"{data.path!r}; give more, or a file of them as data.held_out"
        )
    chosen = held_out_names(names)
    return [r for r in records if r.values[key] not in chosen], [r for r in records if r.values[key] in chosen]


def read_held_out(data: DataConfig, fields: Fields | Sequence[str]) -> list[Record]:
    """Return the records of ``data.held_out``; raise as :func:`read_records` does."""
    return read_records(data.held_out, fields, data.columns, encoding=data.encoding, key="data.held_out")


def _separated(file: Path, text: str, names: Fields, separator: str) -> Iterator[_Row]:
    """Yield the records of a table, each with the line that it begins in."""
    # The csv module ends a record at a carriage return alone, too; one that is not in the text stands for it meanwhile.
    mark = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in text)
    text = _RETURN.sub(mark, text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    # The module's limit is for all readers, and by default below what a long passage takes.
    limit = csv.field_size_limit(2**31 - 1)
    first = 1
    heading: list[str] = []
    at: list[int | None] = []
    try:
        for row in reader:
            begin, first = first, reader.line_num + 1
            row = [value.replace(mark, "\r") for value in row]
            if row and not heading:
                heading = [name.strip() for name in row]
                at = _columns(heading, names, f"{file}, line {begin}")
            elif row and len(row) != len(heading):
                lines = f" up to line {first - 1}, to which a quote keeps it open" if first - 1 > begin else ""
                raise ValueError(
                    f"{file}, line {begin}: expected {len(heading)} values, as in the heading, received {len(row)}"
                    f"{lines}; put values that hold a {'comma' if separator == ',' else 'tab'} between quotes"
                )
            elif row:
                yield begin, tuple("" if index is None else row[index] for index in at)
    except csv.Error as error:
        if "NUL" in str(error):
            line, found, advice = reader.line_num, str(error), "take the character 0 out"
        else:
            # Everything else that the module refuses has to do with a quote.
            line, found = _line_of_quote(text, first, separator), "the quote that opens here is not closed"
            if "expected after" in str(error):
                found = "the quote that opens here is closed by one that no separator follows"
            advice = 'check its quotes, and write "" for one within a value'
        raise ValueError(
            f"{file}, line {line}: expected a record, received what is broken ({found}); {advice}"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _columns(heading: Sequence[str], names: Fields, where: str) -> list[int | None]:
    """Return the places of the named columns in a heading, None for an optional one that is not there."""
    for name in (*names.needed, *names.optional):
        if heading.count(name) != 1 and (name in names.needed or name in heading):
            found = ", ".join(map(repr, heading))
            raise ValueError(
                f"{where}: expected a column {name!r}, received {found}; rename it, or name the columns by data.columns"
            )
    return [heading.index(name) if name in heading else None for name in (*names.needed, *names.optional)]


def _line_of_quote(text: str, line: int, separator: str) -> int:
    """Return the line of the quote that opens the first broken value of a table.

    Args:
        line: in which the record with it begins.
    """
    whole = re.compile(rf'(?:"[^"]*(?:""[^"]*)*"|[^"{separator}\r\n][^{separator}\r\n]*|)(?:{separator}|\r?\n)')
    begin = at = 0
    for _ in range(line - 1):
        begin = at = text.index("\n", at) + 1
    while found := whole.match(text, at):
        at = found.end()
    return line + text.count("\n", begin, at)


def _json_lines(file: Path, text: str, names: Fields) -> Iterator[_Row]:
    for number, found in json_objects(text, str(file)):
        yield number, _values_of(found, names, f"{file}, line {number}", "write one object a line")


def json_objects(text: str, file: str, line: int = 1) -> Iterator[tuple[int, Any]]:
    """Yield what the lines of a text hold as JSON, each with the number of its line; blank lines are left out.

    Args:
        file: for messages.
        line: number of the first line.

    Raises:
        ValueError: a line is broken, or an object has a key twice.
    """
    for number, part in enumerate(text.split("\n"), line):
        if not part.strip():
            continue
        try:
            yield number, json.loads(part, object_pairs_hook=_object)
        except _DoubledKeyError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: expected a JSON object, received what is broken ({error.msg} at column "
                f"{error.colno}); write one object a line"
            ) from None


def _json_array(file: Path, text: str, names: Fields) -> Iterator[_Row]:
    """Yield the objects of an array, element by element, so that each one's line is known."""
    decoder, line, counted = json.JSONDecoder(object_pairs_hook=_object), 1, 0
    at, follows = _after_blanks(text, 0), "["
    try:
        while True:
            if text[at : at + 1] != follows:
                raise json.JSONDecodeError(f"expecting {follows}", text, at)
            at = _after_blanks(text, at + 1)
            if follows == "[" and text[at : at + 1] == "]":
                break
            line, counted = line + text.count("\n", counted, at), at
            found, end = decoder.raw_decode(text, at)
            yield line, _values_of(found, names, f"{file}, line {line}", "write an array of objects")
            at, follows = _after_blanks(text, end), ","
            if text[at : at + 1] == "]":
                break
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("more behind the array", text, at + 1)
    except _DoubledKeyError as error:
        raise ValueError(f"{file}, line {line}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {error.lineno}: expected an array of JSON objects, received what is broken ({error.msg} at "
            f"column {error.colno}); write [{{...}}, {{...}}], or one object a line in a .jsonl file"
        ) from None


class _DoubledKeyError(Exception):
    """An object of JSON has a key twice."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise :class:`_DoubledKeyError` rather than choose one of two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DoubledKeyError(f"expected each key of an object once, received {twice!r} twice; take one out")
    return found


def _after_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None
    return found.end()


def _squad(file: Path, text: str, names: Fields) -> Iterator[_Row]:
    """Yield the questions of a file in SQuAD's form, with the first of their answers."""
    try:
        found = json.loads(text, object_pairs_hook=_object)
        objects = [
            {"question": asked["question"], "passage": paragraph["context"], "answers": asked["answers"]}
            for article in found["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except _DoubledKeyError as error:
        raise ValueError(f"{file}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected an array of JSON objects, or SQuAD's form (data, paragraphs, qas), received what is "
            f"neither ({type(error).__name__}: {error}); write [{{...}}, {{...}}]"
        ) from None
    for number, item in enumerate(objects, 1):
        where, answers = f"{file}, question {number}", item.pop("answers")
        if not answers:
            raise ValueError(f"{where}: expected an answer, received none; leave questions without answers out")
        item["answer"], item["answer_start"] = answers[0].get("text"), answers[0].get("answer_start")
        yield number, _values_of(item, names, where, "")


def _values_of(found: Any, names: Fields, where: str, form: str) -> tuple[str, ...]:
    """Return the values of a JSON object: texts, whole numbers and true or false as JSON writes them."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, received a {type(found).__name__}; {form}")
    for name in names.needed:
        if name not in found:
            raise ValueError(
                f"{where}: expected a key {name!r}, received {', '.join(map(repr, found))}; rename it, or name the "
                "keys by data.columns"
            )
    for name in (*names.needed, *names.optional):
        value = found.get(name, "")
        if not isinstance(value, str | int) and not (value is None and name in names.optional):
            shown = json.dumps(value)
            raise ValueError(
                f"{where}: expected a text or a whole number as {name!r}, received "
                f"{shown if len(shown) < 60 else shown[:56] + ' ...'}; write it as a text, or drop the record"
            )
    values = [found.get(name, "") for name in (*names.needed, *names.optional)]
    return tuple("" if value is None else value if isinstance(value, str) else json.dumps(value) for value in values)


def _plain(file: Path, text: str, fields: Fields) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        more = max(0, min(line.count("\t") + 1 - len(fields.needed), len(fields.optional)))
        values = split_line(line, [*fields.needed, *fields.optional[:more]], f"{file}, line {number}")
        yield number, (*values, *[""] * (len(fields.optional) - more))


def split_line(line: str, fields: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the fields of a line of plain text.

    Raises:
        ValueError: it has more or fewer; begins with ``where``.
    """
    values = tuple(line.removesuffix("\n").removesuffix("\r").split("\t"))
    if len(values) != len(fields):
        raise ValueError(
            f"{where}: expected {', '.join(fields)}, separated by tabs, received {len(values)} value(s); separate them "
            "by single tabs"
        )
    return values
