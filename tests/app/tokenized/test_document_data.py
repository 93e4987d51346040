"""Layers: the application; 2 gloo ranks. Runs of a pretrained model on records, token files and mixtures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemesh import cli, config
from fusemesh.hybrid.data import BatchOrder
from fusemesh.run.fingerprint import fingerprint, with_absolute_paths
from fusemesh.run.settings import load_config
from fusemesh.tasks.base import IGNORED
from fusemesh.tasks.registry import build_task
from fusemesh.tokenized.mixture import sources_in, written
from tests.support.pretrained import runs
from tests.support.pretrained.chats import lines, make_chat_model
from tests.support.pretrained.documents import CHATS, TEXTS, make_data, rows_of, samples_of, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), folder)


@pytest.mark.parametrize("kind", ["chats", "texts", "prompts"])
def test_a_token_file_gives_the_samples_of_its_records(kind, folder, data):
    for part in ("train", "held_out"):
        direct = rows_of(settings(folder, data / f"{kind}.jsonl"), part)
        assert direct == rows_of(settings(folder, data / f"{kind}.tokens"), part)
        assert direct


def test_held_out_records_are_none_of_those_to_train_on(folder, data):
    train, held_out = (rows_of(settings(folder, data / "chats.jsonl"), part) for part in ("train", "held_out"))
    assert len(train) + len(held_out) == len(CHATS)
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in held_out}


def test_the_targets_of_texts_are_all_tokens_but_the_first_once(folder, data):
    task = build_task(settings(folder, data / "texts.jsonl", data__sequence_length="16"))
    samples = task.train
    batch = samples.batch(range(len(samples)))
    targets = int((batch.targets != IGNORED).sum())
    assert targets == samples.targets_in(range(len(samples))) > len(samples)
    documents = samples.documents
    assert targets == int((documents.lengths - 1).sum())
    found = np.sort(batch.targets[batch.targets != IGNORED])
    assert np.array_equal(found, np.sort(np.concatenate([documents[n].ids[1:] for n in range(len(documents))])))


def test_records_whose_targets_are_cut_off_are_counted_and_named(folder, data):
    """A run whose every target is cut off would report a loss of 0 over nothing (trl#6668)."""
    for ending in ("jsonl", "tokens"):
        task = build_task(settings(folder, data / f"prompts.{ending}"))
        counts = task.cuts("train")
        samples = task.train
        assert counts["targets_cut_off"] > 10
        assert counts["records"] == len(samples) + counts["targets_cut_off"]
        assert all(samples.targets_in([number]) for number in range(len(samples)))
        said = task.say_cuts("train")
        where = r"prompts.jsonl, line" if ending == "jsonl" else r"prompts.tokens, document"
        assert f"{counts['targets_cut_off']} are left out, whose targets stand behind these tokens" in said
        assert where in said
        with pytest.raises(ValueError, match=rf"data.sequence_length: expected so many tokens .*{where}"):
            build_task(settings(folder, data / f"prompts.{ending}", data__sequence_length="2"))


def test_records_without_a_target_are_named_at_the_start(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([*TEXTS, {"text": ""}]))
    assert f"1 are left out without a target, the first at {path}, line 41" in build_task(
        settings(folder, path)
    ).say_cuts("train")
    path.write_text(lines([{"text": ""}, {"text": " "}]))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: expected records with something to learn, received 2 with"):
        build_task(settings(folder, path))


def test_a_chosen_length_fits_the_records(folder, data):
    task = build_task(settings(folder, data / "chats.jsonl", data__sequence_length="0"))
    length = task.config.data.sequence_length
    assert length % 16 == 0
    assert not task.cuts("train")["cut"]


def test_one_sample_is_shown_with_its_targets(folder, data, tmp_path, capfd):
    runs.train(config.as_dict(settings(folder, data / "chats.jsonl", tmp_path / "quiet")))
    assert "⟦" not in capfd.readouterr().err
    given = ["--model.pretrained", str(folder), "--data.path", str(data / "chats.jsonl"), "--steps", "1"]
    assert cli.main(["train", "language_model", *given, "--batch-size", "4", "--out", str(tmp_path / "run")]) == 0
    text = capfd.readouterr().err
    assert text.count("one of the samples, its targets between ⟦ and ⟧") == 1
    assert "<|im_start|>assistant\n⟦It is 0 and a fox.<|im_end|>⟧\n" in text


def test_a_run_on_chats_learns(folder, data, tmp_path):
    packed = {"training__steps": "12", "data__packing": "true"}
    summary = runs.train(config.as_dict(settings(folder, data / "chats.jsonl", tmp_path / "run", **packed)))
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert summary["training_loss"] < first - 0.5
    assert summary["cut"]["train"]["records"] == len(rows_of(settings(folder, data / "chats.jsonl")))


def test_sources_have_weights(tmp_path):
    assert written(sources_in("a.tokens:0.75 b.tokens:0.25")) == "a.tokens:3 b.tokens:1"
    assert [source.path for source in sources_in("a b.txt")] == ["a b.txt"]
    assert [source.path for source in sources_in("a.tokens b.tokens:1")] == ["a.tokens b.tokens:1"]
    (tmp_path / "a b:1").write_text("")
    assert [source.path for source in sources_in(str(tmp_path / "a b:1"))] == [str(tmp_path / "a b:1")]
    with pytest.raises(ValueError, match=r"data.path: expected weights above 0"):
        sources_in("a:0 b:1")
    with pytest.raises(ValueError, match=r"data.path: expected weights that are small whole numbers together"):
        sources_in("a:0.12345 b:1")


def test_a_mixture_takes_its_sources_by_weight(folder, data):
    mixed = settings(folder, f"{data}/chats.tokens:3 {data}/texts.jsonl:1")
    task = build_task(mixed)
    chats, texts = (rows_of(settings(folder, data / name)) for name in ("chats.tokens", "texts.jsonl"))
    assert rows_of(mixed) == chats + texts
    order = BatchOrder(len(task.train), 8, sources=task.train.sources)
    taken = np.concatenate([order.step(step) for step in range(10)])
    assert (taken < len(chats)).sum() == 60
    batch = task.train.batch(taken[:8])
    assert [(a.tolist(), b.tolist()) for a, b in zip(batch.tokens, batch.targets, strict=True)] == [
        (chats + texts)[number] for number in taken[:8]
    ]
    assert len(task.held_out) == sum(
        len(rows_of(settings(folder, data / name), "held_out")) for name in ("chats.tokens", "texts.jsonl")
    )


def test_the_weights_are_part_of_the_data(folder, data):
    one, other = (
        fingerprint(with_absolute_paths(settings(folder, f"{data}/chats.tokens:{n} {data}/texts.tokens:1")))
        for n in (3, 2)
    )
    assert one != other
    assert one["path"]["files"] == 2


@pytest.mark.distributed
def test_a_weighted_run_resumes_in_another_layout_with_the_same_samples(folder, data, tmp_path, rank_pool):
    """Runs of others replay an epoch's order after a resume, or skip one (ms-swift#10050, verl#7401)."""
    path = f"{data}/chats.tokens:3 {data}/texts.tokens:1"
    more = {"run__record_samples": "true", "training__global_batch_size": "8", "data__packing": "true"}
    # So many samples that the smaller source begins its second epoch.
    whole = settings(folder, path, tmp_path / "whole", training__steps="20", **more)
    runs.train(config.as_dict(whole))
    half = settings(folder, path, tmp_path / "half", training__steps="11", layout="dp2", **more)
    rank_pool.call(runs.train, config.as_dict(half), False, ranks=2, timeout=120)
    rest = settings(folder, path, tmp_path / "half", training__steps="20", layout="single", **more)
    runs.train(config.as_dict(rest), True)
    assert samples_of(tmp_path / "half") == samples_of(tmp_path / "whole")
    assert len(samples_of(tmp_path / "whole")) == 160


def damaged(path: Path, change: Callable[[bytes], bytes], tmp_path: Path) -> Path:
    copy = tmp_path / path.name
    copy.write_bytes(change(path.read_bytes()))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], r"damaged or cut off .* its end is missing"),
        (lambda content: b"text\n" * 100, r"another kind of file"),
        (lambda content: content[:200] + b"\xff" + content[201:], r"its tokens are not as they were written"),
    ],
)
def test_a_run_refuses_a_damaged_token_file(folder, data, tmp_path, change, message):
    path = damaged(data / "texts.tokens", change, tmp_path)
    with pytest.raises(ValueError, match=rf"data.path: expected .*texts\.tokens.*{message}"):
        runs.train(config.as_dict(settings(folder, path, tmp_path / "run")))


def test_a_run_refuses_tokens_of_another_tokenizer(data, tmp_path):
    other = make_chat_model(tmp_path / "other", bos=True)
    with pytest.raises(ValueError, match=r"expected tokens by the tokenizer of .* received .*texts\.tokens"):
        build_task(settings(other, data / "texts.tokens"))


def test_a_new_model_takes_no_token_file(data):
    with pytest.raises(
        ValueError, match=r"data.path: expected text with a new model, whose tokens are bytes, received"
    ):
        build_task(load_config(None, {"data.path": str(data / "texts.tokens")}))


def test_columns_are_those_of_records_alone(folder, data, tmp_path):
    (tmp_path / "a.txt").write_text("a fox\n\na dog\n")
    with pytest.raises(ValueError, match=r"data.columns: expected nothing with task language_model, whose text has no"):
        build_task(settings(folder, tmp_path / "a.txt", data__columns="text"))
    with pytest.raises(ValueError, match=r"chats.jsonl, line 1: expected a key 'talk', as data.columns says"):
        build_task(settings(folder, data / "chats.jsonl", data__columns="talk"))


def test_the_command_says_what_it_made(folder, data, tmp_path, capfd):
    words = ["tokenize", str(data / "chats.jsonl"), "--model", str(folder)]
    assert cli.main([*words, "-o", f"{tmp_path}/", "--workers", "2", "--json"]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert result["output"] == str(tmp_path / "chats.tokens")
    assert result["documents"] == len(CHATS)
    assert (tmp_path / "chats.tokens").read_bytes().replace(b"x", b"x")
    for more, message in (
        (["-o", str(tmp_path / "a.bin")], "--out: expected a name that ends in .tokens"),
        (["-o", str(tmp_path / "chats.tokens")], "--out: expected a file that is not there"),
        (["-o", str(tmp_path / "b.tokens"), "--workers", "0"], "--workers: expected at least 1, received 0"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capfd.readouterr().err
    assert cli.main(["tokenize", "nothing.jsonl", "--model", str(folder), "-o", str(tmp_path / "c.tokens")]) == 2
    assert "DATA: expected a file of text or records, or a folder of them, received 'nothing.jsonl': not found" in (
        capfd.readouterr().err
    )


def test_a_resolved_configuration_of_a_mixture_is_read_back(folder, data, tmp_path):
    mixed = with_absolute_paths(settings(folder, f"{data}/chats.tokens:3 {data}/texts.tokens:1"))
    config.save(mixed, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml").data.path == mixed.data.path
