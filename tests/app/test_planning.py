"""The plan on the command line, and layout auto. Layers: one process; 2 gloo ranks where said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fusemesh import cli, config
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.planner import measure
from fusemesh.hybrid.planner.hardware import Curve, Hardware, Link
from fusemesh.run import planning
from fusemesh.transformer import Transformer
from tests.support import tiny_run

LLAMA = ["plan", "--model", "llama3-8b", "--world", "64", "--gpu", "h100", "--memory", "80GB"]


def machine(world: int, **_: object) -> Hardware:
    """What a measurement of two cores might say."""
    link = Link(1e-4, 1e9)
    return Hardware(
        name="local",
        device="cpu",
        memory=1 << 32,
        peak={"float32": 1e11},
        bandwidth=1e10,
        intra=link,
        inter=link,
        ranks_per_node=world,
        slowdown=Curve(((1.0, 1.0), (2.0, 1.0), (4.0, 2.0))),
        cores=2,
        sources={"everything": "measured here"},
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure", machine)


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict, str]:
    """Exit status, the one JSON object on stdout, and stderr."""
    capfd.readouterr()
    status = cli.main([*map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    return status, json.loads(out), err


def test_json_ranks_legal_layouts_and_gives_a_reason_for_each_other(capfd: pytest.CaptureFixture[str]) -> None:
    status, found, err = call(capfd, *LLAMA)
    assert status == 0 and set(found) == {"layouts", "rejected"}
    assert "llama3-8b, 8,030,261,248 parameters, 512 samples of 8192 tokens a step in bfloat16, on 64 ranks" in err
    for row in found["layouts"]:
        assert {"layout", "step_s", "memory_bytes"} <= set(row)
        assert Layout.parse(row["layout"]).world_size == 64
        assert row["step_s"] > 0 and 0 < row["memory_bytes"] <= 80e9
    steps = [row["step_s"] for row in found["layouts"]]
    assert steps == sorted(steps) and len(steps) >= 10
    assert all(set(row) == {"layout", "why"} and row["why"] for row in found["rejected"])
    assert any("--memory allows 74.51 GiB" in row["why"] for row in found["rejected"])


@pytest.mark.parametrize("model", ["llama3-70b", "gpt2"])
def test_published_models_are_given_axes_that_their_class_can_be_split_over(
    capfd: pytest.CaptureFixture[str], model: str
) -> None:
    _, found, _ = call(capfd, "plan", "--model", model, "--world", 64, "--gpu", "h100", "--recompute", "full")
    layouts = [Layout.parse(row["layout"]) for row in found["layouts"]]
    assert any(layout.tp > 1 for layout in layouts) and any(layout.pp > 1 for layout in layouts)


def test_flags_change_what_is_planned(capfd: pytest.CaptureFixture[str]) -> None:
    base = call(capfd, *LLAMA)[1]["layouts"][0]
    longer = call(capfd, *LLAMA, "--batch", 1024)[1]["layouts"][0]
    assert longer["step_s"] == pytest.approx(2 * base["step_s"], rel=0.1)
    assert len(call(capfd, *LLAMA, "--gpus-per-node", 2)[1]["rejected"]) > len(call(capfd, *LLAMA)[1]["rejected"])
    small = call(capfd, *LLAMA, "--sequence", 1024, "--batch", 64)[1]["layouts"]
    assert any(Layout.parse(row["layout"]).tp == 8 for row in small)
    cut = call(capfd, *LLAMA, "--microbatches", 8)[1]["layouts"]
    assert all(row["accumulation"] * row["microbatches"] == 8 for row in cut)
    memory = call(capfd, *LLAMA, "--recompute", "full")[1]["layouts"]
    assert len(memory) > len(call(capfd, *LLAMA)[1]["layouts"])


def test_tables_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(LLAMA) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[0].split() == ["layout", "step", "tokens/s/rank", "parts", "memory"]
    assert "cannot run:" in out and "NVIDIA H100 SXM data sheet" in out
    assert cli.main([*LLAMA, "--explain", "fsdp8 x tp8"]) == 0
    out = capfd.readouterr().out
    for part in ("fsdp 8 shards", "communication  data parallel", "compute        mlp", "activations", "optimizer"):
        assert part in out


def test_explain_adds_up(capfd: pytest.CaptureFixture[str]) -> None:
    _, found, _ = call(capfd, *LLAMA, "--explain", "fsdp16 x tp4")
    assert sum(item["seconds"] for item in found["time"]) == pytest.approx(found["step_s"])
    peak = dict(found["memory"]["peak"])
    assert found["memory"]["phases"][peak.pop("phase")] == sum(peak.values())
    assert sum(peak.values()) + found["memory"]["reserved"] == found["memory_bytes"]
    row = next(r for r in call(capfd, *LLAMA)[1]["layouts"] if r["layout"] == "fsdp16 x tp4")
    assert row["step_s"] == found["step_s"] and row["memory_bytes"] == found["memory_bytes"]


def test_where_nothing_fits_the_nearest_miss_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    status, found, err = call(capfd, "plan", "--model", "gpt3-175b", "--world", 8, "--gpu", "a100")
    assert status == 1 and found["layouts"] == [] and len(found["rejected"]) == 20
    assert "no layout of 8 ranks can run: the nearest miss is" in err and not re.search(r"\d{7}", err)
    assert "a100 with 74.51 GiB (80.00 GB) each" in err and err.rstrip().endswith("too much") and found["error"] in err


WRONG = [
    (["--model", "llama3-8b", "--gpu", "h100"], "--world: expected the number of ranks"),
    (["--model", "llama3-8b", "--world", "8"], "--gpu: expected a100, h100, h200 or local with --model"),
    (["--model", "llama9", "--world", "8", "--gpu", "h100"], "--model: expected one of gpt2"),
    (["--model", "gpt2", "--world", "8", "--gpu", "v100"], "--gpu: expected local"),
    (["--model", "gpt2", "--world", "0", "--gpu", "h100"], "--world: expected at least 1, received 0"),
    (["--model", "gpt2", "--world", "8", "--gpu", "h100", "--memory", "lots"], "--memory: expected a size such as"),
    (["--model", "gpt2", "--world", "8", "--gpu", "h100", "--memory", "80"], "--memory: expected a size with its unit"),
    (["--model", "gpt2", "--world", "8", "--gpu", "h100", "--memory", "80B"], "write 80GB (10^9 bytes) or 80GiB"),
    (["--model", "gpt2", "--world", "8", "--gpu", "h100", "--memory", "0GB"], "--memory: expected a size such as"),
    (["--model", "gpt2", "--world", "8", "--gpu", "h100", "--gpus-per-node", "0"], "--gpus-per-node: expected at"),
    (["--model", "gpt2", "--world", "8", "--gpu", "h100", "--explain", "dp4"], "--explain: expected a layout of 8"),
    (
        ["--model", "gpt2", "--world", "8", "--gpu", "h100", "--explain", "tp8"],
        "--explain: tp8 cannot run: num_heads: 12",
    ),
    (["--model", "gpt2", "--world", "8", "--gpu", "h100", "--dtype", "int4"], "dtype: expected one of"),
    (["--model", "gpt2", "--model.num_layers", "3"], "--model: expected it alone"),
    (["--gpu", "h100", "--world", "2", "--microbatches", "2"], "--microbatches: expected it with --model"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_requests_name_the_flag(capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, found, err = call(capfd, "plan", *arguments)
    assert status == 2 and message in found["error"] and message in err


@pytest.mark.parametrize(
    "flags",
    [("--memory", "100"), ("--gpus-per-node", "0"), ("--explain", "dp3"), ("--explain", "qp2"), ("--world", "0")],
)
def test_a_wrong_request_is_refused_before_the_machine_is_measured(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str]
) -> None:
    monkeypatch.setattr(measure, "measure", lambda *_, **__: pytest.fail("measured"))
    status, found, _ = call(capfd, "plan", "--world", 2, "--gpu", "local", *flags)
    assert status == 2 and (flags[0] in found["error"] or flags[1] in found["error"])


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("75GiB", 75 * 2**30), ("512 mb", 512e6), ("1.5TiB", 1.5 * 2**40), ("80g", 80e9)]
)
def test_sizes(text: str, size: float) -> None:
    assert planning.bytes_of(text) == size


def test_our_own_run_is_what_is_planned(measured: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configured = config.load(None, {**tiny_run.SETTINGS, "training.accumulation": "2"})
    from fusemesh.run.setup import plain_model
    from fusemesh.tasks.registry import build_task

    model: Transformer = plain_model(build_task(configured))
    assert planning.model_of(configured).parameters == sum(p.numel() for p in model.parameters())
    config.save(configured, tmp_path / "run.toml")
    status, found, err = call(capfd, "plan", "--config", tmp_path / "run.toml", "--world", 4)
    assert status == 0 and "8 samples of 16 tokens a step in float32, on 4 ranks of local" in err
    assert all(row["accumulation"] == 2 for row in found["layouts"])
    assert {"dp4", "tp4", "dp2 x tp2", "fsdp4"} <= {row["layout"] for row in found["layouts"]}
    stages = ("--schedule", "interleaved1f1b", "--virtual-stages", 2)
    found = call(capfd, "plan", "--config", tmp_path / "run.toml", "--world", 4, *stages)[1]
    assert any("virtual stages" in row["why"] for row in found["rejected"])
    # One kv head and tp4 are legal; five layers' worth of stages of two layers are not.
    reasons = {row["layout"]: row["why"] for row in found["rejected"]}
    assert reasons["pp4"].startswith("num_layers: 2 layers cannot be dealt to pp4")
    status, found, _ = call(capfd, "plan", "--config", tmp_path / "run.toml", "--world", 4, "--model.num_heads=6")
    assert status == 2  # 32 is no multiple of 12


def records(folder: Path, *lines: str) -> str:
    """A file of records, enough of them for some to be held out."""
    path = folder / "records.tsv"
    path.write_text(
        "\n".join(
            ["\t".join(lines[0].split("|"))]
            + ["\t".join(line.format(number).split("|")) for number in range(64) for line in lines[1:]]
        )
    )
    return str(path)


RECORDS = {
    "text_classification": ("text|label", "text {0} of one kind|one", "text {0} of another|other"),
    "translation": ("source|target", "number {0}|le nombre {0}"),
    "question_answering": ("question|passage|answer", "who is {0} ?|the person {0} is name{0} .|name{0}"),
}


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("text_classification", ("texts", 2, None)),
        ("translation", ("tokens", 256, 2)),
        ("question_answering", ("positions", 2, None)),
    ],
)
def test_every_task_is_planned_as_what_it_is(
    measured: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], task: str, kind: tuple[str, int, int | None]
) -> None:
    path = records(tmp_path, *RECORDS[task])
    configured = config.load(None, {**tiny_run.SETTINGS, "task": task, "data.path": path, "layout": "auto"})
    from fusemesh.run.setup import plain_model
    from fusemesh.tasks.registry import build_task

    model, real = planning.model_of(configured), plain_model(build_task(configured))
    assert (model.head.of, model.head.outputs, model.memory_at) == kind
    assert {w.name: w.shape for w in model.weights} == {n: tuple(p.shape) for n, p in real.named_parameters()}
    assert all(layer.causal == (task == "translation" and index >= 2) for index, layer in enumerate(model.layers))
    chosen, _ = planning.resolve_auto(configured, 4, launched=False)
    config.save(configured, tmp_path / "run.toml")
    status, found, err = call(capfd, "plan", "--config", tmp_path / "run.toml", "--world", 4)
    assert status == 0 and f"{model.parameters:,} parameters" in err
    assert found["layouts"][0]["layout"] == chosen.layout
    # An encoder-decoder has a block for each of four stages, two blocks of an encoder have not.
    assert ("pp4" in {row["layout"] for row in found["layouts"]}) == (task == "translation")


def test_auto_takes_the_first_of_the_plan(measured: None) -> None:
    configured = config.load(None, {**tiny_run.SETTINGS, "layout": "auto"})
    chosen, line = planning.resolve_auto(configured, 4, launched=False)
    first = planning.choose_layout(configured, 4, machine(4)).layout
    assert chosen.layout == str(first) and first.world_size == 4
    assert line is not None and line.startswith(f"layout: auto chose {first} for 4 ranks")
    same = config.load(None, {**tiny_run.SETTINGS, "layout": "dp2"})
    assert planning.resolve_auto(same, 2, launched=True) == (same, None)
    with pytest.raises(ValueError, match=r"layout: auto measures this machine before ranks start.*--world 2"):
        planning.resolve_auto(configured, 2, launched=True)


@pytest.mark.distributed
def test_training_with_layout_auto(measured: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tiny_run.write_text(tmp_path / "text")
    options = tiny_run.options(text, tmp_path / "run", layout="auto")
    status, summary, err = call(capfd, "train", *options, "--nproc", 2)
    assert status == 0 and summary["world_size"] == 2
    assert f"layout: auto chose {summary['layout']} for 2 ranks" in err
    assert config.load(tmp_path / "run" / "config.toml").layout == summary["layout"]


@pytest.mark.distributed
@pytest.mark.slow
def test_this_machine_is_measured() -> None:
    found = measure.measure(2)
    assert found.device == "cpu" and 1e8 < found.peak["float32"] < 1e13 and found.memory > 1 << 26
    assert 1e8 < found.bandwidth < 1e12 and 0 < found.block_s < 1 and found.reserved > 1 << 24
    assert set(found.fits) == {f"{kind}:2:2" for kind in ("all_gather", "all_reduce", "reduce_scatter", "send")}
    assert all(1e-6 < link.latency < 10 and link.bandwidth > 1e6 for link in found.fits.values())
    assert found.slowdown(2) >= found.slowdown(1) == 1
    with pytest.raises(ValueError, match="--world: expected at least 1 rank, received 0"):
        measure.measure(0)
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float64"):
        measure.measure(1, dtype="int8")


def test_fits_find_what_they_were_made_of() -> None:
    link = measure._fit([(size, 1e-4 + size / 2e9) for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24)])
    assert link.latency == pytest.approx(1e-4) and link.bandwidth == pytest.approx(2e9)
