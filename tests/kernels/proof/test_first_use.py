"""Proof at first use, on a device whose launches run in Triton's interpreter. Layer: kernels, one process.

Not tried without a GPU: the current stream, the capture of a CUDA graph (its question is replaced), and GPUs of
different kinds beside each other (two devices by name are).
"""

from __future__ import annotations

import logging
import shlex
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusemesh
from fusemesh.kernels import backends
from fusemesh.kernels.measure.cases import Case, PackedCase
from fusemesh.kernels.proof import __main__ as command
from fusemesh.kernels.proof import first_use, store
from fusemesh.kernels.proof.store import Store
from fusemesh.kernels.runtime.launch import execute_on
from tests.support.interpreted_device import InterpretedDevice
from tests.support.planted_kernels import DENSE, FAULTS, GATED, LAYER, LOSS, MASKED, PACKED, STEP, add

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nothing_is_known")]


def slow(value: Any) -> Any:
    """Return a parameter that only ``make test-all`` tries."""
    return pytest.param(value, marks=pytest.mark.slow)


QUICK = ("forward's lse", "dk and dv", "append", "linear", "wgrad", "loss", "loss's dz")


def computed(case: Case, device: InterpretedDevice, backend: str = "auto") -> list[str]:
    """Compute a case and check its results; return the warnings of wrong kernels."""
    with warnings.catch_warnings(record=True) as found, execute_on(device):
        warnings.simplefilter("always")
        x = case.inputs("cpu")
        outputs = case.compute(x, backend)
    case.check(outputs, case.expected(x))
    return [str(x.message) for x in found if "wrong results on" in str(x.message)]


@pytest.mark.parametrize("case", [*(slow(x) for x in (DENSE, MASKED, PACKED, LAYER)), STEP, GATED, LOSS])
def test_auto_takes_what_is_right(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    device = InterpretedDevice()
    with caplog.at_level(logging.INFO, logger="fusemesh"):
        assert computed(case, device) == []
    counts = backends.call_counts()
    assert counts and {name for _, name in counts} == {"triton"} and set(counts.values()) == {1}
    assert {operation for operation, _ in counts} == set(case.counted) or isinstance(case, PackedCase)
    tried = [record.getMessage() for record in caplog.records if "tried" in record.getMessage()]
    assert len(tried) == len(counts) and all("on interpreted sm_90" in line for line in tried)
    before = len(device.prepared), len(device.ran)
    computed(case, device)
    assert len(device.prepared) == before[0], "nothing is proven again"
    assert len(device.ran) - before[1] < before[1]


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in FAULTS])
def test_a_wrong_kernel_is_found_and_survived(name: str) -> None:
    kernel, case, spoil = FAULTS[name]
    device = InterpretedDevice(spoil={kernel: spoil})
    (told,) = computed(case, device)
    assert kernel in told.partition("Please report")[2].partition("Constants")[0]
    assert any(word in told for word in ("allowed", "NaN", "elements"))
    for part in (
        "interpreted sm_90",
        "triton 3.",
        "torch 2.",
        "FUSEMESH_PROOF=always python -m fusemesh.kernels.proof",
    ):
        assert part in told
    names = {operation: backend for operation, backend in backends.call_counts()}
    assert "triton" not in names.values() or len(set(names.values())) == 2
    ran = len(device.ran)
    assert computed(case, device) == [], "said once"
    assert kernel not in device.ran[ran:]
    with pytest.raises(first_use.NotProven, match=f"not proven on interpreted sm_90: .*{kernel}") as raised:
        computed(case, device, "triton")
    assert raised.value.is_wrong


@pytest.mark.parametrize("name", [slow("dq"), slow("forward, packed"), slow("forward's rest"), "append", slow("dgrad")])
def test_the_command_of_a_warning_shows_it_again(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    kernel, case, spoil = FAULTS[name]
    device = InterpretedDevice(spoil={kernel: spoil})
    (told,) = computed(case, device)
    (_, text) = shlex.split(told.partition("python -m ")[2])
    with execute_on(device):
        assert command.main([text], torch.device("cpu")) == 1
    assert kernel in capfd.readouterr().out
    with execute_on(InterpretedDevice("another")):
        assert command.main([text], torch.device("cpu")) == 0


@pytest.mark.slow
def test_others_go_on_where_one_kernel_is_wrong() -> None:
    device = InterpretedDevice(spoil={"attention_dq_kernel": FAULTS["dq"][2]})
    computed(DENSE, device)
    assert backends.call_counts() == {("attention_forward", "triton"): 1, ("attention_backward", "torch"): 1}
    backends.reset_call_counts()
    computed(LAYER, device)
    assert {name for _, name in backends.call_counts()} == {"triton"}


@pytest.mark.slow
def test_a_verdict_is_kept_and_read_by_another_process() -> None:
    kernel, case, spoil = FAULTS["dq"]
    (told,) = computed(case, InterpretedDevice(spoil={kernel: spoil}))
    first_use.forget()
    store._default = Store(store.default().folder)
    device = InterpretedDevice()
    assert computed(case, device) == [told], "another process warns for itself, without a trial"
    assert kernel not in device.ran
    first_use.forget()
    with first_use.mode(first_use.ALWAYS):
        assert computed(case, device) == []
    assert kernel in device.ran
    first_use.forget()
    assert computed(case, InterpretedDevice("another")) == [], "a verdict is one device's"


def test_off_trusts() -> None:
    kernel, case, spoil = FAULTS["forward"]
    device = InterpretedDevice(spoil={kernel: spoil})
    with first_use.mode(first_use.OFF), pytest.raises(AssertionError, match="outside the error budget"):
        computed(case, device)
    assert device.prepared == [] and device.ran.count(kernel) == 1


class Counting(TorchDispatchMode):
    """Counts the ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_a_proof_leaves_everything_as_it_was() -> None:
    x = DENSE.inputs("cpu")
    state, seen = torch.get_rng_state(), []
    device = InterpretedDevice()
    for _ in range(2):
        with execute_on(device), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Counting() as outer:
            with Counting() as inner:
                out = DENSE.run(x, "auto")
            assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled() and not out.requires_grad
            assert out.dtype == torch.bfloat16
        seen.append((inner.seen, outer.seen))
    # The first call was proven, the second one was not.
    prepared_twice = [name for name in seen[0][1] if seen[0][1].count(name) != seen[1][1].count(name)]
    assert set(prepared_twice) <= {"aten.empty.memory_format", "aten.new_empty.default", "aten.transpose.int"}
    assert torch.equal(torch.get_rng_state(), state)
    assert backends.call_counts() == {("attention_forward", "triton"): 2}


@pytest.mark.slow
def test_a_proof_under_inference_mode_and_in_a_backward_with_hooks() -> None:
    device = InterpretedDevice()
    with execute_on(device), torch.inference_mode():
        assert DENSE.run(DENSE.inputs("cpu"), "auto").is_inference()
    with torch.autograd.graph.save_on_cpu():
        computed(DENSE, device)
    assert {name for _, name in backends.call_counts()} == {"triton"}


def test_out_of_memory_in_a_proof_counts_as_unproven(caplog: pytest.LogCaptureFixture) -> None:
    device = InterpretedDevice()
    device.error = torch.OutOfMemoryError("CUDA out of memory")
    with caplog.at_level(logging.INFO, logger="fusemesh"):
        for _ in range(2):
            assert computed(DENSE, device) == []
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(told) == 2 and told[0].startswith("attention_forward: Triton's kernels are not used on interpreted")
    assert set(backends.call_counts()) == {("attention_forward", "reference"), ("attention_backward", "torch")} or set(
        backends.call_counts()
    ) == {("attention_forward", "torch"), ("attention_backward", "torch")}
    assert store.default().all() == {}, "another process may have the memory"
    with pytest.raises(first_use.NotProven, match="out of memory") as raised:
        computed(DENSE, device, "triton")
    assert not raised.value.is_wrong


def test_what_does_not_compile_is_told_by_name_and_left_by_auto() -> None:
    device = InterpretedDevice()

    def fails(*_: Any) -> str:
        raise ValueError("ptxas died")

    device.prepare = fails  # type: ignore[method-assign]
    assert computed(DENSE, device) == []
    assert {name for _, name in backends.call_counts()} == {"torch"}
    with pytest.raises(ValueError, match="ptxas died"):
        computed(DENSE, device, "triton")


@pytest.mark.slow
def test_under_a_capture_what_is_proven_runs_and_the_rest_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    device = InterpretedDevice()
    computed(DENSE, device)
    monkeypatch.setattr(first_use, "_is_capturing", lambda device: True)
    computed(DENSE, device)
    with pytest.raises(RuntimeError, match=r"run the call once before the capture \(warm up\)"):
        computed(LAYER, device)


@pytest.mark.slow
def test_a_key_that_is_too_coarse_hands_out_nothing_unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls of an op have one key: what runs is looked up all the same."""
    monkeypatch.setattr(first_use, "key_of", lambda call: call.operation)
    computed(LAYER, InterpretedDevice())
    device = InterpretedDevice(spoil={"linear_forward_kernel": add("p_y")})
    (told,) = computed(GATED, device)
    assert "linear_forward_kernel" in told


def test_a_small_call_of_other_code_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusemesh.kernels.proof import small

    monkeypatch.setattr(small, "like", lambda real, least: least)
    monkeypatch.setattr(small, "heads", lambda *_: (2, 2))
    assert computed(DENSE, InterpretedDevice()) == []
    assert "triton" not in {name for _, name in backends.call_counts()}
    with pytest.raises(first_use.NotProven, match="no small call compiles to the same code of attention_forward"):
        computed(DENSE, InterpretedDevice(), "triton")


@pytest.mark.slow
def test_several_threads_prove_once() -> None:
    device = InterpretedDevice()
    x = LAYER.inputs("cpu")
    outs: list[torch.Tensor] = []

    def call() -> None:
        with execute_on(device):
            outs.append(LAYER.run(x, "auto"))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 3 and all(torch.equal(out, outs[0]) for out in outs)
    alone = InterpretedDevice("another")
    computed_alone = LAYER.run(x, "reference")
    with execute_on(alone):
        LAYER.run(x, "auto")
    assert device.ran.count("linear_forward_kernel") == alone.ran.count("linear_forward_kernel") + 2
    torch.testing.assert_close(outs[0], computed_alone)


@pytest.mark.parametrize("compiler", [slow("eager"), "aot_eager"])
@pytest.mark.parametrize("name", [slow(None), slow("forward"), slow("dq"), "dk and dv"])
def test_inside_a_compiled_graph(compiler: str, name: str | None) -> None:
    kernel, _, spoil = FAULTS[name or "forward"]
    device = InterpretedDevice(spoil={} if name is None else {kernel: spoil})
    torch._dynamo.reset()
    attend: Callable[..., Any] = torch.compile(
        lambda q, k, v: fusemesh.flash_attention(q, k, v, causal=True, align="top_left", return_lse=True),
        backend=compiler,
        fullgraph=True,
    )
    x = DENSE.inputs("cpu")
    # Heads outside positions in memory, and the other way round.
    q, k, v = (x[n].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n in "qkv")
    with execute_on(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, lse = attend(q, k, v)
        found = torch.autograd.grad([out, lse], [q, k, v], [x["do"], torch.ones_like(lse)])
    want, want_lse = fusemesh.flash_attention(
        q, k, v, causal=True, align="top_left", return_lse=True, backend="reference"
    )
    wanted = torch.autograd.grad([want, want_lse], [q, k, v], [x["do"], torch.ones_like(lse)])
    assert out.stride() == torch.empty_like(q).stride() and lse.is_contiguous()
    for actual, right in zip((out, lse, *found), (want, want_lse, *wanted), strict=True):
        torch.testing.assert_close(actual, right, atol=2e-5, rtol=2e-5)
    names = dict(backends.call_counts())
    assert (("attention_forward", "triton") in names) == (name != "forward")
    assert (("attention_backward", "triton") in names) == (name is None or name == "forward")


@pytest.mark.slow
def test_a_graph_made_outside_of_the_device_is_made_again() -> None:
    torch._dynamo.reset()
    layer: Callable[..., Any] = torch.compile(
        lambda x, w: fusemesh.fused_linear(x, w, activation="gelu"), backend="eager", fullgraph=True
    )
    x, w = torch.randn(17, 16), torch.randn(24, 16)
    outside = layer(x, w)
    with execute_on(InterpretedDevice()):
        inside = layer(x, w)
    assert backends.call_counts()[("linear_forward", "triton")] == 1
    torch.testing.assert_close(outside, inside)
