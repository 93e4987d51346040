"""A score mod's pair of jit functions by themselves, without the attention around them: what a check compares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.launch import launch
from ..call.options import Call
from .device.mods import apply_mod, backward_of_mod
from .device.place import place_of
from .mode import Mode, Positions, mods_of


@triton.jit
def mod_pair_kernel(
    p_s,
    p_ds,
    p_out,
    p_dx,
    mod_inputs,
    positions,
    H,
    Sq,
    Sk,
    origin_q,
    origin_k,
    origin_h,
    origin_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
):
    """The scores of one head and batch entry after the mod, and the gradient of those before it."""
    i_head = tl.program_id(0)
    place = place_of(positions, i_head // H, i_head % H, Sq, Sk, 0, 0, origin_q, origin_k, origin_h, origin_b, MODE)
    # [M, 1] and [1, N], or [1, M] and [N, 1]: kernels visit tiles both ways.
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    if IS_TRANSPOSED:
        o_m = tl.arange(0, BLOCK_M)[None, :]
        o_n = tl.arange(0, BLOCK_N)[:, None]
    o_tile = (i_head * Sq + o_m) * Sk + o_n
    m_tile = (o_m < Sq) & (o_n < Sk)
    b_s = tl.load(p_s + o_tile, m_tile, other=0.0)
    tl.store(p_out + o_tile, apply_mod(b_s, mod_inputs, place, o_m, o_n, MODE, 0, True), m_tile)
    if HAS_BACKWARD:
        b_ds = tl.load(p_ds + o_tile, m_tile, other=0.0)
        tl.store(p_dx + o_tile, backward_of_mod(b_ds, b_s, mod_inputs, place, o_m, o_n, MODE, 0, True), m_tile)


def run(
    s: torch.Tensor, ds: torch.Tensor, call: Call, *, is_transposed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scores s [B, H, Sq, Sk], fp32, after the call's mod, and the gradient of s if it has a backward."""
    spec, (B, H, Sq, Sk) = call.spec, s.shape
    constants = {"d": 16, "dv": 16, "block_d": 16, "block_dv": 16, "mask_dims": None, "bias_dims": None}
    flags = dict.fromkeys(("has_left", "has_right", "has_origin", "fold_scale", "natural"), False)
    mode = Mode(**constants, **flags, precision="ieee", **mods_of(call))  # type: ignore[arg-type]
    out, dx = torch.empty_like(s), torch.empty_like(s)
    has_backward = mode.mod_backwards[0] is not None
    launch(
        mod_pair_kernel,
        (B * H,),
        s,
        ds,
        out,
        dx,
        (*call.aux, *spec.params),
        Positions(None, None, None),
        H,
        Sq,
        Sk,
        spec.origin_q,
        spec.origin_k,
        spec.origin_head,
        spec.origin_batch,
        BLOCK_M=triton.next_power_of_2(Sq),
        BLOCK_N=triton.next_power_of_2(Sk),
        MODE=mode,
        IS_TRANSPOSED=is_transposed,
        HAS_BACKWARD=has_backward,
        enable_fp_fusion=True,
    )
    return out, dx if has_backward else None
