"""flash_attention_decode: attention over a cache of keys and values, the step of generation.

    append k_new and v_new to the caches, in place;   n = length of the sequence, the new keys included
    out, lse = attention of q over the n keys, by the formula of dense/api.py

with query i at position n - Sq + i and key j at position j. Caches, lengths and page tables stay on the device: nothing
waits for it, and grids depend on shapes alone, so that a recorded CUDA graph holds for any lengths.
"""

from __future__ import annotations

import torch

from ...backends import choose
from ..call.options import Options
from ..call.validation import check_flag, normalise
from . import validation
from .ops import FIELDS
from .spec import DecodeCall


def flash_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None = None,
    *,
    cache_lens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    v_dim: int | None = None,
    cache_starts: torch.Tensor | None = None,
    causal: bool = False,
    align: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new queries over a cache, to which it can append first; the formula is at the top of this module.

    Args:
        q: [B, H, Sq, D], the last Sq tokens of each sequence.
        k_cache: [B, Hkv, S, D], H a multiple of Hkv; or with block_table pages [N, Hkv, page, D] of any size. Any
            strides with unit last stride (storage with heads after positions passes by a transpose). Written in place.
        v_cache: likewise with Dv, which may differ from D. None with v_dim: latent attention, in which the values are
            the first v_dim columns of the keys (D 576, v_dim 512), read once for both.
        cache_lens: int32 or int64 [B], on the device. Without k_new: the keys of each sequence, those of the queries
            included. With k_new: the keys before the append; the length becomes cache_lens + Sn. (The caller keeps
            count: cache_lens itself is not changed.)
        block_table: int32 or int64 [B, pages of a sequence]: key j of sequence b is row j % page of page
            block_table[b, j // page]. Entries beyond a sequence's length may hold anything.
        k_new, v_new: [B, Hkv, Sn, D] and [B, Hkv, Sn, Dv], written to the slots after the last key, before attention;
            v_new None in the latent case. Sn need not be Sq.
        cache_starts: int32 or int64 [B]: keys before it are unseen, and positions count from it (left padding).
        causal: hide the keys after a query's own position. Changes nothing where Sq is 1.
        align: ``"bottom_right"``, to be said with causal, window or alibi_slopes: query i stands at length - Sq + i.
        window: (left, right): how many keys before and after its own position a query sees; None leaves a side open.
        mask: bool, True = attend, any shape that broadcasts to [B, H, Sq, S], any strides; with a table S is pages *
            page. Its last dimension, and that of bias, is the slot of the key, whatever cache_starts is.
        bias: added to the scores, likewise; q's dtype or fp32.
        alibi_slopes: [H] or [B, H]: s - slope * |position of the query - position of the key|.
        softcap: cap * tanh(s / cap).
        sinks: [H], one logit for each head that joins the denominator, fp32 or q's dtype; the lse leaves it out.
        scale: factor of q k^T; None means 1 / sqrt(D).
        return_lse: also return the log-sum-exp.
        backend: ``reference`` (plain PyTorch, memory Sq * S), ``cpu`` (the C++ engine) or ``triton`` (GPUs; the CPU
            only in Triton's interpreter); one asked for by name runs or raises. ``auto`` takes triton on a GPU where
            that is proven, cpu on CPUs, else reference.

    Dtypes: fp32, bf16, fp16, and fp64 on reference, the caches' that of q; sums run in fp32 (fp64 for fp64). Triton
    takes D from 16 to 576 and Dv from 16 to 512. Same inputs give the same bits. Caches are mutated arguments of a
    custom op, so torch.compile keeps the order of writes and reads.

    Returns:
        out [B, H, Sq, Dv] in q's dtype; with return_lse also lse [B, H, Sq], natural log, fp32 (fp64 for fp64). A query
        that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: an argument is wrong, an input requires a gradient (decode has none), or a backend given by name
            cannot do the call. What cache_lens, cache_starts and block_table hold is checked only with
            FUSEMESH_CHECK=1, which waits for the device; otherwise lengths beyond the cache count as its end.
    """
    validation.check_cache(q, k_cache, v_cache, cache_lens, block_table, cache_starts)
    v_dim = validation.check_values(q, v_cache, v_dim)
    capacity = k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[2]
    validation.check_new(q, k_cache, v_cache, capacity, k_new, v_new)
    check_flag("return_lse", return_lse)
    check_flag("causal", causal)
    validation.check_align(align, causal or window is not None or alibi_slopes is not None)
    without = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k_new": k_new, "v_new": v_new}
    validation.check_no_gradient(**without, bias=bias, sinks=sinks, alibi_slopes=alibi_slopes)
    # The keys of a sequence as the scores see them, without memory.
    keys = k_cache.new_empty((1, 1, 1, 1)).expand(q.shape[0], k_cache.shape[1], capacity, q.shape[3])
    options = Options(
        causal=causal,
        align="bottom_right",
        window=window,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
    )
    call = normalise(q, keys, options)
    step = DecodeCall(q, k_cache, v_cache, cache_lens, block_table, cache_starts, k_new, v_new, v_dim, call)
    name = choose(backend, step.request()).name
    out, lse = torch.ops.fusemesh.attention_decode(*FIELDS.pack(step), name)
    return (out, lse) if return_lse else out
