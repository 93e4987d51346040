"""Questions about passages for pretrained models: tokens, windows, answers and what is refused. Layer: one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", minversion="5.20")

import torch  # noqa: E402

from fusemesh.run.evaluator import predict_scored  # noqa: E402
from fusemesh.run.setup import Share  # noqa: E402
from fusemesh.tasks.registry import build_task, with_length  # noqa: E402
from tests.support.pretrained.folders import SPANS  # noqa: E402
from tests.support.pretrained.question_answering import (  # noqa: E402
    best_answer,
    byte_pairs,
    characters,
    configured,
    save_folder,
    word_pieces,
)

ENGLISH = [
    "Where does Anna live?",
    "Zoë has a café in São Paulo. Anna, born in 1984, lives in Örebro; Hugo lives in unhappily named Nowhere.",
]
CHINESE = ["北京是哪国的首都?", "北京位于华北平原北部,是中国的首都,人口两千多万。"]
TOKENIZERS = {
    "word pieces": lambda: ("bert", word_pieces(ENGLISH)),
    "characters": lambda: ("bert", characters(CHINESE)),
    "bytes": lambda: ("roberta", byte_pairs(ENGLISH)),
    "bytes and blanks": lambda: ("roberta", byte_pairs(ENGLISH, trim_offsets=False)),
    "no token types": lambda: ("distilbert", word_pieces(ENGLISH)),
    "a decoder": lambda: ("gpt2", byte_pairs(ENGLISH)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a tokenizer, made once."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            family, tokenizer = TOKENIZERS[name]()
            made[name] = save_folder(tmp_path_factory.mktemp("folder"), family, SPANS, tokenizer)
        return made[name]

    return find


def task_of(folder: Path, directory: Path, records: list[dict[str, Any]], **given: str) -> Any:
    """The task of records, all of them to train on and held out."""
    path = directory / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return build_task(with_length(configured(folder, path, data__held_out=str(path), **given)))


def record(question: str, passage: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"question": question, "passage": passage, "answer": answer, **more}


def targets(task: Any, sample: int) -> str:
    """The tokens that a sample has for its target."""
    batch = task.held_out.batch([sample])
    first, last = batch.targets[0].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.config.model.pretrained)
    return str(tokenizer.decode(batch.tokens[0, first : last + 1]))


class Planted:
    """A model whose logits are a function of tokens and their places."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def logits(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.of(tokens)
        real = torch.arange(tokens.shape[1]) < inputs["lengths"][:, None]
        return found.masked_fill(~real[:, None], float("-inf"))


def answers(task: Any, model: Any, samples: Any, count: int, batch_size: int = 4) -> list[tuple[str, float]]:
    """What a planted model answers, and the probabilities."""
    share = Share(torch.device("cpu"))
    found, scores = predict_scored(model, task, samples, count, batch_size, share)
    return [
        (task.answer(row, f"?\t{passage}"), score[0])
        for row, score, passage in zip(found, scores, [r.values[1] for r in task.held_out_records], strict=True)
    ]


def test_a_row_is_the_tokenizers_own_pair(folder: Any, tmp_path: Path) -> None:
    """With its special tokens, and its token types for models that have some."""
    for name in TOKENIZERS:
        question, passage = CHINESE if name == "characters" else ENGLISH
        answer = "中国" if name == "characters" else "Örebro"
        path = folder(name)
        task = task_of(path, tmp_path, [record(question, passage, answer)])
        own = transformers.AutoTokenizer.from_pretrained(path)(question, passage)
        batch = task.train.batch([0])
        assert batch.tokens[0, : batch.inputs["lengths"][0]].tolist() == own["input_ids"], name
        assert ("segments" in batch.inputs) == (name in ("word pieces", "characters")), name
        if "segments" in batch.inputs:
            assert batch.inputs["segments"][0, : len(own["input_ids"])].tolist() == own["token_type_ids"]
            assert 1 in own["token_type_ids"]
        assert targets(task, 0).strip().lower() == own_text(path, answer), name


def own_text(path: Path, answer: str) -> str:
    """An answer as the tokenizer of a folder decodes it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return str(tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"])).strip().lower()


@pytest.mark.parametrize("length", [15, 40, 61])
def test_windows_are_those_of_transformers_with_half_a_window_shared(folder: Any, tmp_path: Path, length: int) -> None:
    path = folder("bytes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    task = task_of(path, tmp_path, [record(*ENGLISH, "1984")], data__sequence_length=str(length))
    asked = tokenizer(ENGLISH[0], add_special_tokens=False)["input_ids"]
    cut = tokenizer.decode(asked[: length // 2])
    assert tokenizer(cut, add_special_tokens=False)["input_ids"] == asked[: length // 2]
    room = length - 4 - min(len(asked), length // 2)
    own = tokenizer(
        cut,
        ENGLISH[1],
        truncation="only_second",
        max_length=length,
        stride=room // 2,
        return_overflowing_tokens=True,
    )["input_ids"]
    batch = task.held_out.batch(range(len(task.held_out)))
    rows = [row[:size].tolist() for row, size in zip(batch.tokens, batch.inputs["lengths"], strict=True)]
    assert rows == own and len(rows) > 1
    found = [targets(task, sample).strip() for sample, (first, _) in enumerate(batch.targets.tolist()) if first]
    assert found and set(found) == {"1984"}
    assert task.cuts("held_out") == {
        "records": 1,
        "cut": int(len(asked) > length // 2),
        "longest": len(tokenizer(*ENGLISH)["input_ids"]),
        "questions_cut": int(len(asked) > length // 2),
        "answers_cut_off": 0,
        "answers_within_words": 0,
    }
    assert f"1 of 1 takes more than data.sequence_length = {length} tokens" in task.say_cuts("held_out")


def test_windows_share_128_tokens_at_most(folder: Any, tmp_path: Path) -> None:
    passage = "首都 " * 600
    task = task_of(folder("characters"), tmp_path, [record("北京?", passage, "首都", answer_start=0)])
    assert task.config.data.sequence_length == 512
    room = 512 - 6
    assert task.held_out.windows[:, 1].tolist() == [0, room - 128, 2 * (room - 128)]


def test_an_answer_that_a_window_cuts_is_whole_in_the_next(folder: Any, tmp_path: Path) -> None:
    """A window that does not hold all of it has the first token for its target."""
    path = folder("characters")
    passage = "".join(chr(0x4E00 + n) for n in range(40)).replace("丘丙业", "中国首都")
    task = task_of(path, tmp_path, [record("哪?", passage, "中国首都")], data__sequence_length="32")
    # Room for 27 tokens, of which 13 are shared.
    batch = task.held_out.batch(range(len(task.held_out)))
    at = passage.index("中国首都")
    begins = task.held_out.windows[:, 1].tolist()
    assert begins == [0, 14] and at < 27 < at + 4
    assert batch.targets.tolist() == [[0, 0], [4 + at - 14, 4 + at - 14 + 3]]
    assert task.train.targets_in([0, 1]) == 4


def test_an_answer_that_no_window_holds_is_not_trained_on(folder: Any, tmp_path: Path) -> None:
    path, many = folder("characters"), "首" * 40
    records = [record("哪?", f"北{many}京", many), record("哪?", "北京是中国的首都", "中国")]
    task = task_of(path, tmp_path, records, data__sequence_length="32")
    assert (len(task.train), task.held_out.records, len(task.held_out)) == (1, 2, 4)
    assert task.held_out.batch(range(4)).targets.tolist() == [[-100, -100]] * 3 + [[7, 8]]
    assert task.cuts("train")["answers_cut_off"] == 1 and task.metadata == {"answer_tokens": 40}
    with pytest.raises(ValueError, match=r"received 32, which cuts every answer in .*records\.jsonl"):
        task_of(path, tmp_path, records[:1], data__sequence_length="32")
    with pytest.raises(ValueError, match=r"data\.sequence_length: expected more than 5 tokens, .* received 5"):
        task_of(path, tmp_path, records[1:], data__sequence_length="5")


@pytest.mark.parametrize(
    ("name", "answer", "held"),
    [
        ("word pieces", "happily", "unhappily"),
        ("word pieces", "Zo", "Zoë"),
        ("bytes", "happily", "unhappily"),
        ("characters", "首都,人", "首都,人"),
    ],
)
def test_an_answer_within_tokens_is_covered_by_them(
    folder: Any, tmp_path: Path, name: str, answer: str, held: str
) -> None:
    question, passage = CHINESE if name == "characters" else ENGLISH
    task = task_of(folder(name), tmp_path, [record(question, passage, answer, answer_start=passage.index(answer))])
    found = answers(task, Planted(lambda tokens: peaks(tokens, task)), task.held_out, 1)[0][0]
    tokens = found in held and answer in found
    assert tokens and task.cuts("held_out")["answers_within_words"] == (found != answer)


def peaks(tokens: torch.Tensor, task: Any) -> torch.Tensor:
    """Logits with their largest values at the held-out targets."""
    found = torch.zeros(len(tokens), 2, tokens.shape[1])
    wanted = {tuple(row): target for row, target in zip(*map_of(task), strict=True)}
    for number, row in enumerate(tokens.tolist()):
        first, last = wanted[tuple(row)]
        found[number, 0, first] = found[number, 1, last] = 9.0
    return found


def map_of(task: Any) -> tuple[list[list[int]], list[list[int]]]:
    batch = task.held_out.batch(range(len(task.held_out)))
    return batch.tokens.tolist(), batch.targets.tolist()


def test_the_original_text_is_answered_whatever_the_tokenizer_makes_of_it(folder: Any, tmp_path: Path) -> None:
    """Case, accents, blanks before words, letters of several tokens, scripts without spaces, marks that are dropped."""
    decomposed = "Anna had a cafe\u0301 once."
    cases = [
        ("word pieces", ENGLISH[1], ["Zoë", "São Paulo", "Örebro", "1984", "lives in unhappily named Nowhere."]),
        ("word pieces", decomposed, ["cafe\u0301"]),
        ("bytes", ENGLISH[1], ["Zoë", "São Paulo", "Örebro", "1984"]),
        ("bytes and blanks", ENGLISH[1], ["Zoë", "São Paulo", "Örebro", "Anna"]),
        ("bytes", CHINESE[1], ["中国的首都", "北京", "两千多万"]),
        ("characters", CHINESE[1], ["中国的首都", "华北", "。"]),
        ("a decoder", ENGLISH[1], ["Örebro"]),
    ]
    for name, passage, wanted in cases:
        starts = [passage.index(answer, passage.find("lives in un") if "named" in answer else 0) for answer in wanted]
        records = [
            record("Where?", passage, answer, answer_start=at) for answer, at in zip(wanted, starts, strict=True)
        ]
        task = task_of(folder(name), tmp_path, records)
        for number, answer in enumerate(wanted):
            first, last = task.held_out.batch([number]).targets[0].tolist()
            logits = torch.zeros(1, 2, task.config.data.sequence_length)
            logits[0, 0, first] = logits[0, 1, last] = 9.0
            batch = task.held_out.batch([number])
            spans, scores = task.predict_scored(Planted(lambda _, x=logits: x), batch, torch.device("cpu"))
            alone = task.examples_of([f"Where?\t{passage}"])
            found, _ = alone.joined(spans.numpy(), scores.numpy())
            assert task.answer(found[0], f"Where?\t{passage}") == answer, name


def test_ten_windows_are_one_record_whose_best_span_is_that_of_all(folder: Any, tmp_path: Path) -> None:
    """Scores are compared over windows, and probabilities are of the spans of all: a window by itself says nothing."""
    path = folder("characters")
    draw = np.random.default_rng(0)
    passage = "".join(map(str, draw.permutation(np.array([*"华北平原是口两千多万"] * 16))))
    passage = passage[:150] + "中国" + passage[150:]
    records = [record("哪?", passage, "中国"), record("哪?", "北京是中国的首都", "中国")]
    task = task_of(path, tmp_path, records, data__sequence_length="32")
    assert np.bincount(task.held_out.windows[:, 0]).tolist() == [11, 1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    wanted = tokenizer.convert_tokens_to_ids(["中", "国"])
    noise = torch.tensor(draw.standard_normal((2, len(tokenizer))))

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        found = noise[:, tokens].transpose(0, 1).clone()
        # The first windows are sure of something, at a lower level; the question and the marks would win.
        found[:, 0] += 5.0 * (tokens == wanted[0])
        found[:, 1] += 5.0 * (tokens == wanted[1])
        found[:, :, :4] += 50.0
        return found

    found = answers(task, Planted(logits), task.held_out, 2)
    assert [text for text, _ in found] == ["中国", "中国"]
    want = [
        best_answer(lambda ids, *_: logits(torch.tensor([ids]))[0], tokenizer, "哪?", r["passage"], 32, 13)
        for r in records
    ]
    assert [text for text, _ in want] == ["中国", "中国"]
    assert [p for _, p in found] == pytest.approx([p for _, p in want], rel=1e-12)
    assert 0.01 < found[0][1] < 0.99
    for size in (1, 3, 16):
        assert answers(task, Planted(logits), task.held_out, 2, size) == found
    assert answers_of_first(task, logits) == found[:1]
    # Of equal spans the first; a passage without tokens has none.
    equal = answers(task, Planted(lambda tokens: torch.zeros(len(tokens), 2, tokens.shape[1])), task.held_out, 2)
    assert [text for text, _ in equal] == [passage[0], "北"]
    empty = task.examples_of(["哪?\t", "哪?\t北京"])
    rows, scores = predict_scored(Planted(logits), task, empty, 2, 1, Share(torch.device("cpu")))
    assert (task.answer(rows[0], "哪?\t"), scores[0, 0]) == ("", 0.0) and scores[1, 0] > 0


def answers_of_first(task: Any, logits: Any) -> list[tuple[str, float]]:
    """The answer where an evaluation takes one record: all of its windows."""
    rows, scores = predict_scored(Planted(logits), task, task.held_out, 1, 4, Share(torch.device("cpu")))
    return [(task.answer(rows[0], f"?\t{task.held_out_records[0].values[1]}"), scores[0, 0])]


def test_answers_have_at_most_as_many_tokens_as_one_was_trained_with(folder: Any, tmp_path: Path) -> None:
    many = "首" * 33
    task = task_of(folder("characters"), tmp_path, [record("哪?", f"北{many}京", many)])
    assert task.metadata == {"answer_tokens": 33}
    task = task_of(folder("characters"), tmp_path, [record("哪?", f"北{many}京", "京")])
    assert task.metadata == {"answer_tokens": 30}

    def ends(tokens: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(tokens), 2, tokens.shape[1])
        # A token of the passage's end is too far away, and a start in front of it is none.
        found[:, 0, 4], found[:, 1, 34], found[:, 1, 33], found[:, 0, 3] = 9.0, 9.0, 8.0, 10.0
        return found

    assert answers(task, Planted(ends), task.held_out, 1)[0][0] == ("北" + many)[:30]


def test_what_cannot_be_used_is_refused_by_file_and_line(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder("word pieces")
    cases: list[tuple[dict[str, Any], str]] = [
        (record(*ENGLISH, "Oslo"), r"records\.jsonl, line 2: expected an answer that stands in the passage"),
        (record(*ENGLISH, "lives"), r"line 2: .* once, received 'lives', which stands there 2 times"),
        (record(*ENGLISH, "Anna", answer_start=3), r"line 2: expected 'Anna' at answer_start, received ' has'"),
        (record("?", "a \x7f b", "\x7f"), r"line 2: expected an answer that the tokenizer has tokens for"),
    ]
    good = record(*ENGLISH, "Örebro")
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            task_of(path, tmp_path, [good, bad])
    task_of(path, tmp_path, [good])
    from fusemesh.pretrained import tokenizer

    class Slow:
        is_fast = False

    monkeypatch.setattr(tokenizer.FolderTokens, "tokenizer", property(lambda self: Slow()))
    with pytest.raises(ValueError, match=r"where its tokens stand in a text, .* received a Slow in .*tokenizer\.json"):
        task_of(path, tmp_path, [good])


def test_the_shown_sample_has_its_answer_between_marks(folder: Any, tmp_path: Path) -> None:
    task = task_of(folder("word pieces"), tmp_path, [record(*ENGLISH, "Örebro")])
    assert "in ⟦orebro⟧ ; hugo" in task.sample_text()
