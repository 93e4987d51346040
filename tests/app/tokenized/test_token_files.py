"""Layer: the application. Token files: made in parts by any number of workers, after a kill; read back; damaged."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from fusemesh.pretrained.tokenizer import FolderTokens
from fusemesh.tasks.base import held_out_names
from fusemesh.tokenized import file as token_file
from fusemesh.tokenized.file import TokenFile, header_bytes, verify
from fusemesh.tokenized.records import Columns
from fusemesh.tokenized.sources import Read, Source
from fusemesh.tokenized.tokenizing import Job, say, tokenize
from tests.support.pretrained.chats import MARKED, chat, encode, lines, make_chat_folder

CHATS = [chat(f"What is {n}?", f"It is {n} and a fox.", "And?", "The dog " * (n % 7 + 1)) for n in range(60)]
TEXTS = [{"text": f"{n}: the lazy dog sleeps on. " * (n % 5 + 1)} for n in range(80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    (path / "chats.jsonl").write_text(lines(CHATS), encoding="utf-8")
    (path / "texts.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS).encode()))
    (path / "notes").mkdir()
    for number in range(30):
        (path / "notes" / f"{number:02}.txt").write_text(f"A fox, {number} dogs.\n" * (number % 4 + 1))
    (path / "notes" / "wide.txt").write_text("Ein Fuchs, größer.\n", encoding="utf-16")
    (path / "notes" / "other.txt").write_bytes("größer\n".encode("cp1252"))
    (path / "notes" / "binary").write_bytes(b"\0\0\1")
    return path


def job(data: Path, folder: Path, *names: str) -> Job:
    return Job(tuple(str(data / name) for name in names), str(folder))


def made(data: Path, folder: Path, out: Path, *names: str, size: int = 500, workers: int = 1) -> TokenFile:
    tokenize(job(data, folder, *names), out, size=size, workers=workers)
    return TokenFile(out)


def test_a_file_has_the_documents_of_its_records(data, folder, tmp_path):
    found = made(data, folder, tmp_path / "a.tokens", "chats.jsonl", "texts.jsonl.gz")
    wanted = [*encode(folder, CHATS)[0], *encode(folder, TEXTS)[0]]
    assert len(found) == len(wanted) == 140
    for number, document in enumerate(wanted):
        assert np.array_equal(found[number].ids, document.ids)
        assert np.array_equal(found[number].counts, document.counts)
        assert found.lengths[number] == len(document.ids)
        assert found.first_targets[number] == document.counts.argmax()
    assert found.header["targets"] == sum(int(document.counts.sum()) for document in wanted)
    assert found.header["arrays"]["ids"]["dtype"] == "<u2"


def test_where_all_tokens_count_nothing_is_stored_of_targets(data, folder, tmp_path):
    found = made(data, folder, tmp_path / "a.tokens", "texts.jsonl.gz", "notes")
    assert set(found.header["arrays"]) == {"offsets", "ids", "held_out"}
    for number in range(len(found)):
        assert found[number].counts.tolist() == [False] + [True] * (int(found.lengths[number]) - 1)
    assert (found.header["files_left_out"], found.header["documents"]) == (1, 111)
    assert "other.txt, line 1: expected UTF-8" in say(found.header)


def test_documents_are_held_out_by_their_names(data, folder, tmp_path):
    found = made(data, folder, tmp_path / "a.tokens", "texts.jsonl.gz")
    chosen = held_out_names(item["text"] for item in TEXTS)
    assert [item["text"] in chosen for item in TEXTS] == found.held_out.tolist()
    (data / "few.jsonl").write_text(lines([{"text": "a fox"}, {"text": "a dog"}]))
    few = made(data, folder, tmp_path / "few.tokens", "few.jsonl")
    assert few.held_out.sum() == 1


def test_parts_and_workers_change_no_byte(data, folder, tmp_path):
    names = ("chats.jsonl", "notes", "texts.jsonl.gz")
    made(data, folder, tmp_path / "one.tokens", *names, size=1 << 20)
    made(data, folder, tmp_path / "parts.tokens", *names, size=300)
    made(data, folder, tmp_path / "workers.tokens", *names, size=300, workers=3)
    contents = {(tmp_path / f"{name}.tokens").read_bytes() for name in ("one", "parts", "workers")}
    assert len(contents) == 1
    assert sorted(os.listdir(tmp_path)) == ["one.tokens", "parts.tokens", "workers.tokens"]


def test_a_killed_run_goes_on_behind_its_last_part(data, folder, tmp_path):
    names = ("chats.jsonl", "notes")
    made(data, folder, tmp_path / "whole.tokens", *names, size=300)
    out = tmp_path / "killed.tokens"
    process = multiprocessing.get_context("fork").Process(
        target=tokenize,
        args=(job(data, folder, *names), out),
        kwargs={"size": 300, "on_bytes": lambda _: time.sleep(0.2)},
    )
    process.start()
    parts = tmp_path / "killed.tokens.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.npz"))) < 3 and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not out.exists()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("???????.npz")}
    assert len(done) >= 3
    kept = []
    tokenize(
        job(data, folder, *names),
        out,
        size=300,
        on_bytes=lambda n: kept.append({p.name: p.stat().st_mtime_ns for p in parts.glob("*.npz")}),
    )
    assert all(kept[-1][name] == time_of for name, time_of in done.items())
    assert out.read_bytes() == (tmp_path / "whole.tokens").read_bytes()
    assert not parts.exists()


def test_parts_of_other_data_are_made_again(data, folder, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS[:4]))
    out, jobs = tmp_path / "a.tokens", job(tmp_path, folder, "a.jsonl")
    monkeypatch.setattr("fusemesh.tokenized.tokenizing._merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenize(jobs, out)
    monkeypatch.undo()
    (tmp_path / "a.jsonl").write_text(lines(TEXTS[4:9]))
    tokenize(jobs, out)
    assert len(TokenFile(out)) == 5


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        path.write_bytes(b"some text\n" * 50)
    elif how == "header":
        content[-100] ^= 1
        path.write_bytes(content)
    else:
        content[token_file.read_header(path)["arrays"]["ids"]["at"] + 3] ^= 0x80
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "damaged or cut off .* its end is missing"),
        ("empty", "an empty file"),
        ("foreign", "another kind of file; give the text"),
        ("header", "its header is not as it was written"),
    ],
)
def test_a_damaged_file_is_refused_by_name(data, folder, tmp_path, how, message):
    path = tmp_path / "a.tokens"
    made(data, folder, path, "texts.jsonl.gz")
    damage(path, how)
    with pytest.raises(ValueError, match=rf"data.path: expected .*a\.tokens.*{message}"):
        TokenFile(path)


def test_a_token_that_has_changed_is_found_by_the_hash(data, folder, tmp_path):
    path = tmp_path / "a.tokens"
    made(data, folder, path, "texts.jsonl.gz")
    verify(path)
    before = header_bytes(path)
    damage(path, "token")
    assert header_bytes(path) == before
    with pytest.raises(ValueError, match="its tokens are not as they were written"):
        verify(path)
    with pytest.raises(ValueError, match="has tokens that the tokenizer does not have"):
        TokenFile(path)[0]


def test_another_tokenizer_is_refused_and_the_same_one_saved_again_is_not(data, folder, tmp_path):
    found = made(data, folder, tmp_path / "a.tokens", "texts.jsonl.gz")
    found.check_tokenizer(FolderTokens(str(folder)).hashes, str(folder))
    again = make_chat_folder(tmp_path / "again")
    config = json.loads((again / "tokenizer_config.json").read_text())
    (again / "tokenizer_config.json").write_text(json.dumps({**config, "note": 1}))
    found.check_tokenizer(FolderTokens(str(again)).hashes, str(again))
    # Another chat template matters to chats alone.
    marked = make_chat_folder(tmp_path / "marked", MARKED["end"])
    found.check_tokenizer(FolderTokens(str(marked)).hashes, str(marked))
    chats = made(data, folder, tmp_path / "chats.tokens", "chats.jsonl")
    with pytest.raises(ValueError, match=r"expected chats by the chat template of '.*marked'.*make it again"):
        chats.check_tokenizer(FolderTokens(str(marked)).hashes, str(marked))
    other = make_chat_folder(tmp_path / "other", bos=True)
    with pytest.raises(ValueError, match=r"expected tokens by the tokenizer of '.*other'.*make it again: fusemesh tok"):
        found.check_tokenizer(FolderTokens(str(other)).hashes, str(other))


def test_an_error_in_a_later_part_names_the_line_of_the_file(folder, tmp_path):
    items = lines(TEXTS[:20])
    for broken, message in (("{", "what is broken"), (json.dumps(chat("a", "b")), "expected text, as in the lines")):
        (tmp_path / "a.jsonl").write_text(items + broken + "\n")
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 21: .*{message}"):
            tokenize(job(tmp_path, folder, "a.jsonl"), tmp_path / "a.tokens", size=200)
    (tmp_path / "b.jsonl").write_text(items + lines([{"text": " "}]))
    tokenize(job(tmp_path, folder, "b.jsonl"), tmp_path / "b.tokens", size=200)
    assert "1 of 21 records without a target, the first at" in say(TokenFile(tmp_path / "b.tokens").header)
    assert "b.jsonl, line 21" in say(TokenFile(tmp_path / "b.tokens").header)
    (tmp_path / "c.jsonl").write_bytes(items.encode() + '{"text": "größer"}\n'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"c\.jsonl, line 21: expected UTF-8, .*--data.encoding cp1252"):
        tokenize(job(tmp_path, folder, "c.jsonl"), tmp_path / "c.tokens", size=200)


@pytest.mark.parametrize(("content", "message"), [("", "an empty file"), ("\n \n", "blank lines alone")])
def test_a_file_without_records_is_refused(folder, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl: expected records, received {message}"):
        tokenize(job(tmp_path, folder, "a.jsonl"), tmp_path / "a.tokens")


def test_every_byte_of_a_file_is_in_one_part(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(TEXTS))
    for size in (1, 50, 1000, path.stat().st_size, 1 << 20):
        source = Source(str(path), Columns())
        parts = source.parts(size)
        ends = [(part.files[0][2], part.files[0][3]) for part in parts]
        assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == path.stat().st_size
        assert [entry.value.text for part in parts for entry in source.entries(part, Read())] == [
            item["text"] for item in TEXTS
        ]
