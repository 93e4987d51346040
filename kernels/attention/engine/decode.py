"""Decode on the C++ engine: keys are split over threads, and the query heads on one key head are computed together."""

from __future__ import annotations

import torch

from ... import engine
from ..call.tensors import empty_laid_out_like
from ..decode.spec import DecodeCall
from . import dense
from .backend import CPU


@torch.no_grad()
def decode(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the new keys and values to the caches, in place, and attend.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and lse [B, H, Sq], natural log, fp32, without the sinks.

    Raises:
        ValueError: a dtype, device or feature that the engine does not take, or no engine in this installation.
    """
    q = call.q
    CPU.check(call.request())
    batch, heads, seq_q, dim = q.shape
    out = empty_laid_out_like(q, call.v_dim)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if call.k_cache.numel() == 0:  # no page, or no key that a page could hold
        return out.zero_(), lse.fill_(-torch.inf)
    v_cache = call.k_cache[..., : call.v_dim] if call.v_cache is None else call.v_cache
    whole = engine.Attention(
        batch=batch,
        heads=heads,
        kv_heads=call.k_cache.shape[1],
        seq_q=seq_q,
        seq_k=call.capacity,
        dim=dim,
        dim_v=call.v_dim,
        q=dense.view("q", q),
        k=dense.view("k", call.k_cache),
        v=dense.view("v", v_cache),
        out=dense.view("out", out),
        lse=dense.view("lse", lse),
    )
    _kept = dense.set_options(whole, call.call)
    cache = engine.Cache(
        page=call.page,
        pages=call.k_cache.shape[0],
        added=call.added,
        cache_lens=dense.view("cache_lens", call.cache_lens),
    )
    for name in ("cache_starts", "block_table", "k_new", "v_new"):
        tensor = getattr(call, name)
        if tensor is not None:
            setattr(cache, name, dense.view(name, tensor))
    engine.decode(whole, cache)
    return out, lse
