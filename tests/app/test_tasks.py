"""Layer: application. The three tasks: their corpora, their metrics, and that any layout gives one answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fusemesh import cli, config
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.run.evaluator import evaluate_rank
from fusemesh.run.settings import load_config
from fusemesh.run.setup import state_of
from fusemesh.tasks import question_answering, spans, text_classification, translation
from fusemesh.tasks.base import decode, encode, is_held_out
from fusemesh.tasks.registry import build_task

TASKS = ("text_classification", "translation", "question_answering")
# Small enough for a test of what happens, not of what is learnt.
SMALL = {
    "model.hidden_size": "16",
    "model.num_layers": "1",
    "model.num_heads": "2",
    "model.num_kv_heads": "1",
    "model.intermediate_size": "24",
    "training.steps": "3",
    "training.global_batch_size": "8",
    "training.warmup_steps": "1",
    "evaluation.samples": "21",
    "evaluation.batch_size": "8",
    "run.device": "cpu",
}


def test_a_text_survives_its_bytes() -> None:
    assert decode(np.frombuffer(encode("zwölf\x01\x02", 99), np.uint8)) == "zwölf"
    assert encode("zwölf", 3) == b"zw"
    assert decode(np.array([65, 2, 66])) == decode(np.array([65, 0, 66])) == "A"


@pytest.mark.parametrize("name", TASKS)
def test_the_default_corpus_is_the_same_everywhere_and_shares_nothing(name: str) -> None:
    one, other = (build_task(load_config(None, {"task": name})) for _ in range(2))
    train, held_out = (set(map(tuple, part.tokens.tolist())) for part in (one.train, one.held_out))
    assert not train & held_out and len(one.train) > 5000 and len(one.held_out) > 500
    for part in ("train", "held_out"):
        a, b = getattr(one, part), getattr(other, part)
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.targets, b.targets)
    # Nothing is cut.
    assert (one.train.inputs["lengths"] < one.config.data.sequence_length).mean() > 0.999


def test_names_are_held_out_in_all_languages() -> None:
    train, held_out = text_classification.locale_names()
    assert {record.values[1] for record in train} == {record.values[1] for record in held_out}
    texts = {record.values for record in train}
    assert ("Frankreich", "de") in texts or ("Frankreich", "de") in {record.values for record in held_out}
    both = [record.values[0] for record in [*train, *held_out]]
    assert len(both) == len(set(both))


def test_composed_facts_hold_their_answers_once() -> None:
    train, held_out = (question_answering.composed_facts(held_out=part) for part in (False, True))
    kinds = set()
    for record in [*train[:500], *held_out[:500]]:
        question, passage, answer = record.values
        name = next(name for name in question_answering.NAMES if name in question)
        (kind,) = (
            k
            for k, fact in enumerate(question_answering.FACTS)
            if question in {asked.format(name) for asked in fact.asked}
        )
        kinds.add(kind)
        assert passage.count(answer) == 1 and answer in question_answering.FACTS[kind].answers
        assert any(said.format(name, answer) in passage for said in question_answering.FACTS[kind].said)
        assert question_answering.is_held_out_fact(name, kind, answer) == (record in held_out)
    assert len(kinds) == len(question_answering.FACTS)
    # Words in common do not find it.
    guesses = [spans.overlap_guess(*record.values[:2]) for record in held_out]
    right = [spans.exact_match(guess, record.values[2]) for guess, record in zip(guesses, held_out, strict=True)]
    assert np.mean(right) < 0.4


def test_number_words_are_held_out_by_number() -> None:
    train, held_out = translation.number_words()
    assert len(train) + len(held_out) == 10000
    assert all(is_held_out(f"number {record.line}") for record in held_out)
    words = dict(record.values for record in [*train, *held_out])
    assert words["ninety-seven"] == "quatre-vingt-dix-sept"


def test_squads_rules() -> None:
    assert spans.normalised("  The  Cat's, a hat!") == "cats hat"
    assert spans.exact_match("The cat", "cat.") == 1
    assert spans.f1("the black cat", "a cat sat") == pytest.approx(0.5)
    assert spans.f1("dog", "cat") == 0
    assert spans.f1("the", "a") == 1 and spans.f1("the", "cat") == 0


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    assert spans.exact_match("《红楼梦》。", "红楼梦") == 1
    # Three of three and three of five characters.
    assert spans.f1("红楼梦", "《红楼梦》作者") == pytest.approx(6 / 8)
    assert spans.f1("GPT模型", "gpt 模型") == 1
    assert spans.overlap_guess("谁住在北京?", "张三住在北京。李四住在上海。") == "京"


def test_words_of_any_script() -> None:
    def words(text: str) -> list[str]:
        return [text[start:end] for start, end in spans.spans_of(text)]

    assert words("It's 3.5 am") == ["It", "'", "s", "3", ".", "5", "am"]
    assert words("北京GPT3的,カナ") == ["北", "京", "GPT3", "的", ",", "カ", "ナ"]
    # Combining marks stay with their letters: of Devanagari, of decomposed Latin, of Thai.
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("cafe\u0301s!") == ["cafe\u0301s", "!"]
    assert words("ที่นี่ a") == ["ที่", "นี่", "a"]
    assert words("서울에서") == list("서울에서")


@pytest.mark.parametrize(
    ("passage", "answer", "start", "expected"),
    [
        ("There were two, and he ate.", "he", "", "he"),
        ("We started art in 1995, or 95.", "art", "", "art"),
        ("In 1995, or 95.", "95", "", "95"),
        ("Anna met Anna.", "Anna", "9", "Anna"),
        ("In the 1990s.", "1990", "7", "1990s"),
        ("Where? In New York.", " New York ", "", "New York"),
        ("张三住在北京。", "北京", "", "北京"),
        ("張三は東京に住んでいる。", "東京", "", "東京"),
        ("เขาอยู่ที่กรุงเทพ", "กรุงเทพ", "", "กรุงเทพ"),
        ("그는 서울에 산다.", "서울", "", "서울"),
    ],
)
def test_an_answer_stands_at_word_borders_and_scores_all(passage: str, answer: str, start: str, expected: str) -> None:
    span = spans.find_answer(passage, answer, start, "a.csv, line 2")
    assert spans.cut(passage, span) == expected
    assert spans.f1(spans.cut(passage, span), expected) == 1 == spans.exact_match(spans.cut(passage, span), expected)


@pytest.mark.parametrize(
    ("passage", "answer", "start", "message"),
    [
        ("There were two.", "he", "", "an answer of whole words of the passage, .* within words, first 'There'; give"),
        ("Anna met Anna.", "Anna", "", "stands in the passage once, received 'Anna', which stands there 2 times; give"),
        ("北京在北京。", "北京", "", "once, received '北京', which stands there 2 times"),
        ("Anna came.", "Bell", "", "an answer that stands in the passage, received 'Bell'; quote it"),
        ("Anna came.", "came", "4", "'came' at answer_start, received ' cam' at character 4 of the passage; count"),
        ("Anna came.", "came", "-5", "'came' at answer_start, received 'Anna' at character -5"),
        ("Anna came.", "came", "4.5", "a whole number as answer_start, received '4.5'; give"),
    ],
)
def test_answers_that_are_refused(passage: str, answer: str, start: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.csv, line 2: expected .*{message}"):
        spans.find_answer(passage, answer, start, "a.csv, line 2")


def test_trained_targets_score_all(tmp_path: Path) -> None:
    """Of records in Chinese, with an offset and an answer longer than those of words are."""
    answer = "一座有三千多年历史的城市,也是中国的首都"
    lines = ["question,passage,answer,answer_start", f"北京是什么?,北京是{answer}。,{answer},3"]
    lines[1] = f'北京是什么?,"北京是{answer}。","{answer}",3'
    lines += [f"谁{n}?,张{n}在李{n}家。,李{n}," for n in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    options = {"data.path": str(tmp_path / "a.csv"), "data.held_out": str(tmp_path / "a.csv")}
    task = build_task(load_config(None, {"task": "question_answering", **options}))
    assert task.metadata["answer_words"] == 20 and task.config.data.sequence_length == 32
    batch = task.held_out.batch(range(21))
    found = task.score(0.0, batch.targets - batch.inputs["span_starts"][:, None], 21)
    assert found["f1"] == found["exact_match"] == 1


def test_macro_f1_is_the_mean_of_each_labels() -> None:
    found, expected = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    # Label 0: 2 * 1 / (2 + 2); 1: 2 * 2 / (2 + 3); 2: 0.
    assert text_classification.macro_f1(found, expected) == pytest.approx((0.5 + 0.8 + 0) / 3)
    assert text_classification.accuracy(found, expected) == pytest.approx(0.6)


def test_a_span_is_the_most_probable_that_is_one() -> None:
    """Ends before starts, and answers that are too long, are none."""
    task = build_task(load_config(None, {"task": "question_answering"}))
    logits = torch.full((2, 2, 64), -9.0)
    logits[0, 0, [20, 30]] = torch.tensor([5.0, 4.0])
    logits[0, 1, [10, 33]] = torch.tensor([7.0, 3.0])
    logits[1, 0, [20, 39]] = torch.tensor([5.0, 4.0])
    logits[1, 1, 40] = 5.0

    class Fixed:
        def logits(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            return logits

    batch = task.held_out.batch([0, 1])
    found = task.predict(Fixed(), batch, torch.device("cpu"))  # type: ignore[arg-type]
    starts = batch.inputs["span_starts"].tolist()
    assert found.tolist() == [[20 - starts[0], 33 - starts[0]], [39 - starts[1], 40 - starts[1]]]
    _, scores = task.predict_scored(Fixed(), batch, torch.device("cpu"))  # type: ignore[arg-type]
    most = task.metadata["answer_words"]
    for row, (start, end), score in zip(logits.double(), [(20, 33), (39, 40)], scores, strict=True):
        legal = [row[0, i] + row[1, j] for i in range(64) for j in range(i, min(i + most, 64))]
        expected = torch.stack(legal).softmax(0)[legal.index(row[0, start] + row[1, end])]
        assert task.named_scores(score.numpy()) == {"probability": pytest.approx(expected.item(), rel=1e-6)}


def test_a_label_comes_with_the_probabilities_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {n},{'正负中'[n % 3]}\n" for n in range(60)))
    task = build_task(load_config(None, {"task": "text_classification", "data.path": str(tmp_path / "a.csv")}))
    logits = torch.tensor([[[0.0, 2.0, -1.0]], [[1.0, 0.5, 0.0]]])

    class Fixed:
        def logits(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            return logits

    found, scores = task.predict_scored(Fixed(), task.held_out.batch([0, 1]), torch.device("cpu"))  # type: ignore[arg-type]
    labels = sorted("正负中")
    assert [task.answer(row.numpy(), "") for row in found] == [labels[1], labels[0]]
    for row, score in zip(logits[:, 0].double().softmax(-1), scores, strict=True):
        named = task.named_scores(score.numpy())["probabilities"]
        assert named == {label: pytest.approx(p) for label, p in zip(labels, row.tolist(), strict=True)}


def test_an_answer_is_cut_out_as_it_is_written() -> None:
    passage = "It's   Anna\tBell-Smith, of Rome."
    assert spans.cut(passage, np.array([3, 6])) == "Anna\tBell-Smith"
    assert spans.cut(passage, np.array([8, 99])) == "of Rome."
    assert spans.cut(passage, np.array([9, 9])) == "Rome"


def train(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], layout: str, changed: dict[str, str] | None = None
) -> dict:
    options = [f"--{key}={value}" for key, value in {**SMALL, **(changed or {})}.items()]
    status = cli.main(["train", name, *options, "--layout", layout, "--out", str(folder), "--quiet", "--json"])
    output = json.loads(capsys.readouterr().out)
    assert status == 0, output
    return output


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    status = cli.main([*arguments, "--json"])
    output = json.loads(capsys.readouterr().out)
    assert status == 0, output
    return output


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [name if name == "translation" else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]
)
def test_one_checkpoint_has_one_metric(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained and evaluated in one layout, merged, and asked in others; lines are answered alike."""
    layout = {"translation": "pp2", "question_answering": "dp2"}.get(name, "tp2")
    changed = {}
    if name == "translation":
        # The default corpus takes each of eight processes more than a second, its longer texts as much again.
        (tmp_path / "pairs.txt").write_text("".join(f"the {n}th number\tle numéro {n}\n" for n in range(900)))
        changed = {"data.path": str(tmp_path / "pairs.txt"), "data.sequence_length": "20"}
    summary = train(name, tmp_path / "run", capsys, layout, changed)
    keys = [key for key in summary["held_out"] if key not in ("loss", "seconds")]
    assert build_task(load_config(None, {"task": name, **SMALL, **changed})).metric in keys
    merged = run(capsys, "merge", str(tmp_path / "run"))["output"]
    alone = run(capsys, "eval", merged)
    assert {key: alone[key] for key in keys} == {key: summary["held_out"][key] for key in keys}
    assert alone["loss"] == pytest.approx(summary["loss"], abs=1e-5)
    assert (tmp_path / "run" / "confusion.png").is_file() == (name == "text_classification")

    # They end at newlines alone.
    lines = "one\fa\ntwo\u2028b\n\x85three\n"
    if name == "question_answering":
        lines = "Where does Anna live?\tAnna lives in Oslo.\n" * 3
    answers = []
    for more in ("single", "dp2") if name == "translation" else ("single", "dp2", "tp2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        answers.append(run(capsys, "predict", merged, "--layout", more))
    assert len(answers[0]["answers"]) == len(answers[0]["scores"]) == 3
    for other in answers[1:]:
        assert other["answers"] == answers[0]["answers"]
        assert _numbers(other["scores"]) == pytest.approx(_numbers(answers[0]["scores"]), rel=1e-5)
    assert cli.main(["generate", merged, "--prompt", "one"]) == 2
    assert f"expected one of task language_model, received {name}; use fusemesh predict" in capsys.readouterr().err


def _numbers(scores: list[dict]) -> list[float]:
    """All scores of all lines in their order."""
    values = [value for score in scores for value in score.values()]
    return [number for x in values for number in (x.values() if isinstance(x, dict) else [x])]


def test_a_language_model_goes_on_with_a_text(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {n} is line {n}" for n in range(200)))
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    folder = str(tmp_path / "run")
    data = ["--data.path", str(tmp_path / "text.txt"), "--data.sequence_length", "32"]
    assert cli.main(["train", *options, *data, "--out", folder, "--quiet"]) == 0
    capsys.readouterr()
    # What it was trained on is needed no more.
    (tmp_path / "text.txt").rename(tmp_path / "other.txt")
    assert run(capsys, "eval", folder, "--data.held_out", str(tmp_path / "other.txt"))["samples"] > 99
    found = run(capsys, "generate", folder, "--prompt", "line", "--tokens", "9")
    assert found["prompt"] == "line" and found["tokens"] == 9
    # Streamed: the same text.
    assert cli.main(["generate", folder, "--prompt", "line", "--tokens", "9"]) == 0
    assert capsys.readouterr().out == f"line{found['text']}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("line"))
    assert run(capsys, "generate", folder, "--tokens", "9") == found
    sampled = [run(capsys, "generate", folder, "--prompt", "line", "--top-k", "5", "--seed", s) for s in "112"]
    assert sampled[0] == sampled[1] != sampled[2]
    assert cli.main(["generate", folder, "--prompt", "line", "--tokens", "32"]) == 2
    assert "--tokens: expected 1 to 31" in capsys.readouterr().err
    # Between two characters, and not without a word.
    assert run(capsys, "generate", folder, "--prompt", "é" * 20, "--tokens", "9")["prompt"] == "é" * 11
    assert "--prompt: the model sees the last 22 of its 40 tokens" in caplog.text
    # What is no UTF-8, from a shell or a file.
    assert cli.main(["generate", folder, "--prompt", "a\udce9"]) == 2
    assert "--prompt: expected UTF-8, received the byte 0xe9" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\xe9"), encoding="utf-8"))
    assert cli.main(["generate", folder]) == 2
    assert (
        "standard input, line 2: expected UTF-8, received the byte 0xe9; it is likely cp1252" in capsys.readouterr().err
    )


RECORDS = {
    "language_model": ("text.txt", "".join(f"line {n} is line {n}\n\n" for n in range(99)), "line"),
    "translation": ("a.csv", "source,target\n" + "".join(f"number {n},numero {n}\n" for n in range(99)), "number 3"),
    "text_classification": ("a.csv", "text,label\n" + "".join(f"{n},{'正负'[n % 2]}\n" for n in range(99)), "正"),
    "question_answering": ("a.txt", "".join(f"who?\tIt was Al{n}.\tAl{n}\n" for n in range(99)), "who?\tIt was Al."),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", RECORDS)
def test_bf16_from_the_first_step_to_the_last_answer(
    name: str,
    tmp_path: Path,
    rank_pool: RankPool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, content, line = RECORDS[name]
    (tmp_path / file).write_text(content)
    options = [f"--{key}={value}" for key, value in SMALL.items() if key != "training.steps"]
    options += ["--data.path", str(tmp_path / file), "--steps=2", "--data.sequence_length=24", "--quiet"]
    options += ["--evaluation.samples=3", "--evaluation.num_beams=1"]
    for module in ("matplotlib", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    folder = str(tmp_path / "run")
    summary = run(capsys, "train", name, *options, "--training.dtype=bf16", "--out", folder)
    assert run(capsys, "eval", folder)["loss"] == summary["loss"]
    # In one process a merged file is the same model, in the dtype that is asked for.
    merged = run(capsys, "merge", folder)["output"]
    assert run(capsys, "eval", merged)["loss"] == summary["loss"]
    assert run(capsys, "eval", merged, "--training.dtype=fp32")["loss"] != summary["loss"]
    if name == "language_model":
        whole = run(capsys, "generate", folder, "--prompt", line, "--tokens", "9")
        assert whole["tokens"] == 9
        return
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n{line}\n"))
    answers = run(capsys, "predict", folder)["answers"]
    assert len(answers) == 2 and answers[0] == answers[1]
    if name == "translation":
        values = config.as_dict(load_config(None, {"layout": "fsdp2"}, base=state_of(folder)["config"]))
        for found in rank_pool.call(evaluate_rank, folder, values, ranks=2):
            assert found["loss"] == pytest.approx(summary["loss"], rel=1e-3)
