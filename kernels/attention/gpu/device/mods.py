"""The built-in score mods as jit functions, found by name (mode.py), and the chain that runs a call's mods.

A mod's forward takes a block of scores and gives the new one; its backward takes the gradient of what forward returned
and the scores that it took.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(b_x):
    """tanh of fp32 to about one unit in the last place: a polynomial near 0 (Cephes), the exponential elsewhere."""
    b_abs = tl.abs(b_x)
    b_z = b_x * b_x
    b_near = -5.70498872745e-3 * b_z + 2.06390887954e-2
    b_near = b_near * b_z - 5.37397155531e-2
    b_near = b_near * b_z + 1.33314422036e-1
    b_near = b_near * b_z - 3.33332819422e-1
    b_near = b_near * b_z * b_x + b_x
    b_far = 1.0 - 2.0 / (tl.exp2(b_abs * 2.8853900817779268) + 1.0)
    return tl.where(b_abs < 0.625, b_near, tl.where(b_x < 0, -b_far, b_far))


@triton.jit
def softcap(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    """cap * tanh(s / cap)."""
    return numbers[0] * tanh(b_s / numbers[0])


@triton.jit
def softcap_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    """ds * (1 - tanh(s / cap)^2)."""
    b_t = tanh(b_s / numbers[0])
    return b_ds * (1.0 - b_t * b_t)


@triton.jit
def alibi(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    """s - slope * |i_q - i_k|; the slopes are [B, H], and numbers[0] is H."""
    slope = tl.load(aux[0] + i_b * tl.cast(numbers[0], tl.int32) + i_h)
    return b_s - slope * tl.abs(i_q - i_k).to(tl.float32)


@triton.jit
def alibi_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    """The distance does not depend on the score."""
    return b_ds


@triton.jit
def apply_mod(b_s, mod_inputs, place, o_m, o_n, MODE: tl.constexpr, I_MOD: tl.constexpr, IS_EDGE: tl.constexpr):
    """Scores after mod I_MOD of the call; ``mod_inputs``: pointers of all mods' tensors, then all their numbers."""
    i_b, i_h, i_q, i_k = positions(place, o_m, o_n, MODE.local_heads[I_MOD], IS_EDGE)
    aux = mod_inputs[MODE.aux_from[I_MOD] : MODE.aux_from[I_MOD + 1]]
    numbers = mod_inputs[MODE.numbers_from[I_MOD] : MODE.numbers_from[I_MOD + 1]]
    return MODE.mods[I_MOD](b_s, i_b, i_h, i_q, i_k, aux, numbers)


@triton.jit
def backward_of_mod(
    b_ds, b_s, mod_inputs, place, o_m, o_n, MODE: tl.constexpr, I_MOD: tl.constexpr, IS_EDGE: tl.constexpr
):
    """The gradient of the scores ``b_s`` that mod I_MOD took, from that of the scores which it gave."""
    i_b, i_h, i_q, i_k = positions(place, o_m, o_n, MODE.local_heads[I_MOD], IS_EDGE)
    aux = mod_inputs[MODE.aux_from[I_MOD] : MODE.aux_from[I_MOD + 1]]
    numbers = mod_inputs[MODE.numbers_from[I_MOD] : MODE.numbers_from[I_MOD + 1]]
    return MODE.mod_backwards[I_MOD](b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers)


@triton.jit
def positions(place, o_m, o_n, IS_LOCAL: tl.constexpr, IS_EDGE: tl.constexpr):
    """Batch, head, and blocks of query and key positions in the whole, int32, as a mod sees them.

    Beyond the tensors, in a tile at an edge, the last position is repeated, so that a mod that reads a table by
    position reads none that is not there.
    """
    i_b = place.i_b
    i_h = place.i_h
    if IS_EDGE:
        o_m = tl.minimum(o_m, place.Sq - 1)
        o_n = tl.minimum(o_n, place.Sk - 1)
    if not IS_LOCAL:
        i_b = i_b + place.origin_b
        i_h = i_h + place.origin_h
    return i_b, i_h, o_m + place.origin_q, o_n + place.origin_k
