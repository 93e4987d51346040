"""Layer: one process, Triton's interpreter. Attention's custom ops: schema, fakes, autograd, torch.compile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusemesh.kernels.attention.dense import ops
from fusemesh.kernels.attention.dense.api import flash_attention
from fusemesh.kernels.measure.cases import AttentionCase

pytestmark = pytest.mark.interpreter

CASES = {
    "plain": AttentionCase(Sq=5, Sk=7),
    "gqa": AttentionCase(dtype="bf16", H=4, Hkv=2, Sq=5, Sk=7, Dv=24, layout="bshd"),
    "mask_and_bias": AttentionCase(Sq=5, Sk=7, mask="n", bias="hmn", causal=True, device_origin=(40, 38, 3, 5)),
    "all": AttentionCase(
        Sq=5, Sk=7, bias="mn", softcap=3.0, alibi="h", mod=True, sinks=True, dropout=0.2, window=(3, None)
    ),
}


def arguments(case: AttentionCase, *, requires_grad: bool) -> tuple[Any, ...]:
    """Those of attention_forward."""
    x = case.inputs()
    q, k, v = (x[name].requires_grad_(requires_grad) for name in "qkv")
    for name in ("bias", "sinks"):
        if x[name] is not None:
            x[name].requires_grad_(requires_grad)
    return q, k, v, *ops.FIELDS.pack(case.call(x)), "triton"


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_forward(name: str, requires_grad: bool) -> None:
    op = torch.ops.fusemesh.attention_forward.default
    torch.library.opcheck(op, arguments(CASES[name], requires_grad=requires_grad), {"keep_rest": requires_grad})


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_backward(name: str, with_dlse: bool) -> None:
    q, k, v, *values, backend = arguments(CASES[name], requires_grad=False)
    out, lse, rest = torch.ops.fusemesh.attention_forward(q, k, v, *values, backend, keep_rest=True)
    assert (rest.numel() > 0) == (q.dtype == torch.bfloat16)
    out_rest = rest if rest.numel() else None
    do, dlse = torch.randn_like(out), torch.randn_like(lse) if with_dlse else None
    bias_grad = CASES[name].bias is not None
    inputs = (do, q, k, v, out, lse, dlse, out_rest, *values, bias_grad, False, backend)
    torch.library.opcheck(torch.ops.fusemesh.attention_backward.default, inputs)


def test_lengths_and_positions_cost_no_compilation() -> None:
    """Compiled once for one length and once for all others, forward and backward; seeds and origins are numbers too."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, sinks: torch.Tensor) -> Any:
        return flash_attention(
            q, k, v, causal=True, align="bottom_right", alibi_slopes=slopes, softcap=5.0, sinks=sinks, backend="triton"
        )

    for Sq, Sk in ((5, 7), (9, 20), (17, 17), (2, 33), (30, 31)):
        x = AttentionCase(Sq=Sq, Sk=Sk).inputs()
        q, k, v = (x[name].requires_grad_() for name in "qkv")
        slopes, sinks = torch.tensor([0.1, 0.2]), torch.zeros(2, requires_grad=True)
        compiled = call(q, k, v, slopes, sinks)
        plain = flash_attention(
            q, k, v, causal=True, align="bottom_right", alibi_slopes=slopes, softcap=5.0, sinks=sinks, backend="triton"
        )
        assert torch.equal(compiled, plain)
        leaves = (q, k, v, sinks)
        for mine, theirs in zip(
            torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True
        ):
            assert torch.equal(mine, theirs)
    assert counter.frame_count <= 2


def test_checkpointing_and_double_backward_with_every_feature() -> None:
    """Recomputed in the backward, dropout's elements are the same ones; second derivatives are the reference's."""
    from torch.utils.checkpoint import checkpoint

    case = CASES["all"]
    x = case.inputs()
    mod = case.mods(x)[-1]
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "bias", "sinks")]

    def call(q: Any, k: Any, v: Any, bias: Any, sinks: Any, backend: str = "triton") -> torch.Tensor:
        options = {"window": (3, None), "align": "top_left", "dropout_p": 0.2, "seed": 5, "softcap": 3.0}
        out = flash_attention(q, k, v, bias=bias, sinks=sinks, score_mod=mod, backend=backend, **options)
        assert isinstance(out, torch.Tensor)
        return out

    plain = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    second = []
    for backend in ("triton", "reference"):
        first = torch.autograd.grad(call(*leaves, backend).square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for fused, exact in zip(*second, strict=True):
        scale = exact.abs().max().item()
        assert math.isfinite(scale) and (fused - exact).abs().max() <= 2e-5 * scale
