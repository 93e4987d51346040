"""The linear layer's Triton kernels: forward, dgrad, wgrad. Their launchers are in linear.py.

Each program computes one tile of its result, with fp32 accumulation and no atomics. M counts tokens, N out features, K
in features, in every kernel; the tile dimension that a kernel sums over is the depth of its loop. Addresses are 64-bit.
M is not specialised, so that no number of tokens compiles anew; N and K, properties of the weights, are (Triton then
knows whether rows can be read 16 bytes at a time).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...runtime.fences import LEFT_OUT, fence_copies
from .epilogues import activate, load_scaled


@triton.jit
def tile_of_program(num_rows, num_cols, GROUP: tl.constexpr):
    """(row, column) of this program's tile. Programs that run together share GROUP rows of tiles: the L2 cache's."""
    i_program = tl.program_id(0)
    per_group = GROUP * num_cols
    first = i_program // per_group * GROUP
    size = min(num_rows - first, GROUP)
    within = i_program % per_group
    return first + within % size, within // size


@triton.jit
def offsets(i_tile, BLOCK: tl.constexpr):
    return tl.cast(i_tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def step(BLOCK: tl.constexpr, stride):
    """The distance between two steps of a loop, in elements, 64-bit whatever the stride came as."""
    return tl.cast(BLOCK, tl.int64) * stride


@triton.jit
def _finished(b_acc, WAITS: tl.constexpr):
    """The accumulator, of which no product is under way any more where WAITS; costs no instruction but the wait.

    A product whose left operand is computed in registers reads them while it runs. Triton lets the last one of a round
    run on into the next round, which computes its operand into the same registers; PTX calls that undefined. An empty
    piece of assembly that takes the accumulator makes Triton wait for it.
    """
    if WAITS:
        b_acc = tl.inline_asm_elementwise("", "=r,0", [b_acc], dtype=tl.float32, is_pure=True, pack=1)
    return b_acc


@triton.jit(do_not_specialize=["M"])
def linear_forward_kernel(
    p_x,
    p_w,
    p_bias,
    p_w_up,
    p_y,
    p_slope,
    p_slope_up,
    s_x,
    s_w,
    s_w_up,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = act(z), gated act(z) * u, with z = x w^T + bias and u = x w_up^T.

    Where their pointers are given, slope = dy/dz (act'(z), gated u * act'(z)) and slope_up = dy/du (act(z)) are stored.
    """
    i_m, i_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    o_m = offsets(i_m, BLOCK_M)
    o_n = offsets(i_n, BLOCK_N)
    o_k = offsets(0, BLOCK_K)
    m_m = (o_m < M)[:, None]
    m_n = (o_n < N)[None, :]

    # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
    p_bx = p_x + o_m[:, None] * s_x[0] + o_k[None, :] * s_x[1]
    p_bw = p_w + o_k[:, None] * s_w[1] + o_n[None, :] * s_w[0]
    # [BLOCK_M, BLOCK_N]
    b_z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if p_w_up is not None:
        p_bw_up = p_w_up + o_k[:, None] * s_w_up[1] + o_n[None, :] * s_w_up[0]
        b_u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        m_w = m_k[:, None] & m_n
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        b_x = tl.load(p_bx, mask=m_m & m_k[None, :], other=0.0)
        b_w = tl.load(p_bw, mask=m_w, other=0.0)
        fence_copies()
        b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
        if p_w_up is not None:
            b_w_up = tl.load(p_bw_up, mask=m_w, other=0.0)
            fence_copies()
            b_u = tl.dot(b_x, b_w_up, b_u, input_precision=PRECISION)
            p_bw_up += step(BLOCK_K, s_w_up[1])
        p_bx += step(BLOCK_K, s_x[1])
        p_bw += step(BLOCK_K, s_w[1])

    if p_bias is not None:
        b_z += tl.load(p_bias + o_n[None, :], mask=m_n, other=0.0).to(tl.float32)
    o_y = o_m[:, None] * N + o_n[None, :]
    m_y = m_m & m_n
    if ACTIVATION is None:
        tl.store(p_y + o_y, b_z.to(p_y.dtype.element_ty), mask=m_y)
    else:
        b_y, b_slope = activate(b_z, ACTIVATION)
        if p_slope_up is not None:
            tl.store(p_slope_up + o_y, b_y.to(p_slope_up.dtype.element_ty), mask=m_y)
        if p_w_up is not None:
            b_y *= b_u
        tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)
        if p_slope is not None:
            if p_w_up is not None:
                b_slope *= b_u
            tl.store(p_slope + o_y, b_slope.to(p_slope.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["M"])
def linear_dgrad_kernel(
    p_dy,
    p_slope,
    p_slope_up,
    p_w,
    p_w_up,
    p_dx,
    s_dy,
    s_slope,
    s_slope_up,
    s_w,
    s_w_up,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx = (dy * slope) w + (dy * slope_up) w_up; without slopes dy w."""
    i_m, i_k = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    o_m = offsets(i_m, BLOCK_M)
    o_n = offsets(0, BLOCK_N)
    o_k = offsets(i_k, BLOCK_K)
    m_m = (o_m < M)[:, None]
    m_k = (o_k < K)[None, :]

    # [BLOCK_M, BLOCK_N], [BLOCK_N, BLOCK_K]
    p_bdy = p_dy + o_m[:, None] * s_dy[0] + o_n[None, :] * s_dy[1]
    p_bw = p_w + o_n[:, None] * s_w[0] + o_k[None, :] * s_w[1]
    p_bslope = p_bdy
    if p_slope is not None:
        p_bslope = p_slope + o_m[:, None] * s_slope[0] + o_n[None, :] * s_slope[1]
    if p_w_up is not None:
        p_bslope_up = p_slope_up + o_m[:, None] * s_slope_up[0] + o_n[None, :] * s_slope_up[1]
        p_bw_up = p_w_up + o_n[:, None] * s_w_up[0] + o_k[None, :] * s_w_up[1]

    # [BLOCK_M, BLOCK_K]
    b_dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in range(0, N, BLOCK_N):
        m_n = o_n < N - n
        m_dy = m_m & m_n[None, :]
        m_w = m_n[:, None] & m_k
        # [BLOCK_M, BLOCK_N], [BLOCK_N, BLOCK_K]
        b_dz = load_scaled(p_bdy, p_bslope, m_dy, p_slope is not None)
        b_w = tl.load(p_bw, mask=m_w, other=0.0)
        if LEFT_OUT and p_w_up is not None:
            # Behind a fence dy would be copied once more.
            b_du = load_scaled(p_bdy, p_bslope_up, m_dy, True)
        fence_copies()
        b_dx = tl.dot(b_dz.to(b_w.dtype), b_w, b_dx, input_precision=PRECISION)
        if p_w_up is not None:
            if not LEFT_OUT:
                b_du = load_scaled(p_bdy, p_bslope_up, m_dy, True)
            b_w_up = tl.load(p_bw_up, mask=m_w, other=0.0)
            fence_copies()
            b_dx = tl.dot(b_du.to(b_w_up.dtype), b_w_up, b_dx, input_precision=PRECISION)
            p_bslope_up += step(BLOCK_N, s_slope_up[1])
            p_bw_up += step(BLOCK_N, s_w_up[0])
        b_dx = _finished(b_dx, WAITS)
        p_bdy += step(BLOCK_N, s_dy[1])
        if p_slope is not None:
            p_bslope += step(BLOCK_N, s_slope[1])
        p_bw += step(BLOCK_N, s_w[0])

    tl.store(p_dx + o_m[:, None] * K + o_k[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_m & m_k)


@triton.jit(do_not_specialize=["M"])
def linear_wgrad_kernel(
    p_dy,
    p_slope,
    p_slope_up,
    p_x,
    p_dw,
    p_dw_up,
    p_dbias,
    s_dy,
    s_slope,
    s_slope_up,
    s_x,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dw = dz^T x, dw_up = du^T x, dbias = dz summed over tokens, each where its pointer is given.

    dz = dy * slope, or dy where there is no slope; du = dy * slope_up.
    """
    i_n, i_k = tile_of_program(tl.cdiv(N, BLOCK_N), tl.maximum(tl.cdiv(K, BLOCK_K), 1), GROUP)
    o_m = offsets(0, BLOCK_M)
    o_n = offsets(i_n, BLOCK_N)
    o_k = offsets(i_k, BLOCK_K)
    m_n = (o_n < N)[None, :]
    m_k = (o_k < K)[None, :]

    # [BLOCK_M, BLOCK_N], [BLOCK_M, BLOCK_K]
    p_bdy = p_dy + o_m[:, None] * s_dy[0] + o_n[None, :] * s_dy[1]
    p_bslope = p_bdy
    if p_slope is not None:
        p_bslope = p_slope + o_m[:, None] * s_slope[0] + o_n[None, :] * s_slope[1]
    if p_dw_up is not None:
        p_bslope_up = p_slope_up + o_m[:, None] * s_slope_up[0] + o_n[None, :] * s_slope_up[1]
        # [BLOCK_N, BLOCK_K]
        b_dw_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if p_x is not None:
        p_bx = p_x + o_m[:, None] * s_x[0] + o_k[None, :] * s_x[1]
    # [BLOCK_N, BLOCK_K], [BLOCK_N]
    b_dw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    b_dbias = tl.zeros((BLOCK_N,), tl.float32)

    for m in range(0, M, BLOCK_M):
        m_m = (o_m < M - m)[:, None]
        if p_x is not None:
            # [BLOCK_M, BLOCK_K]
            b_x = tl.load(p_bx, mask=m_m & m_k, other=0.0)
            p_bx += step(BLOCK_M, s_x[0])
        if p_dw is not None or p_dbias is not None:
            # [BLOCK_M, BLOCK_N]
            b_dz = load_scaled(p_bdy, p_bslope, m_m & m_n, p_slope is not None)
            if p_dbias is not None:  # noqa: SIM102 (decided at compile time, the inner one at run time)
                # Every column of tiles has these dz; the first one sums them.
                if i_k == 0:
                    b_dbias += tl.sum(b_dz.to(tl.float32), 0)
            if LEFT_OUT and p_dw_up is not None:
                b_du = load_scaled(p_bdy, p_bslope_up, m_m & m_n, True)
            if p_dw is not None:
                fence_copies()
                b_dw = tl.dot(tl.trans(b_dz.to(b_x.dtype)), b_x, b_dw, input_precision=PRECISION)
                b_dw = _finished(b_dw, WAITS)
        if p_dw_up is not None:
            if not LEFT_OUT or (p_dw is None and p_dbias is None):
                b_du = load_scaled(p_bdy, p_bslope_up, m_m & m_n, True)
            fence_copies()
            b_dw_up = tl.dot(tl.trans(b_du.to(b_x.dtype)), b_x, b_dw_up, input_precision=PRECISION)
            b_dw_up = _finished(b_dw_up, WAITS)
            p_bslope_up += step(BLOCK_M, s_slope_up[0])
        p_bdy += step(BLOCK_M, s_dy[0])
        if p_slope is not None:
            p_bslope += step(BLOCK_M, s_slope[0])

    o_dw = o_n[:, None] * K + o_k[None, :]
    m_dw = (o_n < N)[:, None] & m_k
    if p_dw is not None:
        tl.store(p_dw + o_dw, b_dw.to(p_dw.dtype.element_ty), mask=m_dw)
    if p_dw_up is not None:
        tl.store(p_dw_up + o_dw, b_dw_up.to(p_dw_up.dtype.element_ty), mask=m_dw)
    if p_dbias is not None:  # noqa: SIM102
        if i_k == 0:
            tl.store(p_dbias + o_n, b_dbias.to(p_dbias.dtype.element_ty), mask=o_n < N)
