"""Attention, forward and backward: every FuseMesh backend that runs here, and PyTorch's own ops in the same run."""

from __future__ import annotations

from typing import Any

import torch

from fusemesh.peers import AttentionCase

if torch.cuda.is_available():
    CASES = [AttentionCase(4, 16, 16, 4096, 128, causal, torch.bfloat16) for causal in (True, False)] + [
        AttentionCase(4, 64, 8, 4096, 128, True, torch.bfloat16)
    ]
else:
    CASES = [
        AttentionCase(1, 8, 8, 1024, 64, False, torch.float32),
        AttentionCase(1, 8, 8, 1024, 64, True, torch.float32),
        AttentionCase(2, 8, 2, 512, 128, True, torch.float32),
    ]


def test_attention(contest: Any, case: AttentionCase, direction: str, contender: Any) -> None:
    contest(case, direction, contender)
