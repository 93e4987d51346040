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
    groups: int = 2,
    length: int = 512,
    backward: bool = True,
    **features: Any,
) -> Callable[[], None]:
    """Return a call of ``flash_attention`` on the Triton backend: the forward and, unless switched off, the backward.

    Args:
        dtype: of q, k, v.
        head_dim, v_head_dim: D and Dv (default: D).
        groups: query heads per key head.
        length: Sq and Sk.
        features: options of flash_attention. The tensors among them are made here: ``mask=True``,
            ``alibi_slopes=True``, ``sinks=True``, and ``bias``, which names the dims, out of BHQK, in which it is not
            of size 1; its gradient is taken, too.
    """
    from ..attention.dense.api import flash_attention

    def run() -> None:
        sizes = {"B": 2, "H": 2 * groups, "Q": length, "K": length}
        dv = head_dim if v_head_dim is None else v_head_dim

        def leaf(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, requires_grad=backward)

        q, k, v = leaf(2, 2 * groups, length, head_dim), leaf(2, 2, length, head_dim), leaf(2, 2, length, dv)
        made: dict[str, Callable[[], torch.Tensor]] = {
            "mask": lambda: torch.empty(2, 1, length, length, dtype=torch.bool),
            "bias": lambda: leaf(*(size if letter in features["bias"] else 1 for letter, size in sizes.items())),
            "alibi_slopes": lambda: torch.empty(2 * groups),
            "sinks": lambda: leaf(2 * groups),
        }
        # An empty string is a bias of one number.
        asked: dict[str, Any] = {n: make() for n, make in made.items() if features.get(n) not in (None, False)}
        options = {name: value for name, value in features.items() if name not in made}
        if options.get("dropout_p"):
            options["seed"] = 1
        with any_device():
            out = flash_attention(q, k, v, **options, **asked, backend="triton")
            assert isinstance(out, torch.Tensor)
            if backward:
                leaves = [x for x in (q, k, v, asked.get("bias"), asked.get("sinks")) if x is not None]
                torch.autograd.grad(out, leaves, torch.empty_like(out))

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


def loss_launches(
    dtype: torch.dtype,
    *,
    bias: bool = False,
    softcap: float | None = None,
    rows: int = 256,
    features: int = 1024,
    columns: int = 4096,
    backward: bool = True,
) -> Callable[[], None]:
    """``fused_linear_cross_entropy`` on the Triton backend: the forward and, unless switched off, every gradient.

    Args:
        dtype: of h and the head.
        bias, softcap: of the head.
        rows, features, columns: N, E and V. Tiles do not depend on them, and PyTorch's products of the backward run.
    """
    from ..vocab_loss.linear import fused_linear_cross_entropy

    def run() -> None:
        def leaf(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, requires_grad=backward)

        h, weight, b = leaf(rows, features), leaf(columns, features), leaf(columns) if bias else None
        targets = torch.zeros(rows, dtype=torch.int64)
        with any_device():
            loss = fused_linear_cross_entropy(h, weight, targets, b, softcap=softcap, backend="triton")
            if backward:
                torch.autograd.grad(loss, [x for x in (h, weight, b) if x is not None], torch.empty_like(loss))

    return run
