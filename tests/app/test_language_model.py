"""The corpus, its split, its samples and the baselines. Layer: numpy, one process."""

import gzip
import math
from collections import Counter

import numpy as np
import pytest

from fusemesh.run.settings import load_config
from fusemesh.tasks import language_model
from fusemesh.tasks.base import is_held_out
from fusemesh.tasks.language_model import Corpus, Samples, baselines, load_corpus, ngram_bits_per_byte
from fusemesh.tasks.registry import build_task


@pytest.fixture(scope="module")
def library():
    return load_corpus()


def test_the_standard_library_is_read_and_split_by_document(library):
    assert len(library.train) > 4_000_000 and len(library.held_out) > 200_000
    assert library.train_documents > 300 and library.held_out_documents > 15
    assert (library.train == language_model.SEPARATOR).sum() == library.train_documents
    assert (library.held_out == language_model.SEPARATOR).sum() == library.held_out_documents
    text = library.train.tobytes() + library.held_out.tobytes()
    assert b"class ArgumentParser(" in text and b"def dataclass(" in text
    # Neither installed packages nor the library's own tests.
    assert b"import pytest" not in text and b"class TestCase" in text
    assert library.source.startswith("Python 3.")


def test_the_split_depends_on_the_relative_path_alone(tmp_path):
    names = [f"folder{i % 3}/text{i}.txt" for i in range(200)]
    for root in (tmp_path / "a", tmp_path / "b"):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{name} of {root.name}\n")
    one, other = load_corpus(str(tmp_path / "a")), load_corpus(str(tmp_path / "b"))
    held_out = [name for name in names if is_held_out(name)]
    assert 3 <= len(held_out) <= 30
    for corpus, letter in ((one, "a"), (other, "b")):
        documents = corpus.held_out.tobytes().split(b"\0")[:-1]
        assert sorted(documents) == sorted(f"{name} of {letter}\n".encode() for name in held_out)
        assert corpus.train_documents == 200 - len(held_out)


def test_binary_hidden_empty_and_unreadable_files_are_left_out(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text("text")
    before = load_corpus(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.txt").write_text("cache")
    after = load_corpus(str(tmp_path))
    assert np.array_equal(before.train, after.train) and np.array_equal(before.held_out, after.held_out)


def test_a_single_file_is_split_by_paragraph(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(100)))
    corpus = load_corpus(str(path))
    assert corpus.train_documents + corpus.held_out_documents == 100
    assert corpus.held_out_documents >= 1
    assert corpus.source == str(path.resolve())


def test_wrong_paths(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path: expected a text file or a folder of text files, .*not found"):
        load_corpus(str(tmp_path / "absent"))
    (tmp_path / "one.txt").write_text("only one")
    with pytest.raises(ValueError, match=r"data\.path: expected enough documents to hold some out"):
        load_corpus(str(tmp_path))
    (tmp_path / "one.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"data\.path: expected enough documents to hold some out"):
        load_corpus(str(tmp_path / "one.txt"))
    (tmp_path / "one.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data\.path: expected text, received '.*one\.txt', an empty file"):
        load_corpus(str(tmp_path / "one.txt"))
    with pytest.raises(ValueError, match=r"data\.path: expected a folder of text files, .* which has no text"):
        load_corpus(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"data\.held_out: expected text, each also as \.gz, .* which is \.parquet"):
        load_corpus("", str(tmp_path / "a.parquet"))


def test_samples_tile_the_stream():
    stream = np.arange(23, dtype=np.uint8)
    samples = Samples(stream, 5)
    assert len(samples) == 4
    batch = samples.batch([3, 0])
    tokens, targets = batch.tokens, batch.targets
    assert samples.targets_in([3, 0]) == 10
    assert tokens.tolist() == [[15, 16, 17, 18, 19], [0, 1, 2, 3, 4]]
    assert targets.tolist() == [[16, 17, 18, 19, 20], [1, 2, 3, 4, 5]]
    assert tokens.dtype == targets.dtype == np.int64 and not np.shares_memory(tokens, targets)
    assert len(Samples(stream, 22)) == 1
    with pytest.raises(ValueError, match=r"data\.sequence_length: expected at most 22, .*received 23"):
        Samples(stream, 23)


def slow_ngram(train, text, positions, context, smoothing):
    """Definition, byte by byte, with zeros before the beginning."""
    train, text = bytes(context) + bytes(train), bytes(context) + bytes(text)
    grams = Counter(train[i : i + context + 1] for i in range(len(train) - context))
    contexts = Counter(gram[:context] for gram in grams.elements())
    bits = 0.0
    for position in positions:
        gram = text[position : position + context + 1]
        p = (grams[gram] + smoothing) / (contexts[gram[:context]] + 256 * smoothing)
        bits -= math.log2(p)
    return bits / len(positions)


@pytest.mark.parametrize("context", [0, 1, 2])
def test_ngrams_equal_the_slow_loop(context):
    random = np.random.default_rng(0)
    train, text = (random.integers(97, 102, size).astype(np.uint8) for size in (700, 300))
    text[50] = 200  # a byte that the training text does not hold
    positions = np.array([0, 1, 2, 3, 49, 50, 51, 52, 299, 17])
    fast = ngram_bits_per_byte(train, text, positions, context)
    assert fast == pytest.approx(slow_ngram(train, text, positions, context, 0.01), rel=1e-12)
    assert ngram_bits_per_byte(train, text, positions, context, 1.0) == pytest.approx(
        slow_ngram(train, text, positions, context, 1.0), rel=1e-12
    )


def test_ngram_distribution_sums_to_one():
    train = np.array([1, 2, 1, 3, 1, 2], dtype=np.uint8)
    text = np.stack([np.ones(256), np.arange(256)], axis=1).astype(np.uint8).ravel()
    p = [2 ** -ngram_bits_per_byte(train, text, np.array([2 * byte + 1]), 1) for byte in range(256)]
    assert sum(p) == pytest.approx(1.0, rel=1e-12)


def test_baselines_are_of_just_the_bytes_that_samples_predict():
    train = np.frombuffer(b"abcabcabd" * 40, dtype=np.uint8)
    held_out = np.frombuffer(b"abcabcxyz" * 20, dtype=np.uint8)
    result = baselines(Corpus(train, held_out, 1, 1, ""), 8, [5, 2])
    positions = [*range(17, 25), *range(41, 49)]
    for context in range(3):
        expected = slow_ngram(train, held_out, positions, context, 0.01)
        assert result[f"ngram{context}"] == pytest.approx(expected, rel=1e-12)
    text = held_out[17:25].tobytes() + held_out[41:49].tobytes()
    assert result["gzip"] == 8 * len(gzip.compress(text, 9)) / 16


def test_baselines_of_the_standard_library_stand_in_the_known_order(library):
    result = baselines(library, 128, range(len(Samples(library.held_out, 128))))
    assert 4.2 < result["ngram0"] < 5.2
    assert 3.1 < result["ngram1"] < 4.0
    assert 2.2 < result["ngram2"] < 3.0
    assert 1.6 < result["gzip"] < 2.4


def test_wrong_context():
    with pytest.raises(ValueError, match="context: expected 0, 1 or 2 bytes, received 3"):
        ngram_bits_per_byte(np.zeros(4, np.uint8), np.zeros(4, np.uint8), np.array([1]), 3)


def test_of_few_documents_one_is_held_out(tmp_path):
    # None of these falls under the rule of one in 16.
    names = [name for name in (f"page{n}.md" for n in range(40)) if not is_held_out(name)][:21]
    for name in names:
        (tmp_path / name).write_text(f"# {name}\n")
    corpus = load_corpus(str(tmp_path))
    assert (corpus.train_documents, corpus.held_out_documents) == (20, 1)
    assert np.array_equal(load_corpus(str(tmp_path)).held_out, corpus.held_out)
    for name in names[1:]:
        (tmp_path / name).unlink()
    # A single document is divided: by paragraphs, also those of another system's line ends, or by lines.
    for text, separator in (("one\r\n\r\ntwo\r\n", b"\r\n\r\n"), ("one\ntwo\n", b"\n")):
        (tmp_path / names[0]).write_bytes(text.encode())
        for path in (tmp_path, tmp_path / names[0]):
            corpus = load_corpus(str(path))
            assert (corpus.train_documents, corpus.held_out_documents) == (1, 1)
            assert corpus.train.tobytes().rstrip(b"\0").strip() in (b"one", b"two")
            assert corpus.train.tobytes().rstrip(b"\0").endswith(separator)


def test_a_short_held_out_document_is_a_sample_whose_filling_does_not_count(tmp_path):
    for n in range(8):
        (tmp_path / f"{n}.txt").write_text(f"{n}" * 40)
    task = build_task(load_config(None, {"data.path": str(tmp_path)}))
    # The default, as far as the text to train on goes.
    assert task.config.data.sequence_length == 256 and len(task.held_out) == 1
    batch = task.held_out.batch([0])
    assert task.held_out.targets_in([0]) == 40 and (batch.targets[0] == -100).sum() == 216
    assert batch.targets[0, 39] == 0 and batch.tokens[0, 40:].tolist() == [0] * 216
    for n in range(2, 8):
        (tmp_path / f"{n}.txt").unlink()
    assert build_task(load_config(None, {"data.path": str(tmp_path)})).config.data.sequence_length == 32


def test_a_held_out_part_of_its_own(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 99)
    (tmp_path / "folder").mkdir()
    for n in range(3):
        (tmp_path / "folder" / f"{n}.txt").write_text("b" * 9)
    corpus = load_corpus(str(tmp_path / "train.txt"), str(tmp_path / "folder"))
    assert set(corpus.train.tobytes()) == set(b"a\n\0") and set(corpus.held_out.tobytes()) == set(b"b\0")
    task = build_task(load_config(None, {"data.path": str(tmp_path / "folder"), "data.held_out": str(tmp_path)}))
    assert task.held_out.stream.tobytes().count(b"a") == 99


def test_documents_in_another_encoding_are_named_or_read(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.md").write_text(f"{n} naïve", encoding="utf-8")
    (tmp_path / "gbk.md").write_bytes("今天天气不错,我们去公园吧".encode("gb18030"))
    (tmp_path / "marked.md").write_bytes("naïve".encode("utf-16"))
    (tmp_path / "packed.md.gz").write_bytes(gzip.compress(b"packed"))
    corpus = load_corpus(str(tmp_path))
    text = corpus.train.tobytes() + corpus.held_out.tobytes()
    assert text.count("naïve".encode()) == 5 and b"packed" in text and corpus.train_documents == 5
    said = build_task(load_config(None, {"data.path": str(tmp_path)})).say_cuts("train")
    assert said.startswith(
        "1 file is left out: gbk.md, line 1: expected UTF-8, received the byte 0xbd; it is likely gb18030"
    )
    (tmp_path / "false.md.gz").write_bytes(b"not packed")
    said = build_task(load_config(None, {"data.path": str(tmp_path)})).say_cuts("train")
    assert said.startswith("2 files are left out: ") and "false.md.gz: expected a gzip file, as .gz says" in said
    (tmp_path / "false.md.gz").unlink()
    for n in range(4):
        (tmp_path / f"{n}.md").write_bytes("我们去公园吧".encode("gb18030"))
    with pytest.raises(ValueError, match=r"data\.path: expected text in UTF-8, .*5 of 7 files in .* and 2 others"):
        load_corpus(str(tmp_path))
    assert load_corpus(str(tmp_path), encoding="gb18030").train.tobytes().count("公园".encode()) == 4
