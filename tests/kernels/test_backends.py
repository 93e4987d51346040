"""Floor 1: the records of the backends, and the one rule by which every operation chooses among them."""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh.kernels import backend_record, backends
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.backend_record import OPERATIONS, Backend, Refusal, Request
from fusemesh.kernels.runtime import launch
from fusemesh.kernels.scoped import Scoped
from tests.support.interpreted_device import InterpretedDevice

CPU = torch.device("cpu")
PLAIN = Call(AttentionSpec(1.0))
TOO_LARGE = Refusal("v", "a head dim from 16 to 256", 300)


def request(operation: str = "attention", **changes: object) -> Request:
    values = {"device": CPU, "dtype": torch.float32, "head_dims": (16, 16), "call": PLAIN, **changes}
    return Request(operation, **values)  # type: ignore[arg-type]


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Backend]]:
    """Only what the test registers."""
    monkeypatch.setattr(backend_record, "_records", {})
    monkeypatch.setattr(backend_record, "_LOADED", {})
    return backend_record.records


def willing(name: str, why: str, **options: object) -> Backend:
    implementations = dict.fromkeys(OPERATIONS, object())
    return Backend(name, implementations, automatic=lambda request: why, **options)  # type: ignore[arg-type]


def test_auto_takes_the_first_willing_record_that_does_not_refuse(records: Callable[[], dict[str, Backend]]) -> None:
    backend_record.register(Backend("silent", {"attention": object()}))
    backend_record.register(willing("refusing", "fast", limits=lambda request: TOO_LARGE))
    backend_record.register(willing("absent", "fast", unavailable=lambda device: f"not on {device}"))
    backend_record.register(willing("plain", "the plain formula"))
    assert list(records()) == ["silent", "refusing", "absent", "plain"]
    assert backends.choose("auto", request()).name == "plain"
    backend_record.register(willing("other", "faster"), before="plain")
    assert backends.choose("auto", request()).name == "other"
    assert backends.automatic(request(), without=("other",))[0].name == "plain"


def test_auto_says_what_and_why_once(
    records: Callable[[], dict[str, Backend]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_announced", set())
    limited = Refusal("backend", "another", "this one", "it does not express X")
    has_limit = [True]
    backend_record.register(willing("fast", "it is fast", limits=lambda request: limited if has_limit[0] else None))
    backend_record.register(willing("plain", "the plain formula"))
    with caplog.at_level(logging.INFO, logger="fusemesh"):
        for has_limit[0] in (True, False, False):
            backends.choose("auto", request("attention_decode"))
        backends.choose("plain", request())
    assert [record.getMessage() for record in caplog.records] == [
        "attention_decode: auto chose backend 'plain' (it does not express X)",
        "attention_decode: auto chose backend 'fast' (it is fast)",
    ]


@pytest.mark.usefixtures("records")
def test_names_come_from_use_backend_too() -> None:
    backend_record.register(willing("fast", "it is fast"))
    backend_record.register(willing("plain", "the plain formula"))
    with backends.use_backend("plain"):
        assert backends.choose("auto", request()).name == "plain"
        assert backends.choose("fast", request()).name == "fast"
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', 'plain', 'fast'\), received 'none'"):
        backends.choose("none", request())


@pytest.mark.usefixtures("records")
def test_a_refused_name_raises_with_the_argument_and_who_would_take_the_call() -> None:
    backend_record.register(willing("fast", "it is fast", limits=lambda request: TOO_LARGE))
    backend_record.register(willing("torch", "", limits=lambda request: TOO_LARGE if request.needs_lse else None))
    backend_record.register(willing("reference", ""))
    expected = "v: expected a head dim from 16 to 256 for backend='fast', received 300; use backend='auto'"
    with pytest.raises(ValueError) as error:
        backends.choose("fast", request())
    assert str(error.value) == expected + " or 'reference' or 'torch'"
    with pytest.raises(ValueError) as error:
        backends.choose("fast", request(needs_lse=True))
    assert str(error.value) == expected + " or 'reference'", "a remedy must not name what is refused, too"


@pytest.mark.usefixtures("records")
def test_what_cannot_run_here_raises_with_the_reason() -> None:
    backend_record.register(willing("fast", "", unavailable=lambda device: f"no fast on {device}"))
    backend_record.register(willing("reference", "plain"))
    with pytest.raises(ValueError, match=r"^backend='fast' cannot run here: no fast on cpu. Use backend='auto'"):
        backends.choose("fast", request())
    assert backends.choose("auto", request()).name == "reference"


@pytest.mark.usefixtures("records")
def test_an_operation_that_a_backend_does_not_compute_is_refused_or_handed_on() -> None:
    backend_record.register(Backend("part", {"attention": object()}, instead={"linear": "whole"}))
    backend_record.register(willing("whole", "everything"))
    with pytest.raises(ValueError, match=r"^backend: expected one that computes attention_decode \(whole\), received"):
        backends.choose("part", request("attention_decode"))
    assert backends.choose("part", request("linear")).name == "whole"


def test_implementations_check_by_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called past the choice, an implementation refuses what its record refuses."""
    from fusemesh.kernels.attention.engine import dense

    q = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="q: expected float32, bfloat16 or float16 for backend='cpu'"):
        dense.forward(q, q, q, PLAIN)


class TestTriton:
    def test_dtype_and_each_head_dim(self) -> None:
        refuse = backend_record.records()["triton"].refuse
        with launch.any_device():
            assert refuse(request(dtype=torch.bfloat16)) is None
            assert refuse(request(dtype=torch.float64))[:3] == ("q", "float32, bfloat16 or float16", torch.float64)
            assert refuse(request(head_dims=(15, 16)))[:3] == ("q", "a head dim from 16 to 256", 15)
            assert refuse(request("attention_decode", head_dims=(576, 512))) is None
            too_large = refuse(request("attention_decode", head_dims=(576, 513)))
            assert too_large[:3] == ("v_dim", "a head dim from 16 to 512", 513)

    def test_fp8_by_the_gpu(self) -> None:
        refuse = backend_record.records()["triton"].refuse
        for name, is_there in (("sm_80", False), ("sm_90", True), ("gfx942", False)):
            with launch.any_device(), launch.assume_target(launch.TARGETS[name]):
                refusal = refuse(request(dtype=torch.float8_e4m3fn))
                assert (refusal is None) == is_there, (name, refusal)

    def test_auto_falls_back_to_what_can_compute(self) -> None:
        """A device with compiled kernels, and calls that they cannot do: auto does not raise."""
        with launch.execute_on(InterpretedDevice()), launch.assume_target(launch.TARGETS["sm_80"]):
            assert backends.choose("auto", request()).name == "auto"
            assert backends.automatic(request())[0].name == "triton"
            assert backends.choose("auto", request(dtype=torch.float8_e4m3fn)).name == "reference"
            assert backends.choose("auto", request(dtype=torch.float64)).name == "torch"
            assert backends.choose("auto", request(head_dims=(8, 8))).name == "torch"


def test_the_engine_refuses_dtypes_and_user_mods() -> None:
    from fusemesh.kernels.attention.engine.backend import CPU as ENGINE

    for mods in ((), ("softcap",), ("alibi",), ("softcap", "alibi")):
        assert (
            ENGINE.limits(request(dtype=torch.float16, call=Call(AttentionSpec(1.0, mods=mods, params=(2.0, 4.0)))))
            is None
        )
    assert ENGINE.limits(request(dtype=torch.float64))[:3] == ("q", "float32, bfloat16 or float16", torch.float64)
    refusal = ENGINE.limits(request(call=Call(AttentionSpec(1.0, mods=("softcap", "mine")))))
    assert refusal[:3] == ("score_mod", "softcap and alibi_slopes alone", "'mine'")


def test_registering_again_takes_the_new_record_in_the_old_place(
    records: Callable[[], dict[str, Backend]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ModuleType("first_attention"), ModuleType("second_attention")
    for module in (first, second):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    backend_record.register(Backend("mine", {"attention": first.__name__}))
    backend_record.register(willing("last", "it is here"))
    assert backend_record.implementation("mine", "attention") is first
    backend_record.register(Backend("mine", {"attention": second.__name__}))
    assert backend_record.implementation("mine", "attention") is second and list(records()) == ["mine", "last"]
    backend_record.register(records()["last"], before="mine")
    assert list(records()) == ["last", "mine"]


@pytest.mark.parametrize("name", ["auto", "", "a b", None])
def test_names_that_calls_cannot_give_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"backend\.name: expected an identifier other than 'auto', received"):
        backend_record.register(willing(name, "it is here"))  # type: ignore[arg-type]


def test_unknown_places_and_names_are_refused(records: Callable[[], dict[str, Backend]]) -> None:
    backend_record.register(willing("first", "it is here"))
    with pytest.raises(ValueError, match=r"before: expected None or one of \('first',\), received 'ghost'"):
        backend_record.register(willing("second", "it is here"), before="ghost")
    with pytest.raises(ValueError, match=r"name: expected one of \('first',\), received 'ghost'"):
        backend_record.unregister("ghost")
    assert list(records()) == ["first"]


def test_calls_of_other_threads_go_on_while_backends_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, ended = [], threading.Event()

    def choose() -> None:
        while not ended.is_set():
            try:
                backends.choose("reference", request())
                backends.choose("auto", request())
            except Exception as error:
                failed.append(error)

    before, interval = backend_record.records(), sys.getswitchinterval()
    thread = threading.Thread(target=choose)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(2000):
            backend_record.register(Backend("guest", {"attention": object()}), before="reference")
            backend_record.unregister("guest")
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()
    assert failed == [] and backend_record.records() == before


def test_overlapping_blocks_of_two_threads_leave_nothing_behind() -> None:
    value: Scoped[str] = Scoped("overlapping", "default")
    first, second = value.use("first"), value.use("second")
    contexts = contextvars.copy_context(), contextvars.copy_context()
    contexts[0].run(first.__enter__)
    contexts[1].run(second.__enter__)
    assert value.traced == "second"
    contexts[0].run(first.__exit__, None, None, None)
    assert value.traced == "second" and value.get() == "default"
    contexts[1].run(second.__exit__, None, None, None)
    assert value.traced == value.get() == "default"


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been warned of."""
    monkeypatch.setattr(backends, "_warned", set())


def caught(call: Callable[[], Any]) -> list[str]:
    """Return the warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(x.message) for x in found if "stores scores" in str(x.message)]


@pytest.mark.parametrize("operation", ["attention", "attention_varlen"])
def test_auto_warns_once_where_a_gpu_would_store_the_scores(operation: str, warned: None) -> None:
    """As on a GPU that is absent, whose tensors are fake: nothing compiled runs there."""

    def choose(**options: Any) -> str:
        call, shape = Call(AttentionSpec(1.0, **options)), (2, 16, 8192, 8192)
        asked = request(operation, device=torch.device("cuda"), dtype=torch.bfloat16, call=call, scores=shape)
        return backends.choose("auto", asked).name

    (message,) = caught(lambda: choose(window_left=5))
    for part in (f"{operation}: backend='auto' took 'reference' on cuda", "2 x 16 x 8192 x 8192", "8192 MiB"):
        assert part in message
    assert "name backend='triton'" in message
    assert caught(lambda: choose(window_left=7)) == []
    if operation == "attention":  # packed sequences have one reason, whatever the options are
        assert len(caught(lambda: choose(dropout_p=0.5))) == 1
        assert caught(choose) == []


def test_auto_warns_on_a_cpu_where_it_is_worth_it(warned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, cu, lens = torch.ones(2, 2, 4, 16, dtype=torch.float64), torch.tensor([0, 4]), torch.tensor([3, 4])

    def attend() -> Any:
        return fusemesh.flash_attention(q, q, q, window=(1, 1))

    p = q[0].transpose(0, 1)
    calls = {
        "attention": (attend, "2 x 2 x 4 x 4"),
        "attention_varlen": (lambda: fusemesh.flash_attention_varlen(p, p, p, cu, cu, 4, 4), "1 x 2 x 4 x 4"),
        "attention_decode": (lambda: fusemesh.flash_attention_decode(q, q, q, cache_lens=lens), "2 x 2 x 4 x 4"),
    }
    assert caught(attend) == []
    monkeypatch.setattr(backends, "MOST_SILENT", 0)
    for name, (call, shape) in calls.items():
        (message,) = caught(call)
        assert message.startswith(f"{name}: backend='auto' took 'reference' on cpu") and shape in message
        assert caught(call) == []
    backends._warned.clear()
    assert caught(lambda: fusemesh.flash_attention(q, q, q, backend="reference")) == []
    assert caught(lambda: fusemesh.flash_attention(q.float(), q.float(), q.float(), window=(1, 1))) == []
    meta = q.to("meta")
    assert caught(lambda: fusemesh.flash_attention(meta, meta, meta, window=(1, 1))) == []


def test_the_remedy_under_a_transform_is_one_that_stores_no_scores(
    warned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernel, which elsewhere would be it, is PyTorch's formula there."""
    monkeypatch.setattr(backends, "MOST_SILENT", 0)
    q = torch.ones(1, 2, 4, 16)
    (message,) = caught(lambda: torch.func.jvp(lambda x: fusemesh.flash_attention(x, q, q), (q,), (q,)))
    assert "take gradients by backward()" in message and "(under forward-mode derivatives" in message
    (message,) = caught(lambda: torch.func.vmap(lambda x: fusemesh.flash_attention(x, x, x))(q[None]))
    assert "name backend='cpu'" in message


def test_a_compiled_call_warns_too(warned: None) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        backends._warn_once("attention", "cuda", "reference", "window", "[B, H, Sq, Sk]", "name another")
        return x + 1

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert len(caught(lambda: compiled(torch.ones(2)))) == 1
    assert caught(lambda: compiled(torch.ones(3))) == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("is_left_out", [True, False])
def test_no_blackwell_by_a_triton_that_leaves_fences_out(
    target: str, is_left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from fusemesh.kernels.runtime import fences

    monkeypatch.setattr(fences, "LEFT_OUT", fences.tl.constexpr(is_left_out))
    with fusemesh.emulate(target):
        reason = backends.why_unavailable("triton", "cpu")
    assert ("pip install 'triton>=3.7.1'" in str(reason)) == (is_left_out and target == "sm_100")
