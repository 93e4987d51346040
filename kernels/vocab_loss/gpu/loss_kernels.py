"""The Triton kernels of the head's product with the cross entropy. Their launchers are in loss.py.

Both compute tiles of logits z [rows, columns of the vocabulary] by the same code, with fp32 accumulation, and keep
them in registers: the forward leaves three numbers a row, the backward the gradient of z, already in the dtype of the
products that follow. N counts rows, E features, V columns of this rank. No atomics, and addresses are 64-bit. Neither N
nor V is specialised: E alone is a stride.

Sums over lanes are not fused with products (``enable_fp_fusion=False`` at the launch): each lane would round its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...attention.gpu.device.mods import tanh
from ...matmul.gpu.linear_kernels import offsets, step, tile_of_program
from ...runtime.fences import fence_copies


@triton.jit
def _logits(
    p_h,
    p_weight,
    p_bias,
    s_weight,
    o_n,
    o_v,
    N,
    V,
    E,
    scale,
    softcap,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Logits [BLOCK_N, BLOCK_V] of rows ``o_n`` and columns ``o_v``, and the softcap's slope there, 1 without one."""
    o_e = offsets(0, BLOCK_E)
    m_n = (o_n < N)[:, None]
    m_v = (o_v < V)[None, :]
    # [BLOCK_N, BLOCK_E], [BLOCK_E, BLOCK_V]
    p_bh = p_h + o_n[:, None] * E + o_e[None, :]
    p_bw = p_weight + o_e[:, None] * s_weight[1] + o_v[None, :] * s_weight[0]
    # [BLOCK_N, BLOCK_V]
    b_z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for e in range(0, E, BLOCK_E):
        m_e = o_e < E - e
        b_h = tl.load(p_bh, mask=m_n & m_e[None, :], other=0.0)
        b_w = tl.load(p_bw, mask=m_e[:, None] & m_v, other=0.0)
        fence_copies()
        b_z = tl.dot(b_h, b_w, b_z, input_precision=PRECISION)
        p_bh += BLOCK_E
        p_bw += step(BLOCK_E, s_weight[1])
    if p_bias is not None:
        b_z += tl.load(p_bias + o_v[None, :], mask=m_v, other=0.0).to(tl.float32)
    b_z *= scale
    b_slope = 1.0
    if softcap is not None:
        b_t = tanh(b_z / softcap)
        b_z = softcap * b_t
        b_slope = 1.0 - b_t * b_t
    return b_z, b_slope


@triton.jit
def _targets(p_local, o_n, N, V):
    """The targets' columns [BLOCK_N], int32; -1 for rows whose target another rank holds."""
    b_local = tl.load(p_local + o_n, mask=o_n < N, other=-1)
    return tl.where((b_local >= 0) & (b_local < V), b_local, -1).to(tl.int32)


@triton.jit
def _is_target(b_local, o_v):
    """Where a row's target is, [BLOCK_N, BLOCK_V]. 32 bits, since 64 a comparison would spill registers."""
    return o_v.to(tl.int32)[None, :] == b_local[:, None]


@triton.jit(do_not_specialize=["N", "V", "num_tiles"])
def vocab_loss_forward_kernel(
    p_h,
    p_weight,
    p_bias,
    p_local,
    p_largest,
    p_total,
    p_own,
    s_weight,
    N,
    V,
    E,
    num_tiles,
    scale,
    softcap,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of some rows and ``num_tiles`` tiles of columns, a part: the largest logit and the sum of exp(z - largest).

    Parts are [parts, N]; ``p_own`` [N] gets the target's logit from the program whose columns hold the target.
    """
    tiles = tl.cdiv(V, BLOCK_V)
    i_n, i_part = tile_of_program(tl.cdiv(N, BLOCK_N), tl.cdiv(tiles, num_tiles), GROUP)
    o_n = offsets(i_n, BLOCK_N)
    m_n = o_n < N
    first = i_part * num_tiles
    last = tl.minimum(first + num_tiles, tiles)
    # [BLOCK_N]
    b_local = _targets(p_local, o_n, N, V)
    b_largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_N,), tl.float32)
    b_own = tl.zeros((BLOCK_N,), tl.float32)
    for i_v in range(first, last):
        o_v = offsets(i_v, BLOCK_V)
        b_z, _ = _logits(
            p_h, p_weight, p_bias, s_weight, o_n, o_v, N, V, E, scale, softcap, PRECISION, BLOCK_N, BLOCK_V, BLOCK_E
        )
        b_own += tl.sum(tl.where(_is_target(b_local, o_v), b_z, 0.0), 1)
        b_z = tl.where((o_v < V)[None, :], b_z, float("-inf"))
        b_more = tl.maximum(b_largest, tl.max(b_z, 1))
        # Logits may all be -inf so far (a bias that hides columns), and -inf - -inf must not happen.
        b_shift = tl.where(b_more == float("-inf"), 0.0, b_more)
        b_total = b_total * tl.exp(b_largest - b_shift) + tl.sum(tl.exp(b_z - b_shift[:, None]), 1)
        b_largest = b_more
    o_part = tl.cast(i_part, tl.int64) * N + o_n
    tl.store(p_largest + o_part, b_largest, mask=m_n)
    tl.store(p_total + o_part, b_total, mask=m_n)
    m_own = (b_local >= first * BLOCK_V) & (b_local < last * BLOCK_V)
    tl.store(p_own + o_n, b_own, mask=m_n & m_own)


@triton.jit(do_not_specialize=["N", "V", "start"])
def vocab_loss_dz_kernel(
    p_h,
    p_weight,
    p_bias,
    p_local,
    p_rows,
    p_dz,
    p_dbias,
    s_weight,
    width,
    N,
    V,
    E,
    start,
    scale,
    softcap,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dz = (softmax - onehot) * dloss * slope * scale, of columns ``start`` to ``start + width``, none from V on.

    ``p_rows`` [3, N] holds dloss, the largest logit and log(total) of each row; dz is [N, width]. Where ``p_dbias``
    [blocks of rows, width] is given, it gets dz summed over each block of rows.
    """
    i_n, i_v = tile_of_program(tl.cdiv(N, BLOCK_N), tl.cdiv(tl.minimum(width, V - start), BLOCK_V), GROUP)
    o_n = offsets(i_n, BLOCK_N)
    o_c = offsets(i_v, BLOCK_V)
    o_v = start + o_c
    m_n = o_n < N
    m_c = (o_c < width) & (o_v < V)
    b_z, b_slope = _logits(
        p_h, p_weight, p_bias, s_weight, o_n, o_v, N, V, E, scale, softcap, PRECISION, BLOCK_N, BLOCK_V, BLOCK_E
    )
    # [BLOCK_N]; of rows beyond the last one dloss is 0, and so is dz
    b_local = _targets(p_local, o_n, N, V)
    b_dloss = tl.load(p_rows + o_n, mask=m_n, other=0.0)
    b_largest = tl.load(p_rows + N + o_n, mask=m_n, other=float("inf"))
    b_log_total = tl.load(p_rows + 2 * tl.cast(N, tl.int64) + o_n, mask=m_n, other=0.0)
    b_dz = tl.exp(b_z - b_largest[:, None] - b_log_total[:, None])
    b_dz -= tl.where(_is_target(b_local, o_v), 1.0, 0.0)
    b_dz *= (b_dloss * scale)[:, None]
    b_dz *= b_slope
    p_bdz = p_dz + o_n[:, None] * width + o_c[None, :]
    tl.store(p_bdz, b_dz.to(p_dz.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])
    if p_dbias is not None:
        tl.store(p_dbias + tl.cast(i_n, tl.int64) * width + o_c, tl.sum(b_dz, 0), mask=m_c)
