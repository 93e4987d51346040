"""Layer: the application. Files of records and texts as a language model's data: encodings, gzip, folders."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from fusemesh.tokenized.records import Columns, Text
from fusemesh.tokenized.sources import Read, Source, has_records
from tests.support.pretrained.chats import lines

TEXTS = ["größer als ein Fuchs", "和狗在一起", "a lazy dog"]


def read(source: Source, size: int = 1 << 20) -> tuple[list[str], Read]:
    found, counted = [], Read()
    parts = source.parts(size)
    for part in parts:
        for entry in source.entries(part, counted):
            assert isinstance(entry.value, Text)
            found.append(entry.value.text)
    source.check(counted, parts)
    return found, counted


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_records_in_any_encoding(tmp_path: Path, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    texts = [text for text in TEXTS if encoding != "gb18030" or "ö" not in text]
    content = "".join(f'{{"text": "{text}"}}\n' for text in texts).encode(encoding)
    path = tmp_path / f"a.jsonl{'.gz' if pack is gzip.compress else ''}"
    path.write_bytes(pack(content))
    named = encoding if encoding == "gb18030" else ""
    # Of small parts, too: a wide encoding is not cut, whose newlines are no single bytes.
    for size in (1 << 20, 30):
        assert read(Source(str(path), Columns(), named), size)[0] == texts
    if named:
        with pytest.raises(ValueError, match=r"a\.jsonl.*, line 1: expected UTF-8, .*give --data.encoding gb18030"):
            read(Source(str(path), Columns()))


def test_a_folder_of_records_and_texts(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(lines([{"text": "one"}, {"text": "two"}]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines([{"text": "three"}]).encode()))
    (tmp_path / "a.txt").write_text("four\n\nstill four\n")
    (tmp_path / ".hidden.jsonl").write_text("{")
    found, counted = read(Source(str(tmp_path), Columns()))
    assert sorted(found) == ["four\n\nstill four\n", "one", "three", "two"]
    assert counted.texts == 1
    assert has_records(str(tmp_path))
    assert not has_records(str(tmp_path / "a.txt"))


def test_the_paragraphs_of_a_text_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\n\n\nthree\n")
    assert read(Source(str(path), Columns()))[0] == ["one\n\n", "two\n\n", "three\n\n\n"]
    path.write_text("one\ntwo\n")
    assert read(Source(str(path), Columns()))[0] == ["one\ntwo\n\n\n"]
    assert read(Source(str(path), Columns(), divided=True))[0] == ["one\n", "two\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "data.path: expected text, received '.*a.txt', an empty file"),
        ("a.jsonl", b"", r"a\.jsonl: expected records, received an empty file"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: expected a gzip file, as .gz says"),
        ("a.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:20], "expected a whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', "carriage returns alone"),
        (
            "a.jsonl",
            b'{"text": "a", "text": "b"}\n',
            r"line 1: expected each key of an object once, received 'text' tw",
        ),
        ("a.pdf", b"%PDF-", "which is .pdf; save it as text"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(Source(str(tmp_path / name), Columns()))


def test_a_folder_of_another_encoding_or_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path: expected a folder of text files, .* which has no text"):
        read(Source(str(tmp_path), Columns()))
    (tmp_path / "a.txt").write_bytes("größer".encode("cp1252") * 9)
    with pytest.raises(ValueError, match=r"data.path: expected text in UTF-8, received 1 of 1 files in"):
        read(Source(str(tmp_path), Columns()))
    with pytest.raises(ValueError, match=r"data.path: expected a file of text or records, .*: not found"):
        read(Source(str(tmp_path / "none"), Columns()))
