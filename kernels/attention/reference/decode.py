"""Attention over a cache in plain PyTorch: what decode is. The Triton kernels are compared with this file.

    append;   s = mods(scale * q k^T) + bias, -inf where the query does not see the key
    lse = log sum_k exp(s);   p = exp(s) / (exp(lse) + exp(sink));   out = p v

over all slots of the cache, those that hold no key hidden. Half precision is computed in fp32, fp64 in fp64. Its memory
grows with Sq * S, and with pages it gathers the sequences; nothing waits for the device.
"""

from __future__ import annotations

import math

import torch

from ..call import score_mods
from ..decode.spec import DecodeCall
from .dense import without_autocast


@torch.no_grad()
def decode(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the new keys and values to the caches, in place, and attend.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, and lse [B, H, Sq], natural log, fp32 (fp64 for fp64), without the sinks.
    """
    with without_autocast(call.q.device.type):
        _append(call)
        return _attend(call)


def _append(call: DecodeCall) -> None:
    """Write the new keys and values to the slots after the last key; what lies beyond the cache is dropped."""
    if call.k_new is None or call.capacity == 0:
        return
    slots = call.cache_lens.long()[:, None] + torch.arange(call.added, device=call.q.device)
    # A boolean index would wait for the device. So a token that is dropped rewrites what stands in a slot that no other
    # token is written to: there are at most as many tokens as slots.
    inside = ((slots >= 0) & (slots < call.capacity))[:, :, None, None]
    rows, offsets = _locate(call, slots % call.capacity)
    for cache, new in ((call.k_cache, call.k_new), (call.v_cache, call.v_new)):
        if cache is not None and new is not None:
            # [B, Sn, Hkv, D]
            cache[rows, :, offsets] = torch.where(inside, new.transpose(1, 2), cache[rows, :, offsets])


def _locate(call: DecodeCall, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(first index of the cache, third index of the cache) of slots [B, n] of each sequence."""
    if call.block_table is None:
        return torch.arange(slots.shape[0], device=slots.device)[:, None].expand_as(slots), slots
    pages = call.block_table.long().gather(1, slots // call.page)
    # Entries of a table beyond a sequence's pages may hold anything; the slots that they lead to are hidden.
    return pages.clamp(0, max(call.k_cache.shape[0] - 1, 0)), slots % call.page


def _attend(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    q = call.q
    B, H, Sq, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    device = q.device
    slots = torch.arange(call.capacity, device=device)
    length = (call.cache_lens.long() + call.added).clamp(max=call.capacity)
    start = torch.zeros_like(length) if call.cache_starts is None else call.cache_starts.long()
    # [B, capacity]
    exists = (slots >= start[:, None]) & (slots < length[:, None])
    k = _gather(call, call.k_cache, exists).to(dtype)
    v = k[..., : call.v_dim] if call.v_cache is None else _gather(call, call.v_cache, exists).to(dtype)
    groups = H // max(k.shape[1], 1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    # [B, 1, Sq, 1] and [B, 1, 1, capacity]: positions, which count from the start
    i_q = (length[:, None] - Sq + torch.arange(Sq, device=device) - start[:, None])[:, None, :, None]
    i_k = (slots - start[:, None])[:, None, None, :]
    s = call.spec.scale * (q.to(dtype) @ k.transpose(-1, -2))
    i_b = torch.arange(B, device=device)[:, None, None, None]
    i_h = torch.arange(H, device=device)[:, None, None]
    for mod, aux, params in score_mods.split(call.spec.mods, call.aux, call.spec.params):
        s = mod.torch_forward(s, i_b, i_h, i_q, i_k, *aux, **dict(zip(mod.param_names, params, strict=True)))
    if call.bias is not None:
        s = s + call.bias.to(dtype)
    seen = exists[:, None, None, :]
    if call.spec.window_left is not None:
        seen = seen & (i_k - i_q >= -call.spec.window_left)
    if call.spec.window_right is not None:
        seen = seen & (i_k - i_q <= call.spec.window_right)
    if call.mask is not None:
        seen = seen & call.mask
    # where, because what bias holds at a hidden key may be anything
    s = torch.where(seen, s, -math.inf)
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    p = torch.softmax(s, -1).masked_fill(empty, 0.0)
    if call.sinks is not None:
        p = p * torch.exp(lse - torch.logaddexp(lse, call.sinks.to(dtype)[:, None, None]))
    out = p @ v
    return out.to(q.dtype), lse.masked_fill(empty, -math.inf).squeeze(-1)


def _gather(call: DecodeCall, cache: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, capacity, D]: the sequences' slots in their order, 0 where ``exists`` [B, capacity] is False."""
    if call.block_table is not None:
        slots = torch.arange(call.capacity, device=cache.device).expand(call.q.shape[0], -1)
        rows, offsets = _locate(call, slots)
        if cache.shape[0] == 0:
            cache = cache.new_zeros((1, *cache.shape[1:]))
        cache = cache[rows, :, offsets].transpose(1, 2)
    return torch.where(exists[:, None, :, None], cache, 0)
