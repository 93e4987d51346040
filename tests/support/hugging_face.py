"""Tiny, randomly initialised Hugging Face models, and their logits and gradients, for the tests of the integration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.overrides import TorchFunctionMode

from fusemesh.hybrid import recompute

VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 2}
ENCODER = {**SIZES, "hidden_size": 64}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}


@dataclass(frozen=True)
class Family:
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    calls: int = 2  # attention calls of one forward
    since: str = "4.57"  # the first version of transformers that routes it

    def is_routed(self) -> bool:
        """Whether the installed version does."""
        return Version(transformers.__version__) >= Version(self.since)

    def build(self, implementation: str, **changed: Any) -> Any:
        """The model in eval mode, the same weights for every implementation."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **changed})
        config._attn_implementation = implementation
        config._experts_implementation = "eager"  # the default takes no fp64
        model = getattr(transformers, self.model)(config).eval()
        for name, parameter in model.named_parameters():
            # What starts at one value everywhere, or is left uninitialised, would hide mistakes.
            if parameter.dim() == 1 or "relative_attention_bias" in name:
                torch.nn.init.normal_(parameter, 0.5, 0.5)
        return model


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GQA),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 5}),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**GQA, "attention_chunk_size": 5, "moe_layers": [], "intermediate_size_mlp": 48, "num_local_experts": 2},
    ),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", {**GPT2, "eos_token_id": None}),
    "bert": Family("BertForMaskedLM", "BertConfig", ENCODER, since="5.0"),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "decoder_start_token_id": 0, "eos_token_id": None},
        calls=6,
        since="5.15",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GQA, "sliding_window": 5, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 16},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GQA, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
}


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))


def padding(side: str | None, batch: int = 2, length: int = 12) -> torch.Tensor | None:
    """attention_mask [B, T] with three tokens of padding in the first sequence, or None."""
    if side is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, slice(0, 3) if side == "left" else slice(length - 3, length)] = 0
    return mask


class KeepDouble(TorchFunctionMode):
    """Models compute norms and softmax in fp32 whatever their dtype; within the block fp64 stays fp64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in (torch.Tensor.to, torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax):
                args = tuple(torch.float64 if x is torch.float32 else x for x in args)
                if kwargs.get("dtype") is torch.float32:
                    kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextlib.contextmanager
def keep_double() -> Iterator[None]:
    """:class:`KeepDouble`, also for blocks that are computed again: backward runs with torch's modes off."""
    original = recompute._contexts

    @contextlib.contextmanager
    def within(again: Any) -> Iterator[None]:
        with KeepDouble(), again:
            yield

    def contexts() -> Any:
        first, again = original()
        return first, within(again)

    recompute._contexts = contexts
    try:
        with KeepDouble():
            yield
    finally:
        recompute._contexts = original


def results(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, gradients: bool = True, **inputs: Any
) -> dict[str, torch.Tensor]:
    """The logits where there is no padding, and the gradient of every parameter through them."""
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :9]
        kept = torch.ones_like(ids[:, :9], dtype=torch.bool)
    if "use_cache" not in inputs and model.config.model_type != "bert":
        inputs["use_cache"] = False
    logits = model(ids, attention_mask=mask, **inputs).logits[kept]
    found = {"logits": logits.detach()}
    if gradients:
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
        model.zero_grad(set_to_none=True)
        (logits * weights).sum().backward()
        named = model.named_parameters()
        found.update({name: x.grad.clone() for name, x in named if x.grad is not None})
    return found


def exact(family: Family, *args: Any, implementation: str = "eager", **kwargs: Any) -> dict[str, torch.Tensor]:
    """:func:`results` in fp64 throughout."""
    model = family.build(implementation).double()
    with KeepDouble():
        return results(model, *args, **kwargs)
