"""From q k^T to the scores that the softmax sees, in the contract's order; shared by forward and backward.

    s = scale * q k^T;  [softcap;  ALiBi;  score_mod;]  + bias;  mask, causal, window

The steps in brackets are not there yet; their place is marked below. A plain scale is left to the softmax
(``fold_scale``), which multiplies by a factor anyway (softmax.py):

    fold_scale:  the score is q k^T itself     factor = scale       (times log2(e) unless natural)
    otherwise:   the score is complete          factor = 1           (times log2(e) unless natural)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .loads import at_head, load_tile
from .masks import hide
from .spec import AttentionSpec


class Scores(NamedTuple):
    """What the scores depend on besides q and k. Flat, because triton 3.6 loses constants of nested tuples in loops."""

    p_mask: torch.Tensor | None  # bytes, 0 = not seen
    p_bias: torch.Tensor | None
    mask_b: int
    mask_h: int
    mask_m: int
    mask_n: int
    bias_b: int
    bias_h: int
    bias_m: int
    bias_n: int
    scale: float
    factor: float


@dataclass(frozen=True)
class Mode:
    """What a kernel is compiled for, apart from its tile.

    Lengths, positions and the width of a window are not in it: they change from call to call.
    """

    d: int
    dv: int
    block_d: int  # head dimensions padded to powers of two
    block_dv: int
    mask_dims: str | None  # along which of queries (m) and keys (n) the mask varies; None without one
    bias_dims: str | None
    has_left: bool
    has_right: bool
    has_origin: bool
    fold_scale: bool
    natural: bool  # units of the softmax (softmax.py)
    precision: str  # of fp32 dots

    @property
    def has_tiles(self) -> bool:
        """Whether a tile of a mask or bias is read for each tile of scores."""
        return self.mask_dims is not None or self.bias_dims is not None


def describe(
    mask: torch.Tensor | None, bias: torch.Tensor | None, spec: AttentionSpec, *, natural: bool
) -> tuple[Scores, bool]:
    """The kernels' view of mask, bias and scale, and whether the scale is left to the softmax."""
    # The softmax takes a row's maximum before it multiplies by the factor, which needs a positive one.
    fold_scale = bias is None and spec.scale > 0
    scores = Scores(
        None if mask is None else mask.view(torch.uint8),
        bias,
        *_strides(mask),
        *_strides(bias),
        float(spec.scale),
        (spec.scale if fold_scale else 1.0) * (1.0 if natural else 1 / math.log(2)),
    )
    return scores, fold_scale


def dims(tensor: torch.Tensor | None) -> str | None:
    """Along which of queries and keys a mask or bias varies: "mn", "m", "n", "", or None without one."""
    if tensor is None:
        return None
    _, _, m, n = _strides(tensor)
    return ("m" if m else "") + ("n" if n else "")


def _strides(tensor: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Strides in elements, 0 along dimensions of size 1."""
    if tensor is None:
        return (0, 0, 0, 0)
    b, h, m, n = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return b, h, m, n


@triton.jit
def modify_scores(
    b_s, scores, i_b, i_h, o_m, o_n, lo, hi, Sq, Sk, MODE: tl.constexpr, IS_EDGE: tl.constexpr, HAS_END: tl.constexpr
):
    """Scores of the products ``b_s``, -inf where a query does not see the key.

    Args:
        b_s: q k^T of a tile, fp32, queries along whichever axis ``o_m`` has them.
        scores, MODE: :class:`Scores` and :class:`Mode`.
        i_b, i_h: batch and query head.
        o_m, o_n: positions within the tensors, shaped [M, 1] and [1, N], or [1, M] and [N, 1] for a transposed tile.
        lo, hi: the window (masks.py).
        IS_EDGE: the tile has entries that the window hides or that lie outside the tensors.
        HAS_END: the scores of keys beyond the last one matter to the caller, and are to be -inf.
    """
    if not MODE.fold_scale:
        b_s = b_s * scores.scale
    # softcap, then ALiBi, then score_mod come here, before the bias; any of them clears fold_scale.
    if MODE.bias_dims is not None:
        p_bias = at_head(scores.p_bias, scores.bias_b, scores.bias_h, i_b, i_h)
        b_bias = load_tile(p_bias, scores.bias_m, scores.bias_n, o_m, o_n, Sq, Sk, MODE.bias_dims, IS_EDGE)
        b_s += b_bias.to(tl.float32)
    if MODE.mask_dims is not None:
        p_mask = at_head(scores.p_mask, scores.mask_b, scores.mask_h, i_b, i_h)
        b_mask = load_tile(p_mask, scores.mask_m, scores.mask_n, o_m, o_n, Sq, Sk, MODE.mask_dims, IS_EDGE)
        b_s = tl.where(b_mask != 0, b_s, float("-inf"))
    if IS_EDGE:
        b_s = hide(b_s, o_m, o_n, lo, hi, Sk, MODE.has_left, MODE.has_right, HAS_END)
    return b_s
