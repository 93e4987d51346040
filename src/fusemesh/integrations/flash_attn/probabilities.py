"""The probabilities that flash-attn's functions return for tests: by the reference's formula, memory of Sq x Sk.

They come from the log-sum-exp and the seed of the call, whichever backend computed it, so that they are negative
exactly where that call dropped. They have no derivative, backward or forward.
"""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.kernels.attention.call.option_checks import checked_dropout, seed_tensor
from fusemesh.kernels.attention.call.options import Options
from fusemesh.kernels.attention.call.scalars import element
from fusemesh.kernels.attention.call.spec import Origin
from fusemesh.kernels.attention.call.tensors import autocast
from fusemesh.kernels.attention.call.validation import normalise
from fusemesh.kernels.attention.reference import dense as reference


def dropout_options(q: torch.Tensor, dropout_p: Any, return_attn_probs: bool) -> dict[str, Any]:
    """Return dropout_p and, where the probabilities are wanted, the seed of the call, drawn from torch's generator."""
    share = checked_dropout(element(dropout_p))
    return {"dropout_p": share, "seed": seed_tensor(None, q) if share > 0 and return_attn_probs else None}


@torch.no_grad()
def dense_probabilities(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return S_dmask [B, H, Sq, Sk] of a call of flash_attention of q [B, H, Sq, D], k [B, Hkv, Sk, D]."""
    q, k = autocast(q, k)
    return reference.signed_weights(q, k, lse, normalise(q, k, Options(**options))).detach()


@torch.no_grad()
def packed_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor, int, int],
    options: dict[str, Any],
) -> torch.Tensor:
    """Return S_dmask [B, H, max_seqlen_q, max_seqlen_k] of a call of flash_attention_varlen, without reading lengths.

    Args:
        q: [total_q, H, D].
        k: [total_k, Hkv, D].
        lse: [H, total_q].
        lengths: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
        options: of the call, aligned to the last key.
    """
    q, k = autocast(q, k)
    cu_q, cu_k, max_q, max_k = lengths
    at_q, seen_q = _places(cu_q, max_q)
    at_k, seen_k = _places(cu_k, max_k)
    batch_q, batch_k = _gathered(q, at_q).transpose(1, 2), _gathered(k, at_k).transpose(1, 2)
    # A row beyond its sequence counts as one that sees no key, and has probabilities 0.
    rows = _gathered(lse.T, at_q).transpose(1, 2).masked_fill(~seen_q[:, None], -torch.inf)
    call = normalise(batch_q, batch_k, Options(**{**options, "align": None, "origin": Origin()}))
    ahead = (cu_k[1:] - cu_k[:-1] - (cu_q[1:] - cu_q[:-1])).long()
    zero = torch.zeros_like(ahead)
    call = call.replace(origin=torch.stack((ahead, zero, zero, zero)))
    found = reference.signed_weights(batch_q, batch_k, rows, call).masked_fill(~seen_k[:, None, None], 0.0)
    return found.detach()


def _places(cu: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of each sequence's positions, [B, most], and which of them are within its length."""
    positions = torch.arange(most, device=cu.device)
    return cu[:-1, None].long() + positions, positions < (cu[1:] - cu[:-1])[:, None]


def _gathered(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return x [total, ...] at ``rows`` [B, S], as [B, S, ...]; where there is no such row, any."""
    if x.shape[0] == 0:
        return x.new_zeros((*rows.shape, *x.shape[1:]))
    return x[rows.clamp(0, x.shape[0] - 1)]
