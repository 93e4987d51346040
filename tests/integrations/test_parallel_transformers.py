"""Layer: application, on gloo ranks. Hugging Face models split by the plan they bring along equal one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.ranks import hugging_face as ranks
from tests.support.ranks import parity

pytestmark = pytest.mark.distributed

FP64, FP32 = 1e-12, 5e-6


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
        slow("tp4", "phi3", {}),  # one matrix for queries, keys and values, gathered
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
        ("tp2", "gpt2", {}, {}, ["say by plan= how tp splits them"]),
        ("pp2", "llama", {}, {}, ["model: pp2 expects", "PipelinedModel"]),
    ],
    ids=["heads", "intermediate", "style", "no-plan", "pipeline"],
)
def test_refusals(
    rank_pool: RankPool, layout: str, name: str, changed: dict[str, Any], styles: dict[str, str], parts: list[str]
) -> None:
    """Every rank refuses by itself, before it waits for another."""
    for message in rank_pool.run(ranks.refused, layout, name, changed, styles, ranks=int(layout[-1])):
        for part in parts:
            assert part in message, message
