"""The linear layer."""

from __future__ import annotations

import functools
from typing import Any

import torch

import fusemesh
from bench.bits.draw import DTYPES, Draw, Tensors, add, with_gradients, with_second_gradients

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "relu2")


def linear(
    draw: Draw,
    backend: str,
    *,
    dtype: torch.dtype,
    activation: str | None = None,
    bias: bool = False,
    gated: bool = False,
    shape: tuple[int, ...] = (3, 13),
    layout: str = "plain",
    needs: tuple[str, ...] = ("x", "w", "bias", "w_up"),
    second: bool = False,
) -> Tensors:
    """fused_linear and its gradients."""
    K, N = 40, 72
    leaves = {"x": draw.leaf(*shape, K, dtype=dtype), "w": draw.leaf(N, K, dtype=dtype, size=K**-0.5)}
    x, w = leaves["x"], leaves["w"]
    if layout == "transposed":
        leaves["x"], leaves["w"] = draw.leaf(K, 39, dtype=dtype), draw.leaf(K, N, dtype=dtype, size=K**-0.5)
        x, w = leaves["x"].t(), leaves["w"].t()
    elif layout == "strided":
        leaves["x"] = draw.leaf(*shape, 2 * K, dtype=dtype)
        x = leaves["x"][..., ::2]
    elif layout == "expanded":
        leaves["x"] = draw.leaf(1, shape[-1], K, dtype=dtype)
        x = leaves["x"].expand(*shape, K)
    if bias:
        leaves["bias"] = draw.leaf(N, dtype=dtype)
    if gated:
        leaves["w_up"] = draw.leaf(N, K, dtype=dtype, size=K**-0.5)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needs)
    if not needs:
        x, w = x.detach(), w.detach()
    y = fusemesh.fused_linear(x, w, leaves.get("bias"), activation=activation, w_up=leaves.get("w_up"), backend=backend)
    if not needs:
        return {"y": y}
    return (with_second_gradients if second else with_gradients)(draw, {"y": y}, leaves)


def add_linear() -> None:
    """The linear layer with every epilogue."""
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            for bias in (False, True):
                for gated in (False, True) if activation else (False,):
                    words = [activation or "plain", *(["bias"] if bias else []), *(["gated"] if gated else [])]
                    run = functools.partial(linear, dtype=DTYPES[dtype], activation=activation, bias=bias, gated=gated)
                    add(f"linear/{'_'.join(words)}/{dtype}", run)
    others: dict[str, dict[str, Any]] = {
        "vector": {"shape": (), "activation": "silu", "gated": True},
        "rows": {"shape": (70,), "bias": True},
        "no_rows": {"shape": (0,), "bias": True, "activation": "gelu"},
        "transposed": {"layout": "transposed", "activation": "gelu_tanh", "bias": True},
        "strided": {"layout": "strided", "activation": "relu2"},
        "expanded": {"layout": "expanded", "activation": "silu", "gated": True, "bias": True},
        "forward_alone": {"needs": (), "activation": "gelu"},
        "x_alone": {"needs": ("x",), "activation": "silu", "gated": True},
        "weights_alone": {"needs": ("w", "w_up"), "activation": "silu", "gated": True, "bias": True},
        "bias_alone": {"needs": ("bias",), "activation": "gelu", "bias": True},
    }
    for name, changed in others.items():
        for dtype in ("fp32", "bf16"):
            add(f"linear/{name}/{dtype}", functools.partial(linear, dtype=DTYPES[dtype], **changed))
    # The Triton backend has no second derivatives.
    twice = functools.partial(linear, dtype=torch.float32, activation="silu", gated=True, bias=True, second=True)
    add("linear/second_gradients/fp32", twice, ("reference", "torch", "cpu", "auto"))
