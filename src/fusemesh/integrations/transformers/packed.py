"""Attention over rows that hold several sequences, by the bounds that transformers passes to flash-attn."""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.kernels.attention.call.option_checks import checked_scale
from fusemesh.kernels.attention.call.place import dropping
from fusemesh.kernels.attention.call.scalars import element
from fusemesh.kernels.attention.call.score_mods import checked_softcap
from fusemesh.kernels.attention.call.validation import wrong
from fusemesh.kernels.attention.varlen.api import flash_attention_varlen


def packed_attention(
    module: torch.nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bounds: dict[str, Any],
    *,
    causal: bool,
    window: tuple[int, None] | None,
    softcap: Any,
    sinks: torch.Tensor | None,
    scale: Any,
    dropout_p: float,
) -> torch.Tensor:
    """Return [B, Sq, H, Dv] of rows that hold several sequences, one behind the other, which do not see each other.

    Args:
        bounds: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k``, of all rows, as transformers
            passes them to flash-attn.
    """
    query = tensors[0]
    if dropout_p > 0 and dropping(module, query, tensors[1], None) != (None, None, None):
        raise wrong(
            "dropout",
            "0 where sequences share a row (cu_seq_lens_q) in a model that drops by position",
            dropout_p,
            "pass position_ids that begin at 0 with each sequence and no cu_seq_lens_q: the mask keeps them apart",
        )
    flat = [x.transpose(1, 2).flatten(0, 1) for x in tensors]
    lengths: list[Any] = [
        bounds.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    ]
    out = flash_attention_varlen(
        flat[0],
        flat[1],
        flat[2],
        *lengths,
        causal=causal,
        align="bottom_right" if causal or window is not None else None,
        window=window,
        softcap=None if softcap is None else checked_softcap(element(softcap)),
        sinks=in_dtype_of(query, sinks),
        dropout_p=dropout_p,
        scale=checked_scale(element(scale), query, "scaling"),
    )
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def in_dtype_of(query: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None:
    """Return ``x`` in a dtype that attention takes beside ``query``'s."""
    return x if x is None or x.dtype in (query.dtype, torch.float32) else x.to(query.dtype)
