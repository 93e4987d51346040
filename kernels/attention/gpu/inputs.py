"""What the Triton attention launchers share: their limits, and the arguments that every kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ...backend_record import Request
from ...runtime.launch import Target, dot_precision, target_of
from ..call import options as attention
from ..call.packed import Packed
from ..call.spec import AttentionSpec
from .backend import TRITON
from .device.scores import Mode, Scores, describe, dims, mods_of


@dataclass(frozen=True)
class Call:
    """One attention call as the kernels see it."""

    target: Target
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    origin: torch.Tensor | None
    scores: Scores
    aux: tuple[torch.Tensor, ...]  # of the score mods
    numbers: tuple[float, ...]
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

    def strides(self, x: torch.Tensor) -> tuple[int, int, int]:
        """Strides of batches, heads and rows; packed sequences are told apart by their rows alone."""
        b, h, row = x.stride()[:3]
        return b if self.packed is None else 0, h, row


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: attention.Call, *, needs_grad: bool = False
) -> Call:
    """Check these kernels' own limits and gather the arguments of forward and backward.

    Raises:
        ValueError: a dtype or head dimension that these kernels do not have.
    """
    spec, packed, origin = options.spec, options.packed, options.origin
    mask, bias, sinks, aux, descale = options.mask, options.bias, options.sinks, options.aux, options.descale
    TRITON.check(Request("attention", q.device, q.dtype, (q.shape[-1], v.shape[-1]), options, needs_grad))
    target = target_of(q.device)
    natural = q.dtype == torch.float32
    seed = options.seed if spec.dropout_p > 0 else None
    scores, fold_scale = describe(mask, bias, sinks, seed, spec, natural=natural, descale=descale)
    if packed is not None:
        scores = scores._replace(p_cu_q=packed.cu_q, p_cu_k=packed.cu_k)
    d, dv = q.shape[-1], v.shape[-1]
    mode = Mode(
        d=d,
        dv=dv,
        block_d=triton.next_power_of_2(d),
        block_dv=triton.next_power_of_2(dv),
        mask_dims=dims(mask),
        bias_dims=dims(bias),
        has_left=spec.window_left is not None,
        has_right=spec.window_right is not None,
        has_origin=origin is not None,
        fold_scale=fold_scale,
        natural=natural,
        precision=dot_precision(target, q.dtype),
        has_sinks=sinks is not None,
        has_dropout=spec.dropout_p > 0,
        has_lengths=packed is not None,
        is_bottom_right=packed is not None and packed.is_bottom_right,
        has_descale=descale is not None,
        **mods_of(spec, aux),
    )
    if packed is None:
        sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        lo, hi = _window(q.shape[2], k.shape[2], origin, spec)
    else:
        sizes = packed.batch, q.shape[1], packed.max_q, packed.max_k
        # Each program adds what its sequence's lengths say, which is less than what int32 leaves.
        lo, hi = (min(max(x, -(2**31)), 2**31 - 1) for x in _window(0, 0, packed.cu_q, spec))
    return Call(
        target=target,
        q=unit_stride(q),
        k=unit_stride(k),
        v=unit_stride(v),
        origin=origin,
        scores=scores,
        aux=aux,
        numbers=spec.params,
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


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last stride is 1, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _window(sq: int, sk: int, origin: torch.Tensor | None, spec: AttentionSpec) -> tuple[int, int]:
    """``lo`` and ``hi`` of masks.py as far as they are known on the host; 0 where a side is open."""
    shift = spec.origin_q - spec.origin_k
    lo = 0 if spec.window_left is None else shift - spec.window_left
    hi = 0 if spec.window_right is None else shift + spec.window_right
    # Without an origin on the device the answer is decided within [-Sq, Sk], which keeps the arguments in 32 bits (one
    # compiled kernel whatever the positions); with one, 2^62 leaves room for it.
    lowest, highest = (-sq, sk) if origin is None else (-(2**62), 2**62)
    return min(max(lo, lowest), highest), min(max(hi, lowest), highest)
