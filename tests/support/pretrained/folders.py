"""Small random models of every family with odd sizes, saved by save_pretrained into several files, with a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# 89 is a prime: no tp divides it. One key head under two query heads, or three under six: tp repeats or cuts them.
VOCABULARY = 89
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    **_IDS,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    **_IDS,
}
_PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "max_position_embeddings": 64,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 56))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **_IDS,
    "decoder_start_token_id": 0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 40,
    "d_kv": 16,
    "d_ff": 56,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
# Auto classes by task: language_model, text_classification, question_answering, translation.
CAUSAL, CLASSES, SPANS, PAIRS = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
)


@dataclass(frozen=True)
class PretrainedFamily:
    """One family: its config class, small odd sizes, and the kinds of model that transformers has of it."""

    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = (CAUSAL, CLASSES, SPANS)

    def make_config(self, **changed: Any) -> Any:
        """Return a config with these sizes."""
        return getattr(transformers, self.config)(**{**self.sizes, **changed})


PRETRAINED = {
    "llama": PretrainedFamily("LlamaConfig", {**_DECODER, "head_dim": 16}),
    "qwen2": PretrainedFamily("Qwen2Config", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": PretrainedFamily("Qwen3Config", {**_DECODER, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": PretrainedFamily("MistralConfig", {**_DECODER, "head_dim": 16, "sliding_window": 5}),
    "gemma2": PretrainedFamily(
        "Gemma2Config",
        {**_DECODER, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24},
        (CAUSAL, CLASSES),
    ),
    "gemma3": PretrainedFamily(
        "Gemma3TextConfig",
        {**_DECODER, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24},
        (CAUSAL, CLASSES),
    ),
    "phi3": PretrainedFamily("Phi3Config", {**_DECODER, "num_key_value_heads": 2}, (CAUSAL, CLASSES)),
    "gpt2": PretrainedFamily(
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "bert": PretrainedFamily("BertConfig", _ENCODER, (CAUSAL, CLASSES, SPANS)),
    "roberta": PretrainedFamily("RobertaConfig", _ENCODER, (CAUSAL, CLASSES, SPANS)),
    "distilbert": PretrainedFamily(
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 56,
            "n_layers": 4,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        (CLASSES, SPANS),
    ),
    "t5": PretrainedFamily("T5Config", _T5, (PAIRS, CLASSES, SPANS)),
    "marian": PretrainedFamily("MarianConfig", _PAIR, (PAIRS,)),
    "bart": PretrainedFamily("BartConfig", {**_PAIR, "forced_eos_token_id": None}, (PAIRS, CLASSES, SPANS)),
}
TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Sphinx of black quartz, judge my vow! 0123456789 (a + b) * c = d?",
    "Pack my box with five dozen liquor jugs; then go home.",
]


def make_model(name: str, kind: str | None = None, *, seed: int = 0, **changed: Any) -> Any:
    """Return a random fp32 model of the family in eval mode, with no value that a mistake could hide behind.

    Args:
        kind: an auto class of the family's ``kinds``; None: the first.
        changed: of the config.
    """
    family = PRETRAINED[name]
    torch.manual_seed(seed)
    auto = getattr(transformers, kind or family.kinds[0])
    config = family.make_config(**changed)
    if auto is transformers.AutoModelForCausalLM and name in ("bert", "roberta"):
        config.is_decoder = True
    model = auto.from_config(config).eval()
    for tensor_name, parameter in model.named_parameters():
        # What starts at one value everywhere would hide mistakes.
        if parameter.requires_grad and (parameter.dim() == 1 or "relative_attention_bias" in tensor_name):
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return model


def make_tokenizer(tokens: int = VOCABULARY) -> Any:
    """Return a byte-level BPE tokenizer of so many tokens or fewer trained on :data:`TEXT`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=tokens, special_tokens=special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_folder(
    path: Path,
    name: str,
    kind: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard: str = "40KB",
    tokens: int = VOCABULARY,
    **changed: Any,
) -> Path:
    """Save a model of the family, and a tokenizer of so many tokens, as transformers does, in several files; return the
    folder."""
    model = make_model(name, kind, **changed)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    make_tokenizer(tokens).save_pretrained(path)
    return path
