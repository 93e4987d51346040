"""``fusemesh verify`` finds the first module that differs, another loss and a wrong tokenizer, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusemesh.cli import main
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.pretrained import verify
from tests.support.pretrained.folders import CAUSAL, CLASSES, PRETRAINED, make_folder, make_model
from tests.support.ranks.pretrained_verify import verified


def run(capsys: Any, *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["verify", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_whole_folder(tmp_path: Path, capsys: Any) -> None:
    folder = make_folder(tmp_path / "qwen3", "qwen3")
    status, found = run(capsys, str(folder))
    assert status == 0 and not found["problems"]
    assert found["compared"] == found["modules"] > 50
    assert 0 < found["largest"]["relative"] < 1e-5
    assert found["tokenizer"] == []


def test_the_first_module_that_differs(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, build = make_folder(tmp_path / "llama", "llama"), verify.build

    def planted(*args: Any, **kwargs: Any) -> Any:
        model, untied = build(*args, **kwargs)
        model.model.layers[2].mlp.act_fn = torch.nn.GELU()
        return model, untied

    monkeypatch.setattr(verify, "build", planted)
    status, found = run(capsys, str(folder))
    assert status == 1
    assert found["first"]["module"] == "model.layers.2.mlp.act_fn"
    assert found["problems"][0].startswith("model.layers.2.mlp.act_fn differs from transformers' by ")


def test_a_loss_that_differs(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "gpt2", "gpt2")
    sum_over_replicas = verify.sum_over_replicas
    monkeypatch.setattr(verify, "sum_over_replicas", lambda loss, mesh: 1.01 * sum_over_replicas(loss, mesh))
    status, found = run(capsys, str(folder))
    assert status == 1 and found["first"] is None
    assert [problem[:8] for problem in found["problems"]] == ["the loss"]


def test_a_head_that_the_folder_lacks(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "base"
    make_model("bert", CLASSES).bert.save_pretrained(folder)
    assert main(["verify", str(folder)]) == 2
    assert "--task: expected" in capsys.readouterr().err
    status, found = run(capsys, str(folder), "--task", "text_classification")
    assert status == 0, found["problems"]
    assert found["new"] == ["classifier.bias", "classifier.weight"]
    assert found["tokenizer"] is None


def test_more_tokens_than_rows(tmp_path: Path, capsys: Any) -> None:
    folder = make_folder(tmp_path / "few", "llama", vocab_size=80)
    status, found = run(capsys, str(folder))
    assert status == 1
    assert found["problems"] == ["the tokenizer has 89 tokens, and the model's embedding 80 rows"]


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, capsys: Any) -> None:
    folder = make_folder(tmp_path / "broken", "llama")
    (folder / "tokenizer.json").write_text("{")
    status, found = run(capsys, str(folder))
    assert status == 1
    assert [problem[:28] for problem in found["problems"]] == ["the tokenizer cannot be read"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "dp2 x tp2", "fsdp4", "pp2", "pp2 x tp2"])
def test_every_family_and_kind(layout: str, tmp_path: Path) -> None:
    with RankPool(4) as pool:
        for name, family in PRETRAINED.items():
            for kind in family.kinds:
                folder = make_folder(tmp_path / f"{name}-{kind}", name, kind)
                found = verified(pool, folder, kind, layout)
                # The made tokenizer knows few letters; the classes of some families leave the others out.
                problems = [
                    problem for problem in found["problems"] if not problem.startswith("the tokenizer does not")
                ]
                assert not problems, (name, kind, problems)
                assert found["compared"] >= 10, (name, kind, found["compared"])


@pytest.mark.slow
def test_a_pipeline(rank_pool: RankPool, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mistral", "mistral")
    found = verified(rank_pool, folder, CAUSAL, "pp2")
    assert not found["problems"]
    assert {"model.layers.0", "model.layers.3", "model.norm", "lm_head"} <= set(found["names"])
