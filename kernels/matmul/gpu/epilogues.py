"""Activation functions and their derivatives as small Triton functions, fp32 block to fp32 blocks.

The formulas are those of ``reference.ACTIVATIONS``; where one is written in another way, the comment gives the
identity.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(b_z):
    """(z Phi(z), Phi(z) + z phi(z)), with the normal distribution's Phi and phi."""
    b_cdf = 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476))
    return b_z * b_cdf, b_cdf + b_z * 0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)


@triton.jit
def gelu_tanh(b_z):
    """z (1 + tanh u) / 2 = z sigmoid(2u), with u = sqrt(2/pi) (z + 0.044715 z^3); and its derivative."""
    b_square = b_z * b_z
    b_s = tl.sigmoid(1.5957691216057308 * b_z * (1.0 + 0.044715 * b_square))
    b_inner = 1.5957691216057308 * (1.0 + 0.134145 * b_square)
    return b_z * b_s, b_s + b_z * b_s * (1.0 - b_s) * b_inner


@triton.jit
def silu(b_z):
    """(z s, s + z s (1 - s)) with s = sigmoid(z)."""
    b_s = tl.sigmoid(b_z)
    b_y = b_z * b_s
    return b_y, b_s + b_y * (1.0 - b_s)


@triton.jit
def relu2(b_z):
    """(relu(z)^2, 2 relu(z)). Not by tl.maximum, which would turn NaN into 0."""
    b_relu = tl.where(b_z <= 0.0, 0.0, b_z)
    return b_relu * b_relu, 2.0 * b_relu


@triton.jit
def activate(b_z, ACTIVATION: tl.constexpr):
    """(act(z), act'(z)). What a caller leaves unused, the compiler removes."""
    if ACTIVATION == "gelu":
        return gelu(b_z)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh(b_z)
    elif ACTIVATION == "silu":
        return silu(b_z)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        return relu2(b_z)


@triton.jit
def load_scaled(p_dy, p_slope, mask, HAS_SLOPE: tl.constexpr):
    """The prologue of the backward kernels: dy times the slope saved by forward, fp32; without one dy as it is."""
    b_dy = tl.load(p_dy, mask=mask, other=0.0)
    if HAS_SLOPE:
        return b_dy.to(tl.float32) * tl.load(p_slope, mask=mask, other=0.0).to(tl.float32)
    else:
        return b_dy
