"""Dropout's random bits in Triton: the twin of reference/philox.py, whose docstring defines them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(softmax, place, o_m, o_n):
    """Return the probabilities of a tile that dropout keeps: bool, of the shape to which ``o_m`` and ``o_n`` broadcast.

    Args:
        softmax: ``Softmax`` (mode.py), with the seed and the threshold below which words are dropped.
        place: where the tile stands.
        o_m, o_n: queries and keys, all within the tensors.
    """
    i_k = o_n + place.origin_k
    c_k = (i_k >> 2) + 0 * o_m
    c_q = o_m + place.origin_q + 0 * o_n
    c_h = 0 * c_q + (place.i_h + place.origin_h)
    c_b = 0 * c_q + (place.i_b + place.origin_b)
    b_0, b_1, b_2, b_3 = tl.philox(tl.load(softmax.p_seed), c_k, c_q, c_h, c_b)
    b_lane = i_k & 3
    b_word = tl.where(b_lane < 2, tl.where(b_lane == 0, b_0, b_1), tl.where(b_lane == 2, b_2, b_3))
    return b_word >= tl.cast(softmax.threshold, tl.uint32)
