"""Layer: one process, CPU, no Triton. Attention under autograd and torch.compile: bias gradients, second derivatives.

What the functions compute is test_attention_api.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint

import fusemesh
from fusemesh import attention_backward, attention_forward, flash_attention
from fusemesh.kernels.attention.call import validation
from fusemesh.kernels.attention.call.options import Call, Options
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.dense import ops
from tests.support.attention_inputs import close, qkv


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
class TestBias:
    """The gradient of a bias has the bias's own shape, whatever that is."""

    @pytest.mark.parametrize("shape", [(), (7,), (5, 1), (4, 1, 1), (2, 1, 5, 7), (1, 1, 1, 1), (2, 4, 5, 7)], ids=str)
    def test_shapes(self, backend: str, shape: tuple[int, ...]) -> None:
        q, k, v = qkv(5, 7)
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def call(x: torch.Tensor) -> torch.Tensor:
            return flash_attention(q, k, v, bias=x, backend=backend)

        assert torch.autograd.gradcheck(call, bias, fast_mode=True)
        out, lse = attention_forward(q, k, v, bias=bias)
        do = torch.randn_like(out)
        dbias = attention_backward(do, q, k, v, out, lse, bias=bias, bias_grad=True).dbias
        want = torch.autograd.grad(call(bias), bias, do)[0]
        assert dbias is not None and dbias.shape == want.shape == bias.shape
        close(dbias, want)
        assert attention_backward(do, q, k, v, out, lse, bias=bias)[3] is None

    @pytest.mark.parametrize("dims", [(0,), (0, 1), (2,), (0, 1, 3)], ids=str)
    def test_expanded_dimensions_cost_nothing(self, backend: str, dims: tuple[int, ...]) -> None:
        """expand() gives the same as the small tensor; the gradient of a repeated element is not stored per repeat."""
        q, k, v = qkv(5, 7)
        small = torch.randn([1 if dim in dims else size for dim, size in enumerate((2, 4, 5, 7))], dtype=torch.float64)
        small.requires_grad_()
        expanded = small.expand(2, 4, 5, 7)
        out, want = (flash_attention(q, k, v, bias=x, backend=backend) for x in (expanded, small))
        assert torch.equal(out, want)
        do = torch.randn_like(out)
        close(torch.autograd.grad(out, small, do)[0], torch.autograd.grad(want, small, do)[0])
        call = validation.normalise(q, k, Options(mask=expanded > 0, bias=expanded))
        assert call.bias is not None and call.bias.shape == small.shape
        out, lse = attention_forward(q, k, v, bias=expanded)
        dbias = attention_backward(do, q, k, v, out, lse, bias=expanded, bias_grad=True)[3]
        assert dbias is not None and dbias.shape == small.shape

    def test_fp32_beside_half_precision(self, backend: str) -> None:
        q, k, v = qkv(dtype=torch.bfloat16)
        bias = torch.randn(4, 5, 5, requires_grad=True)
        out = flash_attention(q, k, v, bias=bias, backend=backend)
        (dbias,) = torch.autograd.grad(out.float().sum(), bias)
        assert out.dtype == torch.bfloat16 and dbias.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "torch"])
class TestSecondDerivative:
    def test_gradgradcheck(self, backend: str) -> None:
        q, k, v = qkv(3, 4, dim=3, dim_v=2, requires_grad=True)
        bias = torch.randn(4, 3, 1, dtype=torch.float64, requires_grad=True)
        mask = torch.rand(3, 4) > 0.3
        mask[1] = False

        def call(q, k, v, bias):  # type: ignore[no-untyped-def]
            return flash_attention(q, k, v, bias=bias, mask=mask, backend=backend)

        assert torch.autograd.gradgradcheck(call, (q, k, v, bias), fast_mode=True)

    def test_one_tensor_in_three_roles(self, backend: str) -> None:
        """x attends to itself: its gradient is the sum of three, recorded or not, and so is the second one."""
        x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

        def call(x: torch.Tensor) -> torch.Tensor:
            return flash_attention(x, x, x, backend=backend)

        assert torch.autograd.gradcheck(call, x)
        close(
            torch.autograd.grad(call(x).square().sum(), x, create_graph=True)[0],
            torch.autograd.grad(call(x).square().sum(), x)[0],
        )
        assert torch.autograd.gradgradcheck(call, x)

    def test_recorded_and_plain_backward_agree(self, backend: str) -> None:
        tensors = qkv(requires_grad=True)
        plain, recorded = (
            torch.autograd.grad(
                flash_attention(*tensors, causal=True, backend=backend).sum(), tensors, create_graph=graph
            )
            for graph in (False, True)
        )
        for mine, theirs in zip(plain, recorded, strict=True):
            assert not mine.requires_grad and theirs.requires_grad
            close(mine, theirs)


def test_the_op_with_one_tensor_in_three_roles() -> None:
    """The custom op, whose backward is an op too, on the reference: what fused backends go through."""
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor) -> torch.Tensor:
        values = ops.FIELDS.pack(Call(AttentionSpec(0.5, window_right=0)))
        return torch.ops.fusemesh.attention_forward(x, x, x, *values, "reference")[0]

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


def test_the_op_where_v_alone_has_gradients() -> None:
    """The output is linear in v: its first derivative depends on no tensor with gradients, and the second is none."""
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    values = ops.FIELDS.pack(Call(AttentionSpec(0.5, window_right=0)))
    out = torch.ops.fusemesh.attention_forward(q, k, v, *values, "reference")[0]
    (dv,) = torch.autograd.grad(out.sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(dv.square().sum(), v, allow_unused=True)
    assert second is None or (second == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
class TestLikeAnyOtherFunctionOfTorch:
    def test_outputs_can_be_changed_in_place(self, backend: str) -> None:
        q, k, v = qkv(requires_grad=True)
        out = flash_attention(q, k, v, backend=backend)
        out += 1
        out.sum().backward()
        assert q.grad is not None

    def test_checkpointing_gives_the_same_gradients(self, backend: str) -> None:
        tensors = qkv(requires_grad=True)

        def call(*x: torch.Tensor) -> torch.Tensor:
            return flash_attention(*x, causal=True, backend=backend)

        want = torch.autograd.grad(call(*tensors).square().sum(), tensors)
        again = torch.utils.checkpoint.checkpoint(call, *tensors, use_reentrant=False)
        for mine, theirs in zip(torch.autograd.grad(again.square().sum(), tensors), want, strict=True):
            assert torch.equal(mine, theirs)

    def test_functional_gradients(self, backend: str) -> None:
        q, k, v = qkv(requires_grad=True)
        mine = torch.func.grad(lambda q: flash_attention(q, k.detach(), v.detach(), backend=backend).square().sum())(q)
        close(mine, torch.autograd.grad(flash_attention(q, k, v, backend=backend).square().sum(), q)[0])

    def test_autocast_casts_like_sdpa(self, backend: str) -> None:
        q, k, v = qkv(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = flash_attention(q, k.bfloat16(), v, backend=backend)
            wide = flash_attention(*qkv(), backend=backend)
        assert out.dtype == torch.bfloat16 and wide.dtype == torch.float64
        assert torch.equal(out, flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend))

    @pytest.mark.parametrize("feature", ["nothing", "causal", "bottom_right", "bias", "mask"])
    def test_compiles_as_one_graph(self, backend: str, feature: str) -> None:
        """aot_eager: traced, differentiated and run again, without Inductor's compiler."""
        q, k, v = qkv(5, 7, requires_grad=True)
        options: dict = {
            "causal": {"causal": True, "align": "top_left"},
            "bottom_right": {"causal": True, "align": "bottom_right"},
            "bias": {"bias": torch.randn(4, 1, 7, dtype=torch.float64, requires_grad=True).expand(2, 4, 5, 7)},
            "mask": {"mask": torch.rand(5, 7) > 0.4},
        }.get(feature, {})

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return flash_attention(q, k, v, backend=backend, **options)

        torch._dynamo.reset()
        out = torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v)
        want = call(q, k, v)
        close(out, want)
        do = torch.randn_like(out)
        for mine, theirs in zip(
            torch.autograd.grad(out, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do), strict=True
        ):
            close(mine, theirs)


def test_compiled_for_all_lengths_and_again_for_another_backend() -> None:
    """Sequence lengths cost no compilation; use_backend does, because a compiled choice would go stale."""
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: flash_attention(q, k, v, causal=True), backend=count, fullgraph=True, dynamic=True
    )
    for length in (5, 7, 12, 33):
        tensors = qkv(length, length)
        close(compiled(*tensors), flash_attention(*tensors, causal=True))
    assert len(graphs) == 1
    with fusemesh.use_backend("reference"):
        compiled(*qkv(6, 6))
    assert len(graphs) == 2
    compiled(*qkv(6, 6))
    assert len(graphs) == 2
