"""The online softmax and its way back, as small jit functions that every attention kernel shares.

The exponential is exp2, the one that GPUs have. Scores come with a ``factor`` still to be multiplied (scores.py), and
maxima and LSE inside the kernels are in the units that the factor leads to:

    NATURAL false   log2 units: p = exp2(s * factor - m), one FMA and one exp2 an element
    NATURAL true    natural units: p = exp2((s * factor - m) * log2(e)). One multiplication more, and no rounding of the
                    LSE beyond its own: where scores reach 60, each more costs 4e-6 of p, which is what fp32 must not
                    lose and half precision does not see

Scores with a bias or a user's mod may be any finite number, down to the lowest of the bias's dtype, with which some
masks are written. Times log2(e) those would be infinite; and the rounding of a large maximum times the factor, which
the FMA does not share, would leave anything of exp2. So where ``MODE.is_wide`` a large reference is subtracted before
the factor, which is exact for the scores that count, and any other one after it, in the FMA (``split_reference``).
Maxima inside such kernels are plain scores.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Above it the rounding of a score times log2(e), up to 2^-12, is not far below that of half precision.
LARGE: tl.constexpr = tl.constexpr(4096.0)


@triton.jit
def power(b_exponent, NATURAL: tl.constexpr):
    """2 to the power of ``b_exponent``, or e to it where NATURAL."""
    if NATURAL:
        b_exponent = b_exponent * LOG2E
    return tl.exp2(b_exponent)


@triton.jit
def split_reference(b_reference, factor):
    """Return the numbers to subtract from scores before and after they are multiplied by ``factor``.

    One of the two is 0, or for a row without key -inf after the factor.
    """
    b_is_large = (tl.abs(b_reference) > LARGE) & (tl.abs(b_reference) < float("inf"))
    b_before = tl.where(b_is_large, b_reference, 0.0)
    return b_before, (b_reference - b_before) * factor


@triton.jit
def relative(b_s, b_before, b_after, factor, MODE: tl.constexpr):
    """Exponents of the scores ``b_s``, relative to what :func:`split_reference` split; ``b_before`` only if wide."""
    if MODE.is_wide:
        b_s = b_s - b_before
    return b_s * factor - b_after


@triton.jit
def online_step(b_m, b_l, b_s, factor, MODE: tl.constexpr, MAY_BE_EMPTY: tl.constexpr):
    """Take one tile of scores ``b_s`` [M, N] into the running maximum ``b_m`` and sum ``b_l`` [M].

    Returns the new maximum and sum, the unnormalised probabilities [M, N] and the factor [M] for what was accumulated
    before. MAY_BE_EMPTY: a row may have seen no key so far; its maximum is -inf, and -inf - -inf must not happen.
    ``factor`` is not negative.
    """
    if MODE.is_wide:
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_before, b_shift = split_reference(b_m_new, factor)
    else:
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
        b_before = b_m_new
        b_shift = b_m_new
    if MAY_BE_EMPTY:
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_shift)
    b_p = power(relative(b_s, b_before[:, None], b_shift[:, None], factor, MODE), MODE.natural)
    b_alpha = power(rescaled(b_m, b_before, b_shift, factor, MODE), MODE.natural)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    return b_m_new, b_l, b_p, b_alpha


@triton.jit
def rescaled(b_m, b_before, b_after, factor, MODE: tl.constexpr):
    """Exponents of maxima, as :func:`relative` gives those of scores."""
    if MODE.is_wide:
        return (b_m - b_before) * factor - b_after
    else:
        return b_m - b_after


@triton.jit
def finish(b_acc, b_m, b_l, p_sinks, i_h, MODE: tl.constexpr):
    """Output [M, Dv] and natural-log LSE [M] of what :func:`online_step` accumulated.

    A row without key has output 0 and LSE -inf. MODE.has_sinks: the logit of head ``i_h`` joins the denominator of the
    output; the LSE leaves it out.
    """
    # The largest score of a row contributes exp2(0) = 1 to its sum, so only a row without key has a sum of 0.
    b_empty = b_l == 0.0
    b_l = tl.where(b_empty, 1.0, b_l)
    b_before = b_m
    b_after = b_m
    if MODE.is_wide:
        b_before, b_after = split_reference(b_m, LOG2E)
        b_lse = b_before + (b_after + tl.log2(b_l)) * LN2
    elif MODE.natural:
        b_lse = b_m + tl.log2(b_l) * LN2
    else:
        b_lse = (b_m + tl.log2(b_l)) * LN2
    if MODE.has_sinks:
        sink = tl.load(p_sinks + i_h).to(tl.float32)
        if MODE.is_wide:
            sink = sink - b_before
        if not MODE.natural:
            sink = sink * LOG2E
        # Infinite where the sink is far above every score: the output is then 0, as it should be.
        b_l += power(sink - tl.where(b_empty, 0.0, b_after), MODE.natural)
    return b_acc / b_l[:, None], tl.where(b_empty, float("-inf"), b_lse)


@triton.jit
def split_lse(b_lse, NATURAL: tl.constexpr, IS_WIDE: tl.constexpr):
    """A natural-log LSE as :func:`probabilities` subtracts it, before the factor (only if wide) and after it.

    -inf, the LSE of a row without key, becomes +inf, which makes every probability of that row 0.
    """
    b_is_empty = b_lse == float("-inf")
    b_before = b_lse
    b_after = b_lse
    if IS_WIDE:
        b_before, b_after = split_reference(b_lse, LOG2E)
        # Before the factor, because the product with a large score would be infinite, too.
        b_before = tl.where(b_is_empty, float("inf"), b_before)
    elif not NATURAL:
        b_after = b_lse * LOG2E
    return b_before, tl.where(b_is_empty, float("inf"), b_after)


@triton.jit
def probabilities(b_s, b_before, b_after, factor, MODE: tl.constexpr):
    """The normalised probabilities of scores ``b_s``, given :func:`split_lse`, broadcast against them."""
    return power(relative(b_s, b_before, b_after, factor, MODE), MODE.natural)


@triton.jit
def with_sink(b_lse, sink):
    """log(exp(lse) + exp(sink)), natural, of the rows that see a key."""
    b_high = tl.maximum(b_lse, sink)
    b_low = tl.minimum(b_lse, sink)
    b_sum = b_high + tl.log2(1.0 + tl.exp2((b_low - b_high) * LOG2E)) * LN2
    # A sink of -inf, and inf - inf, change nothing.
    return tl.where(b_low == float("-inf"), b_high, b_sum)
