"""Tensor-parallel tables of families whose config brings none, or none that splits the heads.

Patterns count from the base model (``model.base_model_prefix``); those of heads, which stand around it, from the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FamilyTable:
    """Styles of fusemesh.hybrid.tensor.table for the base model, and for what stands around it."""

    base: Mapping[str, str]
    around: Mapping[str, str] = field(default_factory=dict)


def _each(names: tuple[str, ...], style: str, prefix: str = "") -> dict[str, str]:
    return {prefix + name: style for name in names}


GPT2 = FamilyTable(
    {
        "wte": "vocab",
        **_each(("query", "key", "value"), "column", "h.*.attn.c_attn."),
        "h.*.attn.c_proj": "row",
        "h.*.crossattention.q_attn": "column",
        **_each(("key", "value"), "column", "h.*.crossattention.c_attn."),
        "h.*.crossattention.c_proj": "row",
        "h.*.mlp.c_fc": "column",
        "h.*.mlp.c_proj": "row",
    },
    {"lm_head": "vocab"},
)

PHI3 = FamilyTable(
    {
        "embed_tokens": "vocab",
        **_each(("query", "key", "value"), "column", "layers.*.self_attn.qkv_proj."),
        "layers.*.self_attn.o_proj": "row",
        **_each(("gate", "up"), "column", "layers.*.mlp.gate_up_proj."),
        "layers.*.mlp.down_proj": "row",
    },
    {"lm_head": "vocab"},
)

_BERT = {
    "embeddings.word_embeddings": "vocab",
    **_each(("query", "key", "value"), "column", "encoder.layer.*.attention.self."),
    "encoder.layer.*.attention.output.dense": "row",
    **_each(("query", "key", "value"), "column", "encoder.layer.*.crossattention.self."),
    "encoder.layer.*.crossattention.output.dense": "row",
    "encoder.layer.*.intermediate.dense": "column",
    "encoder.layer.*.output.dense": "row",
}
# The head's own bias is the decoder's under a second name.
BERT = FamilyTable(_BERT, {"cls.predictions": "tied", "cls.predictions.decoder": "vocab"})
ROBERTA = FamilyTable(_BERT, {"lm_head": "tied", "lm_head.decoder": "vocab"})

DISTILBERT = FamilyTable(
    {
        "embeddings.word_embeddings": "vocab",
        **_each(("q_lin", "k_lin", "v_lin"), "column", "transformer.layer.*.attention."),
        "transformer.layer.*.attention.out_lin": "row",
        "transformer.layer.*.ffn.lin1": "column",
        "transformer.layer.*.ffn.lin2": "row",
    },
    {"vocab_projector": "vocab"},
)


def _t5(block: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for attention in ("SelfAttention", "EncDecAttention"):
        found |= _each(("q", "k", "v"), "column", f"{block}.{attention}.")
        found[f"{block}.{attention}.o"] = "row"
    # [buckets, heads]: a rank's scores take its own heads' biases.
    found[f"{block}.SelfAttention.relative_attention_bias"] = "features"
    found |= _each(("wi", "wi_0", "wi_1"), "column", f"{block}.DenseReluDense.")
    return {**found, f"{block}.DenseReluDense.wo": "row"}


T5 = FamilyTable(
    {
        **_each(("shared", "encoder.embed_tokens", "decoder.embed_tokens"), "vocab"),
        **_t5("encoder.block.*.layer.*"),
        **_t5("decoder.block.*.layer.*"),
    },
    {"lm_head": "vocab"},
)


def _bart(layer: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for attention in ("self_attn", "encoder_attn"):
        found |= _each(("q_proj", "k_proj", "v_proj"), "column", f"{layer}.{attention}.")
        found[f"{layer}.{attention}.out_proj"] = "row"
    # fc1 stands beside norms, which see whole activations all the same.
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    return {**found, f"{layer}.fc1": "column", f"{layer}.fc2": "row", **_each(norms, "whole", f"{layer}.")}


# Marian's, too.
BART = FamilyTable(
    {
        **_each(("shared", "encoder.embed_tokens", "decoder.embed_tokens"), "vocab"),
        **_bart("encoder.layers.*"),
        **_bart("decoder.layers.*"),
    },
    {"lm_head": "vocab"},
)
