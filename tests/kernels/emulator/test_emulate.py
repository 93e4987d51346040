"""Layer: emulator. fusemesh.emulate runs the compiled kernels under every way of calling them, and leaves nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

triton = pytest.importorskip("triton")

import fusemesh  # noqa: E402
from fusemesh.kernels import aot, emulator, env  # noqa: E402
from fusemesh.kernels.emulator.hazard import Hazard  # noqa: E402
from fusemesh.kernels.measure.cases import AttentionCase, DecodeCase, LinearCase, PackedCase  # noqa: E402
from fusemesh.kernels.runtime.launch import INTERPRETER, TARGETS, launch, target_of  # noqa: E402
from tests.support import fresh_process  # noqa: E402
from tests.support.emulator.double import double_kernel  # noqa: E402

pytestmark = pytest.mark.aot

CASES = (
    AttentionCase("bf16", H=2, Hkv=1, Sq=33, Sk=65, D=64, Dv=64, causal=True, align="bottom_right", mod=True),
    PackedCase("bf16", lens_q=(19, 0, 1, 30), lens_k=(19, 9, 65, 71), D=32, Dv=32, causal=True, align="bottom_right"),
    DecodeCase("bf16", H=4, Hkv=2, D=64, Dv=64, lens=(70, 1), capacity=80, added=1, page=16, causal=True),
    LinearCase("bf16", 19, 40, 24, "silu", gated=True),
)
CPU = torch.device("cpu")


def outside() -> None:
    """Check that nothing of a block is left."""
    q = torch.randn(1, 1, 16, 16)
    with pytest.raises(ValueError, match="cannot run here: Triton compiles for GPUs"):
        fusemesh.flash_attention(q, q, q, backend="triton")
    assert target_of(CPU) == INTERPRETER
    from triton import knobs
    from triton.runtime import driver

    assert driver._active is None and knobs.runtime.add_stages_inspection_hook is None
    assert knobs.cache.manager_class is None


@pytest.mark.parametrize(
    ("target", "case"),
    list(zip(("sm_90", "sm_80", "sm_90", "sm_80"), CASES, strict=True)),
    ids=lambda x: getattr(x, "op", x),
)
def test_each_operation_is_right(target: str, case: Any) -> None:
    x = case.inputs()
    want = case.expected(x)
    with fusemesh.emulate(target) as run:
        outputs = case.compute(x, "triton")
    case.check(outputs, want)
    assert len(run.counts) >= 1 and all(each.ctas for each in run.counts)
    outside()


@pytest.mark.parametrize("options", [{"copies": "early"}, {"copies": "random", "seed": 1}, {"seed": 2}], ids=str)
def test_copies_and_orders_give_the_same_bits(options: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 1, 1, 70, 32).bfloat16()

    def attention(**options: Any) -> torch.Tensor:
        with fusemesh.emulate("sm_80", **options):
            return fusemesh.flash_attention(q, k, v, causal=True, backend="triton")

    assert torch.equal(attention(), attention(**options))


class Small(nn.Module):
    """A layer of PyTorch's that reaches attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (2, 3, 16)).permute(3, 0, 2, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("way", ["plain", "accelerate", "compiled", "checkpointed"])
def test_modules(way: str) -> None:
    torch.manual_seed(0)
    module, x = Small().bfloat16(), torch.randn(1, 40, 32).bfloat16()

    def loss(call: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        module.zero_grad()
        out = call(x)
        out.float().square().sum().backward()
        assert module.project.weight.grad is not None
        return out.detach(), module.project.weight.grad.clone()

    def ours(x: torch.Tensor) -> torch.Tensor:
        q, k, v = module.project(x).unflatten(-1, (2, 3, 16)).permute(3, 0, 2, 1, 4)
        return fusemesh.flash_attention(q, k, v, causal=True, backend="triton")

    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "plain": ours,
        "compiled": torch.compile(ours, backend="aot_eager"),
        "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False),
    }
    want = loss(module)
    with fusemesh.emulate("sm_90") as run:
        if way == "accelerate":
            with fusemesh.accelerate(), fusemesh.use_backend("triton"):
                found = loss(module)
        else:
            found = loss(calls[way])
    assert {each.kernel for each in run.counts} >= {"attention_forward_kernel", "attention_dkdv_kernel"}
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, atol=0.02 * float(other.abs().max()), rtol=0)
    outside()


def test_what_is_compiled_inside_a_block_runs_the_reference_outside() -> None:
    call = torch.compile(lambda q: fusemesh.flash_attention(q, q, q), backend="aot_eager")
    q = torch.randn(1, 1, 16, 16)
    with fusemesh.use_backend("triton"), fusemesh.emulate("sm_90") as run:
        inside = call(q)
    assert len(run.counts) == 1
    after = call(q)
    assert len(run.counts) == 1 and torch.allclose(inside, after, atol=1e-5)


@pytest.mark.parametrize("way", ["plainly", "by launch"])
def test_a_users_own_kernel(way: str) -> None:
    x, out = torch.randn(4, 32), torch.zeros(4, 32)
    with fusemesh.emulate("sm_90") as run:
        if way == "plainly":
            double_kernel[(4,)](x, out, SIZE=32)
        else:
            launch(double_kernel, (4,), x, out, SIZE=32)
    assert torch.equal(out, 2 * x) and [each.kernel for each in run.counts] == ["double_kernel"]
    outside()


def test_kernels_are_proven_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Without, a call launches what it needs alone."""
    monkeypatch.setattr(env, "CACHE", str(tmp_path))
    x, w = torch.randn(5, 32), torch.randn(32, 32)
    launches = {}
    for prove in (False, True):
        with fusemesh.emulate("sm_80", prove=prove) as run:
            fusemesh.fused_linear(x, w, backend="triton")
        launches[prove] = len(run.counts)
    assert launches[False] == 1 and launches[True] > 1


def test_autotuned_kernels_are_refused_and_their_functions_run() -> None:
    tuned = triton.autotune([triton.Config({"SIZE": size}) for size in (16, 32)], key=[])(double_kernel)
    x, out = torch.randn(32), torch.zeros(32)
    with fusemesh.emulate("sm_90"):
        with pytest.raises(ValueError, match=r"expected a kernel with one configuration, received one of triton\.auto"):
            tuned[(1,)](x, out)
        tuned.fn[(1,)](x, out, SIZE=32)
    assert torch.equal(out, 2 * x)


def test_blocks_in_blocks() -> None:
    x, out = torch.randn(32), torch.zeros(32)
    with fusemesh.emulate("sm_80") as outer:
        double_kernel[(1,)](x, out, SIZE=32)
        with fusemesh.emulate("sm_90") as inner:
            assert target_of(CPU) is TARGETS["sm_90"]
            double_kernel[(1,)](out, x, SIZE=32)
        assert target_of(CPU) is TARGETS["sm_80"]
        double_kernel[(2,)](x, out, SIZE=16)
    assert [each.ctas for each in outer.counts] == [1, 2] and [each.ctas for each in inner.counts] == [1]
    assert torch.equal(out, 2 * x)
    outside()


def test_each_thread_has_its_own_block() -> None:
    """A block of one thread is not seen by another, and both may run the same kernel at the same time."""
    begun, ended = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    def other() -> None:
        begun.wait(60)
        try:
            found["without"] = target_of(CPU)
            x, out = torch.randn(4, 32), torch.zeros(4, 32)
            with fusemesh.emulate("sm_80") as run:
                for _ in range(5):
                    double_kernel[(4,)](x, out, SIZE=32)
            found["counts"], found["right"] = len(run.counts), torch.equal(out, 2 * x)
        finally:
            ended.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fusemesh.emulate("sm_80") as run:
        begun.set()
        x, out = torch.randn(4, 32), torch.zeros(4, 32)
        for _ in range(5):
            double_kernel[(4,)](x, out, SIZE=32)
        assert torch.equal(out, 2 * x)
        ended.wait(60)
    thread.join()
    assert found == {"without": INTERPRETER, "counts": 5, "right": True} and len(run.counts) == 5
    outside()


def test_an_error_ends_the_block_and_leaves_nothing() -> None:
    x, out = torch.randn(30), torch.zeros(30)
    with pytest.raises(Hazard, match=r"p_x.*double\.py:\d+"), fusemesh.emulate("sm_90"):
        double_kernel[(1,)](x, out, SIZE=32)
    outside()
    with pytest.raises(ZeroDivisionError), fusemesh.emulate("sm_90"):
        raise ZeroDivisionError
    outside()


@pytest.mark.parametrize("target", ["sm_91", "gfx942", TARGETS["gfx942"], "interpreter"], ids=str)
def test_targets_that_cannot_be_emulated_are_refused(target: Any) -> None:
    with pytest.raises(ValueError, match=r"target: expected one of \('sm_80', .* received"), fusemesh.emulate(target):
        raise AssertionError("a block was entered")
    outside()


def test_wrong_arguments_and_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = "sometimes"
    with pytest.raises(ValueError, match=r"copies: expected one of .* received 'sometimes'"):
        fusemesh.emulate(copies=wrong).__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(emulator.env, "INTERPRET", True)
        with pytest.raises(ValueError, match=r"TRITON_INTERPRET: expected it unset .* received 1"):
            fusemesh.emulate().__enter__()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="triton: expected it installed"):
        fusemesh.emulate().__enter__()


# Machine code must never be taken from a text that nothing assembled, nor the other way round.
ASSEMBLED = """
from fusemesh.kernels import aot
(report,) = aot.compile_launches(lambda: launch(kernel, (1,), x, out, SIZE=32), "sm_90")
assert report.registers > 0 and report.instructions > 10, report
"""
EMULATED = """
with fusemesh.emulate("sm_90"):
    kernel[(1,)](x, out, SIZE=32)
assert torch.equal(out, 2 * x)
"""
PREAMBLE = """
import torch, fusemesh
from fusemesh.kernels.runtime.launch import launch
from tests.support.emulator.double import double_kernel as kernel
x, out = torch.randn(32), torch.zeros(32)
"""


@pytest.mark.parametrize(
    "order",
    [
        pytest.param((EMULATED, ASSEMBLED), id="emulated first"),
        pytest.param((ASSEMBLED, EMULATED), id="assembled first", marks=pytest.mark.slow),
    ],
)
def test_text_and_machine_code_share_a_cache_and_no_entry(order: tuple[str, str], tmp_path: Any) -> None:
    env = {"TRITON_CACHE_DIR": str(tmp_path)}
    fresh_process.run(PREAMBLE + order[0], env=env)
    # In one process what the one before has left, and both in both orders.
    fresh_process.run(PREAMBLE + order[1] + order[0] + order[1], env=env)
    folders = [path.name for path in tmp_path.iterdir() if list(path.glob("*.cubin"))]
    assert len(folders) == 2 and sum(name.startswith("fusemesh-ptx-") for name in folders) == 1
    assert len(list(tmp_path.iterdir())) == len(folders), "nothing was compiled twice"


def test_compiling_for_a_target_within_a_block_assembles() -> None:
    x, out = torch.randn(32), torch.zeros(32)

    def call() -> None:
        launch(double_kernel, (1,), x, out, SIZE=16)

    with fusemesh.emulate("sm_80"):
        (report,) = aot.compile_launches(call, "sm_80")
        assert report.registers > 0
        call()
    assert torch.equal(out[:16], 2 * x[:16])
