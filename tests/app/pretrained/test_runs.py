"""Fine-tuning a folder in any layout: as plain transformers does, resumed, evaluated, merged, continued by generate.

Layers: one process; 4 gloo ranks. What is compared with is a loop of transformers and torch alone.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fusemesh import cli, config
from fusemesh.config import Config
from fusemesh.hybrid.checkpoint.store import stored_tensors
from fusemesh.hybrid.layout import Layout
from fusemesh.run.metrics import read_metrics
from fusemesh.run.predictor import answer_rank
from fusemesh.run.setup import config_of as values_of
from fusemesh.tasks.registry import build_task
from tests.support import tiny_run
from tests.support.pretrained import runs
from tests.support.pretrained.folders import CAUSAL, CLASSES, PRETRAINED, make_folder

pytestmark = pytest.mark.distributed
DROPOUTS = (
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
)
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
Run = Callable[..., tuple[Config, dict[str, Any]]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.write_text(tmp_path_factory.mktemp("text") / "documents")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder of a family, made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def find(name: str, **changed: Any) -> Path:
        key = (name, *sorted(changed.items()))
        if key not in made:
            made[key] = make_folder(tmp_path_factory.mktemp(name), name, **changed)
        return made[key]

    return find


@pytest.fixture(scope="module")
def run(text: str, rank_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs four steps in a layout, once for each set of arguments."""
    done: dict[Any, tuple[Config, dict[str, Any]]] = {}

    def find(path: Path, layout: str, **overrides: str) -> tuple[Config, dict[str, Any]]:
        key = (path, layout, *sorted(overrides.items()))
        if key not in done:
            directory = tmp_path_factory.mktemp("run") / "run"
            configured = runs.settings(path, text, directory, layout=layout, **overrides)
            done[key] = configured, execute(rank_pool, configured)
        return done[key]

    return find


def execute(rank_pool: Any, configured: Config, resume: bool = False) -> dict[str, Any]:
    values, world = runs.as_values(configured), Layout.parse(configured.layout).world_size
    if world == 1:
        return runs.train(values, resume)
    found: dict[str, Any] = rank_pool.call(runs.train, values, resume, ranks=world, timeout=120)[0]
    return found


def losses_of(configured: Config) -> list[float]:
    return [line["loss"] for line in read_metrics(configured.run.directory) if "loss" in line]


LAYOUTS = ["fsdp2 x tp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("single", "pp2 x tp2"))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_what_plain_transformers_computes(
    layout: str, folder: Callable[..., Path], run: Run, rank_pool: Any
) -> None:
    """From the first step on, at which a model that is loaded wrong begins at the loss of chance (torchtitan#3775)."""
    configured, summary = run(folder("qwen3"), layout)
    wanted, held_out, model = runs.plain(configured)
    found = losses_of(configured)
    assert found[0] == pytest.approx(wanted[0], rel=5e-6)
    assert found == pytest.approx(wanted, rel=1e-4) and wanted[-1] < wanted[0] - 0.1
    assert summary["held_out"]["loss"] == pytest.approx(held_out, rel=1e-4)
    saved = runs.tensors(Path(summary["exported"]))
    state = model.state_dict()
    for name, tensor in saved.items():
        assert (tensor - state[name]).norm() <= 2e-3 * state[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, made in PRETRAINED.items() if CAUSAL in made.kinds])
@pytest.mark.parametrize("layout", ["fsdp2 x tp2", "pp2 x tp2"])
def test_every_family_begins_where_plain_transformers_does(
    family: str, layout: str, folder: Callable[..., Path], run: Run
) -> None:
    still = {name: 0.0 for name in PRETRAINED[family].make_config().to_dict() if name in DROPOUTS}
    configured, _ = run(folder(family, **still), layout, training__steps="2", run__export="false")
    wanted, *_ = runs.plain(configured)
    found = losses_of(configured)
    assert found[0] == pytest.approx(wanted[0], rel=5e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-4)


@pytest.mark.slow
def test_weights_of_bf16_train_as_fp32_and_are_bf16_again(folder: Callable[..., Path], run: Run) -> None:
    source = folder("llama", dtype=torch.bfloat16)
    configured, summary = run(source, "fsdp2 x tp2", training__steps="2")
    assert configured.training.dtype == "bfloat16"
    stored = stored_tensors(Path(configured.run.directory, "checkpoints", "step-00000002"))
    assert {value.properties.dtype for value in stored.values()} == {torch.float32}
    before, after = runs.tensors(source), runs.tensors(Path(summary["exported"]))
    assert before.keys() == after.keys() and {x.dtype for x in after.values()} == {torch.bfloat16}
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_what_the_config_ties_and_the_files_do_not_stays_apart(
    folder: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    """In training, in a run that goes on without its source, and in the export."""
    source = Path(shutil.copytree(folder("llama"), tmp_path / "source"))
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "tie_word_embeddings": True}))
    configured, summary = run(source, "single", training__steps="1", run__backend="torch")
    assert "attention_forward: torch" in summary["backends"]
    shutil.rmtree(source)
    found = runs.train(runs.as_values(configured, training__steps="2"), True)
    head, table = (
        runs.tensors(Path(found["exported"]))[name] for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert not torch.allclose(head, table)
    alone = transformers.AutoModelForCausalLM.from_pretrained(found["exported"])
    assert torch.equal(alone.lm_head.weight, head) and torch.equal(alone.model.embed_tokens.weight, table)
    assert summary["parameters"] == found["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_in_fp64_is_that_of_plain_transformers_to_1e_12(
    layout: str, folder: Callable[..., Path], run: Run
) -> None:
    """Of a family that computes in its own dtype throughout."""
    exact = {"training__dtype": "float64", "run__backend": "reference"}
    still = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    configured, summary = run(folder("gpt2", dtype=torch.float64, **still), layout, **exact)
    wanted, held_out, model = runs.plain(configured, attn_implementation="sdpa")
    assert losses_of(configured) == pytest.approx(wanted, rel=1e-12)
    assert summary["held_out"]["loss"] == pytest.approx(held_out, rel=1e-12)
    state = model.state_dict()
    for name, tensor in runs.tensors(Path(summary["exported"])).items():
        assert (tensor - state[name]).norm() <= 1e-10 * state[name].norm(), name


@pytest.mark.slow
def test_every_layout_drops_what_one_process_drops(folder: Callable[..., Path], run: Run) -> None:
    """The family's own dropout of 0.1, also where a step is accumulated, or backward computes blocks again."""
    parts = {"training__accumulation": "2"}
    alone = losses_of(run(folder("gpt2"), "single", **parts)[0])
    found = losses_of(run(folder("gpt2"), "fsdp2 x tp2", training__recompute="full", **parts)[0])
    assert found == pytest.approx(alone, rel=2e-5)
    assert losses_of(run(folder("gpt2"), "pp2 x tp2")[0]) == pytest.approx(alone, rel=2e-5)
    other = losses_of(run(folder("gpt2"), "single", training__seed="1", training__steps="1")[0])
    assert abs(other[0] - alone[0]) > 1e-4


def test_the_exported_folder_is_transformers_own(folder: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    """And merging a checkpoint gives the same files, byte for byte, in a new place."""
    source = folder("qwen3")
    configured, summary = run(source, "fsdp2 x tp2")
    exported = Path(summary["exported"])
    assert exported == Path(configured.run.directory, "model")
    assert cli.main(["merge", configured.run.directory, "-o", str(tmp_path / "merged")]) == 0
    names = {file.name for file in source.iterdir()}
    assert names <= {file.name for file in exported.iterdir()}
    for name in names - {file.name for file in source.glob("*.safetensors")}:
        assert (exported / name).read_bytes() == (source / name).read_bytes(), name
    for name in names:
        assert (exported / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name
    assert cli.main(["merge", configured.run.directory, "-o", str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    whole, half = (runs.tensors(place) for place in (exported, tmp_path / "half"))
    assert whole.keys() == half.keys() and all(torch.equal(half[name], x.bfloat16()) for name, x in whole.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    *_, wanted = runs.plain(configured)
    ids = torch.arange(1, 30)[None]
    assert torch.allclose(model(ids).logits, wanted(ids).logits, rtol=1e-2, atol=1e-2)
    transformers.AutoTokenizer.from_pretrained(exported)


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_where_its_source_has_gone(
    folder: Callable[..., Path], run: Run, rank_pool: Any, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(folder("qwen3"), tmp_path / "source"))
    whole, _ = run(folder("qwen3"), "fsdp2 x tp2")
    configured, _ = run(source, "fsdp2 x tp2", training__steps="2", training__warmup_steps="1", run__export="false")
    assert not Path(configured.run.directory, "model").exists()
    shutil.rmtree(source)
    again = runs.as_values(configured, training__steps="4", layout="pp2 x tp2", run__export="true")
    summary = rank_pool.call(runs.train, again, True, ranks=4, timeout=120)[0]
    assert (summary["resumed_from"], summary["steps"]) == (2, 4)
    assert losses_of(configured)[:2] == pytest.approx(losses_of(whole)[:2], rel=1e-5)
    assert losses_of(configured)[3] < losses_of(configured)[0]
    assert runs.tensors(Path(summary["exported"])).keys() == runs.tensors(folder("qwen3")).keys()
    saved = json.loads(next(Path(configured.run.directory, "checkpoints").glob("step-*4/checkpoint.json")).read_text())
    assert saved["state"]["config"]["model"] == {"pretrained": str(source)}


@pytest.mark.parametrize("layout", ["single", *(pytest.param(x, marks=pytest.mark.slow) for x in ("pp2 x tp2", "tp2"))])
def test_a_carried_run_is_evaluated_in_any_layout(
    layout: str, folder: Callable[..., Path], run: Run, text: str, tmp_path: Path, capsys: Any, rank_pool: Any
) -> None:
    configured, summary = run(folder("qwen3"), "fsdp2 x tp2")
    moved = Path(shutil.copytree(configured.run.directory, tmp_path / "moved"))
    values = runs.as_values(configured, layout=layout, model__pretrained=str(moved / "checkpoints" / "pretrained"))
    world = Layout.parse(layout).world_size
    target = str(moved / "checkpoints" / "step-00000004")
    found = (
        runs.evaluate(target, values) if world == 1 else rank_pool.call(runs.evaluate, target, values, ranks=world)[0]
    )
    assert found["loss"] == pytest.approx(summary["held_out"]["loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(2.718281828459045 ** found["loss"])


def test_a_run_is_continued_by_transformers_generate(
    folder: Callable[..., Path], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    configured, summary = run(folder("qwen3"), "fsdp2 x tp2")
    directory, prompt = configured.run.directory, "line 3 of"
    model = transformers.AutoModelForCausalLM.from_pretrained(summary["exported"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(summary["exported"])
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    asked = ["generate", directory, "--layout", "single", "--prompt", prompt, "--tokens", "9", "--json"]
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=9, do_sample=False)[0][ids.shape[1] :])
    assert cli.main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["text"], found["tokens"]) == (prompt, wanted, 9)
    logits = model(torch.tensor([[*ids[0].tolist(), *tokenizer(wanted).input_ids]])).logits[0].double().log_softmax(-1)
    tokens = tokenizer(wanted).input_ids
    score = sum(logits[ids.shape[1] - 1 + n, token].item() for n, token in enumerate(tokens))
    assert found["log_likelihood"] == pytest.approx(score, rel=1e-4)
    assert cli.main([*asked[:3], "pp2", *asked[4:]]) == 0
    assert json.loads(capsys.readouterr().out) == {**found, "log_likelihood": pytest.approx(score, rel=1e-4)}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    kinds = {"good": "fox jumps over the dog", "bad": "five dozen jugs", "so-so": "black quartz"}
    lines = [f"{text} {n},{kind}" for n in range(30) for kind, text in kinds.items()]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_a_classifier_is_trained_on_a_folder_with_a_new_head(
    family: str, folder: Callable[..., Path], run: Run, reviews: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a language model, or of an encoder's; the layouts begin with one head, and export its labels."""
    source, asked = folder(family), {"task": "text_classification", "data__path": reviews, "training__steps": "8"}
    alone, first = run(source, "single", **asked)
    other, second = run(source, "fsdp2 x tp2", **asked)
    assert losses_of(other) == pytest.approx(losses_of(alone), rel=1e-4)
    assert second["held_out"]["loss"] == pytest.approx(first["held_out"]["loss"], rel=1e-4)
    if family == "qwen3":
        third = run(source, "pp2 x tp2", **asked)[0]
        assert losses_of(third) == pytest.approx(losses_of(alone), rel=1e-4)
    said = json.loads(Path(second["exported"], "config.json").read_text())
    assert said["id2label"] == {"0": "bad", "1": "good", "2": "so-so"} and "pad_token_id" in said
    model = transformers.AutoModelForSequenceClassification.from_pretrained(second["exported"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(second["exported"])
    lines = ["black quartz 3", "five dozen jugs"]
    with torch.no_grad():
        wanted = model(**tokenizer(lines, return_tensors="pt", padding=True)).logits.softmax(-1)
    found = answers(other.run.directory, lines)
    for row, scores in zip(wanted.tolist(), found, strict=True):
        assert list(scores["probabilities"].values()) == pytest.approx(row, rel=1e-3)


def answers(target: str, lines: list[str]) -> list[dict[str, Any]]:
    """What the model of a run says of lines, in one process."""
    values = runs.as_values(
        config.load(base=values_of(target)), layout="single", model__pretrained=f"{target}/checkpoints/pretrained"
    )
    return [answer.scores for answer in answer_rank(target, values, lines)]


def test_a_head_that_has_the_labels_keeps_their_order(
    folder: Callable[..., Path], reviews: str, tmp_path: Path
) -> None:
    source = folder("bert", kind=CLASSES, num_labels=3)
    path = Path(shutil.copytree(source, tmp_path / "source"))
    content = json.loads((path / "config.json").read_text())
    content["id2label"] = {"0": "so-so", "1": "good", "2": "bad"}
    (path / "config.json").write_text(json.dumps(content))
    asked = {"task": "text_classification", "training__dtype": "float32"}
    found = build_task(runs.settings(path, reviews, tmp_path / "run", **asked))
    assert found.metadata["labels"] == ["so-so", "good", "bad"]
    assert build_task(runs.settings(folder("bert"), reviews, tmp_path / "run", **asked)).metadata["labels"][0] == "bad"


@pytest.mark.slow
def test_a_safetensors_name_is_refused_for_a_folder(
    folder: Callable[..., Path], run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    configured, _ = run(folder("qwen3"), "fsdp2 x tp2")
    assert cli.main(["merge", configured.run.directory, "-o", str(tmp_path / "model.safetensors")]) == 2
    assert f"give '{tmp_path / 'model'}'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_runs_and_its_model_is_loaded_by_transformers(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(EXAMPLES / "fine_tune_pretrained.py"))
    asked = ["--text", text, "--steps", "2", "--out", str(tmp_path / "run")]
    assert script["main"](asked) == 0
    assert "A layout" in capsys.readouterr().out
