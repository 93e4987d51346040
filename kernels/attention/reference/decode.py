"""Attention over a cache in plain PyTorch: append, gather the sequences' keys, and attend as dense.py does.

Every slot of the cache is a key; those that hold none are hidden by a mask. Its memory grows with Sq * S, and with
pages it gathers the sequences; nothing waits for the device.
"""

from __future__ import annotations

import dataclasses

import torch

from ..call.options import Call
from ..decode.spec import DecodeCall
from . import dense


@torch.no_grad()
def decode(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the new keys and values to the caches, in place, and attend.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and lse [B, H, Sq], natural log, fp32 (fp64 for fp64), without the sinks.
    """
    with dense.without_autocast(call.q.device.type):
        append(call)
        out, lse = dense.forward(*as_dense(call))
        return out, lse


def append(call: DecodeCall) -> None:
    """Write the new keys and values to the slots after the last key.

    A token whose slot lies beyond the cache, or on a page that does not exist, is dropped.
    """
    if call.k_new is None or call.capacity == 0 or call.k_cache.shape[0] == 0 or call.added == 0:
        return
    slots = call.cache_lens.long()[:, None] + torch.arange(call.added, device=call.q.device)
    rows, offsets, exists = _locate(call, slots.clamp(0, call.capacity - 1))
    kept = ((slots >= 0) & (slots < call.capacity) & exists).flatten()
    rows, offsets = rows.flatten(), offsets.flatten()
    if not kept.numel():
        return
    # A boolean index would wait for the device. So a dropped token repeats the write of the first one that is kept; if
    # all are dropped, each rewrites what stands in one slot.
    first = kept.int().argmax()
    any_kept = kept[first]
    source = torch.where(kept, torch.arange(len(kept), device=kept.device), first)
    rows, offsets = rows[source], offsets[source]
    for cache, new in ((call.k_cache, call.k_new), (call.v_cache, call.v_new)):
        if cache is not None and new is not None:
            # [B * Sn, Hkv, D]
            tokens = new.transpose(1, 2).flatten(0, 1)[source]
            cache[rows, :, offsets] = torch.where(any_kept, tokens, cache[rows, :, offsets])


def _locate(call: DecodeCall, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first and third index into the cache of slots [B, n] of each sequence, and whether they exist."""
    if call.block_table is None:
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None].expand_as(slots)
        return rows, slots, torch.ones_like(slots, dtype=torch.bool)
    pages = call.block_table.long().gather(1, slots // call.page)
    # Entries of a table beyond a sequence's pages may hold anything; the slots that they lead to are hidden.
    last = call.k_cache.shape[0] - 1
    return pages.clamp(0, max(last, 0)), slots % call.page, (pages >= 0) & (pages <= last)


def as_dense(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Call]:
    """Return q, the sequences' keys and values side by side, and the options that hide what is no key."""
    q = call.q
    slots = torch.arange(call.capacity, device=q.device)
    length = (call.cache_lens.long() + call.added).clamp(max=call.capacity)
    start = torch.zeros_like(length) if call.cache_starts is None else call.cache_starts.long()
    # [B, capacity]
    exists = (slots >= start[:, None]) & (slots < length[:, None])
    k = _gather(call, call.k_cache, exists)
    v = k[..., : call.v_dim] if call.v_cache is None else _gather(call, call.v_cache, exists)
    # Positions count from the start; the queries are the last tokens.
    zero = torch.zeros_like(length)
    seen = exists[:, None, None, :]
    own = call.call.replace(
        mask=seen if call.call.mask is None else seen & call.call.mask,
        origin=torch.stack([length - q.shape[2] - start, -start, zero, zero]),
        spec=dataclasses.replace(call.call.spec, origin_q=0, origin_k=0),
    )
    return q, k, v, own


def _gather(call: DecodeCall, cache: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, capacity, D]: the sequences' slots in their order, 0 where ``exists`` [B, capacity] is False."""
    if call.block_table is not None:
        slots = torch.arange(call.capacity, device=cache.device).expand(call.q.shape[0], -1)
        rows, offsets, _ = _locate(call, slots)
        if cache.shape[0] == 0:
            cache = cache.new_zeros((1, *cache.shape[1:]))
        cache = cache[rows, :, offsets].transpose(1, 2)
    return torch.where(exists[:, None, :, None], cache, 0).contiguous()
