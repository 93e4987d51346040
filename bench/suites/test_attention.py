"""Attention, forward and backward: every FuseMesh backend that runs here, and PyTorch's own ops in the same run."""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.kernels.measure.cases import AttentionCase, self_attention

if torch.cuda.is_available():
    CASES = [
        *(self_attention("bf16", 4, 16, 16, 4096, 128, causal) for causal in (True, False)),
        self_attention("bf16", 4, 64, 8, 4096, 128, causal=True),
    ]
else:
    CASES = [
        self_attention("fp32", 1, 8, 8, 1024, 64, causal=False),
        self_attention("fp32", 1, 8, 8, 1024, 64, causal=True),
        self_attention("fp32", 2, 8, 2, 512, 128, causal=True),
    ]


def test_attention(contest: Any, case: AttentionCase, direction: str, contender: Any) -> None:
    contest(case, direction, contender)
