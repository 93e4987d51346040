"""Calls that reach every Triton kernel, on CPU tensors, for recording and compiling where there is no GPU.

Nothing is computed, and the tensors' memory is never touched. Use within ``launch.intercept``, or hand the callables to
:func:`fusemesh.kernels.aot.compile_launches`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .launch import any_device


def attention_launches(
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: bool = False,
    bias: str | None = None,
    groups: int = 2,
    length: int = 512,
    backward: bool = True,
    softcap: float | None = None,
    alibi: bool = False,
    score_mod: Any = None,
    sinks: bool = False,
    dropout_p: float = 0.0,
) -> Callable[[], None]:
    """``flash_attention`` on the Triton backend: the forward and, unless switched off, the backward.

    Args:
        dtype: of q, k, v.
        head_dim, v_head_dim: D and Dv (default: D).
        causal, window, mask: features of the call.
        bias: the dims, out of BHQK, in which a bias is not of size 1; its gradient is taken, too.
        groups: query heads per key head.
        length: Sq and Sk.
        softcap, alibi, score_mod, sinks, dropout_p: as flash_attention takes them, tensors made here.
    """
    from ..attention.dense.api import flash_attention

    def run() -> None:
        sizes = {"B": 2, "H": 2 * groups, "Q": length, "K": length}
        dv = head_dim if v_head_dim is None else v_head_dim

        def leaf(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, requires_grad=backward)

        q, k, v = leaf(2, 2 * groups, length, head_dim), leaf(2, 2, length, head_dim), leaf(2, 2, length, dv)
        b = None if bias is None else leaf(*(size if letter in bias else 1 for letter, size in sizes.items()))
        s = leaf(2 * groups) if sinks else None
        m = torch.empty(2, 1, length, length, dtype=torch.bool) if mask else None
        with any_device():
            out = flash_attention(
                q,
                k,
                v,
                causal=causal,
                window=window,
                mask=m,
                bias=b,
                softcap=softcap,
                alibi_slopes=torch.empty(2 * groups) if alibi else None,
                score_mod=score_mod,
                sinks=s,
                dropout_p=dropout_p,
                seed=1 if dropout_p else None,
                backend="triton",
            )
            assert isinstance(out, torch.Tensor)
            if backward:
                torch.autograd.grad(out, [x for x in (q, k, v, b, s) if x is not None], torch.empty_like(out))

    return run


def linear_launches(
    dtype: torch.dtype,
    activation: str | None = None,
    *,
    gated: bool = False,
    bias: bool = True,
    rows: int = 4096,
    features: int = 4096,
    backward: bool = True,
) -> Callable[[], None]:
    """``fused_linear`` on the Triton backend: the forward and, unless switched off, every gradient.

    Args:
        dtype: of x and the weights.
        activation, gated, bias: as :func:`fusemesh.fused_linear` takes them.
        rows, features: M, and N = K.
    """
    from ..matmul.api import fused_linear

    def run() -> None:
        def leaf(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, requires_grad=backward)

        x, w = leaf(rows, features), leaf(features, features)
        w_up = leaf(features, features) if gated else None
        b = leaf(features) if bias else None
        with any_device():
            y = fused_linear(x, w, b, activation=activation, w_up=w_up, backend="triton")
            if backward:
                torch.autograd.grad(y, [t for t in (x, w, b, w_up) if t is not None], torch.empty_like(y))

    return run
