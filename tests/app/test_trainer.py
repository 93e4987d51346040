"""Training, resuming and evaluating. Layers: pure functions; one process; 4 gloo ranks."""

import errno
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from fusemesh import cli, config
from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.data import BatchOrder
from fusemesh.hybrid.layout import Layout
from fusemesh.run import trainer
from fusemesh.run.evaluator import evaluate_file
from fusemesh.run.metrics import MetricsWriter, read_metrics
from fusemesh.run.optimizer import build_optimizer, learning_rate
from fusemesh.tasks.language_model import Samples, load_corpus
from tests.support import tiny_run
from tests.support.engine_required import AUTO


def test_learning_rate_rises_linearly_and_falls_by_a_cosine():
    training = config.TrainingConfig(steps=21, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.2)
    rates = [learning_rate(training, step) for step in range(22)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[15] == pytest.approx(0.6) and rates[20] == rates[21] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:21]))


def test_decay_spares_norms_and_biases():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = build_optimizer(model, config.TrainingConfig(weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): (0.1 if name == "0.weight" else 0.0) for name, p in model.named_parameters()}


def test_metrics_of_a_resumed_run_are_written_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (2, 4, 6):
        writer.write(step, {"loss": float(step), "gradient_norm": None})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a crash in the middle of a line
    writer = MetricsWriter(tmp_path, first_step=4)
    writer.write(6, {"loss": 60.0})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": s, "loss": v} for s, v in ((2, 2.0), (4, 4.0), (6, 60.0))]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_run.write_text(tmp_path_factory.mktemp("text") / "documents")


@pytest.fixture(scope="module")
def runs(text, rank_pool, tmp_path_factory):
    """Runs six steps in a layout, once for each set of arguments, with a checkpoint in the middle."""
    done = {}

    def run(layout, **overrides):
        key = (layout, *sorted(overrides.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("run") / "run"
            settings = tiny_run.settings(text, folder, layout=layout, run__checkpoint_every="3", **overrides)
            done[key] = settings, execute(rank_pool, settings)
        return done[key]

    return run


def execute(rank_pool, settings, resume=False):
    """Rank 0's summary, after the others' has been found equal."""
    values = config.as_dict(settings)
    world = Layout.parse(settings.layout).world_size
    if world == 1:
        return tiny_run.train(values, resume)
    summaries = rank_pool.call(tiny_run.train, values, resume, ranks=world, timeout=120)
    assert all(summary["held_out"]["loss"] == summaries[0]["held_out"]["loss"] for summary in summaries)
    return summaries[0]


def killed_after_three(settings, folder, **changes):
    """A run directory as a run that died after its checkpoint of step 3 leaves it, and the settings to go on with."""
    shutil.copytree(settings.run.directory, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    (folder / "summary.json").unlink()
    return config.load(folder / "config.toml", {"run.directory": str(folder), **changes})


def weights(settings, step):
    folder = f"{settings.run.directory}/checkpoints/step-{step:08d}"
    checkpoint.merge(folder, f"{settings.run.directory}/merged-{step}.safetensors")
    return checkpoint.read_merged(f"{settings.run.directory}/merged-{step}.safetensors")[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ("single", {}),
        ("dp2 x tp2", {}),
        ("fsdp2 x tp2", {}),
        ("pp2 x tp2", {"model__tie_embeddings": "true", "training__accumulation": "2"}),
    ],
    ids=["single", "dp2xtp2", "fsdp2xtp2", "pp2xtp2-tied"],
)
def test_resuming_equals_the_uninterrupted_run_to_the_bit(runs, rank_pool, tmp_path, layout, overrides):
    whole, summary = runs(layout, **overrides)
    again = killed_after_three(whole, tmp_path / "run")
    resumed = execute(rank_pool, again, resume=True)
    assert resumed["resumed_from"] == 3 and summary["resumed_from"] is None
    before, expected, received = weights(whole, 3), weights(whole, 6), weights(again, 6)
    assert expected.keys() == received.keys() and len(expected) >= 20
    for name in expected:
        assert torch.equal(expected[name], received[name]), name
        assert not torch.equal(expected[name], before[name]), name
    assert resumed["held_out"]["loss"] == summary["held_out"]["loss"]
    for one, other in zip(read_metrics(whole.run.directory), read_metrics(again.run.directory), strict=True):
        assert {**one, "tokens_per_s": 0} == {**other, "tokens_per_s": 0}


@pytest.mark.distributed
def test_resuming_in_other_layouts_gives_the_same_model(runs, rank_pool, tmp_path):
    exact = dict(training__dtype="float64", run__backend="reference")
    whole, summary = runs("dp2 x tp2", **exact)
    expected = weights(whole, 6)
    for number, layout in enumerate(("single", "fsdp4", "pp2 x tp2")):
        again = killed_after_three(whole, tmp_path / str(number), layout=layout)
        resumed = execute(rank_pool, again, resume=True)
        assert resumed["held_out"]["loss"] == pytest.approx(summary["held_out"]["loss"], rel=1e-12)
        received = weights(again, 6)
        for name in expected:
            assert (received[name] - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    "pipeline",
    [
        pytest.param({}, id="1f1b"),
        pytest.param(
            {"pipeline__schedule": "interleaved1f1b", "pipeline__virtual_stages": "2", "model__num_layers": "4"},
            id="interleaved",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_in_stages_goes_on_in_one_process(runs, rank_pool, tmp_path, pipeline):
    """And is the run of one process from its first step: tied embeddings, clipping at every step."""
    exact = dict(training__dtype="float64", run__backend="reference", model__tie_embeddings="true", **pipeline)
    alone, _ = runs("single", **exact)
    whole, summary = runs("pp2 x fsdp2", **exact)
    again = killed_after_three(whole, tmp_path / "run", layout="single")
    resumed = execute(rank_pool, again, resume=True)
    assert resumed["held_out"]["loss"] == pytest.approx(summary["held_out"]["loss"], rel=1e-12)
    assert resumed["parameters"] == summary["parameters"] == sum(w.numel() for w in weights(alone, 6).values())
    for one, other in ((weights(alone, 6), weights(whole, 6)), (weights(whole, 6), weights(again, 6))):
        assert one.keys() == other.keys() and "head.weight" not in one
        for name in one:
            assert (one[name] - other[name]).norm() <= 1e-10 * one[name].norm(), name
    for line, reference in zip(read_metrics(whole.run.directory), read_metrics(alone.run.directory), strict=True):
        for key in line.keys() & {"loss", "gradient_norm", "held_out_loss"}:
            assert line[key] == pytest.approx(reference[key], rel=1e-10), (line["step"], key)


@pytest.mark.distributed
def test_micro_batches_change_nothing_but_rounding(runs):
    exact = dict(training__dtype="float64", run__backend="reference")
    whole, _ = runs("dp2 x tp2", **exact)
    cut, _ = runs("dp2 x tp2", training__accumulation="4", **exact)
    expected, received = weights(whole, 6), weights(cut, 6)
    for name in expected:
        assert (received[name] - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


@pytest.mark.distributed
def test_one_held_out_loss_whatever_the_layout(runs, rank_pool, tmp_path):
    whole, summary = runs("dp2 x tp2")
    file = tmp_path / "model.safetensors"
    checkpoint.merge(f"{whole.run.directory}/checkpoints", file)
    alone = evaluate_file(file, config.load(base=config.as_dict(whole)))
    assert (alone["step"], alone["targets"], alone["samples"]) == (6, 21 * 16, 21)
    assert summary["held_out"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    for target, layout in (
        (whole.run.directory, "fsdp4"),
        (whole.run.directory, "tp2"),
        (str(file), "dp2"),
        (str(file), "pp2"),
    ):
        values = config.as_dict(config.load(base=config.as_dict(whole), overrides={"layout": layout}))
        world = Layout.parse(layout).world_size
        answers = rank_pool.call(tiny_run.evaluate, target, values, ranks=world, timeout=120)
        assert all({**a, "seconds": 0} == {**answers[0], "seconds": 0} for a in answers)
        assert answers[0]["layout"] == layout and answers[0]["targets"] == alone["targets"]
        assert answers[0]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.distributed
def test_one_held_out_loss_of_a_run_in_stages(runs, rank_pool, tmp_path):
    """The merged model in one process has the loss that the stages found together."""
    whole, summary = runs("pp2 x tp2", model__tie_embeddings="true", training__accumulation="2")
    file = tmp_path / "model.safetensors"
    checkpoint.merge(f"{whole.run.directory}/checkpoints", file)
    alone = evaluate_file(file, config.load(base=config.as_dict(whole)))
    evaluated = rank_pool.call(tiny_run.evaluate, whole.run.directory, config.as_dict(whole), ranks=4, timeout=120)
    assert {answer["loss"] for answer in evaluated} == {summary["held_out"]["loss"]}
    assert alone["targets"] == summary["held_out"]["targets"] == 21 * 16
    assert summary["held_out"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("clip", ["1.0", "0"])
def test_a_rank_whose_loss_is_not_finite_is_named(runs, rank_pool, text, tmp_path, clip):
    """When metrics are due, three steps later; the weights are those from before, and no checkpoint is of after."""
    whole, _ = runs("dp4", training__clip_norm=clip)
    settings = tiny_run.settings(
        text, tmp_path / "run", layout="dp4", run__checkpoint_every="3", run__log_every="6", training__clip_norm=clip
    )
    told = rank_pool.call(tiny_run.train_with_a_bad_rank, config.as_dict(settings), 2, 3, timeout=120)
    for message, _ in told:
        assert message.startswith(
            "NonFiniteError: step 4: a number is not finite, and was born on rank 2, in the gradient of parameter "
        ), message
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run" / "checkpoints")) == 3
    kept = weights(whole, 3)
    assert all(torch.equal(kept[name], value) for name, value in told[0][1].items()) and len(kept) == len(told[0][1])


@pytest.mark.distributed
def test_replicas_that_drift_end_the_run(rank_pool, text, tmp_path):
    settings = tiny_run.settings(text, tmp_path / "run", layout="dp4", run__check_replicas_every="2")
    for message in rank_pool.call(tiny_run.train_with_drift, config.as_dict(settings), 1, 2, timeout=120):
        assert message.startswith(
            "DriftError: step 4: replicas of parameter 'embedding.weight' along dp differ: rank 1"
        )


@pytest.mark.distributed
def test_each_rank_records_the_samples_that_it_consumed(runs):
    """Together they are those of the order, step by step."""
    whole, _ = runs("dp2 x tp2", run__record_samples="true")
    order = BatchOrder(len(Samples(load_corpus(whole.data.path).train, 16)), 8, seed=0)
    read = [
        [
            json.loads(line)
            for line in Path(whole.run.directory, "samples", f"rank-{rank}.jsonl").read_text().split("\n")[:-1]
        ]
        for rank in range(4)
    ]
    assert read[0] == read[1] and read[2] == read[3] and len({line["attempt"] for lines in read for line in lines}) == 1
    for step in range(6):
        assert [line[step]["step"] for line in read] == [step + 1] * 4
        assert [line[step]["replica"] for line in read] == [0, 0, 1, 1]
        assert read[0][step]["samples"] + read[2][step]["samples"] == order.step(step).tolist()


@pytest.mark.distributed
def test_what_a_run_leaves(runs):
    whole, summary = runs("dp2 x tp2")
    folder = Path(whole.run.directory)
    assert config.load(folder / "config.toml") == whole
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["layout"], summary["world_size"], summary["steps"]) == ("dp2 x tp2", 4, 6)
    assert summary["tokens"] == 6 * 8 * 16 and summary["tokens_per_s"] > 0
    # PyTorch's kernel has its backward on PyTorch's tape.
    backward = ["attention_backward: cpu"] if AUTO == "cpu" else []
    plain = ["linear_forward: torch", "vocab_loss_backward: torch", "vocab_loss_forward: torch"]
    assert summary["backends"] == [*backward, f"attention_forward: {AUTO}", *plain]
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 4, 6]
    assert all({"learning_rate", "gradient_norm", "tokens_per_s"} <= line.keys() for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [6]
    assert lines[-1]["held_out_loss"] == summary["held_out"]["loss"] < lines[0]["loss"]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    state = checkpoint.read_state(folder / "checkpoints" / "step-00000003")
    data = state.pop("data")
    assert state == {"step": 3, "config": config.as_dict(whole), "metadata": {}}
    assert data["path"]["files"] == 60 and len(data["path"]["sha256"]) == 64


@pytest.mark.distributed
def test_ranks_that_differ_are_refused_before_the_first_step(runs, rank_pool, text, tmp_path):
    """Other folders (or one path on machines that share none), other keys, and data that differ by a letter."""
    shutil.copytree(text, tmp_path / "other")
    (tmp_path / "other" / "7.txt").write_text((Path(text) / "7.txt").read_text().replace("line 3", "line 4"))
    whole, _ = runs("dp2 x tp2")

    def values(**overrides):
        defaults = {"layout": "dp2", "training__steps": "1", "evaluation__samples": "4"}
        return config.as_dict(tiny_run.settings(text, tmp_path / "run", **{**defaults, **overrides}))

    elsewhere = config.as_dict(tiny_run.settings(text, tmp_path / "b", layout="dp2", training__steps="1"))
    there = {**elsewhere, "run": {**elsewhere["run"], "directory": str(tmp_path / "run")}}
    cases = [
        [there, elsewhere],
        [values(), values(training__learning_rate="0.5")],
        [values(), values(training__steps="2")],
        [values(), values(layout="tp2")],
        [values(), values(data__path=str(tmp_path / "other"))],
        [values(), values(data__path=str(tmp_path / "none"))],
        [values(data__held_out=text), values(data__held_out=str(tmp_path / "other"))],
    ]
    first, second = rank_pool.call(tiny_run.train_each, cases, whole.run.directory, ranks=2, timeout=120)
    assert first == second
    expected = [
        rf"run\.directory: expected one folder that all .*/run' on .*1 of 2 ranks .*rank 1: '{tmp_path}/b' on ",
        r"training\.learning_rate: expected the same on all ranks, received 0\.003 on rank 0; 0\.5 on rank 1; start",
        r"training\.steps: .*received 1 on rank 0; 2 on rank 1",
        r'layout: .*received "dp2" on rank 0; "tp2" on rank 1',
        r"data: .*received data\.path on rank 0 of SHA-256 \w{12}\.\.\., on rank 1 of SHA-256 ",
        rf"data: .*rank 1 cannot read them \(.*{tmp_path}/none",
        r"data: .*received data\.held_out on rank 0 of SHA-256 \w{12}\.\.\., on rank 1 of SHA-256 ",
        r"data: .*received data\.held_out on rank 0 of SHA-256 \w{12}\.\.\., on rank 1 of SHA-256 ",
    ]
    for pattern, message in zip(expected, first, strict=True):
        assert re.match(pattern, message), message
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == []


def test_a_second_run_into_one_folder_is_refused_while_the_first_one_lives(text, tmp_path, monkeypatch, capsys):
    step, seen = trainer.Trainer.train_step, []
    command = ["train", *tiny_run.options(text, tmp_path, training__steps="1"), "--quiet", "--json"]

    def second(self, current):
        before = sorted(path.name for path in tmp_path.iterdir())
        seen.append((cli.main(command), json.loads(capsys.readouterr().out)["error"]))
        seen.append((cli.main([*command, "--resume"]), json.loads(capsys.readouterr().out)["error"]))
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return step(self, current)

    # What a dead run on this machine has left is taken over.
    (tmp_path / ".lock").write_text(json.dumps({"host": "another", "pid": 1, "since": "long ago"}))
    monkeypatch.setattr(trainer.Trainer, "train_step", second)
    assert cli.main(command) == 0
    for status, message in seen:
        assert status == 2
        assert re.match(
            rf"run\.directory: .*another run writes \(process {os.getpid()} on .*, since .*\); wait", message
        )
    assert len(seen) == 2 and not list(tmp_path.glob(".lock"))


def test_a_lock_where_the_file_system_has_none(tmp_path, monkeypatch):
    """Then what the file says counts: a process of another machine may live."""
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no locks")))
    path = tmp_path / "lock"
    ended = subprocess.Popen(["true"])
    ended.wait()
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": ended.pid, "since": "today"}))
    lock = checkpoint.Lock(path)
    lock.release()
    path.write_text(json.dumps({"host": "another", "pid": 7, "since": "today"}))
    assert checkpoint.holder_of(path) == "process 7 on another, since today"
    with pytest.raises(ValueError, match="process 7 on another, since today"):
        checkpoint.Lock(path)


WRONG = [
    (dict(layout="tp8"), 8, r"num_heads: 4 heads cannot be split over tp8"),
    (dict(layout="dp4"), 2, r"layout: dp4 needs 4 ranks and 2 were started"),
    (dict(layout="dp3"), 3, r"global_batch_size: expected a multiple of .*= 3, received 8; change training"),
    (dict(layout="cp2"), 2, r"layout: context parallel \(cp\) is not there yet"),
    (dict(layout="pp4"), 4, r"num_layers: 2 layers cannot be dealt to pp4, .*use pp up to 2, or at least 4 layers"),
    (
        dict(layout="pp2", pipeline__microbatches="3"),
        2,
        r"pipeline\.microbatches: 1f1b on pp2 .* 8 samples .*training\.global_batch_size.*received 3; .*\[2, 4, 8\]",
    ),
    (
        dict(layout="pp2", pipeline__microbatches="1"),
        2,
        r"pipeline\.microbatches: .*at least 2 of them, received 1; use",
    ),
    (dict(layout="pp2", training__accumulation="8"), 2, r"training\.global_batch_size .*received 1 samples a replica"),
    (dict(layout="pp2", evaluation__batch_size="1"), 2, r"evaluation\.batch_size: 1f1b on pp2 .*received 1 samples"),
    (dict(layout="pp2", pipeline__virtual_stages="2"), 2, r"pipeline\.virtual_stages: .*received 2 with 1f1b"),
    (dict(layout="two"), 1, r"layout: expected axes .*received 'two'"),
    (dict(data__sequence_length="100000"), 1, r"data\.sequence_length: expected at most"),
    (dict(data__path="/nowhere"), 1, r"data\.path: expected a text file or a folder"),
]


@pytest.mark.parametrize(("overrides", "world", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_what_cannot_run_is_refused_before_it_starts(text, tmp_path, overrides, world, message):
    settings = tiny_run.settings(text, tmp_path / "run", **overrides)
    with pytest.raises(ValueError, match=message):
        trainer.prepare(settings, world, resume=False)
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_resumed_as_another(runs, tmp_path):
    whole, _ = runs("single")
    with pytest.raises(ValueError, match=r"run\.directory: '.*' holds another run's checkpoints; .*--resume"):
        trainer.prepare(whole, 1, resume=False)
    for changes, message in (
        (
            {"training.global_batch_size": "4"},
            r"training\.global_batch_size: expected 8, with which the run began .* 4",
        ),
        ({"model.num_layers": "3"}, r"model\.num_layers: expected 2, .*received 3"),
        ({"data.sequence_length": "8"}, r"data\.sequence_length: expected 16"),
        ({"training.seed": "5"}, r"training\.seed: expected 0"),
    ):
        other = config.load(base=config.as_dict(whole), overrides=changes)
        with pytest.raises(ValueError, match=message):
            trainer.prepare(other, 1, resume=True)
    absent = config.load(base=config.as_dict(whole), overrides={"run.directory": str(tmp_path / "absent")})
    with pytest.raises(ValueError, match=r"checkpoint: expected a folder step-\* .*found none"):
        trainer.prepare(absent, 1, resume=True)
