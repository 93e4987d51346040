"""Trials of attention over a cache: small calls of the same specialisation, with the tile and splits of a given one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ..attention.call.options import Call
from ..attention.decode.spec import DecodeCall
from ..attention.gpu import decode_tiles
from ..attention.gpu.decode import decode, plan_of
from ..attention.reference import decode as reference
from ..testing import attention as expectations
from . import attention, small
from .trial import Results, Trial, Wanted, Wrong, compare

WRITTEN = {
    "decode_append_kernel": ("k_cache", "v_cache"),
    "decode_split_kernel": ("out", "lse"),
    "decode_combine_kernel": ("out", "lse"),
}


def trials(real: DecodeCall, exactly: bool) -> Iterator[Trial]:
    """Yield small calls with the kernels of ``real``; arguments as :func:`attention.trials` takes them."""
    plan = plan_of(real)
    Sq, most = real.q.shape[2], 2 * plan.tile.block_m + 5
    Sq = Sq if Sq <= most else small.length_like(Sq, most)
    heads, kv_heads = small.heads(real.q.shape[1], real.k_cache.shape[1], False, exactly)
    blocks = plan.splits * plan.tile.block_n
    for seed, steps in enumerate((2, 3)):
        # Each split has a few tiles of its own, and the last one an end within a tile.
        capacity = steps * blocks + plan.tile.block_n
        yield _trial(real, plan, (heads, kv_heads, Sq, capacity), small.Maker(real.q.device, seed))


def _trial(
    real: DecodeCall, plan: decode_tiles.SplitPlan, sizes: tuple[int, int, int, int], maker: small.Maker
) -> Trial:
    heads, kv_heads, Sq, capacity = sizes
    call = _small_call(real, heads, kv_heads, Sq, capacity, maker)

    def run() -> Results:
        # The call is made anew for each run, because it appends to its caches.
        caches: dict[str, Any] = {name: _cloned(getattr(call, name)) for name in ("k_cache", "v_cache")}
        with decode_tiles.holding(plan):
            out, lse = decode(dataclasses.replace(call, **caches))
        return {"out": out, "lse": lse, **caches}

    def check(found: Results) -> list[Wrong]:
        caches: dict[str, Any] = {name: _cloned(getattr(call, name)) for name in ("k_cache", "v_cache")}
        after = dataclasses.replace(call, **caches)
        with torch.no_grad():
            reference.append(after)
            want = expectations.expected(*reference.as_dense(after))
        wrong = compare(found, {name: Wanted(want.exact[name], want.eager[name]) for name in ("out", "lse")})
        for name, cache in caches.items():
            value = found[name]
            if cache is None or value is None or call.k_new is None:
                continue
            same = (value == cache) | (value.isnan() & cache.isnan())
            if not same.all():
                wrong.append(Wrong(name, f"{name}: {int((~same).sum())} elements are not what the append should leave"))
        return wrong

    return Trial(run, check, WRITTEN)


def _cloned(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy with the same strides and alignment."""
    return None if x is None else small.Maker(x.device).copied(x)


def _small_call(real: DecodeCall, heads: int, kv_heads: int, Sq: int, capacity: int, maker: small.Maker) -> DecodeCall:
    """Return a call of a few sequences: one that fills its cache, one with a ragged end, one with one key or none."""
    device, added = maker.device, min(real.added, 2 * decode_tiles.APPEND_ROWS + 5)
    B = min(real.q.shape[0], 3)
    page = real.page if real.block_table is not None else None
    if page is not None:
        # Whole pages, and more of them than a sequence fills.
        capacity = -(-capacity // page) * page
    if added > capacity:
        capacity = added if page is None else -(-added // page) * page
    ends = [capacity, max(capacity - capacity // 3 - 5, added), added][:B]
    lens = torch.tensor([end - added for end in ends], device=device)
    starts = torch.tensor([min(7, end - added) for end in ends], device=device)
    per_sequence = 1 if page is None else capacity // page
    pages = B if page is None else B * per_sequence + 3
    slots = capacity if page is None else page
    table = None
    if real.block_table is not None:
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(7))[: B * per_sequence]
        table = order.view(B, per_sequence).to(device)
    k_cache = maker.normal(real.k_cache, (pages, kv_heads, slots, real.k_cache.shape[3]))
    v_cache = None if real.v_cache is None else maker.normal(real.v_cache, (pages, kv_heads, slots, real.v_dim))
    q_size = min(1 / (abs(real.call.spec.scale) * real.q.shape[3] ** 0.5), 8.0) if real.call.spec.scale else 1.0
    found = DecodeCall(
        q=maker.normal(real.q, (B, heads, Sq, real.q.shape[3]), q_size),
        k_cache=k_cache,
        v_cache=v_cache,
        cache_lens=maker.holding(real.cache_lens, lens.to(real.cache_lens.dtype)),
        block_table=None if table is None else maker.holding(real.block_table, table.to(real.block_table.dtype)),  # type: ignore[arg-type,union-attr]
        cache_starts=None
        if real.cache_starts is None
        else maker.holding(real.cache_starts, starts.to(real.cache_starts.dtype)),
        k_new=None if real.k_new is None else maker.normal(real.k_new, (B, kv_heads, added, real.k_new.shape[3])),
        v_new=None if real.v_new is None else maker.normal(real.v_new, (B, kv_heads, added, real.v_dim)),
        v_dim=real.v_dim,
        call=_options(real, (B, heads, Sq, capacity), maker),
    )
    _hide_unread(found, ends, starts if real.cache_starts is not None else None)
    return found


def _options(real: DecodeCall, sizes: tuple[int, int, int, int], maker: small.Maker) -> Call:
    call = real.call

    def of_scores(x: torch.Tensor) -> tuple[int, ...]:
        return tuple(1 if n == 1 else size for n, size in zip(x.shape, sizes, strict=True))

    spec, aux = attention.small_mods(call, sizes[:2], maker)
    if not attention.has_user_mods(call):
        spec = dataclasses.replace(
            spec,
            window_left=None if spec.window_left is None else min(spec.window_left, sizes[3] // 2 + 3),
            window_right=None if spec.window_right is None else min(spec.window_right, 7),
        )
    return Call(
        spec,
        mask=None if call.mask is None else maker.flags(call.mask, of_scores(call.mask)),
        bias=None if call.bias is None else maker.normal(call.bias, of_scores(call.bias)),
        aux=aux,
        sinks=None if call.sinks is None else maker.normal(call.sinks, sizes[1:2]),
    )


def _hide_unread(call: DecodeCall, ends: list[int], starts: torch.Tensor | None) -> None:
    """Write NaN where the caches hold no key, and numbers of no page behind a sequence's own."""
    for b, end in enumerate(ends):
        first = 0 if starts is None else int(starts[b])
        hidden = [x for x in range(call.capacity) if x < first or x >= end]
        at = torch.tensor(hidden, dtype=torch.long, device=call.q.device)
        for cache in (call.k_cache, call.v_cache):
            if cache is None or not hidden:
                continue
            if call.block_table is None:
                cache[b, :, at] = torch.nan
            else:
                cache[call.block_table[b, at // call.page].long(), :, at % call.page] = torch.nan
        if call.block_table is not None:
            call.block_table[b, -(-end // call.page) :] = -5 if b % 2 else 2**31 - 1
