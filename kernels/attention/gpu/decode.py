"""Attention over a cache on Triton's kernels (decode_kernels.py): what a call compiles, and its launches."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ...runtime.launch import dot_precision, launch, target_of
from ..call.tensors import empty_laid_out_like, unit_last_stride
from ..decode.spec import DecodeCall
from . import decode_tiles as tiles
from .backend import TRITON
from .decode_kernels import (
    CacheLayout,
    Results,
    Slots,
    decode_append_kernel,
    decode_combine_kernel,
    decode_split_kernel,
)
from .mode import Mode, dims, folds_scale, mods_of, scores_of, softmax_of


def decode(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Append and attend on the GPU that holds the tensors (or in Triton's interpreter); see :class:`DecodeCall`.

    Returns:
        out [B, H, Sq, Dv] in q's dtype and order of dimensions in memory, and lse [B, H, Sq], natural log, fp32.

    Raises:
        ValueError: the call is beyond the limits of these kernels (backend.py).
    """
    TRITON.check(call.request())
    B, H, Sq, _ = call.q.shape
    plan = plan_of(call)
    layout = _layout(call, plan.splits)
    out = empty_laid_out_like(call.q, call.v_dim)
    lse = torch.empty((B, H, Sq), dtype=torch.float32, device=call.q.device)
    _append(call, layout)
    _attend(call, plan, layout, _mode(call, dot_precision(target_of(call.q.device), call.q.dtype)), out, lse)
    return out, lse


def plan_of(call: DecodeCall) -> tiles.SplitPlan:
    """Return the tile and the number of splits of a call."""
    B, H, Sq, d = call.q.shape
    Hkv = call.k_cache.shape[1]
    rows, latent = H // max(Hkv, 1) * Sq, call.v_cache is None
    return tiles.choose(target_of(call.q.device), call.q.dtype, d, call.v_dim, latent, rows, B * Hkv, call.capacity)


def _append(call: DecodeCall, layout: CacheLayout) -> None:
    """Write the new keys and values into the caches."""
    slots = _slots(call)
    for cache, new in ((call.k_cache, call.k_new), (call.v_cache, call.v_new)):
        if cache is None or new is None:
            continue
        new = unit_last_stride(new)
        B, Hkv, added, d = new.shape
        launch(
            decode_append_kernel,
            (triton.cdiv(added, tiles.APPEND_ROWS) * B * Hkv,),
            (*_view(new), *_view(cache)),
            slots,
            Hkv,
            added,
            call.capacity,
            cache.shape[0],
            LAYOUT=layout,
            D=d,
            BLOCK_D=triton.next_power_of_2(d),
            BLOCK_T=tiles.APPEND_ROWS,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )


def _attend(
    call: DecodeCall, plan: tiles.SplitPlan, layout: CacheLayout, mode: Mode, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Fill out and lse: in one pass, or in splits and their combination."""
    q, spec, splits = unit_last_stride(call.q), call.call.spec, plan.splits
    B, H, Sq, _ = q.shape
    Hkv, capacity = call.k_cache.shape[1], call.capacity
    group, rows = H // max(Hkv, 1), B * H * Sq
    # Keys of pages that do not exist are read from one that does.
    k_cache, v_cache = call.k_cache, call.v_cache
    if call.block_table is not None and k_cache.shape[0] == 0:
        k_cache = k_cache.new_zeros((1, *k_cache.shape[1:]))
        v_cache = None if v_cache is None else v_cache.new_zeros((1, *v_cache.shape[1:]))
    softmax = softmax_of(call.call, fold_scale=mode.fold_scale, natural=mode.natural)
    part = stats = None
    if splits > 1:
        part = torch.empty((splits, rows, call.v_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((2, splits, rows), dtype=torch.float32, device=q.device)
    results = Results(lse, part, stats)
    launch(
        decode_split_kernel,
        (splits * triton.cdiv(group * Sq, plan.tile.block_m) * B * Hkv,),
        (*_view(q), *_view(k_cache), *_view(v_cache), *_view(out)),
        _slots(call),
        results,
        scores_of(call.call),
        softmax,
        (*call.call.aux, *spec.params),
        (Hkv, group),
        # Beyond what the cache and the queries span a window hides nothing, and so the sums stay in 32 bits.
        min(spec.window_left or 0, capacity + Sq),
        min(spec.window_right or 0, capacity + Sq),
        call.added,
        rows,
        Sq,
        capacity,
        k_cache.shape[0],
        splits,
        MODE=mode,
        LAYOUT=layout,
        **plan.tile.launch_arguments(),
    )
    if splits == 1:
        return
    launch(
        decode_combine_kernel,
        (rows,),
        results,
        _view(out),
        softmax,
        H,
        rows,
        Sq,
        splits,
        MODE=mode,
        BLOCK_S=min(triton.next_power_of_2(splits), tiles.COMBINED // mode.block_dv),
        num_warps=4,
        num_stages=1,
        # As in tiles.RowTile: sums over lanes are not fused with products.
        enable_fp_fusion=False,
    )


def _view(x: torch.Tensor | None) -> tuple[Any, ...]:
    """A tensor and its strides of batches or pages, heads and rows."""
    return (None, 0, 0, 0) if x is None else (x, *x.stride()[:3])


def _slots(call: DecodeCall) -> Slots:
    """Return the places of the sequences' keys."""
    table = call.block_table
    starts = None if call.cache_starts is None else call.cache_starts.contiguous()
    return Slots(call.cache_lens.contiguous(), starts, table, *((0, 0) if table is None else table.stride()))


def _layout(call: DecodeCall, splits: int) -> CacheLayout:
    """Return how the call's keys lie in the cache and in a tile."""
    d_first, d_rest = tiles.blocks(call.q.shape[3], call.v_dim, call.v_cache is None)
    return CacheLayout(
        page=None if call.block_table is None else call.page,
        has_starts=call.cache_starts is not None,
        is_latent=call.v_cache is None,
        is_whole=splits == 1,
        d_first=d_first,
        block_first=tiles.padded(d_first),
        d_rest=d_rest,
        block_rest=tiles.padded(d_rest) if d_rest else 0,
    )


def _mode(call: DecodeCall, precision: str) -> Mode:
    """Return the constants that the kernels are compiled for; the columns of a key are in :class:`CacheLayout`."""
    natural = call.q.dtype == torch.float32
    options = call.call
    return Mode(
        d=call.q.shape[3],
        dv=call.v_dim,
        block_d=0,
        block_dv=tiles.padded(call.v_dim),
        mask_dims=dims(options.mask),
        bias_dims=dims(options.bias),
        has_left=options.spec.window_left is not None,
        has_right=options.spec.window_right is not None,
        has_origin=False,
        fold_scale=folds_scale(options),
        natural=natural,
        precision=precision,
        has_sinks=options.sinks is not None,
        **mods_of(options),
    )
