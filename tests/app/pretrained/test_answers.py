"""Question answering with a pretrained folder in any layout: losses, gradients, metrics and answers are transformers'.

Layers: one process; 4 gloo ranks. What is compared with are transformers' own models, one window at a time.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", minversion="5.20")

import torch  # noqa: E402

import fusemesh  # noqa: E402
from fusemesh import cli  # noqa: E402
from fusemesh.config import Config  # noqa: E402
from fusemesh.hybrid.data import BatchOrder  # noqa: E402
from fusemesh.hybrid.hugging_face.load import load_pretrained  # noqa: E402
from fusemesh.hybrid.layout import Layout  # noqa: E402
from fusemesh.models.registry import maker_of  # noqa: E402
from fusemesh.run.metrics import read_metrics  # noqa: E402
from fusemesh.run.optimizer import build_optimizer, learning_rate  # noqa: E402
from fusemesh.run.predictor import answer_rank  # noqa: E402
from fusemesh.tasks.registry import build_task  # noqa: E402
from tests.support.hugging_face import KeepDouble  # noqa: E402
from tests.support.pretrained import runs, training  # noqa: E402
from tests.support.pretrained.folders import SPANS, make_folder  # noqa: E402
from tests.support.pretrained.question_answering import (  # noqa: E402
    best_answer,
    byte_pairs,
    characters,
    configured,
    save_folder,
    word_pieces,
)

pytestmark = pytest.mark.distributed
LAYOUTS = ("tp2", "fsdp2", "pp2", "pp2 x tp2")
LENGTH = 32
SETTINGS = {
    "data__sequence_length": str(LENGTH),
    "training__steps": "3",
    "training__global_batch_size": "8",
    "training__learning_rate": "1e-2",
    "evaluation__batch_size": "4",
    "run__log_every": "1",
    "run__keep_checkpoints": "0",
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NAMES, PLACES = ["Anna", "Zoë", "Hugo", "Nils", "Rosa"], ["Oslo", "São Paulo", "Rome", "New York", "Örebro"]


def english() -> list[dict[str, Any]]:
    """Records whose passages take one window to five."""
    found = []
    for number in range(40):
        who, where = NAMES[number % 5], PLACES[number // 5 % 5]
        others = [f"{NAMES[(number + n) % 5]}, {number + n}, was in {PLACES[(number * n) % 5]}." for n in range(1, 5)]
        home = f"{who} lives in {where} now."
        sentences = [*others[: number % 5], home]
        passage = " ".join(sentences[number % 3 :] + sentences[: number % 3])
        at = passage.index(home) + len(f"{who} lives in ")
        found.append({"question": f"Where does {who} live?", "passage": passage, "answer": where, "answer_start": at})
    return found


def chinese() -> list[dict[str, Any]]:
    """The same without spaces."""
    found = []
    for number in range(40):
        who, where = "张王李赵陈"[number % 5], ["北京", "上海", "广州", "南京", "成都"][number // 5 % 5]
        passage = "他们都是很好的人,有的住在山上。" * (number % 4) + f"{who}先生{number}住在{where},很高兴。"
        at = passage.rindex(where)
        found.append({"question": f"{who}先生住在哪?", "passage": passage, "answer": where, "answer_start": at})
    return found


TEXTS = [text for record in english() for text in (record["question"], record["passage"])]
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda path: save_folder(path, "bert", SPANS, word_pieces(TEXTS)),
    "chinese": lambda path: save_folder(
        path, "bert", SPANS, characters([x for r in chinese() for x in r.values() if isinstance(x, str)])
    ),
    "roberta": lambda path: save_folder(path, "roberta", SPANS, byte_pairs(TEXTS, 320, trim_offsets=False)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder, made once."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = FOLDERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return find


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of records, to train on and held out."""
    directory = tmp_path_factory.mktemp("records")

    def find(name: str) -> Path:
        path = directory / f"{'chinese' if name == 'chinese' else 'english'}.jsonl"
        found = chinese() if name == "chinese" else english()
        path.write_text("".join(json.dumps(record) + "\n" for record in found))
        return path

    return find


def settings(folder: Path, records: Path, directory: Path, **given: str) -> Config:
    own = {"data__held_out": str(records), "run__directory": str(directory)}
    return configured(folder, records, **{**SETTINGS, **own, **given})


def execute(rank_pool: Any, made: Config) -> dict[str, Any]:
    values, world = runs.as_values(made), Layout.parse(made.layout).world_size
    if world == 1:
        return runs.train(values)
    found: dict[str, Any] = rank_pool.call(runs.train, values, ranks=world, timeout=120)[0]
    return found


def each_loss(model: Any, batch: Any) -> torch.Tensor:
    """The losses of the windows' targets, summed: each by transformers' own forward, which takes the mean of two."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch.tokens)):
        size = int(batch.inputs["lengths"][row])
        given = {"input_ids": torch.from_numpy(batch.tokens[row : row + 1, :size])}
        if "segments" in batch.inputs:
            given["token_type_ids"] = torch.from_numpy(batch.inputs["segments"][row : row + 1, :size])
        start, end = torch.from_numpy(batch.targets[row : row + 1]).unbind(1)
        total = total + 2 * model(**given, start_positions=start, end_positions=end).loss
    return total


FAMILIES = {
    "bert": lambda: word_pieces(TEXTS),
    "distilbert": lambda: word_pieces(TEXTS),
    "roberta": lambda: byte_pairs(TEXTS, 320),
    **dict.fromkeys(("gpt2", "qwen3", "llama", "t5", "bart"), lambda: byte_pairs(TEXTS, 320)),
}


@pytest.mark.parametrize(
    "family", [name if name == "bert" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_loss_and_gradients_are_those_of_transformers_own_forward(
    family: str, records: Callable[[str], Path], tmp_path: Path
) -> None:
    """In fp64: of windows with padding here, of each by itself and without there."""
    path = save_folder(tmp_path / "folder", family, SPANS, FAMILIES[family](), dtype=torch.float64)
    made = settings(path, records(family), tmp_path, training__dtype="float64")
    task = build_task(made)
    batch = task.train.batch(range(12))
    assert {0} < set(batch.targets[:, 0].tolist()) and len(set(batch.inputs["lengths"].tolist())) > 2
    with KeepDouble(), fusemesh.use_backend("reference"):
        model = maker_of(made).build(task)
        load_pretrained(model, path)
        inputs = {name: torch.from_numpy(x) for name, x in batch.inputs.items()}
        loss = model.eval().loss(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets), **inputs)
        loss.backward()
        plain = transformers.AutoModelForQuestionAnswering.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        wanted = each_loss(plain, batch)
        wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    gradients = {name: x.grad for name, x in plain.named_parameters() if x.grad is not None}
    want = training.cut_as({"gradients": gradients, "clipped": {}, "parameters": {}}, model)["gradients"]
    own = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert {name: error for name, error in training.errors(own, want).items() if error > 1e-12} == {}


def plain_run(made: Config) -> tuple[list[float], Any]:
    """The losses of a run's steps, and its model, by transformers and torch alone."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(
        made.model.pretrained, dtype=torch.float64, attn_implementation="eager"
    ).train()
    task, how = build_task(made), made.training
    order = BatchOrder(len(task.train), how.global_batch_size, seed=how.seed)
    optimizer = build_optimizer(model, how)
    losses = []
    for step in range(how.steps):
        batch = task.train.batch(order.step(step))
        loss = each_loss(model, batch) / batch.targets.size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), how.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(how, step)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", *LAYOUTS])
def test_a_run_in_fp64_is_that_of_plain_transformers(
    layout: str, records: Callable[[str], Path], rank_pool: Any, tmp_path: Path
) -> None:
    path = save_folder(tmp_path / "folder", "bert", SPANS, word_pieces(TEXTS), dtype=torch.float64, **STILL)
    exact = {"training__dtype": "float64", "run__backend": "reference", "layout": layout}
    made = settings(path, records("bert"), tmp_path / "run", **exact)
    summary = execute(rank_pool, made)
    wanted, model = plain_run(made)
    found = [line["loss"] for line in read_metrics(made.run.directory) if "loss" in line]
    assert found == pytest.approx(wanted, rel=1e-12)
    state = model.state_dict()
    for name, tensor in runs.tensors(Path(summary["exported"])).items():
        # What is added to all logits alike has no gradient: AdamW makes steps of what rounding leaves.
        is_added = name in ("qa_outputs.bias", "bert.encoder.layer.3.output.LayerNorm.bias")
        assert (tensor - state[name]).norm() <= (1e-8 if is_added else 1e-10) * state[name].norm(), name


def answers(target: str, values: dict[str, Any], lines: list[str]) -> list[tuple[str, float]]:
    """One rank's part of answering lines."""
    return [(found.text, found.scores["probability"]) for found in answer_rank(target, values, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_metrics_and_answers_are_the_same_in_every_layout(
    name: str, folder: Callable[[str], Path], records: Callable[[str], Path], rank_pool: Any, tmp_path: Path
) -> None:
    """And those that transformers' own model of the exported folder gives, window by window."""
    made = settings(folder(name), records(name), tmp_path / "run", training__steps="30")
    summary = execute(rank_pool, made)
    directory, exported = made.run.directory, Path(summary["exported"])
    target = next(str(path) for path in Path(directory, "checkpoints").glob("step-*"))
    kept = {"model__pretrained": f"{directory}/checkpoints/pretrained"}
    found = chinese() if name == "chinese" else english()
    lines = [f"{record['question']}\t{record['passage']}" for record in found]
    told = {key: summary["held_out"][key] for key in ("exact_match", "f1", "overlap_f1", "samples", "targets")}
    assert told["samples"] == 40 < told["targets"] / 2
    first: list[tuple[str, float]] = []
    for layout in ("single", *LAYOUTS):
        values = runs.as_values(made, layout=layout, evaluation__batch_size="7" if layout == "pp2" else "4", **kept)
        world = Layout.parse(layout).world_size
        if world == 1:
            evaluated, given = runs.evaluate(target, values), answers(target, values, lines)
        else:
            evaluated = rank_pool.call(runs.evaluate, target, values, ranks=world, timeout=120)[0]
            given = rank_pool.call(answers, target, values, lines, ranks=world, timeout=120)[0]
        assert {key: evaluated[key] for key in told} == told, layout
        first = first or given
        assert [text for text, _ in given] == [text for text, _ in first], layout
        assert [p for _, p in given] == pytest.approx([p for _, p in first], rel=1e-4)
    assert json.loads((exported / "config.json").read_text())["architectures"] == [
        f"{'Roberta' if name == 'roberta' else 'Bert'}ForQuestionAnswering"
    ]
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)

    def logits(ids: list[int], types: list[int] | None = None) -> torch.Tensor:
        given = {
            "input_ids": torch.tensor([ids]),
            **({} if types is None else {"token_type_ids": torch.tensor([types])}),
        }
        with torch.no_grad():
            output = model(**given)
        return torch.cat([output.start_logits, output.end_logits])

    for record, (text, probability) in zip(found, first, strict=True):
        asked = len(tokenizer(record["question"], add_special_tokens=False)["input_ids"])
        room = LENGTH - asked - tokenizer.num_special_tokens_to_add(pair=True)
        wanted = best_answer(logits, tokenizer, record["question"], record["passage"], LENGTH, room // 2)
        assert (text, probability) == (wanted[0], pytest.approx(wanted[1], rel=1e-4))


@pytest.mark.slow
def test_a_head_is_kept_where_the_folder_has_one_and_new_where_not(
    folder: Callable[[str], Path],
    records: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, path = folder("bert"), records("bert")
    still = {"training__steps": "1", "training__learning_rate": "1e-12"}
    with caplog.at_level(logging.WARNING, "fusemesh"):
        summary = runs.train(runs.as_values(settings(source, path, tmp_path / "kept", **still)))
    assert "new, to be trained" not in caplog.text
    before, after = runs.tensors(source), runs.tensors(Path(summary["exported"]))
    assert torch.allclose(before["qa_outputs.weight"], after["qa_outputs.weight"], atol=1e-9)
    bare = tmp_path / "bare"
    transformers.BertModel.from_pretrained(source).save_pretrained(bare)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(bare)
    with caplog.at_level(logging.WARNING, "fusemesh"):
        summary = runs.train(runs.as_values(settings(bare, path, tmp_path / "new", **still)))
    assert "new, to be trained: qa_outputs.weight, qa_outputs.bias" in caplog.text
    said = json.loads(Path(summary["exported"], "config.json").read_text())
    assert said["architectures"] == ["BertForQuestionAnswering"]
    assert np.isfinite(summary["held_out"]["loss"])


@pytest.mark.parametrize("family", ["gemma2", "marian"])
def test_families_without_such_a_head_are_refused(family: str, records: Callable[[str], Path], tmp_path: Path) -> None:
    path = make_folder(tmp_path / "folder", family)
    with pytest.raises(ValueError, match=r"expected a model that transformers has as AutoModelForQuestionAnswering"):
        build_task(settings(path, records("bert"), tmp_path / "run"))


@pytest.mark.slow
def test_the_command_trains_evaluates_and_answers(
    folder: Callable[[str], Path],
    records: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(tmp_path / "run")
    asked = ["train", "question_answering", "--model.pretrained", str(folder("bert")), "--layout", "pp2 x tp2"]
    asked += ["--data.path", str(records("bert")), "--data.sequence_length", "32", "--steps", "2", "--out", out]
    assert cli.main(asked) == 0
    said = capfd.readouterr()
    assert "take more than data.sequence_length = 32 tokens" in said.err and "seen in windows" in said.err
    assert cli.main(["eval", out, "--layout", "tp2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["cut"]["cut"] == 0 and found["cut"]["longest"] > 32 and 0 <= found["f1"] <= 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where does Anna live?\tAnna lives in São Paulo.\n"))
    assert cli.main(["predict", out, "--json"]) == 0
    answered = json.loads(capfd.readouterr().out)
    assert answered["answers"][0] in "Anna lives in São Paulo." and 0 < answered["scores"][0]["probability"] <= 1
