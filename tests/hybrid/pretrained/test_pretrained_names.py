"""Distributed layer: names of folders and models that differ, ties, heads that a folder lacks, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", minversion="5.20")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from fusemesh.hybrid.hugging_face.folder import WEIGHTS, read_folder  # noqa: E402
from fusemesh.hybrid.hugging_face.load import load_pretrained  # noqa: E402
from fusemesh.hybrid.hugging_face.ties import untie_as_saved  # noqa: E402
from fusemesh.hybrid.ranks.testing import RankPool  # noqa: E402
from tests.support.pretrained.folders import CAUSAL, CLASSES, PAIRS, PRETRAINED, SPANS, make_folder, make_model  # noqa: E402
from tests.support.ranks import pretrained_load as ranks  # noqa: E402

Tensors = dict[str, torch.Tensor]


def saved(path: Path, name: str, kind: str | None = None, change: Callable[[Tensors], Any] | None = None) -> Path:
    """A folder of one file, in which ``change`` may rename, add or drop tensors."""
    make_folder(path, name, kind, shard="10MB")
    if change is not None:
        held = load_file(path / WEIGHTS)
        change(held)
        save_file(held, path / WEIGHTS, {"format": "pt"})
    return path


def loaded(path: Path, kind: str, **options: Any) -> tuple[Any, Any]:
    """The model on meta and its report."""
    model = ranks.on_meta(str(path), kind)
    return model, load_pretrained(model, path, **options)


def theirs(path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    return getattr(transformers, kind).from_pretrained(path, output_loading_info=True)


def told(path: Path, kind: str) -> str:
    with pytest.raises(ValueError) as raised:
        loaded(path, kind)
    return str(raised.value)


def rename(held: Tensors, old: str, new: str) -> None:
    for name in [name for name in held if old in name]:
        held[name.replace(old, new)] = held.pop(name)


def as_theirs(path: Path, kind: str) -> Any:
    """Load, and hold names and values against from_pretrained's; return the report."""
    (want, info), (got, report) = theirs(path, kind), loaded(path, kind)
    assert set(report.missing) == info["missing_keys"] and set(report.unexpected) == info["unexpected_keys"]
    assert set(ranks.differing(want, got)) <= set(report.newly_initialised)
    return report


def old_norms(held: Tensors) -> None:
    for now, old in (("weight", "gamma"), ("bias", "beta")):
        rename(held, f"LayerNorm.{now}", f"LayerNorm.{old}")


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("bert", SPANS, old_norms),
        ("bert", SPANS, lambda held: held.update({"bert.embeddings.position_ids": torch.arange(66)})),
        ("qwen3", CAUSAL, lambda held: rename(held, "model.embed_tokens", "lm_head")),
        ("qwen3", CAUSAL, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()})),
        ("qwen3", CAUSAL, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
        ("qwen3", CAUSAL, lambda held: held.update({"value_head.weight": torch.ones(8)})),
        ("gpt2", CAUSAL, lambda held: held.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)})),
        ("gpt2", CAUSAL, lambda held: rename(held, "transformer.", "")),
        ("t5", PAIRS, lambda held: rename(held, "shared", "decoder.embed_tokens")),
        ("marian", PAIRS, lambda held: held.pop("final_logits_bias")),
    ],
)  # fmt: skip
def test_names_are_matched_as_from_pretrained_does(tmp_path: Path, name: str, kind: str, change: Any) -> None:
    report = as_theirs(saved(tmp_path, name, kind, change), kind)
    assert report.missing == () and report.unexpected in ((), ("value_head.weight",))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_every_family_between_bodies_and_heads(tmp_path: Path, name: str) -> None:
    first = PRETRAINED[name].kinds[0]
    whole, body = saved(tmp_path / "whole", name), tmp_path / "body"
    make_model(name).base_model.save_pretrained(body)
    for path in (whole, body):
        for kind in (*PRETRAINED[name].kinds, "AutoModel"):
            if not (path is whole and kind == SPANS and first == CAUSAL and name in ("llama", "qwen2", "qwen3")):
                as_theirs(path, kind)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_body_under_another_name_is_found_where_from_pretrained_draws_all_at_random(
    tmp_path: Path, name: str
) -> None:
    """Llama's model for spans calls ``model`` ``transformer``."""
    path = saved(tmp_path, name)
    assert len(theirs(path, SPANS)[1]["missing_keys"]) > 10
    model, report = loaded(path, SPANS)
    assert report.missing == ("qa_outputs.weight", "qa_outputs.bias")
    want, _ = theirs(path, CAUSAL)
    assert all(torch.equal(a, b) for a, b in zip(model.transformer.parameters(), want.model.parameters(), strict=True))


def test_two_tensors_that_are_tied_must_be_equal_or_the_weights_are_not_tied(
    tmp_path: Path, rank_pool: RankPool
) -> None:
    """As from_pretrained decides; T5 v1.1's config always says tied, as transformers reads it."""

    def split(held: Tensors) -> None:
        held["lm_head.weight"] = held["shared.weight"] + 1

    path = saved(tmp_path / "t5", "t5", PAIRS, split)
    (want, _), (got, report) = theirs(path, PAIRS), loaded(path, PAIRS)
    assert ranks.differing(want, got) == [] and report.missing == report.unexpected == ()
    assert got.lm_head.weight is not got.shared.weight and got.encoder.embed_tokens.weight is got.shared.weight
    assert report.tied == (("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),)
    # On a mesh it is too late to untie.
    for said, _ in rank_pool.run(ranks.refusals, "fsdp2", str(path), PAIRS, "", ranks=2):
        assert "expected equal tensors 'shared.weight' and 'lm_head.weight', which are tied in the model" in said
        assert "set tie_word_embeddings to false in config.json, or call untie_as_saved(model, folder) before" in said
    model = ranks.on_meta(str(path), PAIRS)
    assert untie_as_saved(model, read_folder(path)) == ["lm_head.weight"]
    assert untie_as_saved(model, read_folder(path)) == []

    # One row of a hundred is looked at before; loading sees all.
    def one_row(held: Tensors) -> None:
        held["lm_head.weight"] = held["shared.weight"].clone()
        held["lm_head.weight"][0, 0] += 1

    assert "expected equal tensors" in told(saved(tmp_path / "row", "t5", PAIRS, one_row), PAIRS)


def test_a_weight_that_the_config_does_not_tie_is_read_by_itself(tmp_path: Path) -> None:
    """And one that is tied in the file and not in the config is new: reported, and drawn."""
    path = saved(tmp_path, "llama")
    got, report = loaded(path, CAUSAL)
    assert report.tied == () and got.lm_head.weight is not got.model.embed_tokens.weight
    held = load_file(path / WEIGHTS)
    del held["lm_head.weight"]
    save_file(held, path / WEIGHTS, {"format": "pt"})
    assert as_theirs(path, CAUSAL).newly_initialised == ("lm_head.weight",)


def test_a_model_whose_ties_are_broken_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, "qwen3")
    model = ranks.on_meta(str(path), CAUSAL).to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"expected 'model\.embed_tokens\.weight' and 'lm_head\.weight' to be one"):
        load_pretrained(model, path)
    model.tie_weights()
    load_pretrained(model, path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("model.layers.1.mlp.up_proj.weight"), "received none for 1 of its names on disk: 'mo"),
        (lambda held: held.pop("model.embed_tokens.weight"), "'model.embed_tokens.weight'"),
        (lambda held: held.pop("model.norm.weight"), "'model.norm.weight'; the files are of another"),
        (
            lambda held: held.update({"model.norm.weight": torch.ones(48)}),
            "'model.norm.weight' of model.safetensors: expected shape [40], received [48]; take all files",
        ),
        (
            lambda held: held.update({"model.norm.weight": torch.ones(40, dtype=torch.int8)}),
            "'model.norm.weight' of model.safetensors: expected torch.float32, received torch.int8",
        ),
        (lambda held: held.update({"norm.weight": torch.ones(40)}), "expected one tensor for 'model.norm.weight'"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_the_models_is_refused_by_name(tmp_path: Path, change: Any, said: str) -> None:
    path = saved(tmp_path, "llama", None, change)
    message = told(path, CAUSAL)
    assert said in message and str(path) in message


@pytest.mark.distributed
def test_all_ranks_refuse_what_one_refuses(tmp_path: Path, rank_pool: RankPool) -> None:
    """Before a byte is read, where it can be known."""
    path = saved(tmp_path / "model", "llama", None, lambda held: held.update({"model.norm.weight": torch.ones(48)}))
    for said, read in rank_pool.run(ranks.refusals, "fsdp2", str(path), CAUSAL, "", ranks=2):
        assert "expected shape [40], received [48]" in said and read == 0
    path = saved(tmp_path / "other", "llama")
    for said, read in rank_pool.run(ranks.refusals, "fsdp2", str(path), CAUSAL, "file", ranks=2):
        assert "bytes, as when its header was read, received" in said and "that all machines see" in said and read == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_new_heads_are_the_same_in_every_layout_and_another_for_another_seed(
    tmp_path: Path, rank_pool: RankPool
) -> None:
    """And drawn as the model's class draws: here normal, of the config's deviation, and zeros."""
    path = saved(tmp_path, "qwen2")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_labels": 5, "initializer_range": 0.5}))
    alone, report = loaded(path, CLASSES, seed=3)
    assert report.newly_initialised == ("score.weight",)
    head = alone.score.weight.detach()
    assert 0.4 < head.std().item() < 0.6
    for layout in ("fsdp2", "tp2"):
        for seed in (3, 4):
            for report, values in rank_pool.run(ranks.new_heads, layout, str(path), CLASSES, seed, ranks=2):
                assert report.missing == ("score.weight",) and report.unexpected == ()
                assert torch.equal(values["score.weight"], head) == (seed == 3), layout


@pytest.mark.parametrize(
    ("name", "kind"), [("t5", CLASSES), ("roberta", CLASSES), ("bart", CLASSES), ("distilbert", SPANS)]
)
def test_new_heads_are_drawn_as_from_pretrained_draws(tmp_path: Path, name: str, kind: str) -> None:
    """With its deviations: T5's class sets those of a head where the head's parent is."""
    path = saved(tmp_path, name)
    want = ranks.tensors(theirs(path, kind)[0])
    model, report = loaded(path, kind)
    got = ranks.tensors(model)
    assert report.newly_initialised
    for new in report.newly_initialised:
        first, second = want[new].std(correction=0).item(), got[new].std(correction=0).item()
        assert abs(first - second) <= 0.3 * first, new


@pytest.mark.distributed
def test_tied_weights_stay_one_parameter_on_a_mesh(tmp_path: Path, rank_pool: RankPool) -> None:
    path = saved(tmp_path, "qwen3")
    found = [rank_pool.run(ranks.trained, layout, str(path), CAUSAL, ranks=2) for layout in ("fsdp2", "tp2")]
    losses = [loss for result in found for tied, loss in result if tied]
    assert len(losses) == 4 and max(losses) - min(losses) < 1e-5 * max(losses)
