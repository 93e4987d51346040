"""Dropout's random bits in Triton: the twin of philox.py, whose docstring defines them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(p_seed, threshold, at, i_b, i_h, o_m, o_n):
    """Which probabilities of a tile dropout keeps: bool, the shape to which the blocks ``o_m`` and ``o_n`` broadcast.

    Args:
        p_seed: int64 on the device.
        threshold: words below it are dropped.
        at: origins of q, k, head and batch.
        i_b, i_h: batch and query head; o_m, o_n: queries and keys, all within the tensors.
    """
    i_k = o_n + at[1]
    c_k = (i_k >> 2) + 0 * o_m
    c_q = o_m + at[0] + 0 * o_n
    c_h = 0 * c_q + (i_h + at[2])
    c_b = 0 * c_q + (i_b + at[3])
    b_0, b_1, b_2, b_3 = tl.philox(tl.load(p_seed), c_k, c_q, c_h, c_b)
    b_lane = i_k & 3
    b_word = tl.where(b_lane < 2, tl.where(b_lane == 0, b_0, b_1), tl.where(b_lane == 2, b_2, b_3))
    return b_word >= tl.cast(threshold, tl.uint32)
