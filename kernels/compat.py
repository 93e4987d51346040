"""Every name of torch and triton that floor 1 uses and that their documentation does not promise (leaf).

Each has its reason here, and a test in tests/kernels/test_compat.py that says by name when it is gone. Tried with torch
2.13.0 and triton 3.7.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# PyTorch's kernel itself, which F.scaled_dot_product_attention is a name for: fusemesh.accelerate() gives that name to a
# function that may end up here.
scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention


def assume_constant_result(function: Callable[..., Any]) -> None:
    """Let torch.compile call ``function`` once and take its result as a constant.

    torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo to do so: 2 s of every process.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
