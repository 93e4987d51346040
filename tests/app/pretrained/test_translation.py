"""Sequence-to-sequence folders: samples as transformers makes them, and translations as its generate() finds them.

Layers: one process; 4 gloo ranks, among them a pipeline, over whose stages transformers' own loop goes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fusemesh.config import Config
from fusemesh.hybrid.layout import Layout
from fusemesh.pretrained.defaults import fine_tuning_defaults
from fusemesh.pretrained.tokenizer import FolderTokens
from fusemesh.run.predictor import answer_rank
from fusemesh.run.setup import config_of as values_of
from fusemesh.tasks.base import IGNORED
from fusemesh.tasks.registry import build_task
from fusemesh.tasks.translation import text_scores
from tests.support.pretrained import runs
from tests.support.pretrained.folders import PAIRS, PRETRAINED, TEXT, make_model, make_tokenizer

pytestmark = pytest.mark.distributed
FAMILIES = [name for name, made in PRETRAINED.items() if PAIRS in made.kinds]
# Of a folder's generation_config.json: what changes translations, and none of which is in the configuration of a run.
GENERATION = {"num_beams": 3, "no_repeat_ngram_size": 2, "bad_words_ids": [[0]], "min_new_tokens": 9}
MANY = {"num_return_sequences": 2}  # asked for by some, where an answer is one


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Words in some order, and in the order of the alphabet."""
    draw, words = random.Random(0), sorted({word for line in TEXT for word in line.split()})
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    chosen = [draw.sample(words, draw.randint(1, 4)) for _ in range(160)]
    path.write_text("source\ttarget\n" + "".join(f"{' '.join(some)}\t{' '.join(sorted(some))}\n" for some in chosen))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            model = make_model(name, PAIRS)
            with torch.no_grad():
                for parameter in model.parameters():
                    # By which translations of different texts differ.
                    parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
            model.generation_config.update(**GENERATION, **MANY)
            model.save_pretrained(made[name], max_shard_size="40KB")
            make_tokenizer().save_pretrained(made[name])
        return made[name]

    return find


def settings(folder: Path, pairs: str, directory: Path, **overrides: str) -> Config:
    given = {"task": "translation", "data__sequence_length": "24", "evaluation__samples": "6", **overrides}
    return runs.settings(folder, pairs, directory, **given)


def plain(name: str, folder: Path) -> tuple[Any, Any]:
    return (
        transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_those_of_transformers(name: str, folder: Any, pairs: str, tmp_path: Path) -> None:
    """The decoder begins with the model's own token, and sees what transformers makes of the labels."""
    task = build_task(settings(folder(name), pairs, tmp_path, data__sequence_length="64"))
    model, tokenizer = plain(name, folder(name))
    sources, targets = zip(*(line.split("\t") for line in Path(pairs).read_text().splitlines()[1:]), strict=True)
    batch = task.train.batch(range(len(task.train)))
    pairs_of = zip(batch.tokens.tolist(), batch.inputs["lengths"], strict=True)
    found = {tuple(row[:length]): number for number, (row, length) in enumerate(pairs_of)}
    hits = 0
    for source, target in zip(sources, targets, strict=True):
        at = found.get(tuple(tokenizer(source)["input_ids"]))
        if at is None:
            continue  # held out
        labels = tokenizer(text_target=target)["input_ids"]
        labels = labels if labels[-1:] == [2] else [*labels, 2]
        own = batch.targets[at]
        assert own[: len(labels)].tolist() == labels and (own[len(labels) :] == IGNORED).all()
        seen = model.prepare_decoder_input_ids_from_labels(torch.tensor([labels]))[0]
        assert batch.inputs["target_tokens"][at][: len(labels)].tolist() == seen.tolist()
        hits += 1
    assert hits > 100


def test_targets_have_a_vocabulary_of_their_own(tmp_path: Path) -> None:
    """As Marian's: SentencePiece files of both languages. By transformers' labels, and back to the text."""
    import sentencepiece

    texts = {"source": ["nine dogs run", "ten cats sleep", "no fox"], "target": ["neuf chiens", "dix chats", "rien"]}
    pieces = {"</s>": 0, "<unk>": 1}
    for side, lines in texts.items():
        options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 20), model_prefix=str(tmp_path / side), **options
        )
        model = sentencepiece.SentencePieceProcessor(str(tmp_path / f"{side}.model"))
        for number in range(3, model.get_piece_size()):
            pieces.setdefault(model.id_to_piece(number), len(pieces))
    pieces["<pad>"] = len(pieces)
    (tmp_path / "vocab.json").write_text(json.dumps(pieces))
    files = (tmp_path / "source.model", tmp_path / "target.model", tmp_path / "vocab.json")
    plain = transformers.MarianTokenizer(*map(str, files), source_lang="en", target_lang="fr")
    pad = pieces["<pad>"]
    sizes = {"vocab_size": len(pieces), "pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0}
    make_model("marian", PAIRS, **sizes).save_pretrained(tmp_path / "marian")
    plain.save_pretrained(tmp_path / "marian")
    tokens = FolderTokens(str(tmp_path / "marian"))
    assert (tokens.begin, tokens.pad, tokens.ends) == (pad, pad, [0])
    rows, lengths = tokens.targets(texts["target"], 60)
    assert rows == plain(text_target=texts["target"])["input_ids"] and lengths == [len(row) for row in rows]
    assert rows != plain(texts["target"])["input_ids"], "the vocabularies are one, and nothing is shown"
    assert tokens.whole(texts["source"], 60)[0] == plain(texts["source"])["input_ids"]
    assert [tokens.target_text(np.array([*row, pad, pad])) for row in rows] == texts["target"]


def translated(values: dict[str, Any], lines: list[str]) -> list[Any]:
    """One rank's part of translating lines by a run's last checkpoint."""
    target = values["run"]["directory"]
    return answer_rank(target, {**values_of(target), "layout": values["layout"]}, lines)


LAYOUTS = ["single", *(pytest.param(x, marks=pytest.mark.slow) for x in ("pp2 x tp2", "fsdp2 x tp2", "dp2 x pp2"))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["t5", *(pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES if x != "t5")])
def test_translations_are_those_of_transformers(
    layout: str, name: str, folder: Any, pairs: str, rank_pool: Any, tmp_path: Path
) -> None:
    """Of the exported folder, by its generation_config.json, with beams; and so are the metrics."""
    configured = settings(
        folder(name), pairs, tmp_path / "run", layout=layout, training__steps="2", training__learning_rate="1e-3"
    )
    assert configured.evaluation.num_beams == 3
    values, world = runs.as_values(configured), Layout.parse(layout).world_size
    task = build_task(configured)
    records = task.held_out_records[:6]  # type: ignore[attr-defined]
    lines = [record.values[0] for record in records]
    if world == 1:
        summary, answers = runs.train(values), translated(values, lines)
    else:
        summary = rank_pool.call(runs.train, values, False, ranks=world, timeout=180)[0]
        answers = rank_pool.call(translated, values, lines, ranks=world, timeout=180)[0]
    model, tokenizer = plain(name, summary["exported"])
    assert json.loads(Path(summary["exported"], "generation_config.json").read_text())["no_repeat_ngram_size"] == 2
    wanted = []
    for line in lines:
        ids = tokenizer(line, return_tensors="pt")["input_ids"][:, :24]
        row = model.generate(ids, max_new_tokens=24, num_return_sequences=1)[0, 1:]
        wanted.append(tokenizer.decode(row, skip_special_tokens=True).strip())
    assert len(set(wanted)) > 1
    assert [answer.text for answer in answers] == wanted
    scores = text_scores(wanted, [record.values[1] for record in records])
    assert {key: summary["held_out"][key] for key in scores} == pytest.approx(scores, abs=1e-9)


def test_defaults_are_the_folders(folder: Any, pairs: str, tmp_path: Path) -> None:
    values = {"task": "translation", "model.pretrained": str(folder("t5"))}
    assert fine_tuning_defaults(values)["evaluation.num_beams"] == 3
    assert settings(folder("t5"), pairs, tmp_path, evaluation__num_beams="1").evaluation.num_beams == 1
    # As long as the longest record, with its end.
    length = build_task(settings(folder("t5"), pairs, tmp_path, data__sequence_length="0")).config.data.sequence_length
    assert 24 < length <= 64 and length % 16 == 0


def test_a_model_without_a_first_token_is_refused(folder: Any, pairs: str, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(folder("t5"), tmp_path / "t5"))
    for file in ("config.json", "generation_config.json"):
        content = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps({**content, "decoder_start_token_id": None}))
    with pytest.raises(ValueError, match=r"expected decoder_start_token_id.*received none"):
        build_task(settings(path, pairs, tmp_path / "run"))


def test_long_targets_keep_their_end(folder: Any, pairs: str, tmp_path: Path) -> None:
    task = build_task(settings(folder("bart"), pairs, tmp_path, data__sequence_length="8"))
    batch = task.train.batch(range(len(task.train)))
    last = np.array([row[row != IGNORED][-1] for row in batch.targets])
    assert (last == 2).all() and "are cut at data.sequence_length = 8 tokens" in task.say_cuts("train")
