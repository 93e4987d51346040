"""PyTorch's own ops as contenders, and flash-attn where it is installed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fusemesh.kernels.measure.cases import AttentionCase, LinearCase
from fusemesh.kernels.measure.cases.common import Tensors
from fusemesh.kernels.measure.contest import Contender, TimedCase, our_backends

NAMES = ("sdpa", "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex", "flash-attn", "F.linear")


def contenders(case: TimedCase, device: torch.device | str) -> list[Contender]:
    """Return FuseMesh's backends that compute the case on ``device``, then those of :func:`peers`."""
    return [*our_backends(case, device), *peers(case, device)]


def peers(case: TimedCase, device: torch.device | str) -> list[Contender]:
    """Return the ops that FuseMesh is compared with on the case."""
    if isinstance(case, LinearCase):
        return [Contender("F.linear", False, case.eager_call)]
    # None of them takes fp8, or a bias that has a gradient.
    if not isinstance(case, AttentionCase) or case.dtype == "fp8" or case.bias is not None:
        return []
    if torch.device(device).type != "cuda":
        return [Contender("sdpa", False, _sdpa(case, None))]
    from torch.nn.attention import SDPBackend

    return [
        Contender("sdpa flash", False, _sdpa(case, SDPBackend.FLASH_ATTENTION)),
        Contender("sdpa cudnn", False, _sdpa(case, SDPBackend.CUDNN_ATTENTION)),
        Contender("sdpa efficient", False, _sdpa(case, SDPBackend.EFFICIENT_ATTENTION)),
        Contender("flex", False, _flex(case)),
        *([Contender("flash-attn", False, _flash_attn(case))] if _has_flash_attn() else []),
    ]


def _sdpa(case: AttentionCase, choice: Any) -> Callable[[Tensors], torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    groups = case.H // case.Hkv

    def forward(x: Tensors) -> torch.Tensor:
        k, v, gqa = x["k"], x["v"], groups > 1
        if gqa and choice == SDPBackend.EFFICIENT_ATTENTION:
            # It knows no GQA: repeating the heads is what its user pays, so it is timed.
            k, v, gqa = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), False
        with contextlib.nullcontext() if choice is None else sdpa_kernel(choice):
            return F.scaled_dot_product_attention(x["q"], k, v, is_causal=case.causal, enable_gqa=gqa)

    return forward


def _has_flash_attn() -> bool:
    """Return whether the package of that name loads here; a wheel built for another torch does not."""
    try:
        return hasattr(importlib.import_module("flash_attn"), "flash_attn_func")
    except ImportError:
        return False


def _flash_attn(case: AttentionCase) -> Callable[[Tensors], torch.Tensor]:
    from flash_attn import flash_attn_func

    def forward(x: Tensors) -> torch.Tensor:
        # Its heads stand after positions; the transposed views cost nothing.
        out = flash_attn_func(*(x[name].transpose(1, 2) for name in "qkv"), causal=case.causal)
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2)

    return forward


def _flex(case: AttentionCase) -> Callable[[Tensors], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: list[Any] = []

    def forward(x: Tensors) -> torch.Tensor:
        if not compiled:
            mask = None
            if case.causal:
                mask = create_block_mask(
                    lambda b, h, i_q, i_k: i_q >= i_k, None, None, case.Sq, case.Sk, device=x["q"].device
                )
            compiled.extend((torch.compile(flex_attention, dynamic=False), mask))
        return compiled[0](x["q"], x["k"], x["v"], block_mask=compiled[1], enable_gqa=case.Hkv != case.H)

    return forward
