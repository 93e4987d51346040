"""Layer: one process, no Triton. fused_linear's contract: its checks, its choice of backend, its PyTorch backends."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fusemesh.kernels import backends, engine, env
from fusemesh.kernels.backend_record import Request
from fusemesh.kernels.matmul import reference
from fusemesh.kernels.matmul.api import ACTIVATIONS, fused_linear
from fusemesh.kernels.runtime.launch import execute_on
from fusemesh.kernels.testing import budget
from tests.support.interpreted_device import InterpretedDevice

X, W, B = torch.zeros(2, 3, 5), torch.zeros(4, 5), torch.zeros(4)

BAD_CALLS = {
    "x_is_a_list": (([[1.0]], W), {}, "x", "torch.Tensor", "list"),
    "x_is_none": ((None, W), {}, "x", "torch.Tensor", "NoneType"),
    "w_is_none": ((X, None), {}, "w", "torch.Tensor", "NoneType"),
    "bias_is_a_number": ((X, W, 1.0), {}, "bias", "torch.Tensor or None", "float"),
    "w_up_is_true": ((X, W), {"w_up": True, "activation": "silu"}, "w_up", "torch.Tensor or None", "bool"),
    "x_is_a_scalar": ((torch.tensor(1.0), W), {}, "x", "at least 1 dimension", "scalar"),
    "x_is_of_integers": ((X.int(), W.int()), {}, "x", "float32", "torch.int32"),
    "x_is_complex": ((X + 0j, W + 0j), {}, "x", "float32", "torch.complex64"),
    "w_is_a_vector": ((X, W[0]), {}, "w", "2 dimensions", r"(5,)"),
    "w_has_3_dimensions": ((X, W[None]), {}, "w", "2 dimensions", r"(1, 4, 5)"),
    "w_is_transposed": ((X, W.t()), {}, "w", "K = x.shape[-1] = 5", r"(5, 4)"),
    "w_has_another_dtype": ((X, W.half()), {}, "w", "torch.float32", "torch.float16"),
    "w_is_on_another_device": ((X, W.to("meta")), {}, "w", "cpu", "meta"),
    "bias_has_one_too_many": ((X, W, torch.zeros(5)), {}, "bias", "N = w.shape[0] = 4", r"(5,)"),
    "bias_would_broadcast": ((X, W, torch.zeros(1)), {}, "bias", "N = w.shape[0] = 4", r"(1,)"),
    "bias_has_2_dimensions": ((X, W, B[None]), {}, "bias", "[N]", r"(1, 4)"),
    "bias_has_another_dtype": ((X.double(), W.double(), B), {}, "bias", "torch.float64", "torch.float32"),
    "bias_is_on_another_device": ((X, W, B.to("meta")), {}, "bias", "cpu", "meta"),
    "activation_is_unknown": ((X, W), {"activation": "relu"}, "activation", "gelu_tanh", "'relu'"),
    "activation_in_capitals": ((X, W), {"activation": "GELU"}, "activation", "gelu", "'GELU'"),
    "activation_is_a_function": ((X, W), {"activation": F.gelu}, "activation", "gelu", "gelu"),
    "activation_cannot_be_hashed": ((X, W), {"activation": ["gelu"]}, "activation", "gelu", "['gelu']"),
    "w_up_without_activation": ((X, W), {"w_up": W}, "w_up", "an activation", "activation=None"),
    "w_up_has_other_features": ((X, W), {"w_up": W[1:], "activation": "silu"}, "w_up", "(4, 5)", r"(3, 5)"),
    "w_up_has_another_dtype": ((X, W), {"w_up": W.half(), "activation": "silu"}, "w_up", "float32", "torch.float16"),
    "w_up_is_elsewhere": ((X, W), {"w_up": W.to("meta"), "activation": "silu"}, "w_up", "cpu", "meta"),
    "backend_is_unknown": ((X, W), {"backend": "cuda"}, "backend", "'triton'", "'cuda'"),
    "backend_of_another_device": ((X.to("meta"), W.to("meta")), {"backend": "cpu"}, "backend", "CPU tensors", "meta"),
    "backend_cannot_run_here": ((X, W), {"backend": "triton"}, "backend", "GPU", "TRITON_INTERPRET=1"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_argument_expected_and_received(case: str) -> None:
    args, kwargs, name, expected, received = BAD_CALLS[case]
    with pytest.raises(ValueError) as error:
        fused_linear(*args, **kwargs)
    message = str(error.value)
    assert message.startswith(name), message
    assert expected in message and received in message, message


def test_triton_refuses_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "INTERPRET", True)
    with pytest.raises(
        ValueError, match=r"x: expected float32, bfloat16 or float16 for backend='triton', received torch\.float64"
    ):
        fused_linear(X.double(), W.double(), backend="triton")


def inputs(dtype: torch.dtype, *, gated: bool, shape: tuple[int, ...] = (3, 5, 7)) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def new(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return [new(*shape), new(4, shape[-1]), new(4), new(4, shape[-1]) if gated else None]


def test_activations_are_the_published_formulas() -> None:
    # Written out with the math module, which shares no code with torch: the reference's own reference.
    def silu(z: float) -> float:
        return z / (1 + math.exp(-z))

    scalar = {
        "gelu": lambda z: z * 0.5 * math.erfc(-z / math.sqrt(2)),
        "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "silu": silu,
        "relu2": lambda z: max(z, 0.0) ** 2,
    }
    assert set(scalar) == set(ACTIVATIONS)
    z = torch.linspace(-6, 6, 41, dtype=torch.float64)
    for name, function in scalar.items():
        expected = torch.tensor([function(value) for value in z.tolist()], dtype=torch.float64)
        torch.testing.assert_close(reference.ACTIVATIONS[name](z), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_torch_equals_reference_in_fp64(activation: str | None, gated: bool) -> None:
    if gated and activation is None:
        activation = "silu"
    results = []
    for backend in ("reference", "torch"):
        x, w, bias, w_up = inputs(torch.float64, gated=gated)
        y = fused_linear(x, w, bias, activation=activation, w_up=w_up, backend=backend)
        assert y.shape == (3, 5, 4)
        grads = torch.autograd.grad(y.sin().sum(), [t for t in (x, w, bias, w_up) if t is not None])
        results.append([y, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_second_derivatives(backend: str, activation: str) -> None:
    x, w, bias, w_up = inputs(torch.float64, gated=True, shape=(2, 3))

    def call(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor:
        return fused_linear(x, w, bias, activation=activation, w_up=w_up, backend=backend)

    assert torch.autograd.gradcheck(call, (x, w, bias, w_up))
    assert torch.autograd.gradgradcheck(call, (x, w, bias, w_up))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_torch_backend_in_16_bits(dtype: torch.dtype) -> None:
    x, w, bias, w_up = inputs(dtype, gated=True)
    y = fused_linear(x, w, bias, activation="silu", w_up=w_up)
    exact = reference.linear(x.double(), w.double(), bias.double(), activation="silu", w_up=w_up.double())
    eager = F.silu(F.linear(x, w, bias)) * F.linear(x, w_up)
    budget.check("y", y, exact, eager)


def test_auto_takes_torch_on_cpu_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "BACKEND", "auto")
    backends.reset_call_counts()
    fused_linear(X, W)
    assert backends.call_counts() == {("linear_forward", "torch"): 1}


def test_auto_takes_triton_where_compiled_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "BACKEND", "auto")
    device = torch.device("cpu")

    def chosen(dtype: torch.dtype) -> str:
        return backends.automatic(Request("linear", device, dtype))[0].name

    assert chosen(torch.bfloat16) == "torch"
    with execute_on(InterpretedDevice()):
        assert chosen(torch.bfloat16) == "triton"
        assert chosen(torch.float64) == "torch"


@pytest.mark.skipif(engine.why_unavailable() is not None, reason="no CPU engine in this installation")
def test_one_name_serves_a_whole_model_on_a_cpu() -> None:
    backends.reset_call_counts()
    with backends.use_backend("cpu"):
        ys = fused_linear(X, W), fused_linear(X, W, backend="cpu")
    assert all(torch.equal(y, torch.nn.functional.linear(X, W)) for y in ys)
    assert backends.call_counts() == {("linear_forward", "torch"): 2}


def test_use_backend_reaches_calls_that_leave_it_open() -> None:
    backends.reset_call_counts()
    with backends.use_backend("reference"):
        fused_linear(X, W)
        fused_linear(X, W, backend="torch")
    assert backends.call_counts() == {("linear_forward", "reference"): 1, ("linear_forward", "torch"): 1}


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_casts_as_linear_does(backend: str) -> None:
    x, w, bias, w_up = inputs(torch.float32, gated=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_linear(x, w.half(), bias, activation="silu", w_up=w_up, backend=backend)
        assert y.dtype == F.linear(x, w).dtype == torch.bfloat16
        assert fused_linear(x.double(), w.double(), backend=backend).dtype == torch.float64
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()

    def call(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused_linear(x, w, bias, activation="gelu_tanh", backend=backend)

    x, w, bias, _ = inputs(torch.float32, gated=False)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(x, w, bias)
    torch.testing.assert_close(compiled, call(x, w, bias), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (3, 0)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_shapes_at_the_edge(shape: tuple[int, ...], backend: str) -> None:
    x = torch.zeros(shape)
    y = fused_linear(x, torch.zeros(4, shape[-1]), B + 1, activation="relu2", backend=backend)
    torch.testing.assert_close(y, torch.ones(*shape[:-1], 4))
