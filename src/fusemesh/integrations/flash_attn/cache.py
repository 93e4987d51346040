"""flash-attn 2's flash_attn_with_kvcache: rotary positions, then the append and the attention of one op."""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.kernels.attention.call.errors import short, wrong
from fusemesh.kernels.attention.call.scalars import as_integer
from fusemesh.kernels.attention.call.validation import check_truth
from fusemesh.kernels.attention.decode.api import flash_attention_decode

from .options import length, score_options

_INTEGERS = (torch.int32, torch.int64)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Append new keys and values to a cache in place, and return the attention of new queries over it.

    Args:
        q: [B, Sq, H, D], the last Sq tokens of each sequence.
        k_cache, v_cache: [Bc, S, Hkv, D] with unit last stride, or with block_table pages [N, page, Hkv, D] of any
            size. Without cache_batch_idx Bc is B.
        k, v: [B, Sn, Hkv, D], written to the slots from cache_seqlens on.
        rotary_cos, rotary_sin: [at least the cache's slots of a sequence, R / 2], R even and at most D, with k and v.
            The first R dimensions of q and k are turned in pairs by these angles: new key j by row cache_seqlens + j,
            and query i by row cache_seqlens + i with causal or a window, else by row cache_seqlens. Computed in fp32
            and rounded to q's dtype.
        cache_seqlens: the keys of each sequence before the append, an int or int32 or int64 [B]; to be given with k.
            None: the cache is full. The caller keeps count: it is not changed.
        cache_batch_idx: int32 or int64 [B]: sequence b owns row cache_batch_idx[b] of the caches. Not with block_table.
            Where two are equal and k is given, either's new keys may stay.
        cache_leftpad: int32 or int64 [B]: keys in earlier slots are unseen.
        block_table: int32 or int64 [B, pages of a sequence]: slot j of sequence b is row j % page of page
            block_table[b, j // page].
        rotary_interleaved: whether a pair is dimensions 2 i and 2 i + 1, or i and i + R / 2.
        num_splits: accepted and ignored: the number of parts follows from shapes.
        softmax_scale, causal, window_size, softcap, alibi_slopes: see :mod:`fusemesh.integrations.flash_attn`; the last
            query stands at the last key, the appended ones included.

    Returns:
        out [B, Sq, H, Dv]; with return_softmax_lse also softmax_lse [B, H, Sq], natural log, fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes do not fit, an argument lacks another that it needs, or a tensor requires a gradient outside
            torch.no_grad() (there is none, and flash-attn would drop it without a word).
    """
    rotary_interleaved = check_truth("rotary_interleaved", rotary_interleaved)
    return_softmax_lse = check_truth("return_softmax_lse", return_softmax_lse)
    length("num_splits", num_splits, remedy="it is ignored; 0 lets flash-attn choose")
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, x in tensors.items():
        if x is None and name in ("k", "v"):
            continue
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            remedy = "dimensions are (batch or page, position, head, head dim)"
            raise wrong(name, "a tensor of 4 dimensions", short(x), remedy)
    _check_new(q, k_cache, v_cache, k, v)
    if cache_leftpad is not None:
        _check_indices("cache_leftpad", cache_leftpad, q, "the first slot of each sequence that holds a key")
    options = score_options(q, softmax_scale, causal, window_size, softcap, alibi_slopes)
    batch = q.shape[0]
    if cache_batch_idx is not None:
        if block_table is not None:
            remedy = "block_table says by itself where each sequence's keys are"
            raise wrong("cache_batch_idx", "None with block_table", short(cache_batch_idx), remedy)
        _check_indices("cache_batch_idx", cache_batch_idx, q, "the row of the caches that each sequence owns")
        # A cache that sequences own by rows is one with a page for each sequence: nothing is gathered.
        block_table = cache_batch_idx[:, None]
    elif block_table is None and k_cache.shape[0] != batch:
        remedy = "say by cache_batch_idx which row each sequence owns"
        raise wrong("k_cache", f"q's batch size {batch}", f"shape {tuple(k_cache.shape)}", remedy)
    columns = block_table.shape[1] if isinstance(block_table, torch.Tensor) and block_table.dim() == 2 else 1
    capacity = columns * k_cache.shape[1]
    lens = _lengths(cache_seqlens, q, capacity, appends=k is not None)
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(rotary_cos, rotary_sin, q, k, capacity)
        assert rotary_cos is not None and rotary_sin is not None and k is not None
        # Without a mask by position all queries count as standing where the first new key does.
        steps = 1 if options["causal"] or options["window"] is not None else 0
        q = _rotate(q, lens, steps, rotary_cos, rotary_sin, rotary_interleaved)
        k = _rotate(k, lens, 1, rotary_cos, rotary_sin, rotary_interleaved)
    result = flash_attention_decode(
        q.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        cache_lens=lens,
        block_table=block_table,
        k_new=None if k is None else k.transpose(1, 2),
        v_new=None if v is None else v.transpose(1, 2),
        cache_starts=cache_leftpad,
        return_lse=return_softmax_lse,
        **options,
    )
    if isinstance(result, tuple):
        return result[0].transpose(1, 2), result[1]
    return result.transpose(1, 2)


def _check_new(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: Any, v: Any) -> None:
    """Raise unless the keys and values to append belong together and to the caches."""
    if (k is None) != (v is None):
        raise wrong("k, v", "both or none", "one of them", "keys and values are appended together")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x is not None:
            shape = (q.shape[0], k.shape[1], *cache.shape[2:])
            if tuple(x.shape) != shape:
                raise wrong(name, f"shape [B, Sn, Hkv, D] = {shape}", tuple(x.shape), "sizes are those of the cache")


def _check_indices(name: str, x: Any, q: torch.Tensor, remedy: str) -> None:
    right = isinstance(x, torch.Tensor) and x.dtype in _INTEGERS
    if not right or x.shape != (q.shape[0],) or x.device != q.device:
        expected = f"an int32 or int64 tensor [B] = [{q.shape[0]}] on {q.device}"
        raise wrong(name, expected, short(x), remedy)


def _lengths(cache_seqlens: Any, q: torch.Tensor, capacity: int, *, appends: bool) -> torch.Tensor:
    """Return the number of keys of each sequence before the append, [B], on the device."""
    if cache_seqlens is None and appends:
        raise wrong("cache_seqlens", "an int or a tensor [B] with k and v", None, "say where they are to be written")
    if cache_seqlens is None:
        cache_seqlens = capacity
    number = as_integer(cache_seqlens)
    if number is not None:
        if not 0 <= number <= capacity:
            remedy = "enlarge the cache or correct the length"
            raise wrong("cache_seqlens", f"from 0 to the cache's {capacity} slots", number, remedy)
        return torch.full((q.shape[0],), number, dtype=torch.int32, device=q.device)
    _check_indices("cache_seqlens", cache_seqlens, q, "an int, or the keys of each sequence before the append")
    assert isinstance(cache_seqlens, torch.Tensor)
    return cache_seqlens


def _check_rotary(cos: Any, sin: Any, q: torch.Tensor, k: Any, capacity: int) -> None:
    """Raise unless cos and sin are tables of angles for q and for the keys to append."""
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise wrong(missing, "a table beside the other one", None, "pass rotary_cos and rotary_sin")
    if k is None:
        remedy = "keys in the cache are taken as they are; turn q yourself"
        raise wrong("rotary_cos, rotary_sin", "None without k and v", "both", remedy)
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        right = isinstance(table, torch.Tensor) and table.dim() == 2 and table.dtype.is_floating_point
        if not right or table.shape != cos.shape or table.device != q.device:
            expected = f"a float tensor [positions, R / 2] on {q.device}, both of one shape"
            raise wrong(name, expected, short(table), "a row of cosines or sines for each position")
        if not 0 < 2 * table.shape[1] <= q.shape[3]:
            expected = f"from 1 to {q.shape[3] // 2} columns, half of the dimensions that are turned"
            raise wrong(name, expected, f"shape {tuple(table.shape)}", "R is at most the head dim")
        if table.shape[0] < capacity:
            expected = f"a row for each of the cache's {capacity} slots of a sequence"
            raise wrong(name, expected, f"shape {tuple(table.shape)}", "compute the table for more positions")


def _rotate(
    x: torch.Tensor, starts: torch.Tensor, steps: int, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Return x [B, S, H, D] with rotary positions: token i of sequence b is at row starts[b] + steps * i.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = starts.long()[:, None] + steps * torch.arange(x.shape[1], device=x.device)
    # A token beyond the cache is dropped by the append, whatever its angle is.
    rows = rows.clamp(0, cos.shape[0] - 1)
    # [B, S, 1, R / 2]
    c, s = (table.to(dtype)[rows].unsqueeze(2) for table in (cos, sin))
    turned, rest = x[..., : 2 * cos.shape[1]].to(dtype), x[..., 2 * cos.shape[1] :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
