"""From q k^T to the scores that the softmax sees, in the contract's order; shared by forward and backward.

    s = scale * q k^T;  softcap;  ALiBi;  score_mod;  + bias;  mask, causal, window

Softcap, ALiBi and a user's score mod are one chain of mods (mods.py). A plain scale is left to the softmax
(``fold_scale``), which multiplies by a factor anyway (softmax.py):

    fold_scale:  the score is q k^T itself     factor = scale       (times log2(e) unless natural)
    otherwise:   the score is complete          factor = 1           (times log2(e) unless natural)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loads import at_head, load_tile
from .masks import hide
from .mods import apply_mod, backward_of_mod


@triton.jit
def modify_scores(
    b_s, scores, mod_inputs, place, o_m, o_n, MODE: tl.constexpr, IS_EDGE: tl.constexpr, HAS_END: tl.constexpr
):
    """Scores of the products ``b_s``, -inf where a query does not see the key.

    Args:
        b_s: q k^T of a tile, fp32, queries along whichever axis ``o_m`` has them.
        scores, MODE: ``Scores`` and ``Mode`` (mode.py).
        mod_inputs: tensors and numbers of the mods (mods.py).
        place: where the tile stands (place.py).
        o_m, o_n: positions within the tensors, shaped [M, 1] and [1, N], or [1, M] and [N, 1] for a transposed tile.
        IS_EDGE: the tile has entries that the window hides or that lie outside the tensors.
        HAS_END: the scores of keys beyond the last one matter to the caller, and are to be -inf.
    """
    if not MODE.fold_scale:
        b_s = b_s * scores.scale
    NUM_MODS: tl.constexpr = MODE.num_mods
    for I_MOD in tl.static_range(NUM_MODS):
        b_s = apply_mod(b_s, mod_inputs, place, o_m, o_n, MODE, I_MOD, IS_EDGE)
    if MODE.bias_dims is not None:
        p_bias = at_head(scores.p_bias, scores.bias_b, scores.bias_h, place.i_b, place.i_h)
        b_bias = load_tile(p_bias, scores.bias_m, scores.bias_n, o_m, o_n, place, MODE.bias_code, IS_EDGE)
        b_s += b_bias.to(tl.float32)
    if MODE.mask_dims is not None:
        p_mask = at_head(scores.p_mask, scores.mask_b, scores.mask_h, place.i_b, place.i_h)
        b_mask = load_tile(p_mask, scores.mask_m, scores.mask_n, o_m, o_n, place, MODE.mask_code, IS_EDGE)
        b_s = tl.where(b_mask != 0, b_s, float("-inf"))
    if IS_EDGE:
        b_s = hide(b_s, o_m, o_n, place, MODE, HAS_END)
    return b_s


@triton.jit
def score_gradient(b_ds, b_s, scores, mod_inputs, place, o_m, o_n, MODE: tl.constexpr, IS_EDGE: tl.constexpr):
    """The gradient of scale * q k^T, from ``b_ds``, that of the scores which :func:`modify_scores` made of it.

    ``b_s`` holds the products q k^T; the scores between the mods are computed again.
    """
    if MODE.num_mods > 0:
        b_s0 = b_s * scores.scale
        b_s1 = b_s0
        b_s2 = b_s0
        if MODE.num_mods > 1:
            b_s1 = apply_mod(b_s0, mod_inputs, place, o_m, o_n, MODE, 0, IS_EDGE)
        if MODE.num_mods > 2:
            b_s2 = apply_mod(b_s1, mod_inputs, place, o_m, o_n, MODE, 1, IS_EDGE)
            b_ds = backward_of_mod(b_ds, b_s2, mod_inputs, place, o_m, o_n, MODE, 2, IS_EDGE)
        if MODE.num_mods > 1:
            b_ds = backward_of_mod(b_ds, b_s1, mod_inputs, place, o_m, o_n, MODE, 1, IS_EDGE)
        b_ds = backward_of_mod(b_ds, b_s0, mod_inputs, place, o_m, o_n, MODE, 0, IS_EDGE)
    return b_ds


@triton.jit
def descale_of(p_descale, i_b, i_h, H, GROUP):
    """Return the factors of fp8's scores and outputs of a head: those of q times k, and of v."""
    p_head = p_descale + 3 * (i_b * (H // GROUP) + i_h // GROUP)
    return tl.load(p_head) * tl.load(p_head + 1), tl.load(p_head + 2)
