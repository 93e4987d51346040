"""Up to 4 gloo ranks: families of transformers as the planner sees them, against models that are really placed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusemesh import cli
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.planner import memory, search
from fusemesh.hybrid.planner.hardware import find_hardware
from fusemesh.hybrid.planner.job import TrainingJob
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.pretrained.description import describe_folder, describe_model
from tests.support.pretrained import planned as ranks
from tests.support.pretrained.folders import CAUSAL, CLASSES, PAIRS, SPANS, make_folder

H100 = find_hardware("h100")
JOB = TrainingJob(8, 16, dtype="float32", sequence_parallel=False)
ODD_HEADS = {"num_attention_heads": 5, "num_key_value_heads": 5}
QUICK = [("qwen2", CAUSAL), ("gpt2", CLASSES), ("bert", CAUSAL), ("t5", PAIRS)]


def check(found: list[tuple[dict[str, int], list[Any]]], text: str, cases: list[ranks.Case], **changed: Any) -> None:
    """Check that the plan says of each case on each rank what was found there."""
    layout = Layout.parse(text)
    for number, (name, kind) in enumerate(cases):
        model = describe_model(ranks.build(name, kind, **changed), name)
        planned = search.consider(model, JOB, H100, layout)
        for at, results in found:
            if isinstance(planned, search.Rejected):
                assert results[number] == planned.why, (name, kind)
            else:
                place = {"stage": at["pp"], "tp_rank": at["tp"], "fsdp_rank": at["fsdp"]}
                assert results[number] == memory.stored(model, JOB, layout, **place), (name, kind, at)


@pytest.mark.distributed
def test_some_families_hold_what_the_plan_says(rank_pool: RankPool) -> None:
    found = rank_pool.run(ranks.placed, "pp2 x tp2", QUICK, {}, ranks=4)
    assert all(isinstance(one, tuple) for _, results in found for one in results)
    check(found, "pp2 x tp2", QUICK)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("text", ["tp2", "fsdp2", "pp2", "pp2 x tp2", "fsdp2 x tp2", "tp4"])
def test_every_family_holds_what_the_plan_says(rank_pool: RankPool, text: str) -> None:
    found = rank_pool.run(ranks.placed, text, ranks.CASES, {}, ranks=Layout.parse(text).world_size)
    assert all(isinstance(one, tuple) for _, results in found for one in results)
    check(found, text, ranks.CASES)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("name", "kind"), [("llama", CLASSES), ("bert", SPANS), ("t5", PAIRS), ("marian", PAIRS)])
def test_a_step_makes_the_gradients_and_states_that_the_plan_says(rank_pool: RankPool, name: str, kind: str) -> None:
    found = rank_pool.run(ranks.stepped, "pp2 x tp2", name, kind, ranks=4)
    check([(at, [result]) for at, result in found], "pp2 x tp2", [(name, kind)])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("text", "cases", "changed", "message"),
    [
        (
            "tp2",
            [("llama", CAUSAL), ("phi3", CAUSAL)],
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "tp2 divides",
        ),
        ("tp2", [("llama", CAUSAL), ("bert", SPANS)], {"intermediate_size": 57}, "intermediate_size: 57"),
        ("tp2", [("bart", PAIRS)], {"encoder_ffn_dim": 57}, "features that tp2 divides"),
        ("pp2", [("bart", PAIRS)], {"encoder_layerdrop": 0.1}, "encoder_layerdrop: expected 0"),
    ],
)
def test_what_parallelize_refuses_the_plan_refuses_in_its_words(
    rank_pool: RankPool, text: str, cases: list[ranks.Case], changed: dict[str, Any], message: str
) -> None:
    found = rank_pool.run(ranks.placed, text, cases, changed, ranks=2)
    assert all(message in one for _, results in found for one in results)
    check(found, text, cases, **changed)


def test_a_folder_is_what_its_architecture_says_or_the_task(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(make_folder(tmp_path / "bert", "bert", SPANS))
    assert describe_folder(folder).head.outputs == 2
    assert describe_folder(folder, "text_classification").head.of == "texts"
    with pytest.raises(ValueError, match="expected a model that transformers has as AutoModelForSeq2SeqLM"):
        describe_folder(folder, "translation")
    asked = ["plan", "--model", folder, "--world", "4", "--gpu", "h100", "--task", "text_classification", "--json"]
    assert cli.main(asked) == 0
    assert "pp2 x tp2" in [one["layout"] for one in json.loads(capfd.readouterr().out)["layouts"]]
