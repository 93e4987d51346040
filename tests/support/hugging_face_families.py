"""More tiny Hugging Face models: decoders, encoders, encoder-decoders, vision, audio, two towers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.support.hugging_face import ENCODER, GQA, SIZES, VOCABULARY, Family, KeepDouble, padding, tokens

IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
PAIR = {
    "d_model": 32,
    "vocab_size": VOCABULARY,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **IDS,
    "decoder_start_token_id": 1,
}
END = 3
PATCHES = {"image_size": 12, "patch_size": 4, "num_channels": 3}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Model(Family):
    """A family, what its forward takes, and under which name it returns what is compared."""

    kind: str = "decoder"
    output: str = "logits"

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "pair", "audio")

    def inputs(self, side: str | None) -> dict[str, torch.Tensor]:
        """The tensors of one call, with padding on a side where there is text."""
        generator = torch.Generator().manual_seed(11)
        found: dict[str, torch.Tensor] = {}
        if self.kind in ("vision", "towers"):
            found["pixel_values"] = torch.randn(2, 3, 12, 12, generator=generator)
        if self.kind == "audio":
            found["input_features"] = torch.randn(2, 8, 20, generator=generator)
        if self.kind not in ("vision", "audio"):
            found["input_ids"] = ids = tokens()
            if self.kind == "towers":
                # The text's embedding is that of its end, which must not be padding.
                ids[ids == END] = END + 1
                ids[:, 8] = END
            mask = padding(side)
            if mask is not None:
                found["attention_mask"] = mask
        if self.kind in ("pair", "audio"):
            found["decoder_input_ids"] = tokens().flip(1)[:, :9]
        return found


MODELS = {
    "qwen2": Model("Qwen2ForCausalLM", "Qwen2Config", GQA),
    "qwen3": Model(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**GQA, "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "gemma3": Model("Gemma3ForCausalLM", "Gemma3TextConfig", {**GQA, "sliding_window": 5, "query_pre_attn_scalar": 16}),
    "phi3": Model("Phi3ForCausalLM", "Phi3Config", {**GQA, "head_dim": 16, "hidden_size": 64, "sliding_window": 5}),
    "olmo2": Model("Olmo2ForCausalLM", "Olmo2Config", {**GQA, "hidden_size": 64}),
    "stablelm": Model(
        "StableLmForCausalLM", "StableLmConfig", {**GQA, "hidden_size": 64, "qk_layernorm": True}, since="5.0"
    ),
    "roberta": Model("RobertaForMaskedLM", "RobertaConfig", ENCODER, since="5.0", kind="encoder"),
    "modernbert": Model(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**SIZES, "hidden_size": 64, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
        since="5.0",
        kind="encoder",
    ),
    "bart": Model("BartForConditionalGeneration", "BartConfig", {**PAIR, "forced_eos_token_id": None}, 6, kind="pair"),
    "whisper": Model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32},
        6,
        kind="audio",
    ),
    "vit": Model("ViTForImageClassification", "ViTConfig", {**TOWER, **PATCHES}, kind="vision"),
    "clip": Model(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {
                **TOWER,
                **IDS,
                "eos_token_id": END,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 64,
            },
            "vision_config": {**TOWER, **PATCHES, "projection_dim": 16},
            "projection_dim": 16,
        },
        4,
        kind="towers",
        output="logits_per_image",
    ),
}


def results(model: Any, family: Model, side: str | None, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output where there is no padding, and the gradient of every parameter through it."""
    inputs = {**family.inputs(side), **more}
    dtype = next(model.parameters()).dtype
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    options = {"use_cache": False} if family.kind in ("decoder", "pair", "audio") else {}
    output = getattr(model(**inputs, **options), family.output)
    if family.kind in ("decoder", "encoder") and "attention_mask" in inputs:
        output = output[inputs["attention_mask"].bool()]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    model.zero_grad(set_to_none=True)
    (output * weights).sum().backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return {"output": output.detach(), **found}


def exact(
    family: Model, side: str | None, implementation: str = "eager", **more: torch.Tensor
) -> dict[str, torch.Tensor]:
    """:func:`results` in fp64 throughout."""
    model = family.build(implementation).double()
    with KeepDouble():
        return results(model, family, side, **more)
