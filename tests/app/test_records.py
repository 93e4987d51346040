"""Layer: application. A user's files: every format is read alike; what is wrong is named by file, line and remedy."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from fusemesh import cli, config
from fusemesh.run.settings import load_config
from fusemesh.run.trainer import prepare
from fusemesh.tasks.base import hash_of, is_held_out
from fusemesh.tasks.records import Fields, read_records
from fusemesh.tasks.registry import build_task
from tests.support import tiny_run

FIELDS = ("text", "label")
VALUES = [("a, b", "x"), ("zwölf", "y"), ('say "c"', "x")]


def write(path: Path, values: list[tuple[str, str]]) -> str:
    """Two fields a record in the format of the file's ending."""
    quote = {'"': '""'}
    if path.suffix == ".jsonl":
        lines = [json.dumps({"label": label, "text": text, "more": 1}) for text, label in values]
    elif path.suffix == ".json":
        lines = ["[", *(json.dumps({"label": label, "text": text}) + "," for text, label in values)]
        lines[-1] = lines[-1][:-1] + "]"
    elif path.suffix == ".csv":
        lines = ["label,more,text"] + [f'{label},1,"{text.translate(str.maketrans(quote))}"' for text, label in values]
    elif path.suffix == ".tsv":
        lines = ["text\tlabel"] + [f'"{text.translate(str.maketrans(quote))}"\t{label}' for text, label in values]
    else:
        lines = [f"{text}\t{label}" for text, label in values]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt", "a.json"])
def test_every_format_is_read_alike(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, VALUES)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    for given in (path, str(packed)):
        records = read_records(given, FIELDS)
        assert [record.values for record in records] == VALUES
        assert [record.line for record in records] == ([1, 2, 3] if name in ("a.jsonl", "a.txt") else [2, 3, 4])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "gb18030", "shift_jis", "big5", "cp1251", "cp1252"])
def test_every_encoding_is_read_or_said(encoding: str, tmp_path: Path) -> None:
    texts = {"shift_jis": "とても良い映画だった", "big5": "這家餐廳的服務很好", "cp1251": "очень хороший фильм"}
    text = texts.get(encoding, "für die Größe" if encoding == "cp1252" else "这家餐厅的服务很好")
    path = tmp_path / "a.csv"
    path.write_bytes(f"text,label\n{text},x\n".encode(encoding))
    if encoding.startswith("utf"):
        assert read_records(str(path), FIELDS)[0].values == (text, "x")
        return
    with pytest.raises(ValueError, match=rf"a\.csv, line 2: expected UTF-8, .*is likely {encoding}.*--data\.encoding"):
        read_records(str(path), FIELDS)
    assert read_records(str(path), FIELDS, encoding=encoding)[0].values == (text, "x")


def test_encodings_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nhello,x\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"every other byte as 0; it is likely utf-16-le without a mark: give --data"):
        read_records(str(path), FIELDS)
    path.write_bytes("text,label\nné,x\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"line 2: expected gb18030, as data\.encoding says, received the byte 0xe9"):
        read_records(str(path), FIELDS, encoding="gb18030")
    path.write_text("text,label\na,x\n服务很好,x\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"line 3: expected ascii, as data\.encoding says, .*; it is UTF-8: leave --data"
    ):
        read_records(str(path), FIELDS, encoding="ascii")
    for wrong in ("klingon", "base64"):
        with pytest.raises(ValueError, match=rf"data\.encoding: expected the name of a text encoding, .*'{wrong}'"):
            read_records(str(path), FIELDS, encoding=wrong)


def test_a_long_text_and_squads_form(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n"{"long, " * 30000}",x\n')
    assert len(read_records(str(path), FIELDS)[0].values[0]) == 180000
    asked = {"question": "who?", "answers": [{"text": "Anna", "answer_start": 4}]}
    content = {"data": [{"paragraphs": [{"context": "Not Anna, Anna.", "qas": [asked]}]}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    fields, values = (
        Fields(("question", "passage", "answer"), ("answer_start",)),
        ("who?", "Not Anna, Anna.", "Anna", "4"),
    )
    (record,) = read_records(str(tmp_path / "a.json"), fields)
    assert record.values == values and record.where.endswith("a.json, question 1")
    # An optional field stands last, under its own name or another.
    (tmp_path / "a.txt").write_text("\t".join(values) + "\n" + "\t".join(values[:3]))
    assert [record.values for record in read_records(str(tmp_path / "a.txt"), fields)] == [values, (*values[:3], "")]
    path.write_text('q,p,a,at\nwho?,"Not Anna, Anna.",Anna,4')
    for columns, start in (("q,p,a,at", "4"), ("q,p,a", "")):
        assert read_records(str(path), fields, columns)[0].values == (*values[:3], start)
    with pytest.raises(
        ValueError, match=r"data\.columns: expected 3 names, of .*, and may be of answer_start, received"
    ):
        read_records(str(path), fields, "q,p")
    for text, label in (("3", "3"), ("true", "true"), ('"3.5"', "3.5")):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "label": {text}}}')
        assert read_records(str(tmp_path / "a.jsonl"), FIELDS)[0].values == ("a", label)


def test_columns_may_have_other_names_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfsentence,kind\nhello,x\n")
    (record,) = read_records(str(path), FIELDS, "sentence, kind")
    assert record.values == ("hello", "x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: expected records, received an empty file"),
        ("a.csv", b"text,label\n", "a.csv: expected records, received a heading alone; give one record a line"),
        ("a.txt", b"\n\n", "a.txt: expected records, received blank lines alone"),
        ("a.csv", b"text,kind\nb,x\n", "a.csv, line 1: expected a column 'label', received 'text', 'kind'; rename it"),
        ("a.csv", b"text,label\na,x\nb, c,x\n", "a.csv, line 3: expected 2 values, as in the heading, received 3"),
        ("a.csv", b'text,label\na,x\n"b,x\n', "a.csv, line 3: expected a record, received what is broken"),
        (
            "a.txt",
            "这家餐厅的服务很好,还\n".encode() + b"\xe4\tx\n",
            "a.txt, line 2: expected UTF-8, received the byte 0xe4; the r",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "label": "x"}\n{"text": \n',
            "a.jsonl, line 2: expected a JSON object, received wh",
        ),
        ("a.jsonl", b'["a", "x"]\n', "a.jsonl, line 1: expected a JSON object, received a list"),
        (
            "a.jsonl",
            b'{"text": "a", "label": null}\n',
            "a.jsonl, line 1: expected a text or a whole number as 'label', ",
        ),
        (
            "a.jsonl",
            b'\n{"text": ["a"], "label": "x"}\n',
            "a.jsonl, line 2: expected a text or a whole number as 'text",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "label": 0.5}\n',
            "a.jsonl, line 1: expected a text or a whole number as 'label', ",
        ),
        (
            "a.jsonl",
            b'{"text": "\\ud800", "label": "x"}',
            "a.jsonl, line 1: expected characters, received \\ud800",
        ),
        ("a.json", b'[\n{"text": "a", "label": "x"},\n{"text": {}}]', "a.json, line 3: expected a key 'label'"),
        ("a.json", b'[{"text": "a", "label": "x"}\n{"text"', "a.json, line 2: expected an array of JSON objects, rece"),
        ("a.json", b'[{"text": "a", "label": "x"}, ', "a.json, line 1: expected an array of JSON objects, received"),
        ("a.json", b'{"text": "a", "label": "x"}', "a.json: expected an array of JSON objects, or SQuAD's form"),
        ("a.json", b"[]", "a.json: expected records, received none in its JSON"),
        (
            "a.csv",
            b"text,label,label\na,b,c\n",
            "a.csv, line 1: expected a column 'label', received 'text', 'l",
        ),
        ("a.csv", b"\x1f\x8b\x08\x00", "a.csv: expected a whole gzip file, received a broken one"),
        ("a.jsonl", b'{"text": "a"}\n', "a.jsonl, line 1: expected a key 'label', received 'text'; rename it"),
        ("a.csv", b"\n\n text,kind\nb,x\n", "a.csv, line 3: expected a column 'label', received 'text', 'kind'; re"),
        ("a.csv", b"text,label\ra,x\rb,y\r", "a.csv: expected lines that end at newlines, received carriage returns"),
        ("a.txt", b"a\tx\rb\ty", "a.txt: expected lines that end at newlines, received carriage returns alone"),
        (
            "a.csv",
            b'text,label\n"b,x\nc,y\nd,z\n',
            "a.csv, line 2: expected a record, received what is broken (the quote",
        ),
        (
            "a.csv",
            b'text,label\na,x\n"b\nb","x\r\ny\nz',
            "a.csv, line 4: expected a record, received what is broken (the quote that opens here is not closed)",
        ),
        (
            "a.tsv",
            b'text\tlabel\na "b" c\tx\n"b\tx\n"c"\ty\n',
            "a.tsv, line 3: expected a record, received what is broken (the quote that opens here is closed by one",
        ),
        (
            "a.csv",
            b'text,label\n"b,x\nc,y"\nd,z\n',
            "a.csv, line 2: expected 2 values, as in the heading, received 1 up",
        ),
        ("a.jsonl", b'\n{"text": "a", "label": 1, "label": 2}', "a.jsonl, line 2: expected each key of an object once"),
        (
            "a.json",
            b'[{"text": "a", "label": 1},\n{"label": 1, "label": 2}]',
            "a.json, line 2: expected each key of an",
        ),
        ("a.json", b'{"data": [], "data": []}', "a.json: expected each key of an object once, received 'data' twice"),
        ("a.csv.gz", b"text,label\na,x\n", "a.csv.gz: expected a gzip file, as .gz says, received another kind"),
        ("a.txt", "a很\tx\n很".encode()[:-1], "a.txt, line 2: expected UTF-8, received its last character cut off"),
        ("a.txt", b"a\tx\nb x\n", "a.txt, line 2: expected text, label, separated by tabs, received 1 value"),
        ("a.txt", b"a\tx\n\tx\n", "a.txt, line 2: expected a value of 'text', received nothing; fill it in"),
        ("a.txt", b"a\tx\n\xe4\tx\n", "a.txt, line 2: expected UTF-8, received the byte 0xe4; it is likely cp1252"),
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


def test_of_few_records_one_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    texts = [text for text in map(str, range(40)) if not is_held_out(text)][:10]
    path.write_text("".join(f"{text}\t{text}\n" for text in texts))
    task = build_task(configured("translation", str(path)))
    assert (len(task.train), len(task.held_out)) == (9, 1)
    # A label has to be learnt before it is asked for.
    path.write_text("".join(f"{text}\t{min(n, 8)}\n" for n, text in enumerate(sorted(texts, key=hash_of))))
    task = build_task(configured("text_classification", str(path), **{"data.held_out": str(path)}))
    assert len(task.labels) == 9
    path.write_text("".join(f"{text}\t{n > 0}\n" for n, text in enumerate(sorted(texts, key=hash_of))))
    with pytest.raises(ValueError, match=r"data\.path: expected enough records to hold some out, and each label"):
        build_task(configured("text_classification", str(path)))


def test_nothing_is_held_out(tmp_path: Path) -> None:
    for task, lines in (("text_classification", "a\tx\nb\ty\n"), ("translation", "a\tx\na\ty\n")):
        path = tmp_path / "a.txt"
        path.write_text(lines)
        with pytest.raises(ValueError, match=r"data\.path: expected enough records to hold some out"):
            check(configured(task, str(path)))


def test_files_that_are_not_read(tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.csv", [("a", "x"), ("b", "y")])
    for name, content, said in (
        ("a.parquet", b"PAR1", r"which is \.parquet; convert it to one of them"),
        ("a.txt", b"PK\x03\x04", r"which is \.zip; unpack it"),
        ("b.xlsx", b"", r"which is \.xlsx; save the sheet as \.csv"),
        ("a.csv.gz", gzip.compress(b"%PDF-"), r"which is \.pdf; save it as text"),
    ):
        (tmp_path / name).write_bytes(content)
        expected = rf"data\.held_out: expected \.csv, .*, each also as \.gz, received '.*{name}', {said}"
        with pytest.raises(ValueError, match=expected):
            check(configured("text_classification", valid, **{"data.held_out": str(tmp_path / name)}))
    with pytest.raises(ValueError, match=r"data\.path: expected a file of records, received a folder, '.*'; name"):
        check(configured("translation", str(tmp_path)))


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
    other = tmp_path / "b.txt"
    other.write_text("who?\tAnna Bell came.\tAnna Bell\n")
    for train, held_out in ((path, other), (other, path)):
        files = {**options, "data.held_out": str(held_out)}
        with pytest.raises(ValueError, match=r"data\.sequence_length: expected enough words .* received 6, which cuts"):
            build_task(configured("question_answering", str(train), **files))


def test_a_length_is_chosen_from_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [f"{number} {'é' * (number % 20)}\t{'x' * 40}" for number in range(300)]
    lines[7] = f"{'long ' * 400}\tx"
    path.write_text("\n".join(lines), encoding="utf-8")
    task = build_task(load_config(None, {"task": "translation", "data.path": str(path)}))
    # The target of 40 and its end; a multiple of 16.
    assert task.config.data.sequence_length == 48 == task.model_config().max_sequence_length
    cuts = {part: task.cuts(part) for part in ("train", "held_out")}
    assert sum(found["records"] for found in cuts.values()) == 300
    assert sum(found["cut"] for found in cuts.values()) == 1 and cuts["train"]["longest"] == 1999
    said = task.say_cuts("train")
    assert said.endswith("1 of 285 is cut at data.sequence_length = 48 tokens (the longest takes 1999)"), said
    assert task.say_cuts("held_out") == ""
    for longest, chosen in ((1, 16), (17, 32), (5000, 1024)):
        path.write_text(f"{'a' * longest}\tx\nb\ty\n")
        held_out = {"data.held_out": str(path)}
        task = build_task(load_config(None, {"task": "text_classification", "data.path": str(path), **held_out}))
        assert task.config.data.sequence_length == chosen


def test_a_run_of_records_in_another_encoding(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is chosen is saved, what is cut is said, and lines end at newlines alone."""

    def run(*arguments: str, lines: bytes = b"", status: int = 0) -> dict:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        caplog.clear()
        found = cli.main([*arguments, "--json"])
        output = json.loads(capsys.readouterr().out)
        assert found == status, output
        return output

    values = [(f"第{n}次去服务很好" + "很长" * (n == 7) * 20, "好" if n % 2 else "坏") for n in range(200)]
    path, folder = tmp_path / "a.csv", str(tmp_path / "run")
    write(path, values)
    path.write_bytes(path.read_text(encoding="utf-8").encode("gb18030"))
    options = [f"--{key}={value}" for key, value in {**tiny_run.SETTINGS, "training.steps": "1"}.items()]
    options = [option for option in options if "sequence_length" not in option]
    data = ["--data.path", str(path), "--data.encoding", "gb18030", "--out", folder, "--quiet"]
    summary = run("train", "text_classification", *options, *data)
    assert config.load(tmp_path / "run" / "config.toml").data.sequence_length == 32
    assert summary["cut"]["train"] == {"records": 190, "cut": 1, "longest": 142}
    assert (
        "records to train on: 1 of 190 is cut at data.sequence_length = 32 tokens (the longest takes 142)"
        in caplog.text
    )
    # The encoding is that of the file; lines have their own, and say so.
    answers = run("predict", folder, lines="服务\f好\n坏\u2028了\r\n\x85很\v好".encode())["answers"]
    assert len(answers) == 3 and "cut" not in caplog.text
    assert len(run("predict", folder, "--data.encoding", "gb18030", lines="好\n坏".encode("gb18030"))["answers"]) == 2
    run("predict", folder, lines="长".encode() * 20)
    assert "lines: 1 of 1 is cut at data.sequence_length = 32 tokens (the longest takes 60)" in caplog.text
    failed = run("predict", folder, lines=b"a\n\xe9t\xe9\n", status=2)
    assert failed["error"].startswith(
        "standard input, line 2: expected UTF-8, received the byte 0xe9; it is likely cp1252"
    )
    # A run that goes on keeps its length, and a plan is made for the same one.
    saved = (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    (tmp_path / "a.toml").write_text(saved.replace("sequence_length = 32\n", ""), encoding="utf-8")
    summary = run("train", "--config", str(tmp_path / "a.toml"), "--resume", "--steps", "2", "--quiet")
    assert summary["tokens"] == 8 * 32
    named = ["--config", str(tmp_path / "a.toml")]
    layout = run("plan", *named, "--gpu", "h100", "--world", "2")["layouts"][0]
    assert layout["tokens_per_s_per_rank"] * 2 * layout["step_s"] == pytest.approx(8 * 32)
    # Other records, in UTF-8.
    held_out = write(tmp_path / "b.jsonl", [("很" * 20, "好")])
    found = run("eval", folder, "--data.held_out", held_out)
    assert found["cut"] == {"records": 1, "cut": 1, "longest": 60} and "held-out records: 1 of 1 is cut" in caplog.text
