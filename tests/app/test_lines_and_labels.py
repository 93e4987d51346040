"""Layer: application. Where lines and characters of a user's bytes end, and which labels are one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from fusemesh.run.settings import load_config
from fusemesh.tasks.encodings import lines_of
from fusemesh.tasks.records import read_records
from fusemesh.tasks.registry import build_task

FIELDS = ("text", "label")


def test_a_carriage_return_alone_ends_no_line(tmp_path: Path) -> None:
    for name, separator in (("a.csv", b","), ("a.tsv", b"\t"), ("a.txt", b"\t")):
        heading = b"" if name == "a.txt" else separator.join((b"text", b"label")) + b"\r\n"
        (tmp_path / name).write_bytes(heading + b"te\rxt" + separator + b"0\r\n")
        assert [record.values for record in read_records(str(tmp_path / name), FIELDS)] == [("te\rxt", "0")]
    # A record stands where it begins, whatever ends the lines of its values.
    (tmp_path / "a.csv").write_bytes(b'text,label\r\n"a\rb\r\nc",x\n\nd\r,y\r\n')
    records = read_records(str(tmp_path / "a.csv"), FIELDS)
    assert [(*record.values, record.line) for record in records] == [("a\rb\r\nc", "x", 2), ("d\r", "y", 5)]
    for stream in (io.BytesIO(b"te\rxt\r\nb\n"), io.BytesIO("te\rxt\r\nb\n".encode("utf-16"))):
        assert list(lines_of(io.TextIOWrapper(stream))) == ["te\rxt", "b"]
    with pytest.raises(ValueError, match="standard input: expected lines that end at newlines, received carriage"):
        list(lines_of(io.TextIOWrapper(io.BytesIO(b"a\rb\r"))))


def test_a_character_that_is_cut_off_is_no_other_encoding(tmp_path: Path) -> None:
    cut = "text,label\n很好,x\n服务很".encode("gb18030")[:-1]
    (tmp_path / "a.csv").write_bytes(cut)
    message = r"line 3: expected gb18030, as data\.encoding says, received its last character cut off \(0xba"
    with pytest.raises(ValueError, match=message):
        read_records(str(tmp_path / "a.csv"), FIELDS, encoding="gb18030")
    with pytest.raises(ValueError, match=message):
        list(lines_of(io.TextIOWrapper(io.BytesIO(cut)), "gb18030"))


def test_labels_that_look_alike_are_one(tmp_path: Path) -> None:
    """Spaces around them, and accents as marks of their own."""
    path, held_out = tmp_path / "a.csv", tmp_path / "b.jsonl"
    path.write_text("text,label\n red 1, gr\u00fcn\nred 2,gru\u0308n\nred 3,grün\t\nblue,x \n", encoding="utf-8")
    held_out.write_text(json.dumps({"text": "red", "label": "\u00a0grün "}), encoding="utf-8")
    task = build_task(
        load_config(
            None,
            {
                "task": "text_classification",
                "data.path": str(path),
                "data.held_out": str(held_out),
                "data.sequence_length": "16",
            },
        )
    )
    assert task.metadata == {"labels": ["grün", "x"], "counts": [3, 1]}
    assert task.train.batch(range(4)).targets[:, 0].tolist() == [0, 0, 0, 1]
    assert task.held_out.batch([0]).targets.tolist() == [[0]]
    # A model of an older version has such labels.
    old = build_task(task.config, {"labels": [" grün", "x"], "counts": [3, 1]})
    assert old.held_out.batch([0]).targets.tolist() == [[0]]
