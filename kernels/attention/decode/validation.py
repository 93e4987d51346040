"""Checks of the arguments of decode; shapes, dtypes and devices only, but for :func:`check_contents`."""

from __future__ import annotations

from typing import Any

import torch

from ... import compat
from ...backend_record import TRANSFORMS, needs_gradient
from ..call.errors import TRANSPOSE, or_transpose, short
from ..call.scalars import as_integer
from ..call.validation import DTYPES, wrong
from .spec import DecodeCall

INDEX_DTYPES = (torch.int32, torch.int64)


def check_cache(q: Any, k_cache: Any, v_cache: Any, cache_lens: Any, block_table: Any, cache_starts: Any) -> None:
    """Raise unless the queries, the caches and what says where their keys are belong together."""
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    paged = block_table is not None
    letters = {"q": "[B, H, Sq, D]", "k_cache": "pages [N, Hkv, page, D]" if paged else "[B, Hkv, S, D]"}
    letters["v_cache"] = letters["k_cache"].replace("D]", "Dv]")
    for name, x in tensors.items():
        if x is None and name == "v_cache":
            continue
        if not isinstance(x, torch.Tensor):
            raise wrong(name, "a torch.Tensor", type(x).__name__, "convert it with torch.as_tensor")
        if x.layout != torch.strided or x.dim() != 4:
            raise wrong(name, f"a dense tensor {letters[name]}", f"shape {tuple(x.shape)}", "add what is missing")
        if name == "q" and x.dtype not in DTYPES:
            raise wrong(name, f"a dtype out of {DTYPES}", x.dtype, "convert it with .to(dtype)")
        if x.dtype != q.dtype or x.device != q.device:
            expected, received = f"q's dtype and device, {q.dtype} on {q.device}", f"{x.dtype} on {x.device}"
            raise wrong(name, expected, received, "queries and caches share both")
        if name != "q" and x.shape[3] > 1 and x.stride(3) != 1:
            remedy = "a cache is written in place, so it cannot be copied; keep each key's elements side by side"
            raise wrong(name, "a last dimension with stride 1", f"strides {x.stride()}", remedy)
        if name != "q" and x.shape[3] == 0:
            raise wrong(name, "a head dim of at least 1", 0, "pass a cache whose last dimension is not empty")
    batch, heads, _, dim = q.shape
    _check_indices("cache_lens", cache_lens, (batch,), q.device)
    if paged:
        _check_indices("block_table", block_table, (batch, None), q.device)
    elif k_cache.shape[0] != batch:
        remedy = "a cache for each sequence; pages that are shared need block_table"
        raise wrong("k_cache", f"q's batch size {batch}", f"{k_cache.shape[0]} (shape {tuple(k_cache.shape)})", remedy)
    if cache_starts is not None:
        _check_indices("cache_starts", cache_starts, (batch,), q.device)
    if k_cache.shape[3] != dim:
        raise wrong("k_cache", f"q's head dim {dim}", f"shape {tuple(k_cache.shape)}", "q and keys have the same")
    if heads != 0 and (k_cache.shape[1] == 0 or heads % k_cache.shape[1] != 0):
        remedy = f"query head h uses key head h // (H / Hkv); {TRANSPOSE}"
        expected = f"a number of heads that divides q's {heads}"
        raise wrong("k_cache", expected, f"{k_cache.shape[1]} (shape {tuple(k_cache.shape)})", remedy)
    if v_cache is not None and v_cache.shape[:3] != k_cache.shape[:3]:
        expected = f"k_cache's first three sizes {tuple(k_cache.shape[:3])}"
        fits = v_cache.shape[1:3] == (k_cache.shape[2], k_cache.shape[1])
        raise wrong("v_cache", expected, tuple(v_cache.shape), or_transpose("one value for each key", fits))
    if paged and k_cache.shape[2] == 0:
        raise wrong("k_cache", "pages of at least one key", f"shape {tuple(k_cache.shape)}", "[N, Hkv, page, D]")


def check_values(q: torch.Tensor, v_cache: torch.Tensor | None, v_dim: Any) -> int:
    """The head dim of the values; raises unless exactly one of v_cache and v_dim is given."""
    if (v_cache is None) == (v_dim is None):
        raise wrong(
            "v_cache, v_dim",
            "one of them",
            "neither" if v_dim is None else "both",
            "pass v_cache, or v_dim where the values are the first v_dim columns of k_cache (latent attention)",
        )
    if v_cache is not None:
        return v_cache.shape[3]
    number = as_integer(v_dim)
    if number is None or not 1 <= number <= q.shape[3]:
        raise wrong("v_dim", f"an int from 1 to k_cache's {q.shape[3]}", short(v_dim), "values are columns of the keys")
    return int(number)


def check_new(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | None, capacity: int, k_new: Any, v_new: Any
) -> None:
    """Raise unless the keys and values to append fit the caches."""
    if k_new is None:
        if v_new is not None:
            raise wrong("v_new", "None without k_new", type(v_new).__name__, "append both or none")
        return
    if v_cache is None and v_new is not None:
        raise wrong("v_new", "None without v_cache", type(v_new).__name__, "the values are columns of k_new")
    if v_cache is not None and v_new is None:
        raise wrong("v_new", "a tensor [B, Hkv, Sn, Dv] beside k_new", None, "append both or none")
    for name, x, cache in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
        if cache is None:
            continue
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            received = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise wrong(name, "a tensor [B, Hkv, Sn, D]", received, "the keys and values of the new tokens")
        shape = (q.shape[0], k_cache.shape[1], k_new.shape[2], cache.shape[3])
        if tuple(x.shape) != shape:
            remedy = or_transpose("sizes are those of the cache", x.shape[2] == k_cache.shape[1])
            raise wrong(name, f"shape [B, Hkv, Sn, D] = {shape}", tuple(x.shape), remedy)
        if x.dtype != q.dtype or x.device != q.device:
            expected = f"the cache's dtype and device, {q.dtype} on {q.device}"
            raise wrong(name, expected, f"{x.dtype} on {x.device}", "convert it with .to()")
    if k_new.shape[2] > capacity:
        raise wrong("k_new", f"at most {capacity} tokens, what a sequence's cache holds", k_new.shape[2], "enlarge it")


def check_align(align: Any, positional: bool) -> None:
    """Raise unless ``align`` says what is the case, where it matters."""
    if align == "bottom_right" or (align is None and not positional):
        return
    raise wrong(
        "align",
        "'bottom_right' with causal, window or alibi_slopes",
        repr(align),
        "pass align='bottom_right': in decode the last query stands at the last key",
    )


def check_no_gradient(**tensors: Any) -> None:
    """Raise if autograd would want a gradient, or forward mode a tangent."""
    if compat.FORWARD in compat.transforms():
        remedy = "decode has no derivative: call it outside, or use flash_attention"
        raise wrong("q", f"a call outside {TRANSFORMS[compat.FORWARD]}", "one inside", remedy)
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and needs_gradient(x):
            remedy = "decode has no gradient: call it under torch.no_grad(), or use flash_attention"
            raise wrong(name, "a tensor that requires no gradient", "requires_grad=True", remedy)


def check_contents(call: DecodeCall) -> None:
    """Raise unless lengths, starts and the pages in use lie within the cache; waits for the device."""
    lens = call.cache_lens.tolist()
    most = call.capacity - call.added
    for b, length in enumerate(lens):
        if not 0 <= length <= most:
            expected = f"from 0 to {most} ({call.capacity} slots less {call.added} new keys)"
            raise wrong(f"cache_lens[{b}]", expected, length, "enlarge the cache or correct the length")
    starts = [0] * len(lens) if call.cache_starts is None else call.cache_starts.tolist()
    for b, (start, length) in enumerate(zip(starts, lens, strict=True)):
        if not 0 <= start <= length + call.added:
            expected = f"from 0 to the sequence's length {length + call.added}"
            raise wrong(f"cache_starts[{b}]", expected, start, "keys before the start are padding")
    if call.block_table is None:
        return
    pages = call.k_cache.shape[0]
    for b, (row, length) in enumerate(zip(call.block_table.tolist(), lens, strict=True)):
        for i in range(starts[b] // call.page, -(-(length + call.added) // call.page)):
            if not 0 <= row[i] < pages:
                remedy = f"pages up to the sequence's length {length + call.added} must exist"
                raise wrong(f"block_table[{b}, {i}]", f"a page from 0 to {pages - 1}", row[i], remedy)


def _check_indices(name: str, x: Any, shape: tuple[int | None, ...], device: torch.device) -> None:

    def wrong_indices(received: object, remedy: str) -> ValueError:
        # Written out only for the error: torch.compile makes constants of sizes that are in a string.
        letters = "[B]" if len(shape) == 1 else "[B, pages of a sequence]"
        return wrong(name, f"an int32 or int64 tensor {letters} with B = {shape[0]} on {device}", received, remedy)

    if not isinstance(x, torch.Tensor):
        raise wrong_indices(type(x).__name__, "a tensor on the device, so that nothing waits for it")
    right = x.dim() == len(shape) and all(
        want is None or want == size for size, want in zip(x.shape, shape, strict=True)
    )
    if not right or x.dtype not in INDEX_DTYPES or x.device != device:
        raise wrong_indices(f"shape {tuple(x.shape)}, {x.dtype} on {x.device}", "convert or reshape it")
