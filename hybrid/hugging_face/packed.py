"""Documents that share a row: what transformers' forward is called with so that they do not see each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fusemesh.kernels.attention.call.place import without_mask

from .. import compat

# What configs call the probability with which attention weights are dropped.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Their positions begin behind the padding token's number.
_BEHIND_PADDING = ("roberta",)
# Their forward makes a mask without asking positions.
_MASKS_WITHOUT_POSITIONS = ("bert", "roberta")


@contextlib.contextmanager
def documents(model: Any, positions: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Yield what to call transformers' forward with for rows whose documents each begin at position 0.

    Positions go to the model, and bounds through it to its attention, under the names of flash-attn's interface. Our
    attention then takes each document by itself, and needs no mask, so that none is made within the block. Another
    attention, and ours where it drops weights, takes the mask [B, 1, S, S] that transformers makes of the positions.

    Args:
        positions: int64 [B, S]; the first column is 0.

    Raises:
        ValueError: a row does not begin at position 0.
    """
    flat = positions.flatten()
    starts = (flat == 0).nonzero().flatten()
    if bool((positions[:, 0] != 0).any()):
        raise ValueError(
            "positions: expected 0 at the beginning of each row, where a document begins, received "
            f"{positions[:, 0].tolist()[:8]}; let them begin again at 0 with each document"
        )
    first = (model.config.pad_token_id or 0) + 1 if model.config.model_type in _BEHIND_PADDING else 0
    given: dict[str, Any] = {"position_ids": positions + first}
    drops = model.training and any(getattr(model.config, name, 0.0) for name in _DROPOUTS)
    if drops or compat.attention_of(model.config) != "fusemesh":
        if model.config.model_type in _MASKS_WITHOUT_POSITIONS:
            mask = _mask(positions)
            if compat.attention_of(model.config) == "eager":
                dtype = next(model.parameters()).dtype
                mask = mask.new_zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            given["attention_mask"] = mask
        yield given
        return
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])]).int()
    longest = int(flat.max()) + 1
    given |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
    given |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
    with without_mask():
        yield given


def _mask(positions: torch.Tensor) -> torch.Tensor:
    """Return which tokens each sees, bool [B, 1, S, S]: those of its document, up to itself."""
    numbers = (positions == 0).cumsum(1)
    places = torch.arange(positions.shape[1], device=positions.device)
    return ((numbers[:, :, None] == numbers[:, None, :]) & (places[:, None] >= places))[:, None]
