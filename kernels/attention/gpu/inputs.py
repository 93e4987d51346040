"""One call of attention as the Triton kernels take it: checked, and as the arguments that every kernel has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...backend_record import Request
from ...runtime.launch import Target, dot_precision, target_of
from ..call.options import Call
from ..call.packed import Packed
from ..call.spec import AttentionSpec
from ..call.tensors import unit_last_stride
from .backend import TRITON
from .mask_tiles import shown_tiles
from .mode import Mode, Positions, Scores, Softmax, dims, folds_scale, mods_of, scores_of, softmax_of
from .tiles import Tile


@dataclass(frozen=True)
class GpuCall:
    """One attention call as the kernels see it."""

    target: Target
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: Scores
    softmax: Softmax
    positions: Positions
    mod_inputs: tuple[Any, ...]  # the tensors of the score mods, then their numbers
    origins: tuple[int, int, int, int]  # of q, k, head and batch, without those on the device
    mode: Mode
    lo: int
    hi: int
    group: int  # query heads a key head
    batch: int
    heads: int
    seq_q: int  # of packed sequences the longest
    seq_k: int
    packed: Packed | None

    def views(self, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
        """Of each tensor itself and its strides of batches, heads and rows, in one flat tuple; of none None and zeros.

        Packed sequences are told apart by their rows alone.
        """
        views: list[Any] = []
        for x in tensors:
            b, h, row = (0, 0, 0) if x is None else x.stride()[:3]
            views += (x, b if self.packed is None else 0, h, row)
        return tuple(views)

    def arguments(self, tile: Tile, *heads: int, along_keys: bool) -> tuple[Any, ...]:
        """The arguments of every kernel that goes over the scores, from ``scores`` to ``Sk``.

        Args:
            tile: the kernel's.
            heads: what the kernel takes in its tuple ``heads`` beyond H and GROUP.
            along_keys: its loop goes over keys, else over queries.
        """
        return (
            self.scores,
            self.softmax,
            shown_tiles(self.scores, tile.block_m, tile.block_n, along_keys=along_keys),
            self.positions,
            self.mod_inputs,
            (self.heads, self.group, *heads),
            *self.origins,
            self.lo,
            self.hi,
            self.seq_q,
            self.seq_k,
        )


def describe_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, *, needs_grad: bool = False
) -> GpuCall:
    """Check the limits of backend ``triton`` and return what forward and backward take of the call.

    Raises:
        ValueError: the call is beyond these limits.
    """
    TRITON.check(Request("attention", q.device, q.dtype, (q.shape[-1], v.shape[-1]), call, needs_grad))
    target = target_of(q.device)
    spec, packed, origin = call.spec, call.packed, call.origin
    natural = q.dtype == torch.float32
    fold_scale = folds_scale(call)
    d, dv = q.shape[-1], v.shape[-1]
    mode = Mode(
        d=d,
        dv=dv,
        # Tensor cores sum over 32 bytes of a row at a time.
        block_d=max(triton.next_power_of_2(d), 32 // q.dtype.itemsize),
        block_dv=triton.next_power_of_2(dv),
        mask_dims=dims(call.mask),
        bias_dims=dims(call.bias),
        has_left=spec.window_left is not None,
        has_right=spec.window_right is not None,
        has_origin=origin is not None,
        fold_scale=fold_scale,
        natural=natural,
        precision=dot_precision(target, q.dtype),
        has_sinks=call.sinks is not None,
        has_dropout=spec.dropout_p > 0,
        has_lengths=packed is not None,
        is_bottom_right=packed is not None and packed.is_bottom_right,
        has_descale=call.descale is not None,
        **mods_of(call),
    )
    if packed is None:
        sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        lo, hi = _window(q.shape[2], k.shape[2], origin, spec)
    else:
        sizes = packed.batch, q.shape[1], packed.max_q, packed.max_k
        # Each program adds what its sequence's lengths say, which is less than what int32 leaves.
        lo, hi = (min(max(x, -(2**31)), 2**31 - 1) for x in _window(0, 0, packed.cu_q, spec))
    return GpuCall(
        target=target,
        q=unit_last_stride(q),
        k=unit_last_stride(k),
        v=unit_last_stride(v),
        scores=scores_of(call),
        softmax=softmax_of(call, fold_scale=fold_scale, natural=natural),
        positions=Positions(origin, *((None, None) if packed is None else (packed.cu_q, packed.cu_k))),
        mod_inputs=(*call.aux, *spec.params),
        origins=(
            _signed(spec.origin_q),
            _signed(spec.origin_k),
            _signed(spec.origin_head),
            _signed(spec.origin_batch),
        ),
        mode=mode,
        lo=lo,
        hi=hi,
        group=q.shape[1] // max(k.shape[1], 1),
        batch=sizes[0],
        heads=sizes[1],
        seq_q=sizes[2],
        seq_k=sizes[3],
        packed=packed,
    )


def _signed(position: int) -> int:
    """Modulo 2^32, as the kernels count positions, and of one integer type whatever it is."""
    return (position + 2**31) % 2**32 - 2**31


def _window(sq: int, sk: int, origin: torch.Tensor | None, spec: AttentionSpec) -> tuple[int, int]:
    """``lo`` and ``hi`` of masks.py as far as they are known on the host; 0 where a side is open."""
    shift = spec.origin_q - spec.origin_k
    lo = 0 if spec.window_left is None else shift - spec.window_left
    hi = 0 if spec.window_right is None else shift + spec.window_right
    # Without an origin on the device the answer is decided within [-Sq, Sk], which keeps the arguments in 32 bits (one
    # compiled kernel whatever the positions); with one, 2^62 leaves room for it.
    lowest, highest = (-sq, sk) if origin is None else (-(2**62), 2**62)
    return min(max(lo, lowest), highest), min(max(hi, lowest), highest)
