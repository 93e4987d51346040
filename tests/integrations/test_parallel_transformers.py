"""Layer: application, on gloo ranks. Hugging Face models split by the plan they bring along equal one process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.planner import search
from fusemesh.hybrid.planner.hardware import find_hardware
from fusemesh.hybrid.planner.job import TrainingJob
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.transformer.description import describe
from tests.support.ranks import hugging_face as ranks
from tests.support.ranks import parity

pytestmark = pytest.mark.distributed

FP64, FP32 = 1e-12, 5e-6
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def check(found: list[Any], want: dict[str, torch.Tensor], tolerance: float) -> None:
    """Loss and every gradient, whole, on every rank."""
    for rank, (own, _, _) in enumerate(found):
        assert own.keys() == want.keys()
        errors = {name: parity.error(own[name], x) for name, x in want.items()}
        wrong = {name: e for name, e in errors.items() if not e <= tolerance}
        assert not wrong, f"rank {rank}: {wrong}"


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("layout", "name", "changed"),
    [
        ("dp2 x tp2", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("dp2 x tp2", "qwen3", {}),  # norms of heads
        ("dp2 x tp2", "gemma2", {}),  # tied embeddings, softcap, window
        ("fsdp2 x tp2", "llama", {"tie_word_embeddings": True}),
        ("tp4", "llama", {}),  # two key and value heads on four ranks
        ("dp2 x tp2", "llama", {"attention_dropout": 0.5}),
        slow("fsdp2 x tp2", "mistral", {"attention_dropout": 0.5}),
        slow("tp4", "phi3", {"attention_dropout": 0.5}),
        slow("dp4", "llama", {"attention_dropout": 0.5}),
        slow("fsdp4", "llama", {}),
        slow("dp2 x tp2", "mistral", {}),
        slow("dp2 x tp2", "qwen2", {}),
        ("dp2 x tp2", "olmo2", {}),  # heads gathered before their norm
        slow("tp4", "phi3", {}),  # one matrix for queries, keys and values
    ],
    ids=lambda x: str(x).replace(" ", "") if isinstance(x, str) else "-".join(x),
)
def test_fp64_on_the_reference_backend(rank_pool: RankPool, layout: str, name: str, changed: dict[str, Any]) -> None:
    """Against eager attention in one process, and with dropout against our own, of the same seed."""
    if not ranks.family(name).is_routed():
        pytest.skip("not routed by this version of transformers")
    alone = "fusemesh" if ranks.drops(changed) else "eager"
    want = ranks.on_one(name, alone, torch.float64, "reference", changed)
    found = rank_pool.run(ranks.on_layout, layout, name, torch.float64, "reference", changed)
    check(found, want, FP64)
    if ranks.drops(changed):
        without = ranks.on_one(name, alone, torch.float64, "reference", {**changed, "attention_dropout": 0.0})
        assert abs(without["loss"] - want["loss"]) > 1e-3
    for _, counts, _ in found:
        assert counts[("attention_forward", "reference")] == 2
        assert {backend for _, backend in counts} == {"reference"}


def test_fp32_within_the_promise(rank_pool: RankPool) -> None:
    """Weights are where the plan puts them, the vocabulary's rows too."""
    want = ranks.on_one("llama", "fusemesh", torch.float32, "reference", {})
    found = rank_pool.run(ranks.on_layout, "dp2 x tp2", "llama", torch.float32, "reference", {})
    check(found, want, FP32)
    placements = found[0][2]
    layer = "model.layers.0."
    for name, placement in {
        "lm_head.weight": "S(0)",
        "model.norm.weight": "R",
        f"{layer}input_layernorm.weight": "R",
        **{f"{layer}self_attn.{which}_proj.weight": "S(0)" for which in "qkv"},
        f"{layer}self_attn.o_proj.weight": "S(1)",
        f"{layer}mlp.gate_proj.weight": "S(0)",
        f"{layer}mlp.down_proj.weight": "S(1)",
    }.items():
        assert placements[name] == placement, name


@pytest.fixture(scope="module")
def triton_pool() -> Iterator[RankPool]:
    with RankPool(4, env={"TRITON_INTERPRET": "1"}, timeout=300) as pool:
        yield pool


@pytest.mark.slow
def test_fp32_through_the_fused_kernels(triton_pool: RankPool) -> None:
    want = triton_pool.run(ranks.alone, "llama", torch.float32, "triton", ranks=1)[0]
    found = triton_pool.run(ranks.on_layout, "dp2 x tp2", "llama", torch.float32, "triton", {})
    check(found, want, FP32)
    for _, counts, _ in found:
        assert counts[("attention_backward", "triton")] == 2 and {backend for _, backend in counts} == {"triton"}


def test_generation_on_a_mesh_equals_one_process(rank_pool: RankPool) -> None:
    want = ranks.generated(None, "llama", {})
    assert want.shape == (ranks.BATCH, ranks.LENGTH + 5)
    for found in rank_pool.run(ranks.generated, "llama", {}, ranks=2):
        assert torch.equal(found, want)


def test_sampling_needs_one_state_of_the_generators_of_a_tp_group(rank_pool: RankPool) -> None:
    want = ranks.sampled(None, False)
    for found in rank_pool.run(ranks.sampled, False, ranks=2):
        assert isinstance(want, torch.Tensor) and torch.equal(found, want)
    for told in rank_pool.run(ranks.sampled, True, ranks=2):
        assert told.startswith("generate(do_sample=True): expected the same state") and "torch.manual_seed()" in told


@pytest.mark.parametrize(("layout", "name"), [("tp2", "gemma2"), ("fsdp2", "llama")])
def test_a_model_on_meta_gets_the_buffers_that_no_state_dict_holds(
    rank_pool: RankPool, tmp_path: Path, layout: str, name: str
) -> None:
    """Rotary frequencies and a scale of embeddings; and a model inside of it saves whole weights, too."""
    for found, want, said in rank_pool.run(ranks.from_meta, layout, name, str(tmp_path), ranks=2):
        assert parity.error(found, want) <= FP32
        assert len(said) == 1 and "save fusemesh.whole_state_dict(model)" in said[0]
    saved = transformers.AutoModel.from_pretrained(tmp_path).state_dict()
    torch.manual_seed(0)
    base = ranks.build(name, "eager", torch.float32, {}).get_decoder().state_dict()
    assert saved.keys() == base.keys() and all(torch.equal(saved[key], x) for key, x in base.items())


@pytest.mark.parametrize("implementation", ["sdpa", slow("eager")])
def test_transformers_own_attention_on_more_ranks_than_keys(rank_pool: RankPool, implementation: str) -> None:
    """It repeats keys by the number of its query heads that share one, which is the rank's."""
    want = ranks.logits_on_more_ranks_than_keys(None, implementation)
    for found in rank_pool.run(ranks.logits_on_more_ranks_than_keys, implementation, ranks=2):
        assert parity.error(found, want) <= FP32


def test_shards_generate_until_all_ranks_are_done(rank_pool: RankPool) -> None:
    for rank, found in enumerate(rank_pool.run(ranks.generated_apart, 0, ranks=2)):
        assert torch.equal(found, ranks.generated_apart(None, rank))


@pytest.mark.parametrize(
    ("layout", "name", "changed"),
    [
        ("fsdp2 x tp2", "llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("fsdp2", "gpt2", {}),
        ("tp2", "gpt2", {}),
        slow("fsdp2 x tp2", "phi3", {}),
        slow("dp2 x tp2", "llama", {}),
        slow("tp4", "gemma2", {}),
        slow("fsdp4", "mistral", {}),
    ],
)
def test_what_is_saved_on_a_mesh_loads_in_one_process(
    rank_pool: RankPool, tmp_path: Path, layout: str, name: str, changed: dict[str, Any]
) -> None:
    """To the bit, under Hugging Face's names, with tied weights stored once."""
    number = Layout.parse(layout).world_size
    first, *others = rank_pool.run(ranks.saved, layout, name, changed, str(tmp_path), ranks=number)
    kind = getattr(transformers, ranks.family(name).model)
    model, loaded = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values())
    found = dict(model.named_parameters(remove_duplicate=False))
    for want in (first, *others):
        assert want.keys() == found.keys() and all(torch.equal(found[key], x) for key, x in want.items())
    stored = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(stored.values())) > 1 and set(stored) == {key for key, _ in model.named_parameters()}
    assert model.config.architectures == [kind.__name__]


def test_the_example_fine_tunes_saves_and_loads(rank_pool: RankPool, tmp_path: Path) -> None:
    arguments = ["--layout", "tp2", "--steps", "5", "--out", str(tmp_path)]
    script = str(EXAMPLES / "fine_tune_hugging_face.py")
    (status, printed), *others = rank_pool.call(ranks.example, script, arguments, ranks=2)
    assert status == 0 and others == [(0, "")]
    first, second = printed.splitlines()
    found = re.fullmatch(r"layout tp2: loss (\d\.\d+) at first, (\d\.\d+) after 5 steps", first)
    assert found is not None and float(found[2]) < float(found[1]) - 0.3
    found = re.fullmatch(r"the next batch: (\d\.\d+) on 2 ranks, (\d\.\d+) from .* in one process", second)
    assert found is not None and float(found[1]) == pytest.approx(float(found[2]), rel=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_saving_that_fails_on_one_rank_fails_on_all(rank_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = rank_pool.run(ranks.not_saved, str(tmp_path / "file" / "model"), ranks=2)
    told = f"OutputError: cannot write {str(tmp_path / 'file' / 'model')!r}: a file stands where a folder is needed"
    assert first[0].startswith(told) and second[0].startswith(told)
    assert "resize_token_embeddings: expected a whole model" in first[1] and "before parallelize()" in second[1]


def test_the_planner_leaves_out_what_parallelize_refuses_and_says_the_same(rank_pool: RankPool) -> None:
    """Of every family that it knows and of our own models, over each axis alone."""
    texts = ("tp2", "pp2")
    verdicts, *others = rank_pool.run(ranks.verdicts, texts, ranks=2)
    assert others == [verdicts]
    described = {name: sizes.describe() for name, sizes in ranks.published().items()}
    described |= {kind: describe(config) for kind, config in ranks.OWN.items()}
    assert verdicts.keys() == {(name, text) for name in described for text in texts}
    for (name, text), message in verdicts.items():
        found = search.consider(described[name], TrainingJob(8, 64), find_hardware("h100"), Layout.parse(text))
        assert (found.why if isinstance(found, search.Rejected) else "") == message, (name, text)
    refused = {key for key, message in verdicts.items() if message}
    assert not refused


@pytest.mark.parametrize(
    ("layout", "name", "changed", "styles", "parts"),
    [
        (
            "tp4",
            "llama",
            {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
            {},
            ["tp4 divides, received 6", "q_proj"],
        ),
        ("tp2", "llama", {"intermediate_size": 49}, {}, ["intermediate_size: 49", "multiple of 2"]),
        (
            "tp2",
            "llama",
            {},
            {"model.layers.*.mlp.up_proj": "local_colwise"},
            ["model._tp_plan: expected styles", "'local_colwise'", "model.layers.*.mlp.up_proj", "plan="],
        ),
        (
            "tp2",
            "llama",
            {},
            {"model.layers.*.mlp": "colwise"},  # as a wrapper around what the plan names is
            ["a torch.nn.Linear for 'column' at 'model.layers.0.mlp', received LlamaMLP", "or use fsdp", "LoRA"],
        ),
        (
            "tp2",
            "stablelm",
            {},
            {},
            ["StableLmForCausalLM brings no tensor-parallel table; pass one", "plan=, or use fsdp"],
        ),
        (
            "pp2",
            "olmo2",
            {},
            {},
            ["pp: Olmo2ForCausalLM brings no stage()", "add the family 'olmo2'", "use fsdp or tp in the place of pp"],
        ),
    ],
    ids=["heads", "intermediate", "style", "wrapped", "no-plan", "pipeline"],
)
def test_refusals(
    rank_pool: RankPool, layout: str, name: str, changed: dict[str, Any], styles: dict[str, str], parts: list[str]
) -> None:
    """Every rank refuses by itself, before it waits for another."""
    for message in rank_pool.run(ranks.refused, layout, name, changed, styles, ranks=int(layout[-1])):
        for part in parts:
            assert part in message, message
