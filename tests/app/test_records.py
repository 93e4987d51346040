"""Layer: application. A user's files: every format is read alike; what is wrong is named by file, line and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusemesh import config
from fusemesh.run.settings import load_config
from fusemesh.run.trainer import prepare
from fusemesh.tasks.records import read_records
from fusemesh.tasks.registry import build_task

FIELDS = ("text", "label")
VALUES = [("a, b", "x"), ("zwölf", "y"), ('say "c"', "x")]


def write(path: Path, values: list[tuple[str, str]]) -> str:
    """Two fields a record in the format of the file's ending."""
    quote = {'"': '""'}
    if path.suffix == ".jsonl":
        lines = [json.dumps({"label": label, "text": text, "more": 1}) for text, label in values]
    elif path.suffix == ".csv":
        lines = ["label,more,text"] + [f'{label},1,"{text.translate(str.maketrans(quote))}"' for text, label in values]
    elif path.suffix == ".tsv":
        lines = ["text\tlabel"] + [f'"{text.translate(str.maketrans(quote))}"\t{label}' for text, label in values]
    else:
        lines = [f"{text}\t{label}" for text, label in values]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_every_format_is_read_alike(name: str, tmp_path: Path) -> None:
    records = read_records(write(tmp_path / name, VALUES), FIELDS)
    assert [record.values for record in records] == VALUES
    assert [record.line for record in records] == ([2, 3, 4] if name in ("a.csv", "a.tsv") else [1, 2, 3])


def test_columns_may_have_other_names_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfsentence,kind\nhello,x\n")
    (record,) = read_records(str(path), FIELDS, "sentence, kind")
    assert record.values == ("hello", "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: expected records, received an empty file"),
        ("a.csv", b"text,label\n", "a.csv: expected records, received an empty file"),
        ("a.txt", b"\n\n", "a.txt: expected records, received an empty file"),
        ("a.csv", b"text,kind\nb,x\n", "a.csv, line 1: expected a column 'label', received 'text', 'kind'; rename it"),
        ("a.csv", b"text,label\na,x\nb, c,x\n", "a.csv, line 3: expected 2 values, as in the heading, received 3"),
        ("a.csv", b'text,label\na,x\n"b,x\n', "a.csv, line 3: expected a record, received what is broken"),
        (
            "a.jsonl",
            b'{"text": "a", "label": "x"}\n{"text": \n',
            "a.jsonl, line 2: expected a JSON object, received wh",
        ),
        ("a.jsonl", b'["a", "x"]\n', "a.jsonl, line 1: expected a JSON object, received a list"),
        ("a.jsonl", b'{"text": "a"}\n', "a.jsonl, line 1: expected a key 'label', received 'text'; rename it"),
        ("a.txt", b"a\tx\nb x\n", "a.txt, line 2: expected text, label, separated by tabs, received 1 value"),
        ("a.txt", b"a\tx\n\tx\n", "a.txt, line 2: expected a text, received nothing; fill it in"),
        ("a.txt", b"a\tx\n\xe4\tx\n", "a.txt, line 2: expected UTF-8, received the byte 0xe4; convert the file, for"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_records(str(path), FIELDS)
    assert str(error.value).startswith(f"{tmp_path}/{message}")


def configured(task: str, path: str, **more: str) -> config.Config:
    values = {"task": task, "data.path": path, "run.device": "cpu", "data.sequence_length": "16", **more}
    return load_config(None, values)


def check(configured: config.Config) -> None:
    """As `fusemesh train` does, before it starts a rank."""
    prepare(configured, 1, resume=False)


def test_a_label_unseen_in_training(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", VALUES)
    held_out = write(tmp_path / "b.csv", [("fine", "x"), ("new", "z")])
    with pytest.raises(ValueError, match=r"b\.csv, line 3: expected one of the 2 labels .* received 'z'; add records"):
        check(configured("text_classification", path, **{"data.held_out": held_out}))


def test_an_answer_that_is_not_in_the_passage(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("who?\tAnna came.\tAnna\nwhen?\tAnna came.\ttoday\n")
    with pytest.raises(
        ValueError, match=r"a\.txt, line 2: expected an answer that stands in the passage, received 'to"
    ):
        check(configured("question_answering", str(path), **{"data.held_out": str(path)}))


def test_nothing_is_held_out(tmp_path: Path) -> None:
    for task, lines in (("text_classification", "a\tx\nb\ty\n"), ("translation", "a\tx\nb\ty\n")):
        path = tmp_path / "a.txt"
        path.write_text(lines)
        with pytest.raises(ValueError, match=r"data\.path: expected enough records to hold some out"):
            check(configured(task, str(path)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path: expected a file of records, received '.*absent': not found"):
        check(configured("translation", str(tmp_path / "absent")))


def test_too_long_a_text_is_cut_between_characters(tmp_path: Path) -> None:
    """The documented truncation: sequence_length bytes; a target keeps room for its end."""
    path = tmp_path / "a.txt"
    path.write_text("é" * 20 + "\t" + "é" * 20 + "\n", encoding="utf-8")
    task = build_task(configured("translation", str(path), **{"data.held_out": str(path)}))
    batch = task.train.batch([0])
    assert bytes(batch.tokens[0].astype("uint8")).decode() == "é" * 8
    assert batch.inputs["lengths"].tolist() == [16]
    # BEGIN, seven times two bytes, END: the eighth character would be cut.
    assert batch.targets[0].tolist() == [*("é" * 7).encode(), 2, -100]
    assert batch.inputs["target_tokens"][0].tolist() == [1, *("é" * 7).encode(), 0]


def test_an_answer_behind_the_cut_is_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("who?\tThere came Anna Bell.\tAnna Bell\nwho?\tAnna Bell came.\tAnna Bell\n")
    options = {"data.held_out": str(path), "data.sequence_length": "6"}
    task = build_task(configured("question_answering", str(path), **options))
    assert task.train.batch([0]).targets.tolist() == [[3, 4]] and len(task.train) == 1
    assert task.held_out.batch([0, 1]).targets.tolist() == [[-100, -100], [3, 4]]
    assert task.held_out.targets_in([0, 1]) == 2
    path.write_text("who?\tThere came Anna Bell.\tAnna Bell\n")
    with pytest.raises(ValueError, match=r"data\.sequence_length: expected enough words .* received 6, which cuts"):
        build_task(configured("question_answering", str(path), **options))
