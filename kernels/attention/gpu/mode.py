"""A call as a launch of the attention kernels describes it: :class:`Mode` is compiled in, flat tuples are arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ... import compat
from ..call.options import Call
from ..call.score_mods import split
from ..call.spec import dropout_threshold
from .device import mods as builtin_mods


class Scores(NamedTuple):
    """The tensors and numbers that make scores of q k^T, besides the mods.

    Flat, as all tuples of a launch: triton 3.6 loses constants of nested ones.
    """

    p_mask: torch.Tensor | None  # bytes, 0 = not seen
    p_bias: torch.Tensor | None
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

    @property
    def mask_strides(self) -> tuple[int, int, int, int]:
        """Strides of the mask, 0 along dimensions that it does not vary in."""
        return self.mask_b, self.mask_h, self.mask_m, self.mask_n


class Softmax(NamedTuple):
    """The tensors and numbers that make of scores the probabilities by which v is multiplied."""

    p_sinks: torch.Tensor | None  # [H]
    p_seed: torch.Tensor | None  # of dropout
    factor: float  # softmax.py
    keep_scale: float  # of the probabilities that dropout keeps
    threshold: int  # random words below it are dropped


class Positions(NamedTuple):
    """The positions that are known on the device alone."""

    p_origin: torch.Tensor | None  # int64 [4]: q, k, head and batch
    p_cu_q: torch.Tensor | None  # [B + 1], where packed sequences begin
    p_cu_k: torch.Tensor | None


class RowValues(NamedTuple):
    """The numbers of each query that the backward's passes read; packed or not, see ``first_row_value``."""

    p_after: torch.Tensor  # to subtract from scores after the factor (softmax.split_lse)
    p_before: torch.Tensor | None  # and before it, if ``Mode.is_wide``
    p_delta: torch.Tensor


@dataclass(frozen=True)
class Mode:
    """The constants that a kernel is compiled for, apart from its tile.

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
    aux_from: tuple[int, ...] = (0,)  # where each mod's tensors begin in ``mod_inputs``, and the last one's end
    numbers_from: tuple[int, ...] = (0,)  # and its numbers
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
        """Return the number of mods of the chain."""
        return len(self.mods)

    @property
    def has_tiles(self) -> bool:
        """Return whether something is read or hidden by position: a tile of a mask or bias, or by a user's mod."""
        return self.mask_dims is not None or self.bias_dims is not None or self.has_user_mods

    @property
    def is_wide(self) -> bool:
        """Return whether finite scores may be so large that their product with log2(e) is infinite (softmax.py).

        That is where a bias or a user's mod may write a mask as a number. Softcap and ALiBi keep to the size of their
        own numbers.
        """
        return not self.natural and (self.bias_dims is not None or self.has_user_mods)

    @property
    def tile_dims(self) -> tuple[str | None, ...]:
        """Along which dims each score takes something from memory or registers of its own: what tiles are chosen by."""
        crowded = "mn" if self.has_dropout or self.has_user_mods else None
        return self.mask_dims, self.bias_dims, crowded

    @property
    def cache_key(self) -> str:
        """Return the key of a compiled kernel in Triton's cache on disk; mods count by source, not by name."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _FUNCTIONS}
        return f"{fields}" + "".join(compat.source_key(f) for f in (*self.mods, *self.mod_backwards) if f is not None)


_FUNCTIONS = ("mods", "mod_backwards")


def mods_of(call: Call) -> dict[str, Any]:
    """Return the fields of :class:`Mode` that describe the call's mods."""
    parts = split(call.spec.mods, call.aux, call.spec.params)
    ends = [(0, len(call.aux))]
    for mod, *_ in parts:
        ends.append((ends[-1][0] + mod.num_aux, ends[-1][1] + mod.num_params))
    return {
        "mods": tuple(_function(mod.forward) for mod, *_ in parts),
        "mod_backwards": tuple(_function(mod.backward) for mod, *_ in parts),
        "aux_from": tuple(a for a, _ in ends),
        "numbers_from": tuple(n for _, n in ends),
        "local_heads": tuple(mod.local_heads for mod, *_ in parts),
        "has_user_mods": any(not isinstance(mod.forward, str) for mod, *_ in parts),
    }


def _function(function: Any) -> Any:
    """The jit function of a mod; those of built-in mods are in device/mods.py under the name that stands for them."""
    return getattr(builtin_mods, function) if isinstance(function, str) else function


def folds_scale(call: Call) -> bool:
    """Return whether the scale is left to the softmax."""
    # The softmax takes a row's maximum before it multiplies by the factor, which needs a positive one.
    return call.bias is None and call.spec.scale > 0 and not call.spec.mods


def scores_of(call: Call) -> Scores:
    """Return the kernels' view of what makes a call's scores."""
    return Scores(
        None if call.mask is None else call.mask.view(torch.uint8),
        call.bias,
        call.descale,
        *_strides(call.mask),
        *_strides(call.bias),
        float(call.spec.scale),
    )


def softmax_of(call: Call, *, fold_scale: bool, natural: bool) -> Softmax:
    """Return the kernels' view of a call's softmax."""
    spec = call.spec
    return Softmax(
        call.sinks,
        call.seed if spec.dropout_p > 0 else None,
        (spec.scale if fold_scale else 1.0) * (1.0 if natural else 1 / math.log(2)),
        1.0 / (1.0 - spec.dropout_p),
        dropout_threshold(spec.dropout_p),
    )


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
