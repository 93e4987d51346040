"""The Triton kernels of attention over a cache: append the new keys, attend in splits of the keys, combine the splits.

    decode_append_kernel    writes new keys, or values, into a cache
    decode_split_kernel     one program: a block of the query rows that share a key head, and one split of their keys
    decode_combine_kernel   the splits of each row in their order, and the sink

The query heads of a group and the Sq queries of each are rows of one tile, because they read the same keys: row r is
query r // GROUP of head r % GROUP. A sequence's keys are shared out among the splits on the device, by its length; the
grid depends on shapes alone, so a recorded graph holds for any lengths.

Source: the split over keys is that of Flash-Decoding (Dao et al., 2023, in FlashAttention's repository); latent
attention, in which the values are the first columns of the keys, DeepSeek-V2, arXiv:2405.04434.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...runtime.fences import fence_copies
from .device.loads import at_head
from .device.place import Place
from .device.scores import modify_scores
from .device.softmax import finish, online_step, power, rescaled, split_reference


@dataclass(frozen=True)
class CacheLayout:
    """The constants of decode's kernels beyond :class:`Mode`: how keys lie in the cache and in a tile.

    A key's columns are loaded as one block or two, each a power of two in registers: 576 are 512 and 64, not 1024.
    """

    page: int | None  # keys of a page; None without pages
    has_starts: bool
    is_latent: bool  # the values are the first block of the keys
    is_whole: bool  # one split, which writes the results itself
    d_first: int
    block_first: int
    d_rest: int  # 0: there is no second block
    block_rest: int


class Slots(NamedTuple):
    """The place in the cache of each sequence's keys."""

    p_lens: torch.Tensor  # [B], keys before the call's own
    p_starts: torch.Tensor | None  # [B], the first one that is seen
    p_table: torch.Tensor | None  # [B, pages of a sequence]
    table_b: int
    table_page: int


class Results(NamedTuple):
    """The tensors that the split kernel writes besides out, and the combine kernel reads and writes."""

    p_lse: torch.Tensor  # [B, H, Sq]
    p_part: torch.Tensor | None  # [splits, rows, Dv], sums over the keys of a split
    p_stats: torch.Tensor | None  # [2, splits, rows], their maximum and the sum of exponentials


@triton.jit
def _load_pages(slots, i_b, o_n, first, end, LAYOUT: tl.constexpr):
    """The page of each of a sequence's keys ``o_n`` that lie in [first, end), as the table has it, else 0."""
    if LAYOUT.page is None:
        return o_n * 0
    else:
        p_table = slots.p_table + tl.cast(i_b, tl.int64) * slots.table_b
        m_n = (o_n >= first) & (o_n < end)
        return tl.load(p_table + (o_n // LAYOUT.page).to(tl.int64) * slots.table_page, mask=m_n, other=0)


@triton.jit
def _slot_offsets(b_page, o_n, stride_page, stride_slot, LAYOUT: tl.constexpr):
    """Offsets (int64, elements) of the keys ``o_n`` of a sequence from the start of the cache of its head."""
    if LAYOUT.page is None:
        return o_n.to(tl.int64) * stride_slot
    else:
        return b_page.to(tl.int64) * stride_page + (o_n % LAYOUT.page).to(tl.int64) * stride_slot


@triton.jit
def _load_columns(p_rows, b_offsets, m_rows, FROM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns [FROM, FROM + D) of the rows at ``b_offsets`` [N], as [N, BLOCK_D]; 0 where there is none."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_rows + b_offsets[:, None] + (FROM + o_d)[None, :]
    m_tile = m_rows[:, None]
    if D != BLOCK_D:
        m_tile = m_tile & (o_d < D)[None, :]
    b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    fence_copies()
    return b_tile


@triton.jit(do_not_specialize=["added", "capacity", "pages"])
def decode_append_kernel(
    views,
    slots,
    Hkv,
    added,
    capacity,
    pages,
    LAYOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: block_t new rows of one head. Grid: cdiv(added, block_t) * B * Hkv.

    ``views``: the new rows and the cache, each with its three first strides. A row whose slot lies beyond the cache, or
    in a page of the table that is none of the cache's ``pages``, is dropped.
    """
    new, cache = views[0:4], views[4:8]
    blocks = tl.cdiv(added, BLOCK_T)
    i_t = tl.program_id(0) % blocks * BLOCK_T
    i_b = tl.program_id(0) // blocks // Hkv
    i_h = tl.program_id(0) // blocks % Hkv
    o_t = i_t + tl.arange(0, BLOCK_T)
    o_n = tl.load(slots.p_lens + i_b).to(tl.int32) + o_t
    m_t = (o_t < added) & (o_n >= 0) & (o_n < capacity)
    # [T, D]
    p_new = at_head(new[0], new[1], new[2], i_b, i_h)
    b_new = _load_columns(p_new, o_t.to(tl.int64) * new[3], m_t, 0, D, BLOCK_D)
    b_page = _load_pages(slots, i_b, o_n, 0, tl.where(m_t, capacity, 0), LAYOUT)
    if LAYOUT.page is not None:
        m_t = m_t & (b_page >= 0) & (b_page < pages)
    b_offsets = _slot_offsets(b_page, o_n, cache[1], cache[3], LAYOUT)
    p_cache = at_head(cache[0], cache[1], cache[2], 0 if LAYOUT.page is not None else i_b, i_h)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_cache + b_offsets[:, None] + o_d[None, :], b_new, mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def _key_range(slots, i_b, i_first, i_last, left, right, added, Sq, capacity, MODE: tl.constexpr, LAYOUT: tl.constexpr):
    """The keys that queries i_first to i_last may see, [first, end); first key; distance of query 0 from key 0."""
    length = tl.minimum(tl.load(slots.p_lens + i_b).to(tl.int32) + added, capacity)
    start = tl.cast(0, tl.int32)
    if LAYOUT.has_starts:
        start = tl.maximum(tl.load(slots.p_starts + i_b).to(tl.int32), 0)
    shift = length - Sq
    first = start
    end = length
    if MODE.has_left:
        first = tl.maximum(first, i_first + shift - left)
    if MODE.has_right:
        end = tl.minimum(end, i_last + shift + right + 1)
    return first, tl.maximum(end, first), start, shift


@triton.jit(do_not_specialize=["left", "right", "added", "rows", "Sq", "capacity", "pages", "splits"])
def decode_split_kernel(
    views,
    slots,
    results,
    scores,
    softmax,
    mod_inputs,
    heads,
    left,
    right,
    added,
    rows,
    Sq,
    capacity,
    pages,
    splits,
    MODE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: block_m rows and one split. Grid: splits * cdiv(GROUP * Sq, block_m) * B * Hkv.

    Writes out [B, H, Sq, Dv] and lse where there is one split, else the sums over its keys and their statistics.

    Args:
        views: q, the caches of keys and values, and out, each with its three first strides.
        slots, results: :class:`Slots` and :class:`Results`.
        heads: Hkv and GROUP.
        left, right: width of the window.
        added: keys that the call appended.
        rows: those of the whole call, B * H * Sq.
        capacity: slots of a sequence.
        pages: those of the cache, at least 1; what the table has beyond them is never read.
    """
    q, k, v, out = views[0:4], views[4:8], views[8:12], views[12:16]
    Hkv, GROUP = heads
    i_split = tl.program_id(0) % splits
    blocks = tl.cdiv(GROUP * Sq, BLOCK_M)
    i_r = tl.program_id(0) // splits % blocks * BLOCK_M
    i_bh = tl.program_id(0) // splits // blocks
    i_b = i_bh // Hkv
    i_kv = i_bh % Hkv
    # [M]; rows beyond the last one are the last one once more, so that nothing else needs to know of them
    o_r = tl.minimum(i_r + tl.arange(0, BLOCK_M), GROUP * Sq - 1)
    o_i = o_r // GROUP
    o_h = i_kv * GROUP + o_r % GROUP
    m_r = i_r + tl.arange(0, BLOCK_M) < GROUP * Sq

    i_last = tl.minimum(i_r + BLOCK_M, GROUP * Sq) - 1
    first, end, start, shift = _key_range(
        slots, i_b, i_r // GROUP, i_last // GROUP, left, right, added, Sq, capacity, MODE, LAYOUT
    )
    # Tiles stand at multiples of their size, so that they lie within pages where these are no smaller.
    begin = first // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    i_from = begin + i_split * share
    i_to = tl.minimum(i_from + share, end)

    i_page = 0 if LAYOUT.page is not None else i_b
    p_k = at_head(k[0], k[1], k[2], i_page, i_kv)
    if not LAYOUT.is_latent:
        p_v = at_head(v[0], v[1], v[2], i_page, i_kv)
    p_q = q[0] + tl.cast(i_b, tl.int64) * q[1]
    b_rows = o_h.to(tl.int64) * q[2] + o_i.to(tl.int64) * q[3]
    # [M, D]
    b_q = _load_columns(p_q, b_rows, m_r, 0, LAYOUT.d_first, LAYOUT.block_first)
    if LAYOUT.d_rest > 0:
        b_q_rest = _load_columns(p_q, b_rows, m_r, LAYOUT.d_first, LAYOUT.d_rest, LAYOUT.block_rest)
    # [M]
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    # [M, Dv]
    BLOCK_DV: tl.constexpr = MODE.block_dv
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    place = Place(i_b, o_h[:, None], Sq, end, shift - left, shift + right, shift - start, -start, 0, 0, 0, 0)
    # [N]; pages are read one tile ahead, because a load whose address another load brings is not copied ahead as far
    b_page = _load_pages(slots, i_b, i_from + tl.arange(0, BLOCK_N), first, i_to, LAYOUT)
    for i_n in tl.range(i_from, i_to, BLOCK_N):
        # [N]; a key that is not there, or that no row sees, is 0: whatever its slot holds
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = (o_n >= first) & (o_n < end)
        # [N, D]
        if LAYOUT.page is not None:
            b_page = tl.minimum(tl.maximum(b_page, 0), pages - 1)
        b_offsets = _slot_offsets(b_page, o_n, k[1], k[3], LAYOUT)
        b_k = _load_columns(p_k, b_offsets, m_n, 0, LAYOUT.d_first, LAYOUT.block_first)
        # [M, N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=MODE.precision)
        if LAYOUT.d_rest > 0:
            b_k_rest = _load_columns(p_k, b_offsets, m_n, LAYOUT.d_first, LAYOUT.d_rest, LAYOUT.block_rest)
            b_s = tl.dot(b_q_rest, tl.trans(b_k_rest), b_s, input_precision=MODE.precision)
        b_s = modify_scores(b_s, scores, mod_inputs, place, o_i[:, None], o_n[None, :], MODE, True, True)
        if LAYOUT.has_starts:
            b_s = tl.where(o_n[None, :] >= start, b_s, float("-inf"))
        b_m, b_l, b_p, b_alpha = online_step(b_m, b_l, b_s, softmax.factor, MODE, True)
        # [N, Dv]
        if LAYOUT.is_latent:
            b_v = b_k
        else:
            b_offsets = _slot_offsets(b_page, o_n, v[1], v[3], LAYOUT)
            b_v = _load_columns(p_v, b_offsets, m_n, 0, MODE.dv, MODE.block_dv)
        # [M, Dv]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=MODE.precision)
        b_page = _load_pages(slots, i_b, o_n + BLOCK_N, first, i_to, LAYOUT)

    o_d = tl.arange(0, BLOCK_DV)
    m_out = m_r[:, None] & (o_d < MODE.dv)[None, :]
    # [M], index of the row among all of them
    b_row = (tl.cast(i_b, tl.int64) * Hkv * GROUP + o_h) * Sq + o_i
    if LAYOUT.is_whole:
        b_out, b_lse = finish(b_acc, b_m, b_l, softmax.p_sinks, o_h, MODE)
        p_out = out[0] + tl.cast(i_b, tl.int64) * out[1]
        p_tile = p_out + o_h.to(tl.int64)[:, None] * out[2] + o_i.to(tl.int64)[:, None] * out[3]
        tl.store(p_tile + o_d[None, :], b_out.to(out[0].dtype.element_ty), mask=m_out)
        tl.store(results.p_lse + b_row, b_lse, mask=m_r)
    else:
        b_row += tl.cast(i_split, tl.int64) * rows
        tl.store(results.p_part + b_row[:, None] * MODE.dv + o_d[None, :], b_acc, mask=m_out)
        tl.store(results.p_stats + b_row, b_m, mask=m_r)
        tl.store(results.p_stats + tl.cast(splits, tl.int64) * rows + b_row, b_l, mask=m_r)


@triton.jit(do_not_specialize=["rows", "Sq", "splits"])
def decode_combine_kernel(results, out, softmax, H, rows, Sq, splits, MODE: tl.constexpr, BLOCK_S: tl.constexpr):
    """One program: one row, of all splits. Grid: rows = B * H * Sq. ``out``: the tensor and its three first strides."""
    i_row = tl.program_id(0)
    i_b = i_row // Sq // H
    i_h = i_row // Sq % H
    i_m = i_row % Sq
    BLOCK_DV: tl.constexpr = MODE.block_dv
    o_d = tl.arange(0, BLOCK_DV)
    m_d = (o_d < MODE.dv)[None, :]
    # [1], [1], [1, Dv]: the rows of one tile, as the shared functions take them
    b_m = tl.full([1], float("-inf"), tl.float32)
    b_l = tl.zeros([1], tl.float32)
    b_acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for i_s in range(0, splits, BLOCK_S):
        # [S]
        o_s = i_s + tl.arange(0, BLOCK_S)
        m_s = o_s < splits
        b_at = o_s.to(tl.int64) * rows + i_row
        b_m_s = tl.load(results.p_stats + b_at, mask=m_s, other=float("-inf"))
        b_l_s = tl.load(results.p_stats + tl.cast(splits, tl.int64) * rows + b_at, mask=m_s, other=0.0)
        # [S, Dv]
        b_part = tl.load(results.p_part + b_at[:, None] * MODE.dv + o_d[None, :], mask=m_s[:, None] & m_d, other=0.0)
        b_m_new = tl.maximum(b_m, tl.max(b_m_s, 0))
        # A row that saw no key so far has a maximum of -inf, and -inf - -inf must not happen.
        b_before = b_m_new
        b_after = b_m_new
        if MODE.is_wide:
            b_before, b_after = split_reference(b_m_new, softmax.factor)
        b_after = tl.where(b_m_new == float("-inf"), 0.0, b_after)
        # [1], [S]
        b_alpha = power(rescaled(b_m, b_before, b_after, softmax.factor, MODE), MODE.natural)
        b_weight = power(rescaled(b_m_s, b_before, b_after, softmax.factor, MODE), MODE.natural)
        b_l = b_l * b_alpha + tl.sum(b_l_s * b_weight, 0)
        b_acc = b_acc * b_alpha[:, None] + tl.sum(b_part * b_weight[:, None], 0)[None, :]
        b_m = b_m_new
    b_out, b_lse = finish(b_acc, b_m, b_l, softmax.p_sinks, i_h, MODE)
    p_out = at_head(out[0], out[1], out[2], i_b, i_h) + tl.cast(i_m, tl.int64) * out[3]
    tl.store(p_out + o_d[None, :], b_out.to(out[0].dtype.element_ty), mask=m_d)
    tl.store(results.p_lse + i_row + tl.arange(0, 1), b_lse)
