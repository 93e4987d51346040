"""A pretrained folder as the model of a run: keys, defaults, refusals, tokens. Layer: one process, before ranks."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusemesh import cli, config
from fusemesh.config import Config, TrainingConfig
from fusemesh.hybrid.hugging_face.exports.documents import keep_small_files
from fusemesh.models.registry import maker_of
from fusemesh.pretrained import folder as folders
from fusemesh.pretrained.tokenizer import FolderTokens
from fusemesh.run.checks import prepare
from fusemesh.run.optimizer import learning_rate
from fusemesh.run.settings import Settings, load_config
from fusemesh.tasks.language_model import LanguageModel
from fusemesh.tasks.registry import build_task, with_length
from tests.support import tiny_run
from tests.support.pretrained.folders import CLASSES, PAIRS, PRETRAINED, SPANS, TEXT, VOCABULARY, make_folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_run.write_text(tmp_path_factory.mktemp("text") / "documents")


def configured(path: Path | str, **given: str) -> Config:
    dotted = {key.replace("__", "."): value for key, value in given.items()}
    return load_config(None, {"model.pretrained": str(path), **dotted})


def copied(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to))


def edited(path: Path, file: str = "config.json", **values: Any) -> None:
    content = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**content, **values}))


# Keys


def test_sizes_are_refused_by_name_and_the_configuration_loads_back_equal(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.num_layers: expected nothing with model\.pretrained.*received 4"):
        configured(qwen, model__num_layers="4")
    with pytest.raises(ValueError, match=r"leave model\.num_layers and model\.rope_theta out"):
        configured(qwen, model__num_layers="2", model__rope_theta="1e6")
    found = configured(qwen)
    config.save(found, tmp_path / "config.toml")
    assert "num_layers" not in (tmp_path / "config.toml").read_text()
    assert load_config(tmp_path / "config.toml") == found == load_config(base=config.as_dict(found))


def test_defaults_are_those_of_fine_tuning_and_give_way(qwen: Path, tmp_path: Path) -> None:
    training = configured(qwen, training__steps="50").training
    assert (training.learning_rate, training.min_learning_rate, training.schedule) == (2e-5, 0.0, "linear")
    assert (training.weight_decay, training.warmup_steps, training.dtype) == (0.01, 5, "float32")
    assert configured(qwen, data__path="texts").data.sequence_length == 0
    (tmp_path / "own.toml").write_text("[training]\nwarmup_steps = 3\n")
    given = {"model.pretrained": str(qwen), "training.weight_decay": "0.2", "training.schedule": "cosine"}
    own = load_config(tmp_path / "own.toml", given).training
    assert (own.warmup_steps, own.weight_decay, own.schedule, own.learning_rate) == (3, 0.2, "cosine", 2e-5)
    assert load_config().training == TrainingConfig()


def test_compute_follows_the_weights_on_disk(tmp_path: Path) -> None:
    """And not config.json, which may say another dtype."""
    folder = make_folder(tmp_path / "bf16", "llama", dtype=torch.bfloat16)
    assert configured(folder).training.dtype == "bfloat16"
    assert configured(folder, training__dtype="fp32").training.dtype == "float32"
    edited(make_folder(tmp_path / "fp32", "llama"), dtype="bfloat16")
    assert configured(tmp_path / "fp32").training.dtype == "float32"


def test_a_linear_schedule_ends_behind_the_last_step() -> None:
    training = TrainingConfig(steps=10, warmup_steps=2, learning_rate=1.0, min_learning_rate=0.0, schedule="linear")
    rates = [learning_rate(training, step) for step in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0])


def test_epochs_decide_the_warm_up_too(qwen: Path, text: str, tmp_path: Path, monkeypatch: Any) -> None:
    from fusemesh.commands import train

    seen: list[Config] = []
    monkeypatch.setattr(train, "_run", lambda configured, options: seen.append(configured))
    options = cli.parse(
        [*("train", "language_model", "--model.pretrained", str(qwen), "--data.path", text, "--epochs", "9"),
         *("--batch-size", "4", "--data.sequence_length", "16", "--quiet")]
    )  # fmt: skip
    train.run(options)
    assert seen[0].training.steps > 200
    assert seen[0].training.warmup_steps == seen[0].training.steps // 10


def test_the_start_says_the_settings(qwen: Path) -> None:
    line = maker_of(configured(qwen, training__steps="50", data__sequence_length="64")).say_settings()
    for part in ("learning rate 2e-05", "5 steps of warm-up", "linear to 0", "weight decay 0.01", "64 tokens a sample"):
        assert part in line
    assert maker_of(load_config()).say_settings() == ""


@pytest.mark.parametrize("name", PRETRAINED)
def test_sizes_that_a_layout_must_fit_are_the_folders(name: str, tmp_path: Path) -> None:
    made = PRETRAINED[name].make_config()
    made.save_pretrained(tmp_path)
    found = maker_of(Config(model=config.ModelConfig(pretrained=str(tmp_path)))).sizes(1)
    wide = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"}
    assert found == {
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 1 if name in wide else 2 if name == "phi3" else 4,
        **({} if name == "gpt2" else {"intermediate_size": 56}),
        "sequence_parallel": False,
    }
    longest = maker_of(Config(model=config.ModelConfig(pretrained=str(tmp_path)))).longest
    assert longest == {"bert": 66, "roberta": 65, "t5": 2**20}.get(name, 64)


# Refusals, each before a rank starts


def refusal(path: Path | str, tmp_path: Path, world: int = 1, **given: str) -> str:
    with pytest.raises(ValueError) as found:
        made = with_length(configured(path, run__directory=str(tmp_path / "run"), **given))
        prepare(made, world, resume=None)
    assert not (tmp_path / "run").exists()
    return str(found.value)


def test_what_is_no_folder_is_refused(tmp_path: Path, text: str) -> None:
    assert "hf download Qwen/Qwen3-0.6B" in refusal("Qwen/Qwen3-0.6B", tmp_path, data__path=text)
    (tmp_path / "empty").mkdir()
    assert "model.pretrained: " in refusal(tmp_path / "empty", tmp_path, data__path=text)
    assert "config.json" in refusal(tmp_path / "empty", tmp_path, data__path=text, training__dtype="float32")


def test_a_layout_that_does_not_fit_the_folder_is_refused(qwen: Path, text: str, tmp_path: Path) -> None:
    assert "num_heads: 4 heads cannot be split over tp3" in refusal(qwen, tmp_path, 3, data__path=text, layout="tp3")
    assert "4 layers cannot be dealt to pp8" in refusal(qwen, tmp_path, 8, data__path=text, layout="pp8")


@pytest.mark.parametrize(
    ("family", "kind", "task", "message"),
    [
        ("qwen3", None, "translation", "its own task is language_model"),
        ("t5", PAIRS, "language_model", "its own task is translation"),
        ("qwen3", CLASSES, "language_model", "whose head is another; its own task is text_classification"),
        ("gpt2", SPANS, "language_model", "whose head is another; its own task is question_answering"),
    ],
)
def test_a_task_that_the_model_does_not_fit_is_refused(
    family: str, kind: str | None, task: str, message: str, text: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "folder", family, kind)
    records = tmp_path / "pairs.tsv"
    records.write_text("source\ttarget\n" + "".join(f"a{n}\tb{n}\n" for n in range(40)))
    path = text if task == "language_model" else str(records)
    assert message in refusal(folder, tmp_path, task=task, data__path=path)


def test_an_encoder_is_no_language_model(tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path / "bert", "bert")
    edited(folder, is_decoder=False, architectures=["BertForMaskedLM"])
    assert "without is_decoder, whose tokens see those behind them" in refusal(folder, tmp_path, data__path=text)


def test_tokenizers_that_cannot_serve_are_refused(qwen: Path, text: str, tmp_path: Path) -> None:
    without = copied(qwen, tmp_path / "without")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (without / name).unlink()
    assert "expected the files of a tokenizer beside" in refusal(without, tmp_path, data__path=text)
    endless = copied(qwen, tmp_path / "endless")
    edited(endless, "tokenizer_config.json", eos_token=None)
    assert "neither eos_token nor sep_token" in refusal(endless, tmp_path, data__path=text)
    small = make_folder(tmp_path / "small", "llama", vocab_size=50)
    assert "at most 50 tokens" in refusal(small, tmp_path, data__path=text)


def test_damaged_and_foreign_weights_are_refused_by_the_files_name(qwen: Path, text: str, tmp_path: Path) -> None:
    short = copied(qwen, tmp_path / "short")
    shard = next(short.glob("model-00002-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refusal(short, tmp_path, data__path=text)
    assert message.startswith("model.pretrained: ") and shard.name in message and "truncated" in message
    other = copied(qwen, tmp_path / "other")
    edited(other, intermediate_size=60)
    message = refusal(other, tmp_path, data__path=text)
    assert message.startswith("model.pretrained: ") and "mlp" in message and "60" in message
    headless = make_folder(tmp_path / "headless", "llama")
    edited(headless, "model.safetensors.index.json", weight_map=without_head(headless))
    assert "lm_head.weight" in refusal(headless, tmp_path, data__path=text)


def without_head(path: Path) -> dict[str, str]:
    """Take the head out of a folder's files; return its index's map."""
    from safetensors.torch import load_file, save_file

    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    file = path / index.pop("lm_head.weight")
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    if not tensors:
        file.unlink()
    return dict(index)


def test_samples_beyond_the_models_positions_are_refused(qwen: Path, text: str, tmp_path: Path) -> None:
    message = refusal(qwen, tmp_path, data__path=text, data__sequence_length="65")
    assert "data.sequence_length: expected at most 64" in message and "received 65" in message


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ValueError, match=r"expected transformers 5\.20 or later, received 4\.57\.1; pip install"):
        folders.check_version()
    for version in ("5.20.0", "6.0.dev1"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        folders.check_version()


# Ranks


def test_ranks_compare_the_folders_content_and_not_its_place(qwen: Path, tmp_path: Path) -> None:
    other = copied(qwen, tmp_path / "other")
    entries = [maker_of(configured(path)).entries() for path in (qwen, other)]
    assert entries[0] == entries[1]
    edited(other, rope_theta=3.0)
    assert maker_of(configured(other)).entries() != entries[0]
    assert maker_of(configured(make_folder(tmp_path / "a", "qwen3", dtype=torch.bfloat16))).entries() != entries[0]


def test_a_run_keeps_the_small_files_byte_for_byte(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "pretrained").mkdir(parents=True)
    (tmp_path / "run" / "pretrained" / "stale.json").write_text("{}")
    source = copied(qwen, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    maker = maker_of(configured(source))
    maker.keep(tmp_path / "run")
    kept = tmp_path / "run" / "pretrained"
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in kept.iterdir()} >= names
    assert not list(kept.glob("*.safetensors")) and not (kept / "stale.json").exists()
    for name in names:
        assert (kept / name).read_bytes() == (source / name).read_bytes()
    found = maker.found_in(tmp_path / "run")
    assert found.model.pretrained == str(kept) and maker.found_in(tmp_path / "absent") == maker.config


# Tokens


def test_documents_become_windows_of_the_tokenizers_tokens(qwen: Path, text: str) -> None:
    found = with_length(configured(qwen, data__path=text, data__sequence_length="16"))
    task, tokenizer = build_task(found), transformers.AutoTokenizer.from_pretrained(qwen)
    assert isinstance(task, LanguageModel)
    train = task.train
    assert train.targets_in([0, 3]) == 32
    batch = train.batch(range(len(train)))
    assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    # All documents and no text twice: what the stream says is what the files say, an end behind each.
    stream = [batch.tokens[0, 0], *batch.targets.ravel()]
    documents = tokenizer.decode(stream).split("</s>")
    files = [tokenizer.decode(tokenizer(path.read_text())["input_ids"]) for path in Path(text).iterdir()]
    assert set(documents[:-1]) <= set(files)
    assert len(documents) > 40 and len(set(documents)) == len(documents)
    again = build_task(found).train.batch(range(len(train)))
    assert np.array_equal(again.tokens, batch.tokens)
    held = tokenizer.decode(build_task(found).held_out.batch(range(3)).tokens.ravel())
    assert held[:30] not in "".join(documents)


def test_the_length_follows_the_model_and_the_text(qwen: Path, text: str, tmp_path: Path) -> None:
    assert with_length(configured(qwen, data__path=text)).data.sequence_length == 64
    (tmp_path / "short.txt").write_text("".join(f"one two {n}\n" for n in range(4)))
    assert with_length(configured(qwen, data__path=str(tmp_path / "short.txt"))).data.sequence_length == 32


def test_a_document_has_one_end_and_a_prompt_none(qwen: Path) -> None:
    tokens = FolderTokens(str(qwen))
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
    rows = tokens.encode(TEXT)
    assert [row.count(tokens.end) for row in rows] == [1, 1, 1] and [row[-1] for row in rows] == [tokens.end] * 3
    assert tokenizer.decode(rows[0][:-1]) == TEXT[0]
    assert tokens.prompt(TEXT[0], 1000) == rows[0][:-1] and tokens.prompt(TEXT[0], 5) == rows[0][-6:-1]
    assert tokens.prompt("", 5) == [tokens.end] and tokens.line(TEXT[0], 4) == (rows[0][:4], len(rows[0]) - 1)
    assert len(tokens.line_ends) < VOCABULARY and tokens.end in tokens.line_ends


def test_characters_of_several_tokens_are_told_whole(qwen: Path, tmp_path: Path) -> None:
    every_byte = {
        letter: number for number, letter in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    made = Tokenizer(models.BPE(vocab=every_byte, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    shutil.copyfile(qwen / "config.json", tmp_path / "config.json")
    edited(tmp_path, vocab_size=300)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
    tokens = FolderTokens(str(tmp_path))
    decode, pieces = tokens.decoder(), []
    row = tokens.prompt("fox € ok", 100)
    for number, token in enumerate(row):
        pieces.append(decode([token], number == len(row) - 1))
    assert "".join(pieces) == "fox € ok" and "€" in pieces and len(row) > 4


def test_settings_check_reads_no_weights(qwen: Path, tmp_path: Path) -> None:
    """As an evaluation of a run whose source has gone."""
    small = keep_small_files(qwen, tmp_path)
    found = configured(small, training__dtype="float32", data__sequence_length="16", layout="tp2")
    Settings.of(found).check(2)
    assert maker_of(found).entries().keys() == {"model.pretrained"}
    assert dataclasses.replace(found, layout="single").model == found.model
