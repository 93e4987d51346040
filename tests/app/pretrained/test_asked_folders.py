"""Layers: one process; 4 gloo ranks. An exported folder is asked and evaluated as the run that wrote it, in any layout,
and answers as transformers' own pipelines do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from fusemesh import cli, config
from fusemesh.hybrid.layout import Layout
from fusemesh.run.evaluator import evaluate_rank
from fusemesh.run.folder import config_of_folder
from fusemesh.run.predictor import Answer, answer_rank
from fusemesh.tasks.records import read_records
from fusemesh.tasks.registry import with_length
from tests.support.pretrained import runs
from tests.support.pretrained.folders import CLASSES, SPANS, make_folder

pytestmark = pytest.mark.distributed
LINES = ["black quartz 3", "five dozen jugs and the dog", "fox", ""]
LAYOUTS = ["single", "tp2", "fsdp2", "dp2 x tp2", "pp2 x tp2"]
METRICS = ("accuracy", "macro_f1", "samples", "targets")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    kinds = {"good": "fox jumps over the dog", "bad": "five dozen jugs", "so-so": "black quartz"}
    lines = [f"{text} {n},{kind}" for n in range(30) for kind, text in kinds.items()]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, reviews: str) -> tuple[Any, Path]:
    """A run of a classifier whose configuration chose the length of samples, and the folder that it wrote."""
    source = make_folder(tmp_path_factory.mktemp("llama"), "llama", initializer_range=0.3)
    asked = {"task": "text_classification", "data__sequence_length": "0", "evaluation__samples": "0"}
    directory = tmp_path_factory.mktemp("run") / "run"
    configured = runs.settings(
        source, reviews, directory, training__steps="30", training__learning_rate="1e-3", **asked
    )
    configured = with_length(configured)
    exported = runs.train(runs.as_values(configured))["exported"]
    # Where the source was is nobody's to know.
    shutil.rmtree(source)
    return configured, Path(exported)


def values_of(folder: Path, *, reads_data: bool = False, **given: str) -> dict[str, Any]:
    """What ranks are given of a folder."""
    dotted = {"run.device": "cpu", **{key.replace("__", "."): value for key, value in given.items()}}
    return config.as_dict(config_of_folder(str(folder), dotted, reads_data=reads_data))


def of_run(configured: Any, layout: str) -> tuple[str, dict[str, Any]]:
    """The run's checkpoint, and what ranks are given of it."""
    kept = Path(configured.run.directory, "checkpoints")
    values = runs.as_values(configured, layout=layout, model__pretrained=str(kept / "pretrained"))
    return str(next(kept.glob("step-*"))), values


def on_ranks(rank_pool: Any, layout: str, function: Callable[..., Any], *arguments: Any) -> Any:
    world = Layout.parse(layout).world_size
    return function(*arguments) if world == 1 else rank_pool.call(function, *arguments, ranks=world)[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_answers_as_its_run_and_as_a_pipeline(layout: str, trained: Any, rank_pool: Any) -> None:
    configured, folder = trained
    target, values = of_run(configured, layout)
    wanted: list[Answer] = on_ranks(rank_pool, layout, answer_rank, target, values, LINES)
    found: list[Answer] = on_ranks(rank_pool, layout, answer_rank, str(folder), values_of(folder, layout=layout), LINES)
    assert found == wanted and len({answer.text for answer in found}) > 0
    pipeline = transformers.pipeline("text-classification", str(folder), top_k=None, device="cpu")
    for answer, theirs in zip(found, pipeline(LINES[:3]), strict=False):
        assert answer.text == theirs[0]["label"]
        assert answer.scores["probabilities"] == pytest.approx({x["label"]: x["score"] for x in theirs}, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_evaluated_as_its_run(layout: str, trained: Any, reviews: str, rank_pool: Any) -> None:
    configured, folder = trained
    wanted = on_ranks(rank_pool, layout, evaluate_rank, *of_run(configured, layout))
    values = values_of(folder, reads_data=True, data__path=reviews, layout=layout)
    assert values["data"]["sequence_length"] == configured.data.sequence_length
    values["evaluation"]["batch_size"] = configured.evaluation.batch_size
    found = on_ranks(rank_pool, layout, evaluate_rank, str(folder), values)
    assert {key: found[key] for key in ("loss", *METRICS)} == {key: wanted[key] for key in ("loss", *METRICS)}
    assert "step" not in found and "majority_accuracy" not in found


@pytest.mark.slow
def test_every_layout_gives_the_same_answers_to_the_same_records(trained: Any, reviews: str, rank_pool: Any) -> None:
    _, folder = trained
    lines = [record.values[0] for record in read_records(reviews, ("text", "label"))]
    found = {
        layout: [
            answer.text
            for answer in on_ranks(rank_pool, layout, answer_rank, str(folder), values_of(folder, layout=layout), lines)
        ]
        for layout in ("single", "tp2", "fsdp2", "pp2 x tp2")
    }
    assert all(answers == found["single"] for answers in found.values()) and len(set(found["single"])) > 1
    pipeline = transformers.pipeline("text-classification", str(folder), device="cpu")
    assert [one["label"] for one in pipeline(lines)] == found["single"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {0: "bad", 1: "good", 2: "so-so"}
    return make_folder(tmp_path_factory.mktemp("classifier"), "bert", CLASSES, id2label=labels)


def test_the_commands_take_a_folder(classifier: Path, reviews: str, capsys: Any, monkeypatch: Any) -> None:
    pipeline = transformers.pipeline("text-classification", str(classifier), top_k=None, device="cpu")
    monkeypatch.setattr("sys.stdin", iter([f"{line}\n" for line in LINES]))
    assert cli.main(["predict", str(classifier), "--run.device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    theirs = pipeline(LINES[:3])
    assert found["answers"][:3] == [scores[0]["label"] for scores in theirs]
    for score, wanted in zip(found["scores"], theirs, strict=False):
        assert score["probabilities"] == pytest.approx({x["label"]: x["score"] for x in wanted}, abs=1e-6)
    assert cli.main(["eval", str(classifier), "--data.held_out", reviews, "--run.device", "cpu"]) == 0
    assert "over 90 samples" in capsys.readouterr().out


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), "llama")


def generated(folder: Path, prompt: str, tokens: int) -> list[int]:
    """What plain transformers adds."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    found: list[int] = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0][ids.shape[1] :].tolist()
    return found


def test_a_folder_is_continued_as_transformers_does_up_to_its_end(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, tokenizer = "line 3 of", transformers.AutoTokenizer.from_pretrained(decoder)
    asked = ["--prompt", prompt, "--tokens", "9", "--run.device", "cpu"]
    added = generated(decoder, prompt, 9)
    assert cli.main(["generate", str(decoder), *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == tokenizer.decode(added)
    # Another token ends texts, as generation_config.json alone says, which also asks to sample.
    ending = next(token for token in added if token != added[0])
    place = added.index(ending)
    other = Path(shutil.copytree(decoder, tmp_path / "ending"))
    transformers.GenerationConfig(eos_token_id=[2, ending], do_sample=True, temperature=9.0).save_pretrained(other)
    assert generated(other, prompt, 9) == added[: place + 1]
    assert cli.main(["generate", str(other), *asked]) == 0
    assert capsys.readouterr().out == prompt + tokenizer.decode(added[:place]) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "fsdp2"])
def test_a_folder_is_continued_the_same_in_every_layout(
    layout: str, decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(decoder), "--prompt", "The quick", "--tokens", "20", "--run.device", "cpu", "--json"]
    assert cli.main([*asked, "--layout", layout]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    wanted = tokenizer.decode(generated(decoder, "The quick", 20), skip_special_tokens=True)
    assert json.loads(capsys.readouterr().out)["text"] == wanted


def test_wrong_folders_are_refused(
    classifier: Path, decoder: Path, reviews: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    weights = Path(shutil.copytree(decoder, tmp_path / "weights"))
    (weights / "config.json").unlink()
    bare = Path(shutil.copytree(decoder, tmp_path / "bare"))
    for file in bare.glob("*.safetensors*"):
        file.unlink()
    headless = make_folder(tmp_path / "headless", "bert", SPANS)
    independent = make_folder(tmp_path / "several", "bert", CLASSES, problem_type="multi_label_classification")
    cases = [
        (["predict", tmp_path / "empty"], "a folder with none of these files; give the --out of a training"),
        (["predict", weights], "a folder with *.safetensors alone"),
        (["predict", bare], "safetensors"),
        (["predict", headless, "--task", "text_classification"], "without such a head"),
        (["predict", independent], "problem_type 'multi_label_classification'"),
        (["predict", classifier, "--from-step", "3"], f"received the folder '{classifier}', which holds one model"),
        (["predict", classifier, "--model.pretrained", decoder], "leave it out"),
        (["generate", classifier, "--prompt", "fox"], "use fusemesh predict"),
        (["eval", classifier], "give --data.held_out FILE for all of its records"),
        (["eval", classifier, "--data.held_out", decoder / "config.json"], "config.json"),
    ]
    capsys.readouterr()
    for words, message in cases:
        assert cli.main([*map(str, words), "--run.device", "cpu"]) == 2, words
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, (words, said)
