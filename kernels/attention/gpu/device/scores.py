"""From q k^T to the scores that the softmax sees, in the contract's order; shared by forward and backward.

    s = scale * q k^T;  softcap;  ALiBi;  score_mod;  + bias;  mask, causal, window

Softcap, ALiBi and a user's score mod are one chain of mods (triton_mods.py). A plain scale is left to the softmax
(``fold_scale``), which multiplies by a factor anyway (softmax.py):

    fold_scale:  the score is q k^T itself     factor = scale       (times log2(e) unless natural)
    otherwise:   the score is complete          factor = 1           (times log2(e) unless natural)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...call.score_mods import split
from ...call.spec import AttentionSpec, dropout_threshold
from .loads import at_head, load_tile
from .masks import hide
from .mods import apply_mod, functions, unapply_mod


class Scores(NamedTuple):
    """What the scores depend on besides q and k. Flat: triton 3.6 loses constants of nested tuples in loops."""

    p_mask: torch.Tensor | None  # bytes, 0 = not seen
    p_bias: torch.Tensor | None
    p_sinks: torch.Tensor | None  # [H]
    p_seed: torch.Tensor | None  # of dropout
    p_descale: torch.Tensor | None  # [B, Hkv, 3], of fp8
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
    keep_scale: float  # of the probabilities that dropout keeps
    threshold: int  # random words below it are dropped
    p_cu_q: torch.Tensor | None = None  # [B + 1], where packed sequences begin (packed.py)
    p_cu_k: torch.Tensor | None = None
    p_tiles: torch.Tensor | None = None  # where the mask shows anything (mask_tiles.py)
    tiles_b: int = 0
    tiles_h: int = 0
    tiles_row: int = 0
    tiles_half: int = 0

    @property
    def mask_strides(self) -> tuple[int, int, int, int]:
        """Strides of the mask, 0 along dimensions that it does not vary in."""
        return self.mask_b, self.mask_h, self.mask_m, self.mask_n


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
    mods: tuple[Any, ...] = ()  # jit functions, forward and backward, of each mod
    mod_backwards: tuple[Any, ...] = ()
    aux_from: tuple[int, ...] = (0,)  # where each mod's tensors begin, and the last one's end
    numbers_from: tuple[int, ...] = (0,)
    local_heads: tuple[bool, ...] = ()
    has_user_mods: bool = False
    has_sinks: bool = False
    has_dropout: bool = False
    has_lengths: bool = False  # packed sequences
    is_bottom_right: bool = False  # each of them aligned at its end
    has_descale: bool = False

    @property
    def mask_code(self) -> int:
        """:func:`dim_code` of the mask."""
        return dim_code(self.mask_dims)

    @property
    def bias_code(self) -> int:
        """:func:`dim_code` of the bias."""
        return dim_code(self.bias_dims)

    @property
    def num_mods(self) -> int:
        """How many mods the chain has."""
        return len(self.mods)

    @property
    def has_tiles(self) -> bool:
        """Whether something is read, or hidden, by position: a tile of a mask or bias, whatever a user's mod does."""
        return self.mask_dims is not None or self.bias_dims is not None or self.has_user_mods

    @property
    def tile_dims(self) -> tuple[str | None, ...]:
        """Along which dims each score takes something from memory or registers of its own: what tiles are chosen by."""
        crowded = "mn" if self.has_dropout or self.has_user_mods else None
        return self.mask_dims, self.bias_dims, crowded

    @property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows a compiled kernel by: the mods by their source, not by their name."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _FUNCTIONS}
        return f"{fields}" + "".join(f.cache_key for f in (*self.mods, *self.mod_backwards) if f is not None)


_FUNCTIONS = ("mods", "mod_backwards")


def mods_of(spec: AttentionSpec, aux: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Return the fields of :class:`Mode` that describe the call's mods."""
    parts = split(spec.mods, aux, spec.params)
    ends = [(0, 0)]
    for mod, *_ in parts:
        ends.append((ends[-1][0] + mod.num_aux, ends[-1][1] + mod.num_params))
    return {
        "mods": tuple(functions(mod, backward=False) for mod, *_ in parts),
        "mod_backwards": tuple(functions(mod, backward=True) for mod, *_ in parts),
        "aux_from": tuple(a for a, _ in ends),
        "numbers_from": tuple(n for _, n in ends),
        "local_heads": tuple(mod.local_heads for mod, *_ in parts),
        "has_user_mods": any(not isinstance(mod.forward, str) for mod, *_ in parts),
    }


def describe(
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    spec: AttentionSpec,
    *,
    natural: bool,
    descale: torch.Tensor | None = None,
) -> tuple[Scores, bool]:
    """The kernels' view of a call's tensors and scale, and whether the scale is left to the softmax."""
    # The softmax takes a row's maximum before it multiplies by the factor, which needs a positive one.
    fold_scale = bias is None and spec.scale > 0 and not spec.mods
    scores = Scores(
        None if mask is None else mask.view(torch.uint8),
        bias,
        sinks,
        seed,
        descale,
        *_strides(mask),
        *_strides(bias),
        float(spec.scale),
        (spec.scale if fold_scale else 1.0) * (1.0 if natural else 1 / math.log(2)),
        1.0 / (1.0 - spec.dropout_p),
        dropout_threshold(spec.dropout_p),
    )
    return scores, fold_scale


def dims(tensor: torch.Tensor | None) -> str | None:
    """Along which of queries and keys a mask or bias varies: "mn", "m", "n", "", or None without one."""
    if tensor is None:
        return None
    _, _, m, n = _strides(tensor)
    return ("m" if m else "") + ("n" if n else "")


def dim_code(dims: str | None) -> int:
    """1 for queries plus 2 for keys: a number, because triton 3.6 hands no string of a constant on to a function."""
    return ("m" in dims) + 2 * ("n" in dims) if dims else 0


def _strides(tensor: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Strides in elements, 0 along dimensions of size 1."""
    if tensor is None:
        return (0, 0, 0, 0)
    b, h, m, n = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return b, h, m, n


@triton.jit
def modify_scores(
    b_s,
    scores,
    aux,
    numbers,
    at,
    i_b,
    i_h,
    o_m,
    o_n,
    lo,
    hi,
    Sq,
    Sk,
    MODE: tl.constexpr,
    IS_EDGE: tl.constexpr,
    HAS_END: tl.constexpr,
):
    """Scores of the products ``b_s``, -inf where a query does not see the key.

    Args:
        b_s: q k^T of a tile, fp32, queries along whichever axis ``o_m`` has them.
        scores, MODE: :class:`Scores` and :class:`Mode`.
        aux, numbers: pointers and numbers of the mods; ``at`` the origins (masks.py), where positions count from.
        i_b, i_h: batch and query head.
        o_m, o_n: positions within the tensors, shaped [M, 1] and [1, N], or [1, M] and [N, 1] for a transposed tile.
        lo, hi: the window (masks.py).
        IS_EDGE: the tile has entries that the window hides or that lie outside the tensors.
        HAS_END: the scores of keys beyond the last one matter to the caller, and are to be -inf.
    """
    if not MODE.fold_scale:
        b_s = b_s * scores.scale
    NUM_MODS: tl.constexpr = MODE.num_mods
    for I_MOD in tl.static_range(NUM_MODS):
        b_s = apply_mod(b_s, aux, numbers, at, i_b, i_h, o_m, o_n, Sq, Sk, MODE, I_MOD, IS_EDGE)
    if MODE.bias_dims is not None:
        p_bias = at_head(scores.p_bias, scores.bias_b, scores.bias_h, i_b, i_h)
        b_bias = load_tile(p_bias, scores.bias_m, scores.bias_n, o_m, o_n, Sq, Sk, MODE.bias_code, IS_EDGE)
        b_s += b_bias.to(tl.float32)
    if MODE.mask_dims is not None:
        p_mask = at_head(scores.p_mask, scores.mask_b, scores.mask_h, i_b, i_h)
        b_mask = load_tile(p_mask, scores.mask_m, scores.mask_n, o_m, o_n, Sq, Sk, MODE.mask_code, IS_EDGE)
        b_s = tl.where(b_mask != 0, b_s, float("-inf"))
    if IS_EDGE:
        b_s = hide(b_s, o_m, o_n, lo, hi, Sk, MODE.has_left, MODE.has_right, HAS_END)
    return b_s


@triton.jit
def score_gradient(
    b_ds,
    b_s,
    scores,
    aux,
    numbers,
    at,
    i_b,
    i_h,
    o_m,
    o_n,
    Sq,
    Sk,
    MODE: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """The gradient of scale * q k^T, from ``b_ds``, that of the scores which :func:`modify_scores` made of it.

    ``b_s`` holds the products q k^T; the scores between the mods are computed again.
    """
    if MODE.num_mods > 0:
        b_s0 = b_s * scores.scale
        b_s1 = b_s0
        b_s2 = b_s0
        if MODE.num_mods > 1:
            b_s1 = apply_mod(b_s0, aux, numbers, at, i_b, i_h, o_m, o_n, Sq, Sk, MODE, 0, IS_EDGE)
        if MODE.num_mods > 2:
            b_s2 = apply_mod(b_s1, aux, numbers, at, i_b, i_h, o_m, o_n, Sq, Sk, MODE, 1, IS_EDGE)
            b_ds = unapply_mod(b_ds, b_s2, aux, numbers, at, i_b, i_h, o_m, o_n, Sq, Sk, MODE, 2, IS_EDGE)
        if MODE.num_mods > 1:
            b_ds = unapply_mod(b_ds, b_s1, aux, numbers, at, i_b, i_h, o_m, o_n, Sq, Sk, MODE, 1, IS_EDGE)
        b_ds = unapply_mod(b_ds, b_s0, aux, numbers, at, i_b, i_h, o_m, o_n, Sq, Sk, MODE, 0, IS_EDGE)
    return b_ds


@triton.jit
def descale_of(p_descale, i_b, i_h, H, GROUP):
    """What fp8's scores and outputs of a head are multiplied by: the factors of q times k, and of v."""
    p_head = p_descale + 3 * (i_b * (H // GROUP) + i_h // GROUP)
    return tl.load(p_head) * tl.load(p_head + 1), tl.load(p_head + 2)
