"""The small calls of a proof run the kernels of the call itself. Layer: kernels; nothing is compiled, nothing runs.

Launches are told apart as Triton's JIT does (tests/support/interpreted_device.py); that this is what it does is tried
on a sample that is compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fusemesh
from bench.gpu import tables
from fusemesh.kernels import compat
from fusemesh.kernels.aot import NamedTarget
from fusemesh.kernels.measure.cases import AttentionCase, Case, DecodeCase, LinearCase, PackedCase
from fusemesh.kernels.proof import attention, first_use, small, store, trial
from fusemesh.kernels.proof.store import Store
from fusemesh.kernels.runtime import launch
from fusemesh.kernels.runtime.launch import TARGETS, execute_on
from tests.support.interpreted_device import RecordingDevice, specialisation


@pytest.fixture(autouse=True)
def every_result_is_right(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is computed, and so nothing is compared."""

    def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Any, *_: Any) -> dict[str, trial.Wanted]:
        rows = q.shape[:3] if call.packed is None else (q.shape[1], q.shape[0])
        out, lse = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
        return {"out": trial.Wanted(out, out), "lse": trial.Wanted(lse, lse)}

    def quiet(run: Any, check: Any, *rest: Any) -> trial.Trial:
        return made(run, lambda found: [], *rest)

    made = trial.Trial
    monkeypatch.setattr(attention, "expected", expected)
    for module in ("attention", "decode", "linear", "vocab_loss"):
        monkeypatch.setattr(f"fusemesh.kernels.proof.{module}.Trial", quiet)
    monkeypatch.setattr(store, "_default", Store(None))
    monkeypatch.setattr(first_use, "_mode", first_use.ON)
    first_use.forget()
    yield
    first_use.forget()


def uncovered(call: Callable[[], Any], device: RecordingDevice) -> str:
    """Return why a call by name is refused, "" where its proof covers all of its kernels."""
    try:
        with execute_on(device):
            call()
    except first_use.NotProven as error:
        return str(error)
    return ""


def slow(*values: Any) -> Any:
    """Return parameters that only ``make test-all`` tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("target", "step"), [("sm_90", 4), slow("sm_90", 1), slow("sm_80", 1), slow("sm_100", 1)])
def test_every_case_of_the_tables(target: str, step: int) -> None:
    device, found = RecordingDevice(target), []
    for case in tables.all_cases(torch.device("cpu"), True)[::step]:
        if not (case.dtype == "fp8" and target == "sm_80"):
            why = uncovered(lambda case=case: case.compute(case.inputs("cpu"), "triton"), device)
            found += [f"{case.op} {case.name}: {why}"] if why else []
    assert found == []
    assert len(first_use.device_of(device).proven) > 300 / step


def strided(shape: tuple[int, ...], order: tuple[int, ...], odd: int, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose dims lie in this order in memory, rows ``odd`` elements apart, from an offset on."""
    sizes = [shape[i] for i in order]
    sizes[-1] += odd
    room = torch.zeros(offset + torch.Size(sizes).numel(), dtype=dtype)[offset:].view(sizes)
    back = [order.index(i) for i in range(len(order))]
    return room[..., : shape[order[-1]]].permute(back)


LAYOUTS = list(itertools.product(((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)), (0, 1, 8), (0, 3, 8)))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 64, 64), (2, 8, 2, 130, 64), (3, 32, 32, 33, 40), (16, 16, 1, 1, 128)])
def test_layouts_of_attention(sizes: tuple[int, int, int, int, int]) -> None:
    """Orders of dims, rows with gaps, addresses that are not aligned, and gradients that are expanded."""
    B, H, Hkv, S, D = sizes
    device, found = RecordingDevice(), []
    for (order, odd, offset), dtype in itertools.product(LAYOUTS, (torch.bfloat16, torch.float32)):
        q = strided((B, H, S, D), order, odd, offset, dtype).requires_grad_()
        k, v = (strided((B, Hkv, S, D), order, odd, x, dtype).requires_grad_() for x in (0, offset))

        def call(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            fusemesh.flash_attention(q, k, v, causal=True, align="top_left", backend="triton").sum().backward()

        why = uncovered(call, device)
        found += [f"{order} {odd} {offset} {dtype}: {why}"] if why else []
    assert found == []


@pytest.mark.parametrize("sizes", [(1, 1, 1), (33, 16, 48), (64, 1, 32), (2048, 2048, 64), (5, 40, 24)])
def test_layouts_of_linear_layers(sizes: tuple[int, int, int]) -> None:
    M, N, K = sizes
    device, found = RecordingDevice(), []
    for order, odd, offset in itertools.product(((0, 1), (1, 0)), (0, 1, 8), (0, 3, 8)):
        x, w = (strided(shape, order, odd, offset, torch.float16).requires_grad_() for shape in ((M, K), (N, K)))
        why = uncovered(
            lambda x=x, w=w: fusemesh.fused_linear(x, w, activation="gelu", backend="triton").sum().backward(), device
        )
        found += [f"{order} {odd} {offset}: {why}"] if why else []
    assert found == []


def test_layouts_of_heads() -> None:
    device, found = RecordingDevice(), []
    for n, v, e in ((1, 1, 1), (33, 50, 48), (64, 1000, 33), (5, 40, 1)):
        for order, odd, offset, cap in itertools.product(((0, 1), (1, 0)), (0, 1, 8), (0, 3, 8), (None, 3.0)):
            h, w = (strided(shape, order, odd, offset, torch.float16).requires_grad_() for shape in ((n, e), (v, e)))
            bias = strided((v,), (0,), 0, offset, torch.float16).requires_grad_()

            def call(h: torch.Tensor = h, w: torch.Tensor = w, bias: torch.Tensor = bias, cap: Any = cap) -> None:
                targets = torch.zeros(len(h), dtype=torch.int64)
                fusemesh.fused_linear_cross_entropy(h, w, targets, bias, softcap=cap, backend="triton").sum().backward()

            why = uncovered(call, device)
            found += [f"{n} {v} {e} {order} {odd} {offset} {cap}: {why}"] if why else []
    assert found == []


PLANTED: dict[str, Any] = {
    "heads": lambda *_: (1, 1),
    "like": lambda real, least: least,
    "length_like": lambda real, least: least,
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_check_finds_small_calls_of_other_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, name, PLANTED[name])
    cases: list[Case] = [
        AttentionCase("bf16", B=2, H=4, Hkv=2, Sq=64, Sk=64, D=40, Dv=40),
        LinearCase("bf16", 64, 64, 64),
        DecodeCase("bf16", H=4, Hkv=2, D=64, Dv=64),
        PackedCase("bf16", lens_q=(5, 9), lens_k=(5, 9)),
    ]
    assert any(uncovered(lambda c=case: c.compute(c.inputs("cpu"), "triton"), RecordingDevice()) for case in cases)


@pytest.mark.slow
def test_the_compiler_tells_launches_apart_as_these_tests_do() -> None:
    """Equal specialisations have one compiled hash, different ones two; a few launches of one kernel are compiled."""
    found: dict[str, set[str]] = {}

    class Compiling(RecordingDevice):
        def prepare(self, kernel: Any, grid: Any, args: Any, kwargs: Any) -> str:
            with compat.driver(NamedTarget(TARGETS["sm_90"])):
                compiled = str(compat.compile_launch(kernel, grid, args, kwargs).hash)
            found.setdefault(specialisation(kernel, args, kwargs), set()).add(compiled)
            return compiled

        run = prepare

    device = Compiling()
    for n, k, offset in ((32, 16, 0), (48, 32, 0), (33, 16, 0), (32, 1, 0), (32, 16, 1)):
        x = strided((17, k), (0, 1), 0, offset, torch.float16)
        why = uncovered(lambda x=x, n=n, k=k: fusemesh.fused_linear(x, x.new_zeros(n, k), backend="triton"), device)
        assert why == ""
    assert len(found) == 4 and all(len(hashes) == 1 for hashes in found.values())
    assert len(set.union(*found.values())) == 4
    assert launch.executor_name() is None
