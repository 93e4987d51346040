"""Packed sequences in Triton: what a program of any attention kernel has to know of its sequence.

Grids are sized by the longest sequence, as if all were that long; programs beyond the end of theirs return at once.
Everything here is behind ``MODE.has_lengths``: kernels of calls that are not packed hold no trace of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loads import ROW_PADDING, padded


@triton.jit
def sequence(scores, i_b, Sq, Sk, lo, hi, origin_q, MODE: tl.constexpr):
    """``first_q, first_k, Sq, Sk, lo, hi, origin_q`` of batch entry ``i_b``; without lengths what was passed.

    first_q, first_k: rows of its first query and key, int64. Lengths are at most ``Sq`` and ``Sk``, so that nothing
    is read beyond a mask or bias whatever cu_seqlens holds. lo, hi: the window (masks.py).
    """
    first_q = tl.cast(0, tl.int64)
    first_k = tl.cast(0, tl.int64)
    if MODE.has_lengths:
        first_q = tl.load(scores.p_cu_q + i_b).to(tl.int64)
        first_k = tl.load(scores.p_cu_k + i_b).to(tl.int64)
        Sq = tl.minimum(tl.load(scores.p_cu_q + i_b + 1).to(tl.int64) - first_q, Sq).to(tl.int32)
        Sk = tl.minimum(tl.load(scores.p_cu_k + i_b + 1).to(tl.int64) - first_k, Sk).to(tl.int32)
        if MODE.is_bottom_right:
            shift = Sk.to(tl.int64) - Sq
            lo = lo + shift
            hi = hi + shift
            origin_q = origin_q + shift
    return first_q, first_k, Sq, Sk, lo, hi, origin_q


@triton.jit
def at_row(p_head, stride, first, MODE: tl.constexpr):
    """``p_head``, element [0, 0] of a head, moved to the first row of a sequence."""
    if MODE.has_lengths:
        p_head += first * stride
    return p_head


@triton.jit
def row_values(i_b, i_h, H, Sq, first_q):
    """Where the backward's values per query begin for head ``i_h`` of sequence ``i_b``.

    Each sequence has room for whole blocks of queries for each head: because a block is added for each sequence before
    it, the block that holds its first row, counted through, is never within the room of the one before.
    """
    return (first_q // ROW_PADDING + i_b) * ROW_PADDING * H + i_h * padded(Sq)
