"""Layer: one process, Triton's interpreter. The loss as torch ops, and which backend a call of it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusemesh
from fusemesh.kernels import backends
from fusemesh.kernels.runtime import launch
from fusemesh.kernels.vocab_loss import ops
from tests.support.interpreted_device import RecordingDevice

N, E, V = 6, 5, 9


def call(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, weight and targets."""
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((N, E), (V, E)))
    return h, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, 3.0)], ids=["fp32", "bf16"])
def test_opcheck(dtype: torch.dtype, softcap: float | None) -> None:
    h, weight, local = call(dtype)
    of_head = (weight, torch.randn(V).to(dtype), local, 0.5, softcap)
    torch.library.opcheck(ops.vocab_loss_forward, (h, *of_head, "triton"), rtol=1e-2, atol=1e-2)
    rows = torch.stack([torch.randn(N), torch.full((N,), 5.0), torch.ones(N)])
    for wanted in ((True, True, True), (True, False, False), (False, True, True)):
        args = (rows, h, *of_head, *wanted, "triton")
        torch.library.opcheck(ops.vocab_loss_backward, args, rtol=1e-2, atol=1e-2)


@pytest.mark.interpreter
def test_the_ops_by_themselves_have_no_gradient() -> None:
    h, weight, local = call()
    found = ops.vocab_loss_forward(h.requires_grad_(), weight, None, local, 1.0, None, "triton")
    with pytest.raises(RuntimeError, match=r"vocab_loss_forward .*have no gradient of their own"):
        found[0].sum().backward()


@pytest.mark.interpreter
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_take_the_formula_or_are_refused_by_name(transform: str) -> None:
    h, weight, targets = call(torch.float64)

    def loss(backend: str) -> Any:
        return lambda h: fusemesh.fused_linear_cross_entropy(h, weight, targets, backend=backend).sum()

    transformed = {
        "grad": lambda f: torch.func.grad(f)(h),
        "jvp": lambda f: torch.func.jvp(f, (h,), (h,))[1],
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([h, h]))[0],
    }[transform]
    whole = torch.nn.functional.cross_entropy
    right = transformed(lambda h: whole(torch.nn.functional.linear(h, weight), targets, reduction="sum"))
    for backend in ("auto", "torch", "cpu", "reference"):
        torch.testing.assert_close(transformed(loss(backend)), right)
    h, weight = h.float(), weight.float()
    with pytest.raises(ValueError, match=r"one with a rule for .*'triton', whose vocab_loss has none"):
        transformed(loss("triton"))


def test_auto_on_a_device_with_compiled_kernels() -> None:
    """Triton's in 16 and 32 bits; in fp64, and by the names of backends without kernels for it, PyTorch's chunks."""
    h, weight, targets = call()

    def ran(backend: str, dtype: torch.dtype = torch.float32) -> set[str]:
        backends.reset_call_counts()
        with launch.execute_on(RecordingDevice()):
            fusemesh.fused_linear_cross_entropy(h.to(dtype), weight.to(dtype), targets, backend=backend)
        return {name for _, name in backends.call_counts()}

    assert ran("torch") == ran("reference") == ran("auto", torch.float64) == {"torch"}
    with launch.execute_on(RecordingDevice()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            request = backends.Request("vocab_loss", h.device, dtype)
            assert backends.choose("auto", request).name == "auto"
            assert backends.automatic(request)[0].name == "triton"
    assert backends.automatic(backends.Request("vocab_loss", h.device, torch.float32))[0].name == "torch"
    with pytest.raises(ValueError, match=r"h: expected float32, bfloat16 or float16 for backend='triton'.*float64"):
        ran("triton", torch.float64)


def test_tensors_of_two_devices_are_refused() -> None:
    h, weight, targets = call()
    with pytest.raises(ValueError, match=r"weight: expected the device of h, cpu, received meta"):
        fusemesh.fused_linear_cross_entropy(h, weight.to("meta"), targets)
    with pytest.raises(ValueError, match=r"targets: expected the device of h, cpu, received meta"):
        fusemesh.fused_linear_cross_entropy(h, weight, targets.to("meta"))
