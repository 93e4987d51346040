"""Floor 1: gradients of a score mod's tensors (``aux_grad=True``): right, or refused by name; never silently absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.dense.api import flash_attention
from fusemesh.kernels.attention.varlen.api import flash_attention_varlen

B, H, S, D = 2, 4, 9, 16
CU = torch.tensor([0, S, 2 * S])


@triton.jit
def _head_shift(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_s * tl.load(aux[0] + i_h)


@triton.jit
def _head_shift_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_ds * tl.load(aux[0] + i_h)


def _by_formula(s: torch.Tensor, i_b: Any, i_h: Any, i_q: Any, i_k: Any, factors: torch.Tensor) -> torch.Tensor:
    return s * factors.to(s.dtype)[i_h.flatten()][:, None, None]


FACTOR_OF_HEADS = score_mods.register_score_mod(
    score_mods.ScoreMod("aux_gradients", _head_shift, _head_shift_backward, _by_formula, num_aux=1, aux_grad=True)
)


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v [B, H, S, D] and the factors of the heads, which all require gradients."""
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(B, H, S, D, generator=generator) for _ in range(3)]
    return [x.to(dtype).requires_grad_() for x in (*tensors, torch.rand(H, generator=generator) + 0.5)]


def by_autograd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    s = D**-0.5 * (q @ k.mT) * factors[:, None, None]
    return torch.softmax(s, -1) @ v


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factors: torch.Tensor, backend: str) -> Any:
    return flash_attention(q, k, v, score_mod=FACTOR_OF_HEADS(factors), backend=backend)


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factors: torch.Tensor, backend: str) -> Any:
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    mod = FACTOR_OF_HEADS(factors)
    out = flash_attention_varlen(*rows, CU, CU, S, S, align="top_left", score_mod=mod, backend=backend)
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (B, S)).transpose(1, 2)


CALLS = {"dense": dense, "packed": packed}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CALLS)
def test_the_reference_computes_them(name: str, compiled: bool) -> None:
    call: Callable[..., Any] = CALLS[name]
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    want = torch.autograd.grad(by_autograd(*tensors).square().sum(), tensors)
    got = torch.autograd.grad(call(*tensors, "reference").square().sum(), tensors)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_auto_gives_them_too(name: str) -> None:
    tensors = inputs(torch.float32)
    want = torch.autograd.grad(by_autograd(*tensors).square().sum(), tensors)
    got = torch.autograd.grad(CALLS[name](*tensors, "auto").square().sum(), tensors)
    torch.testing.assert_close(got[3], want[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_the_engine_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=r"^score_mod: expected softcap and alibi_slopes alone for backend='cpu'"):
        CALLS[name](*inputs(torch.float32), "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CALLS)
def test_triton_refuses_them_and_computes_without(name: str) -> None:
    tensors = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"^score_mod: expected aux tensors without gradient for backend='triton'"):
        CALLS[name](*tensors, "triton")
    tensors[3] = tensors[3].detach()
    want = torch.autograd.grad(by_autograd(*tensors).square().sum(), tensors[:3])
    got = torch.autograd.grad(CALLS[name](*tensors, "triton").square().sum(), tensors[:3])
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        CALLS[name](*inputs(torch.float32), "triton")


def test_second_derivatives_of_packed_calls_reach_them() -> None:
    """Through the op, as a compiled graph calls it: its backward is an op with a gradient of its own."""
    from fusemesh.kernels.attention.call.options import Call
    from fusemesh.kernels.attention.call.packed import Packed
    from fusemesh.kernels.attention.call.spec import AttentionSpec
    from fusemesh.kernels.attention.varlen.ops import FIELDS

    q, k, v, factors = inputs()
    rows = [x.detach().transpose(1, 2).flatten(0, 1)[:, :, :4].requires_grad_() for x in (q, k, v)]
    spec = AttentionSpec(0.5, mods=("aux_gradients",))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        values = FIELDS.pack(Call(spec, aux=(factors,), packed=Packed(CU, CU, S, S, False)))
        return torch.ops.fusemesh.attention_varlen_forward(q, k, v, *values, "reference")[0]

    assert torch.autograd.gradcheck(call, (*rows, factors), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (*rows, factors), fast_mode=True, atol=1e-4)
