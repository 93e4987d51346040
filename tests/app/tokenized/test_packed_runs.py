"""Layers: the application; 4 gloo ranks. Runs on packed documents: their rows, what is said of them, resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fusemesh import cli, config
from fusemesh.config import Config
from fusemesh.hybrid.data import BatchOrder
from fusemesh.hybrid.layout import Layout
from fusemesh.pretrained.tokenizer import FolderTokens
from fusemesh.run.checks import Resume, check_resumable
from fusemesh.run.metrics import read_metrics
from fusemesh.run.settings import load_config
from fusemesh.tasks.base import IGNORED, is_held_out
from fusemesh.tasks.registry import build_task
from fusemesh.tokenized.data import _loaded
from fusemesh.tokenized.packing import PackedRows
from tests.support.pretrained import runs
from tests.support.pretrained.chats import make_chat_model
from tests.support.pretrained.documents import make_data, rows_of, samples_of, settings
from tests.support.pretrained.folders import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), folder)


def test_packed_rows_are_as_long_as_the_model_takes(folder, data, tmp_path):
    """Where a step then has no row twice; a model without that many positions, and records by themselves, have less."""
    more = {"data__packing": "true", "data__sequence_length": "0"}
    path = data / "chats.tokens"
    task = build_task(settings(folder, path, **more, training__global_batch_size="1"))
    assert task.config.data.sequence_length == 1024
    documents = [len(rows_of(settings(folder, path), part)) for part in ("train", "held_out")]
    task = build_task(settings(folder, path, **more, training__global_batch_size="8"))
    packed = task.config.data.sequence_length
    assert len(task.train) + len(task.held_out) >= 8
    alone = build_task(settings(folder, path, data__sequence_length="0")).config.data.sequence_length
    assert alone < packed < 1024
    # However many samples a step takes, records are whole.
    task = build_task(settings(folder, path, **more, training__global_batch_size="512"))
    assert task.config.data.sequence_length == alone
    assert task.packed()["documents"] == documents[0]


def test_texts_are_packed_as_documents(folder, tmp_path):
    """Each file is a document, long ones in pieces; with data.packing false they are windows across files."""
    texts = {f"{n:02d}.txt": f"{n}: the lazy dog sleeps on. " * (1 + n * n % 40) for n in range(40)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    task = build_task(settings(folder, tmp_path, data__packing="true"))
    held_out = [name for name in texts if is_held_out(name)]
    tokenizer = FolderTokens(str(folder))
    wanted = {
        part: sorted(
            tokenizer.encode([text for name, text in texts.items() if (name in held_out) == (part != "train")])
        )
        for part in ("train", "held_out")
    }
    for part in ("train", "held_out"):
        samples = getattr(task, part)
        assert sorted(samples.documents[n].ids.tolist() for n in range(len(samples.documents))) == wanted[part]
        batch = samples.batch(range(len(samples)))
        # All tokens but the first of each document are learned, once: none from another document's end.
        assert sorted(batch.targets[batch.targets != IGNORED]) == sorted(n for ids in wanted[part] for n in ids[1:])
        starts = batch.tokens[(batch.inputs["positions"] == 0) & (batch.targets != IGNORED)]
        pieces = [ids[at] for ids in wanted[part] for at in range(0, len(ids) - 1, 48)]
        assert sorted(starts) == sorted(pieces)
    found = task.packed()
    assert found["documents"] == len(wanted["train"]) and found["rows"] == len(task.train)
    assert found["in_pieces"] == sum(len(ids) > 49 for ids in wanted["train"]) > 0
    assert found["fill"] == pytest.approx(sum(len(ids) - 1 for ids in wanted["train"]) / 48 / found["rows"], abs=1e-4)
    joined = build_task(settings(folder, tmp_path, data__packing="false"))
    assert "positions" not in joined.train.batch([0]).inputs
    assert len(joined.train) == (sum(map(len, wanted["train"])) - 1) // 48
    assert joined.packed() == {} and joined.say_packed() == ""


def test_the_start_says_how_full_rows_are(folder, data, tmp_path, capfd):
    given = ["--model.pretrained", str(folder), "--data.path", f"{data}/chats.tokens:3 {data}/texts.jsonl:1"]
    given += ["--data.sequence_length", "64", "--steps", "1", "--batch-size", "4", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "language_model", *given]) == 0
    said = json.loads((tmp_path / "run" / "summary.json").read_text())["packed"]
    task = build_task(load_config(tmp_path / "run" / "config.toml"))
    batch = task.train.batch(range(len(task.train)))
    assert said["rows"] == len(task.train) and said["documents"] == 94
    assert said["fill"] > (batch.targets != IGNORED).mean() > 0.5
    text = f"94 documents to train on share {said['rows']} rows, {said['fill']:.1%} full"
    assert capfd.readouterr().err.count(text) == 1
    assert "are cut into pieces of several rows" in task.say_packed()


def test_a_new_model_refuses_to_pack(tmp_path):
    for given in ("true", "false"):
        with pytest.raises(
            ValueError, match=rf"data.packing: expected nothing with a new language model.*{given}; lea"
        ):
            load_config(None, {"data.packing": given})
    config.save(load_config(), tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == load_config()


def test_a_run_of_windows_does_not_go_on_packed(folder, data):
    """Configurations of versions that packed no texts lack the key."""
    configured = settings(folder, data / "texts.jsonl", data__packing="true")
    values = config.as_dict(configured)
    del values["data"]["packing"]
    with pytest.raises(ValueError, match=r"data.packing: expected False, with which the run began"):
        check_resumable(configured, {"config": values, "step": 1}, Resume())
    check_resumable(
        settings(folder, data / "texts.jsonl", data__packing="false"), {"config": values, "step": 1}, Resume()
    )


def epochs_of(numbers: list[int], sources: list[tuple[int, int]]) -> list[list[list[int]]]:
    """Of each source its samples in the order in which they are taken, an epoch each."""
    found, begin = [], 0
    for size, _ in sources:
        own = [number - begin for number in numbers if begin <= number < begin + size]
        found.append([own[at : at + size] for at in range(0, len(own), size)])
        begin += size
    return found


def check_epochs(numbers: list[int], sources: list[tuple[int, int]], *, ended: int) -> None:
    """None is lost, and none is twice in an epoch; so many sources have begun a second one."""
    found = epochs_of(numbers, sources)
    assert sum(len(epochs) > 1 for epochs in found) == ended
    for (size, _), epochs in zip(sources, found, strict=True):
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])


def packed_mixture(folder: Path, data: Path, directory: Path | str = "unused", **more: str) -> Config:
    """A token file and records, packed, with weights."""
    own = {"data__packing": "true", "training__global_batch_size": "8", "run__record_samples": "true", **more}
    return settings(folder, f"{data}/chats.tokens:3 {data}/texts.jsonl:1", directory, **own)


def test_a_packed_mixture_is_dealt_out_the_same_whatever_the_layout(folder, data):
    """In mid-epoch and across its end, on 4 replicas and then on 2; a process that begins anew makes the same rows."""
    task = build_task(packed_mixture(folder, data))
    sources, size = task.train.sources, len(task.train)
    assert all(isinstance(rows, PackedRows) for rows in task.train.datasets)
    order = BatchOrder(size, 8, sources=sources)
    steps = 3 * size // 8
    whole = np.concatenate([order.step(step) for step in range(steps)]).tolist()
    check_epochs(whole, sources, ended=2)
    for stop in (1, size // 16, size // 8 + 1):
        dealt = []
        for step in range(steps):
            now = BatchOrder(size, 8, replicas=4 if step < stop else 2, accumulation=1 + step % 2, sources=sources)
            dealt += [now.micro_batches(step, replica).ravel() for replica in range(now.replicas)]
        assert np.concatenate(dealt).tolist() == whole
    _loaded.clear()
    again = build_task(packed_mixture(folder, data)).train.batch(whole[:size])
    batch = task.train.batch(whole[:size])
    assert np.array_equal(again.tokens, batch.tokens) and np.array_equal(again.targets, batch.targets)
    assert np.array_equal(again.inputs["positions"], batch.inputs["positions"])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_packed_mixture_resumes_from_dp4_in_dp2_x_tp2(folder, data, tmp_path, rank_pool):
    """In mid-epoch, and where a source ends its epoch behind: samples, losses and the held-out loss are the same."""
    sources = build_task(packed_mixture(folder, data)).train.sources
    # A rate that does not fall with the number of steps.
    rates = {"learning_rate": "1e-3", "min_learning_rate": "1e-3", "warmup_steps": "0"}
    exact = {"training__dtype": "float64", "run__backend": "reference"}
    exact |= {f"training__{key}": value for key, value in rates.items()}
    # Until the larger source, of which three in four are, begins its second epoch.
    steps = -(-4 * (sources[0][0] + 8) // 3 // 8)
    more = {**exact, "training__steps": str(steps)}
    want = runs.train(config.as_dict(packed_mixture(folder, data, tmp_path / "whole", **more)))
    for stop in (steps // 3, steps - 1):
        at = tmp_path / str(stop)
        half = packed_mixture(folder, data, at, **{**more, "training__steps": str(stop)}, layout="dp4")
        rank_pool.call(runs.train, config.as_dict(half), False, ranks=4, timeout=240)
        rest = packed_mixture(folder, data, at, **more, layout="dp2 x tp2")
        found = rank_pool.call(runs.train, config.as_dict(rest), True, ranks=4, timeout=240)
        numbers = samples_of(at)
        assert numbers == samples_of(tmp_path / "whole")
        assert len(numbers) == 8 * steps
        check_epochs(numbers, sources, ended=1)
        losses = [[line["loss"] for line in read_metrics(path) if "loss" in line] for path in (at, tmp_path / "whole")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        assert len(losses[0]) == steps
        summary = found[0] if isinstance(found, list) else found
        assert summary["loss"] == pytest.approx(want["loss"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "pp2", "fsdp2", "dp2 x tp2"])
def test_packed_rows_drop_in_any_layout_what_one_process_drops(layout, data, tmp_path, rank_pool):
    """GPT-2's own dropout, of attention, too, in rows that documents share."""
    folder = make_folder(tmp_path / "gpt2", "gpt2")
    more = {"data__packing": "true", "training__steps": "3", "training__dtype": "float64", "run__backend": "reference"}
    losses = {}
    for text in ("single", layout):
        configured = settings(folder, data / "texts.jsonl", tmp_path / text, **more, layout=text)
        world = Layout.parse(text).world_size
        if world == 1:
            runs.train(config.as_dict(configured))
        else:
            rank_pool.call(runs.train, config.as_dict(configured), False, ranks=world, timeout=240)
        losses[text] = [line["loss"] for line in read_metrics(tmp_path / text) if "loss" in line]
    assert losses[layout] == pytest.approx(losses["single"], rel=1e-12)
    still = make_folder(tmp_path / "still", "gpt2", attn_pdrop=0.0)
    runs.train(config.as_dict(settings(still, data / "texts.jsonl", tmp_path / "run", **more)))
    assert read_metrics(tmp_path / "run")[0]["loss"] != pytest.approx(losses["single"][0], rel=1e-6)
