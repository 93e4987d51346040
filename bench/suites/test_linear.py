"""The linear layer, forward and backward: every FuseMesh backend that runs here, and F.linear in the same run."""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.kernels.measure.cases import LinearCase

if torch.cuda.is_available():
    CASES = [
        LinearCase("bf16", 8192, 4096, 14336, "silu", gated=True),
        LinearCase("bf16", 8192, 2048, 8192, "gelu"),
        LinearCase("bf16", 8192, 8192, 8192),
    ]
else:
    CASES = [
        LinearCase("fp32", 1024, 512, 1408, "silu", gated=True),
        LinearCase("fp32", 1024, 512, 2048, "gelu"),
        LinearCase("fp32", 1024, 1024, 1024),
    ]


def test_linear(contest: Any, case: LinearCase, direction: str, contender: Any) -> None:
    contest(case, direction, contender)
