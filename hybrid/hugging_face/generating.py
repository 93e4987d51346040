"""transformers' generate() over the stages of a pipeline: every rank runs its loop, on the same logits.

No stage keeps keys and values, so that each token takes a forward of all before it, of an encoder, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Output(dict[str, torch.Tensor]):
    """Tensors by name, which are attributes, too, as of the outputs of transformers' models."""

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def over_stages(model: Any, plain: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Return what transformers' generate() does of a model with pp, as :func:`as_trainable` makes it.

    Args:
        plain: transformers' method, unbound. options: its arguments by name.

    Raises:
        ValueError: sources that are not tokens, or not padded at their ends.
    """
    config = options.get("generation_config")
    if config is None:
        options["use_cache"] = False
    else:
        options["generation_config"] = config = copy.deepcopy(config)
        config.use_cache = False
    if model.kind == "pair":
        options |= _sources(model, options.pop("inputs", None), options)
    elif (mask := options.get("attention_mask")) is not None:
        _check_padding(model, mask, mask.flip(1), "beginnings", "left")
    vars(model)["next_logits"] = next_logits
    try:
        return plain(model, **options)
    finally:
        del vars(model)["next_logits"]


def _sources(model: Any, tokens: torch.Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers is given of sources, whose tokens stand in the place of an encoder's output."""
    tokens = options.pop("input_ids", None) if tokens is None else tokens
    if tokens is None or "encoder_outputs" in options:
        raise ValueError(
            f"generate: expected the tokens of sources, as input_ids, of {type(model).__name__} with pp, whose encoder "
            "is on several ranks, received none, or its output; give them"
        )
    mask = options.get("attention_mask")
    if mask is None:
        # As transformers does.
        pad = getattr(model.config, "pad_token_id", None)
        mask = torch.ones_like(tokens) if pad is None else (tokens != pad).long()
    _check_padding(model, mask, mask, "ends", "right")
    return {"encoder_outputs": Output(last_hidden_state=tokens.unsqueeze(-1)), "attention_mask": mask}


def _check_padding(model: Any, mask: torch.Tensor, real_first: torch.Tensor, where: str, side: str) -> None:
    if bool((real_first.diff(dim=1) > 0).any()):
        raise ValueError(
            f"attention_mask: expected texts padded at their {where} for {type(model).__name__} with pp, received "
            f'{mask.tolist()}; give the tokenizer padding_side="{side}"'
        )


def next_logits(
    model: nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    decoder_input_ids: torch.Tensor | None = None,
    encoder_outputs: Any = None,
    **_: Any,
) -> Any:
    """Return transformers' output with the logits of the next token, [B, 1, V], computed over all stages.

    Args:
        input_ids: int64 [B, S], of a model of one stack, padded on the left. attention_mask: [B, S], 0 at padding.
        decoder_input_ids: int64 [B, T]. encoder_outputs: of :func:`_sources`.
    """
    stages: Any = model
    if encoder_outputs is not None:
        assert attention_mask is not None
        logits = stages.logits(
            encoder_outputs["last_hidden_state"].squeeze(-1), lengths=attention_mask.sum(1), target_tokens=decoder_input_ids
        )
        return Output(logits=logits[:, -1:])
    assert input_ids is not None
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    # A model here takes rows that are padded on the right.
    length, lengths = input_ids.shape[1], attention_mask.sum(1)
    at = (torch.arange(length, device=input_ids.device) - lengths[:, None]) % length
    logits = stages.logits(input_ids.gather(1, at), lengths=lengths)
    last = (lengths - 1)[:, None, None].expand(-1, 1, logits.shape[-1])
    return Output(logits=logits.gather(1, last))
