"""Layer: one process, Triton's interpreter. The linear layer as torch ops: schema, fakes, autograd, torch.compile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fusemesh.kernels import backends
from fusemesh.kernels.matmul import ops
from fusemesh.kernels.matmul.api import fused_linear
from fusemesh.kernels.runtime import launch

pytestmark = pytest.mark.interpreter

M, N, K = 6, 5, 7
NAMES = ("x", "w", "bias", "w_up")


def make(requires_grad: tuple[str, ...] = NAMES, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, M // 2, K), "w": (N, K), "bias": (N,), "w_up": (N, K)}
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(name in requires_grad)
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("activation, gated", [(None, False), ("gelu", False), ("silu", True)])
def test_opcheck_of_forward(activation: str | None, gated: bool, dtype: torch.dtype) -> None:
    x, w, bias, w_up = make(dtype=dtype)
    args = (x, w, bias, w_up if gated else None, activation, activation is not None, gated, "triton")
    torch.library.opcheck(ops.linear_forward, args, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wanted", [(True,) * 4, (True, False, False, False), (False, True, True, False)], ids=str)
def test_opcheck_of_backward(wanted: tuple[bool, ...]) -> None:
    x, w, _, w_up = make(())
    dy, slope, slope_up = torch.randn(3, 2, M // 2, N)
    torch.library.opcheck(ops.linear_backward, (dy, x, w, w_up, slope, slope_up, *wanted, "triton"))


def test_ops_refuse_other_backends() -> None:
    with pytest.raises(ValueError, match="backend: expected one whose linear layer is a kernel, received 'torch'"):
        ops.linear_forward(*make(()), "silu", False, False, "torch")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    torch._dynamo.reset()

    def step(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor:
        return fused_linear(x, w, bias, activation="silu", w_up=w_up, backend="triton").square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (2, 3, 4):
        results = []
        for call in (step, compiled):
            _, w, bias, w_up = make()
            x = torch.linspace(-1, 1, rows * 3 * K).view(rows, 3, K).requires_grad_()
            backends.reset_call_counts()
            loss = call(x, w, bias, w_up)
            results.append([loss, *torch.autograd.grad(loss, (x, w, bias, w_up))])
            assert backends.call_counts() == {("linear_forward", "triton"): 1, ("linear_backward", "triton"): 1}
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "requires_grad", [s for r in range(1, 5) for s in itertools.combinations(NAMES, r)], ids="+".join
)
def test_only_what_is_asked_for_is_saved_and_computed(requires_grad: tuple[str, ...]) -> None:
    tensors = make(requires_grad)
    everything = make()
    y = fused_linear(*everything[:3], activation="gelu", w_up=everything[3], backend="reference")
    expected = torch.autograd.grad(y.sum(), everything)
    saved: list[torch.Tensor] = []
    kernels: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = fused_linear(*tensors[:3], activation="gelu", w_up=tensors[3], backend="triton")
    wanted = [t for t in tensors if t.requires_grad]

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kernels.append(kernel.__name__)
        kernel[grid](*args, **kwargs)

    with launch.intercept(record):
        grads = torch.autograd.grad(y.sum(), wanted)
    exact = [gradient for gradient, tensor in zip(expected, tensors, strict=True) if tensor.requires_grad]
    torch.testing.assert_close(list(grads), exact)
    asked = set(requires_grad)
    pointers = [t.data_ptr() for t in saved]
    x, w, _, w_up = tensors
    assert (x.data_ptr() in pointers) == bool(asked & {"w", "w_up"})
    assert (w.data_ptr() in pointers) == (w_up.data_ptr() in pointers) == ("x" in asked)
    slopes = bool(asked & {"x", "w", "bias"}) + bool(asked & {"x", "w_up"})
    assert sum(t.shape == y.shape for t in saved) == slopes
    assert len(kernels) == ("x" in asked) + bool(asked - {"x"})
    assert ("linear_dgrad_kernel" in kernels) == ("x" in asked)


def test_nothing_is_saved_beside_the_inputs_without_an_activation() -> None:
    x, w, bias, _ = make()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        fused_linear(x, w, bias, backend="triton")
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), w.data_ptr()}


def test_nothing_is_stored_without_gradients() -> None:
    x, w, bias, w_up = make()
    stored: list[Any] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        stored.append((named["p_slope"], named["p_slope_up"]))

    with launch.intercept(record):
        with torch.no_grad():
            fused_linear(x, w, bias, activation="silu", w_up=w_up, backend="triton")
        fused_linear(*make(())[:3], activation="silu", backend="triton")
    assert stored == [(None, None), (None, None)]


def test_bounded_slopes_are_kept_finer_than_16_bit_inputs() -> None:
    finer = {torch.float32: torch.float32, torch.float16: torch.float32, torch.bfloat16: torch.float16}
    x, w, bias, w_up = make(())
    for dtype, activation, gated in itertools.product(finer, ("gelu", "gelu_tanh", "silu", "relu2"), (False, True)):
        expected = finer[dtype] if activation != "relu2" and not gated else dtype
        assert ops.slope_dtype(dtype, activation, gated) == expected
        args = [t.to(dtype) for t in (x, w, bias)]
        up = w_up.to(dtype) if gated else None
        y, slope, slope_up = ops.linear_forward(*args, up, activation, True, gated, "triton")
        assert (y.dtype, slope.dtype, slope_up.dtype) == (dtype, expected, dtype)


def test_a_forward_that_saved_nothing_is_refused_by_backward() -> None:
    x, w, bias, w_up = make()
    y, _, _ = ops.linear_forward(x, w, bias, w_up, "silu", False, False, "triton")
    with pytest.raises(RuntimeError, match="save_slope"):
        y.sum().backward()


def test_second_derivatives_are_refused() -> None:
    x, w, bias, _ = make()
    y = fused_linear(x, w, bias, activation="silu", backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives .* use backend='reference' or backend='torch'"):
        dx.sum().backward()


@pytest.mark.parametrize("trained", ["xwbu", "x", "wb", "xu"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_second_derivatives_under_auto_are_the_references(activation: str | None, trained: str) -> None:
    """``auto`` never raises where the reference can compute; what is not trained is kept for them all the same."""
    found = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        named = dict(zip("xwbu", make(), strict=True))
        named = {n: t.detach().to(dtype).requires_grad_(n in trained) for n, t in named.items()}
        x, w, bias, w_up = named.values()
        up = w_up if activation else None
        if backend == "auto":  # as on a GPU; here the interpreter runs the kernels
            y = ops.linear(x, w, bias, up, activation, "auto")
        else:
            y = fused_linear(x, w, bias, activation=activation, w_up=up, backend=backend)
        leaves = [t for n, t in named.items() if n in trained and (n != "u" or activation)]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([*first, *second])
    for ours, wanted in zip(*found, strict=True):
        assert (ours.double() - wanted).norm() <= 5e-6 * wanted.norm()


def test_autocast() -> None:
    x, w, bias, w_up = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_linear(x, w, bias, activation="silu", w_up=w_up, backend="triton")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, w, bias, w_up))
