"""The linear layer, forward and backward: every FuseMesh backend that runs here, and F.linear in the same run."""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.peers import LinearCase

if torch.cuda.is_available():
    CASES = [
        LinearCase(8192, 4096, 14336, "silu", True, torch.bfloat16),
        LinearCase(8192, 2048, 8192, "gelu", False, torch.bfloat16),
        LinearCase(8192, 8192, 8192, None, False, torch.bfloat16),
    ]
else:
    CASES = [
        LinearCase(1024, 512, 1408, "silu", True, torch.float32),
        LinearCase(1024, 512, 2048, "gelu", False, torch.float32),
        LinearCase(1024, 1024, 1024, None, False, torch.float32),
    ]


def test_linear(contest: Any, case: LinearCase, direction: str, contender: Any) -> None:
    contest(case, direction, contender)
