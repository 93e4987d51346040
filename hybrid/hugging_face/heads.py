"""The outputs of Hugging Face models: from a whole model, or a last stage, to logits, and from logits to a loss.

Shapes: B batch, S sequence, T target sequence, V vocabulary, C classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fusemesh.kernels.vocab_loss.api import vocab_parallel_cross_entropy
from fusemesh.kernels.vocab_loss.linear import fused_linear_cross_entropy

from ..tensor.modules import ColumnParallelLinear, own_rows
from .anatomy import Anatomy, base_name, model_type_of

Shape = tuple[int, ...]


def read(model: Any, given: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits: tokens [B, S, V], or [B, T, V] of a pair; a class [B, 1, C]; a span [B, 2, S].

    Args:
        model: the whole model, or the last stage's.
        given: what transformers' own forward is called with.
        inputs: of the samples; ``ends``, int64 [B], says which token a text's class is read off.
    """
    kind, pools = model.kind, model.anatomy.pools
    if kind == "class" and pools != "first":
        # transformers finds the last token by comparing ids with pad_token_id, which text may contain.
        h = model.get_submodule(base_name(model))(**given)[0]
        h = h[torch.arange(len(h), device=h.device), inputs["ends"]]
        return (model.score if pools == "last" else model.classification_head)(h).unsqueeze(1)
    found = model.plain_forward(model, **given, return_dict=True)
    if kind == "class":
        return found.logits.unsqueeze(1)
    if kind == "span":
        logits = torch.stack([found.start_logits, found.end_logits], 1)
        lengths = inputs.get("lengths")
        if lengths is None:
            return logits
        real = torch.arange(logits.shape[-1], device=logits.device) < lengths[:, None]
        return logits.masked_fill(~real.unsqueeze(1), float("-inf"))
    return found.logits


def shape(kind: str, model: Any, batch: Mapping[str, Shape]) -> Shape:
    """Return the shape of :func:`read`'s logits for a batch of tensors of these shapes."""
    rows, length = batch["tokens"]
    if kind == "class":
        return rows, 1, model.config.num_labels
    if kind == "span":
        return rows, 2, length
    return rows, batch["target_tokens"][1] if kind == "pair" else length, vocabulary(model)


def vocabulary(model: Any) -> int:
    """Return the number of ids that a language model gives logits for."""
    # Of Marian's, where the languages have vocabularies of their own.
    own = getattr(model.config, "decoder_vocab_size", None)
    return own or model.config.vocab_size


def loss(
    model: Any, given: Mapping[str, Any], inputs: Mapping[str, torch.Tensor], targets: torch.Tensor
) -> torch.Tensor:
    """Return the cross entropy of :func:`read`'s logits summed over targets; those of tokens are never whole."""
    if model.kind not in ("tokens", "pair"):
        return summed_loss(read(model, given, inputs), targets)
    head = _last_layer(model)
    with _without_product(head) as seen:
        model.plain_forward(model, **given, return_dict=True)
    (h,) = seen
    place: dict[str, Any] = {}
    weight, bias, rows = head.weight, head.bias, slice(None)
    if isinstance(head, ColumnParallelLinear):
        weight, bias = head.local("weight"), head.local("bias")
        rows = own_rows(head.out_features, head.ranks, head.rank)
        place = {"vocab_start": rows.start, "group": head.group}
        h = head.enter_group(h)
    # What these models do with logits: Marian and BART add numbers that are not trained, Gemma caps.
    added = getattr(model, "final_logits_bias", None)
    if added is not None:
        added = added[0, rows].to(weight.dtype)
        bias = added if bias is None else bias + added
    cap = getattr(model.config, "final_logit_softcapping", None)
    return fused_linear_cross_entropy(h.to(weight.dtype), weight, targets, bias, softcap=cap, **place).sum()


def _last_layer(model: Any) -> Any:
    """Return the linear layer that makes logits of tokens.

    transformers' own get_output_embeddings() asks for the input's first, which a last stage may not have.
    """
    head = model.cls.predictions if model_type_of(model) == "bert" else model.lm_head
    return head.decoder if model_type_of(model) in ("bert", "roberta") else head


@contextlib.contextmanager
def _without_product(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keep what ``head`` is called with, and answer 0, which whatever is done with logits leaves a number."""
    seen: list[torch.Tensor] = []

    def forward(h: torch.Tensor) -> torch.Tensor:
        seen.append(h)
        return h.new_zeros(())

    vars(head)["forward"] = forward
    try:
        yield seen
    finally:
        del vars(head)["forward"]


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy summed over targets [B, S], [B, T], [B, 1] or [B, 2] that are not -100."""
    return vocab_parallel_cross_entropy(logits, targets, vocab_start=0, group=None).sum()


def ends_of(anatomy: Anatomy, model: nn.Module, tokens: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return int64 [B]: the token off which a text's class is read.

    Raises:
        ValueError: a text without an end-of-text token, of a model that reads its class off that.
    """
    rows, length = tokens.shape
    whole = torch.full((rows,), length, dtype=torch.int64, device=tokens.device) if lengths is None else lengths
    if anatomy.pools == "last":
        return (whole - 1).clamp(min=0)
    end: Any = model.config.eos_token_id  # type: ignore[union-attr]
    positions = torch.arange(length, device=tokens.device)
    found = torch.where((tokens == end) & (positions < whole[:, None]), positions, -1).amax(1)
    if bool((found < 0).any()):
        raise ValueError(
            f"tokens: expected an end-of-text token, {end}, in each text, off which {type(model).__name__} reads its "
            "class, received a text without one; let the tokenizer add it, and cut texts before it"
        )
    return found
