"""Layer: application, on gloo ranks. Every kind of every family of Hugging Face models, on tp, equals one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fusemesh.hybrid.hugging_face.sources import Source
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.pretrained.folders import CAUSAL, CLASSES, PAIRS, PRETRAINED, SPANS
from tests.support.ranks import families as ranks

pytestmark = pytest.mark.distributed

FP64 = 1e-12
# Softmax does not see what is added to the scores of all keys, or of all positions of a span, alike: these gradients
# are 0, and what is computed of them is roundings.
ZERO = re.compile(
    r".*\.(key|k_lin|k_proj|c_attn\.key)\.bias"
    r"|(?P<spans>qa_outputs\.bias|.*\.ln_f\.bias|.*layer\.3\.output(\.LayerNorm|_layer_norm)\.bias"
    r"|model\.decoder\.layers\.1\.final_layer_norm\.bias)"
)


def check(
    found: dict[str, torch.Tensor],
    sources: dict[str, Source],
    want: dict[str, torch.Tensor],
    kind: str,
    tolerance: float,
) -> None:
    """Loss, norm and every gradient; each of the model's own tensors is found, and all of it."""
    errors, covered = {}, dict.fromkeys(want, 0)
    for name, x in found.items():
        source = sources.get(name, Source(name))
        covered[source.name] += x.numel()
        right = source.of(want[source.name])
        assert x.shape == right.shape and x.dtype == right.dtype == torch.float64, name
        scale = right.abs().max()
        if scale <= FP64 * want["norm"]:
            zero = ZERO.fullmatch(name)
            assert zero and (kind == SPANS or not zero["spans"]), f"{name}: nothing flows there"
            scale = want["norm"]
        errors[name] = ((x - right).abs().max() / scale).item()
    assert covered == {name: x.numel() for name, x in want.items()}
    wrong = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not wrong, wrong


ALL = [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]
LAYOUTS = ("tp2", "tp4", "dp2 x tp2", "fsdp2 x tp2")
# A fused projection, and norms of repeated heads. test_what_tp_splits has relative biases, and a head's tied ones.
QUICK = {("gpt2", CAUSAL), ("gemma3", CLASSES)}


def cases() -> list[Any]:
    return [
        pytest.param(*(layout, name, kind), marks=[] if layout == "tp2" and (name, kind) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for name, kind in ALL
    ]


@pytest.mark.parametrize(("layout", "name", "kind"), cases())
def test_every_kind_of_every_family_is_one_process(rank_pool: RankPool, layout: str, name: str, kind: str) -> None:
    compare(rank_pool, layout, name, kind, {})


def compare(
    rank_pool: RankPool, layout: str, name: str, kind: str, changed: dict[str, Any], attention: str = ""
) -> dict[str, str]:
    """Return the placement on tp of each parameter of a model that has learned as plain transformers has."""
    want = ranks.on_one(name, kind, changed)
    split = {**changed, **({"attn_implementation": attention} if attention else {})}
    number = Layout.parse(layout).world_size
    gradients, sources, placements = rank_pool.run(ranks.on_layout, layout, name, kind, split, ranks=number)[0]
    check(gradients, sources, want, kind, FP64)
    return placements


# Sizes that three ranks divide, and two do not.
THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "intermediate_size": 57}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "name", "kind", "changed"),
    [
        ("tp4", "t5", PAIRS, {"feed_forward_proj": "gated-gelu"}),
        ("dp2 x tp2", "t5", PAIRS, {"tie_word_embeddings": False}),
        ("tp2", "t5", CLASSES, {"feed_forward_proj": "gated-gelu"}),
        ("fsdp2 x tp2", "marian", PAIRS, {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 83}),
        ("tp2", "marian", PAIRS, {"scale_embedding": True, "tie_word_embeddings": False}),
        ("tp2", "bart", PAIRS, {"scale_embedding": True, "tie_word_embeddings": False}),
        ("tp4", "gpt2", CAUSAL, {"n_inner": 52, "scale_attn_by_inverse_layer_idx": True}),
        ("tp2", "gpt2", CAUSAL, {"tie_word_embeddings": False, "add_cross_attention": True}),
        ("tp2", "bert", CAUSAL, {"add_cross_attention": True}),
        ("dp2 x tp2", "bert", CAUSAL, {"tie_word_embeddings": False}),
        ("fsdp2 x tp2", "roberta", CAUSAL, {"tie_word_embeddings": False}),
        ("tp4", "bert", CAUSAL, {"vocab_size": 5}),  # so few rows that every rank holds all, and of the bias
        ("tp2", "distilbert", CLASSES, {"sinusoidal_pos_embds": True}),
        ("fsdp2 x tp2", "phi3", CAUSAL, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("tp4", "llama", CAUSAL, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("tp4", "qwen3", SPANS, {"attention_bias": True}),
        ("tp3", "llama", CAUSAL, THREE),
        ("tp3", "phi3", CAUSAL, THREE),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x).replace(" ", ""),
)
def test_what_a_config_changes(rank_pool: RankPool, layout: str, name: str, kind: str, changed: dict[str, Any]) -> None:
    compare(rank_pool, layout, name, kind, changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_our_attention_on_the_ranks_heads(rank_pool: RankPool, name: str) -> None:
    compare(rank_pool, "tp2", name, PRETRAINED[name].kinds[0], {}, "fusemesh")


def test_what_tp_splits(rank_pool: RankPool) -> None:
    """Biases of heads by columns, vocabularies by rows, second names as the first."""
    placements = compare(rank_pool, "tp2", "t5", PAIRS, {})
    block = "decoder.block.0.layer.0.SelfAttention"
    assert placements[f"{block}.relative_attention_bias.weight"] == placements[f"{block}.o.weight"] == "S(1)"
    assert placements["shared.weight"] == placements["lm_head.weight"] == placements[f"{block}.q.weight"] == "S(0)"
    placements = compare(rank_pool, "tp2", "bert", CAUSAL, {})
    assert placements["cls.predictions.bias"] == placements["cls.predictions.decoder.bias"] == "S(0)"
    assert placements["cls.predictions.transform.dense.weight"] == "R"


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("fsdp2", "t5"),
        ("pp2", "phi3"),
        *(
            pytest.param(layout, name, marks=pytest.mark.slow)
            for layout in ("tp2", "dp2 x tp2", "fsdp2", "pp2", "pp2 x tp2", "fsdp2 x pp2")
            for name in ("t5", "marian", "bart", "gpt2", "phi3")
            if (layout, name) not in (("fsdp2", "t5"), ("pp2", "phi3"))
        ),
    ],
)
def test_generation_on_a_mesh_equals_one_process(rank_pool: RankPool, layout: str, name: str) -> None:
    """Of an encoder and a decoder, too, whose encoder is called by itself; and over the stages of a pipeline."""
    want = ranks.generated(None, layout, name)
    for found in rank_pool.run(ranks.generated, layout, name, ranks=Layout.parse(layout).world_size):
        assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("name", "changed", "wrapped", "parts"),
    [
        (
            "gpt2",
            {},
            "transformer.h.1.attn.c_attn",
            ["a plain Conv1D or torch.nn.Linear at 'transformer.h.1.attn.c_attn'", "received Sequential", "use fsdp"],
        ),
        ("phi3", {}, "model.layers.0.mlp.gate_up_proj", ["at 'model.layers.0.mlp.gate_up_proj'", "use fsdp"]),
        (
            "bert",
            {"num_attention_heads": 1},
            "",
            ["fusemesh's table of bert: expected a number of heads that tp2 divides, received 1", "tp in [1]"],
        ),
        ("t5", {"num_heads": 3, "num_layers": 1}, "", ["num_heads: 3 heads cannot be split over tp2", "[1, 3]"]),
        ("bart", {"decoder_ffn_dim": 57}, "", ["output features that tp2 divides", "decoder.layers.0.fc1", "57"]),
    ],
    ids=["gpt2-wrapped", "phi3-wrapped", "bert-heads", "t5-heads", "bart-wide"],
)
def test_refusals(rank_pool: RankPool, name: str, changed: dict[str, Any], wrapped: str, parts: list[str]) -> None:
    for message in rank_pool.run(ranks.refused, "tp2", name, changed, wrapped, ranks=2):
        for part in parts:
            assert part in message, message
