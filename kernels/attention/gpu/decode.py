"""Attention over a cache on Triton's kernels (triton_kernels.py): what a call compiles, and its launches."""

from __future__ import annotations

import torch
import triton

from ...runtime.launch import dot_precision, launch, target_of
from ..call.tensors import empty_laid_out_like
from ..decode.spec import DecodeCall
from . import decode_tiles as tiles
from .backend import TRITON
from .decode_kernels import Layout, decode_append_kernel, decode_combine_kernel, decode_split_kernel
from .device.scores import Mode, describe, dims, mods_of
from .inputs import unit_stride


def decode(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Append and attend on the GPU that holds the tensors (or in Triton's interpreter); see :class:`DecodeCall`.

    Returns:
        out [B, H, Sq, Dv] in q's dtype and order of dimensions in memory, and lse [B, H, Sq], natural log, fp32.

    Raises:
        ValueError: a dtype or head dimension that these kernels do not have, or not on this GPU.
    """
    TRITON.check(call.request())
    B, H, Sq, d = call.q.shape
    Hkv = call.k_cache.shape[1]
    target = target_of(call.q.device)
    rows = H // max(Hkv, 1) * Sq
    latent = call.v_cache is None
    plan = tiles.choose(target, call.q.dtype, d, call.v_dim, latent, rows, B * Hkv, call.capacity)
    layout = _layout(call, plan.splits)
    out = empty_laid_out_like(call.q, call.v_dim)
    lse = torch.empty((B, H, Sq), dtype=torch.float32, device=call.q.device)
    _append(call, layout)
    _attend(call, plan, layout, _mode(call, dot_precision(target, call.q.dtype)), out, lse)
    return out, lse


def _append(call: DecodeCall, layout: Layout) -> None:
    """Write the new keys and values into the caches."""
    for cache, new in ((call.k_cache, call.k_new), (call.v_cache, call.v_new)):
        if cache is None or new is None:
            continue
        new = unit_stride(new)
        B, Hkv, added, d = new.shape
        launch(
            decode_append_kernel,
            (triton.cdiv(added, tiles.APPEND_ROWS) * B * Hkv,),
            new,
            cache,
            call.cache_lens.contiguous(),
            call.block_table,
            new.stride()[:3],
            cache.stride()[:3],
            _table_strides(call),
            Hkv,
            added,
            call.capacity,
            LAYOUT=layout,
            D=d,
            BLOCK_D=triton.next_power_of_2(d),
            BLOCK_T=tiles.APPEND_ROWS,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )


def _attend(
    call: DecodeCall, plan: tiles.Plan, layout: Layout, mode: Mode, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Fill out and lse: in one pass, or in splits and their combination."""
    q, options, splits = unit_stride(call.q), call.call, plan.splits
    spec = options.spec
    B, H, Sq, _ = q.shape
    Hkv, capacity = call.k_cache.shape[1], call.capacity
    group, rows = H // max(Hkv, 1), B * H * Sq
    scores, _ = describe(options.mask, options.bias, options.sinks, None, spec, natural=mode.natural)
    part = stats = None
    if splits > 1:
        part = torch.empty((splits, rows, call.v_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((2, splits, rows), dtype=torch.float32, device=q.device)
    launch(
        decode_split_kernel,
        (splits * triton.cdiv(group * Sq, plan.tile.block_m) * B * Hkv,),
        q,
        call.k_cache,
        call.v_cache,
        call.cache_lens.contiguous(),
        None if call.cache_starts is None else call.cache_starts.contiguous(),
        call.block_table,
        out,
        lse,
        part,
        stats,
        q.stride()[:3],
        call.k_cache.stride()[:3],
        (0, 0, 0) if call.v_cache is None else call.v_cache.stride()[:3],
        _table_strides(call),
        out.stride()[:3],
        scores,
        options.aux,
        spec.params,
        Hkv,
        group,
        # Beyond what the cache and the queries span a window hides nothing, and so the sums stay in 32 bits.
        min(spec.window_left or 0, capacity + Sq),
        min(spec.window_right or 0, capacity + Sq),
        call.added,
        rows,
        Sq,
        capacity,
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
        part,
        stats,
        out,
        lse,
        out.stride()[:3],
        scores,
        H,
        rows,
        Sq,
        splits,
        MODE=mode,
        BLOCK_S=min(triton.next_power_of_2(splits), tiles.COMBINED // mode.block_dv),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )


def _table_strides(call: DecodeCall) -> tuple[int, ...]:
    return (0, 0) if call.block_table is None else call.block_table.stride()


def _layout(call: DecodeCall, splits: int) -> Layout:
    """How the call's keys lie in the cache and in a tile."""
    d_first, d_rest = tiles.blocks(call.q.shape[3], call.v_dim, call.v_cache is None)
    return Layout(
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
    """What the kernels are compiled for; the columns of a key are in :class:`Layout`."""
    natural = call.q.dtype == torch.float32
    options = call.call
    _, fold_scale = describe(options.mask, options.bias, options.sinks, None, options.spec, natural=natural)
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
        fold_scale=fold_scale,
        natural=natural,
        precision=precision,
        has_sinks=options.sinks is not None,
        **mods_of(options.spec, options.aux),
    )
