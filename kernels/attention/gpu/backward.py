"""Attention backward in Triton: every sum in one program, so that equal inputs give equal bits.

With the scores s, mask and p = exp(s - lse) recomputed tile by tile (Dao, "FlashAttention-2", arXiv:2307.08691,
algorithm 2, split in two passes so that nothing is added atomically):

    delta = rowsum(do * (out + out_rest)) - dlse
    ds = p * (do v^T - delta)
    dv = p^T do      dk = scale * ds^T q     one program a block of keys, over the queries of every head of its group
    dq = scale * ds k                        one program a block of queries, over the keys
    dbias = ds                               summed to the bias's shape
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...runtime.launch import launch
from ..call.options import Call
from ..call.tensors import empty_laid_out_like, unit_last_stride
from . import tiles
from .bias_gradient import bias_gradient
from .device.loads import ROW_PADDING, at_head, load_rows, padded
from .device.place import packed_row_value
from .device.softmax import LOG2E, power, split_lse, with_sink
from .inputs import GpuCall, describe_call
from .mode import RowValues
from .passes import attention_dkdv_kernel, attention_dq_kernel

# Natural units of a sink above the LSE from which exp(-FAR) is 0 beside 1, while fp32 holds its reciprocal.
FAR: tl.constexpr = tl.constexpr(64.0)


@triton.jit(do_not_specialize=["Sq", "total_q"])
def attention_delta_kernel(
    views,
    lse,
    dlse,
    p_sinks,
    values,
    p_dsink,
    p_cu_q,
    H,
    Sq,
    total_q,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NATURAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: the row values of BLOCK_M queries of one head, and of the padding beyond the last query.

    ``views``: do, out and what rounding took from out, each with its strides of batches, heads and rows; ``lse``,
    ``dlse``: likewise. The pointers of the rest and of dlse are None without.
    Grid: padded(Sq) / BLOCK_M * B * H. Packed (with p_cu_q): Sq is that of the longest sequence, and lse, dlse and
    dsink are contiguous [H, total_q].
    """
    do, out, rest = views[0:4], views[4:8], views[8:12]
    HAS_REST: tl.constexpr = rest[0] is not None
    HAS_DLSE: tl.constexpr = dlse[0] is not None
    blocks = padded(Sq) // BLOCK_M
    i_m = tl.program_id(0) % blocks * BLOCK_M
    i_bh = tl.program_id(0) // blocks
    i_b = i_bh // H
    i_h = i_bh % H
    p_do = at_head(do[0], do[1], do[2], i_b, i_h)
    p_out = at_head(out[0], out[1], out[2], i_b, i_h)
    if HAS_REST:
        p_rest = at_head(rest[0], rest[1], rest[2], i_b, i_h)
    p_lse = at_head(lse[0], lse[1], lse[2], i_b, i_h)
    if HAS_DLSE:
        p_dlse = at_head(dlse[0], dlse[1], dlse[2], i_b, i_h)
    i_dsink = i_bh.to(tl.int64) * Sq
    i_values = i_bh.to(tl.int64) * padded(Sq)
    if p_cu_q is not None:
        first_q = tl.load(p_cu_q + i_b).to(tl.int64)
        Sq = tl.minimum(tl.load(p_cu_q + i_b + 1).to(tl.int64) - first_q, Sq).to(tl.int32)
        if i_m >= padded(Sq):
            return
        p_do += first_q * do[3]
        p_out += first_q * out[3]
        if HAS_REST:
            p_rest += first_q * rest[3]
        i_dsink = tl.cast(i_h, tl.int64) * total_q + first_q
        p_lse += i_dsink
        if HAS_DLSE:
            p_dlse += i_dsink
        i_values = packed_row_value(i_b, i_h, H, Sq, first_q)
    # [M, Dv]
    b_do = load_rows((p_do, do[3]), i_m, Sq, BLOCK_M, DV, BLOCK_DV, True)
    b_out = load_rows((p_out, out[3]), i_m, Sq, BLOCK_M, DV, BLOCK_DV, True).to(tl.float32)
    if HAS_REST:
        b_out += load_rows((p_rest, rest[3]), i_m, Sq, BLOCK_M, DV, BLOCK_DV, True).to(tl.float32)
    # [M]
    b_delta = tl.sum(b_do.to(tl.float32) * b_out, 1)
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_m64 = o_m.to(tl.int64)
    b_lse = tl.load(p_lse + o_m64 * lse[3], mask=o_m < Sq, other=float("-inf"))
    b_is_empty = b_lse == float("-inf")
    b_whole = b_lse
    if p_sinks is not None:
        # The probabilities are those of a softmax that the sink is part of.
        sink = tl.load(p_sinks + i_h).to(tl.float32)
        b_whole = tl.where(b_is_empty, b_lse, with_sink(b_lse, sink))
        # [M]: what each row gives to the sink's gradient
        b_dsink = -b_delta * power(tl.where(b_is_empty, float("-inf"), sink - b_whole), True)
        tl.store(p_dsink + i_dsink + o_m, b_dsink, mask=o_m < Sq)
    b_before, b_after = split_lse(b_whole, NATURAL, values.p_before is not None)
    if HAS_DLSE:
        b_dlse = tl.load(p_dlse + o_m64 * dlse[3], mask=o_m < Sq, other=0.0)
        if p_sinks is not None:
            # The LSE leaves the sink out, and the gradient of it is of a softmax that is this much larger.
            b_factor = power(tl.where(b_is_empty, 0.0, tl.minimum(b_whole - b_lse, FAR)), True)
            # Where the sink is so far above that probabilities may be 0, the passes take exp(-FAR) of that softmax in
            # their place, which adds nothing to what multiplies them. An LSE that fp32 cannot add FAR to stays.
            b_far_before, b_lse_after = split_lse(b_lse, NATURAL, values.p_before is not None)
            b_far_after = b_lse_after + (FAR if NATURAL else FAR * LOG2E)
            b_distance = b_far_after - b_lse_after
            b_is_far = (b_whole - b_lse > FAR) & (b_distance > 0.5 * FAR)
            b_before = tl.where(b_is_far, b_far_before, b_before)
            b_after = tl.where(b_is_far, b_far_after, b_after)
            b_dlse *= tl.where(b_is_far, power(tl.where(b_is_far, b_distance, 0.0), NATURAL), b_factor)
        b_delta -= b_dlse
    # A row without key has probabilities 0; its delta must not turn them into NaN, whatever dlse holds there.
    b_delta = tl.where(b_is_empty, 0.0, b_delta)
    tl.store(values.p_delta + i_values + o_m, b_delta)
    tl.store(values.p_after + i_values + o_m, b_after)
    if values.p_before is not None:
        tl.store(values.p_before + i_values + o_m, b_before)


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    call: Call,
    *,
    bias_grad: bool,
    out_rest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of :func:`forward.forward`, the same bits on every run.

    ``out`` and ``lse`` are taken as given: those of a softmax over more keys than ``k`` holds (a ring of shards) give
    these keys' part of the gradients.

    Args:
        do: gradient of out, [B, H, Sq, Dv] in q's dtype; like q, k, v and out it is copied only where its last stride
            is not 1, and may be expanded.
        out, lse: what the forward returned.
        dlse: gradient of lse, [B, H, Sq] fp32, any strides, or None.
        call: as the forward takes it; lse and dlse of a packed call are contiguous.
        bias_grad: whether dbias is wanted.
        out_rest: what rounding took from out, as ``out`` is taken, or None.

    Returns:
        dq, dk, dv in the shapes, dtypes and memory order of q, k, v; dbias in shape and dtype of bias, or None where
        not asked for; dsinks [H] in dtype of sinks, or None without. Beyond these: 8 bytes a query and head, 4 more
        with sinks and 4 more where ``Mode.is_wide``, and for a bias that is constant over queries or keys its gradient
        before the sum over broadcast dimensions, 4 bytes a head and key or query.

    Raises:
        ValueError: the call is beyond the limits of these kernels (backend.py).
    """
    gpu = describe_call(q, k, v, call, needs_grad=True)
    bias, sinks = call.bias, call.sinks
    do, out = unit_last_stride(do), unit_last_stride(out)
    rest = None if out_rest is None else unit_last_stride(out_rest)
    bias_grad = bias_grad and bias is not None
    values, dsink_rows = _row_values(gpu, do, (out, rest), lse, dlse)
    # Bias gradients that are constant over keys or queries need only sums that the other passes have at hand.
    has_rows = bias_grad and bias is not None and bias.shape[3] == 1
    has_columns = bias_grad and bias is not None and bias.shape[2] == 1 and not has_rows
    dq, dk, dv = (empty_laid_out_like(x, x.shape[-1]) for x in (q, k, v))
    rows = _sums(gpu, gpu.seq_q) if has_rows else None
    columns = _sums(gpu, gpu.seq_k) if has_columns else None
    if call.packed is not None:
        # Rows that belong to no sequence are padding.
        for x in (dq, dk, dv):
            x.zero_()
    inputs = (gpu.q, gpu.k, gpu.v, do)
    size: tuple[Any, ...] = (gpu.target, q.dtype, gpu.mode.block_d, gpu.mode.block_dv, *gpu.mode.tile_dims)
    tile = tiles.choose_dkdv(*size)
    launch(
        attention_dkdv_kernel,
        (triton.cdiv(gpu.seq_k, tile.block_n) * gpu.batch * k.shape[1],),
        gpu.views(*inputs, dk, dv),
        values,
        columns,
        *gpu.arguments(tile, along_keys=False),
        MODE=gpu.mode,
        **tile.launch_arguments(),
    )
    tile = tiles.choose_dq(*size)
    launch(
        attention_dq_kernel,
        (triton.cdiv(gpu.seq_q, tile.block_m) * gpu.batch * gpu.heads,),
        gpu.views(*inputs, dq),
        values,
        rows,
        *gpu.arguments(tile, along_keys=True),
        MODE=gpu.mode,
        **tile.launch_arguments(),
    )
    dbias = None
    if bias_grad and bias is not None:
        if rows is not None:
            dbias = rows.unsqueeze(3).sum_to_size(bias.shape).to(bias.dtype)
        elif columns is not None:
            dbias = columns.unsqueeze(2).sum_to_size(bias.shape).to(bias.dtype)
        else:
            dbias = bias_gradient(gpu, do, values, bias)
    dsinks = None if sinks is None or dsink_rows is None else dsink_rows.sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def _row_values(
    call: GpuCall,
    do: torch.Tensor,
    outs: tuple[torch.Tensor, torch.Tensor | None],
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
) -> tuple[RowValues, torch.Tensor | None]:
    """Return the numbers of each query for the passes, and with sinks each row's part of their gradient, [B, H, Sq].

    ``outs``: the output, and what rounding took from it.
    """
    B, H, Sq = do.shape[:3]
    rows_padded = triton.cdiv(call.seq_q, ROW_PADDING.value) * ROW_PADDING.value
    room = rows_padded
    if call.packed is not None:
        # Room for the rows of all sequences, see place.packed_row_value.
        room = (Sq // ROW_PADDING.value + call.batch) * ROW_PADDING.value
    delta = torch.empty(B, H, room, dtype=torch.float32, device=do.device)
    after = torch.empty_like(delta)
    values = RowValues(after, torch.empty_like(delta) if call.mode.is_wide else None, delta)
    dsink_rows = torch.empty(B, H, Sq, dtype=torch.float32, device=do.device) if call.mode.has_sinks else None
    if dsink_rows is not None and call.packed is not None:
        dsink_rows.zero_()
    is_packed = call.packed is not None
    block = tiles.choose_delta(call.target, call.mode.block_dv)
    launch(
        attention_delta_kernel,
        (rows_padded // block.block_m * call.batch * call.heads,),
        call.views(do, *outs),
        (lse, *((0, 0, 1) if is_packed else lse.stride())),
        (dlse, *((0, 0, 1) if is_packed else (0, 0, 0) if dlse is None else dlse.stride())),
        call.softmax.p_sinks,
        values,
        dsink_rows,
        call.positions.p_cu_q,
        call.heads,
        call.seq_q,
        Sq,
        DV=call.mode.dv,
        BLOCK_DV=call.mode.block_dv,
        NATURAL=call.mode.natural,
        **block.launch_arguments(),
    )
    return values, dsink_rows


def _sums(call: GpuCall, length: int) -> torch.Tensor:
    """Memory for the row or column sums of ds, [B, H, length]."""
    sums = torch.empty(call.batch, call.heads, length, dtype=torch.float32, device=call.q.device)
    # Beyond the end of a sequence nothing is written.
    return sums if call.packed is None else sums.zero_()
