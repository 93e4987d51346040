"""Layer: compiled kernels in the emulator. Products whose left operand is computed in registers, round after round.

Up to 3.7 Triton lets the last product of a round run on into the next, which computes its operand into the same
registers; PTX calls that undefined. The kernels wait where that can be (linear_kernels.py, ``_finished``).
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import fusemesh
from fusemesh.kernels.emulator import Hazard, emulate
from fusemesh.kernels.matmul.gpu import linear
from fusemesh.kernels.runtime.fences import VERSION

pytestmark = pytest.mark.aot


def gradients(is_gated: bool) -> None:
    """The gradients of a layer with an activation; every loop has two rounds at least, and rows of whole 16 bytes."""
    x, w, w_up = (torch.randn(128, 192, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with emulate("sm_90"):
        y = fusemesh.fused_linear(x, w, activation="silu", w_up=w_up if is_gated else None, backend="triton")
        torch.autograd.grad(y, [x, w], torch.randn_like(y))


@pytest.mark.parametrize("is_gated", [False, True])
def test_registers_of_a_product_under_way_are_left_alone(is_gated: bool) -> None:
    gradients(is_gated)


def test_without_the_wait_they_are_not_up_to_triton_3_7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_waits", lambda target, has_prologue: False)
    hazard = pytest.raises(Hazard, match="which a wgmma under way uses")
    with hazard if VERSION < (3, 8) else contextlib.nullcontext():
        gradients(False)
