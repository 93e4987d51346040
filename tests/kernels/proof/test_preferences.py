"""The table by which auto takes the faster backend: its file, its classes, and the choice. Layer: kernels, no GPU.

A device stands for the GPU; its launches are recorded and not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh.kernels import backends, env
from fusemesh.kernels.backend_record import OPERATIONS, Request
from fusemesh.kernels.measure import Clock, Roofline, comparison
from fusemesh.kernels.measure.cases import AttentionCase, DecodeCase, LinearCase, self_attention
from fusemesh.kernels.proof import files, preferences
from fusemesh.kernels.runtime import launch

ROOFLINE = Roofline("bfloat16", 1e15, 1e12)
CPU = torch.device("cpu")
ATTENTION = self_attention("bf16", 1, 2, 2, 512, 64, True)
LAYER = LinearCase("fp32", 16, 1024, 1024)


class Device:
    """An executor that runs nothing."""

    target = launch.TARGETS["sm_90"]
    proves = True

    def __init__(self, name: str = "NVIDIA X") -> None:
        self.name = name

    def prepare(self, kernel: Any, grid: Any, args: Any, kwargs: Any) -> str:
        return "hash"

    run = prepare


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setattr(env, "CACHE", str(tmp_path))
    preferences.forget_what_was_read()
    yield tmp_path
    preferences.forget_what_was_read()


@contextlib.contextmanager
def device(name: str = "NVIDIA X") -> Iterator[None]:
    with launch.execute_on(Device(name)):
        yield


def asked(monkeypatch: pytest.MonkeyPatch, case: Any, mode: str, inputs: dict[str, Any]) -> list[Request]:
    """Return the requests of the public function for a case."""
    seen: list[Request] = []

    def prefers(request: Request) -> None:
        seen.append(request)

    with monkeypatch.context() as patched, torch.set_grad_enabled(mode == "training"):
        patched.setattr(preferences, "prefers", prefers)
        leaves = case.leaves(inputs) if mode == "training" else ()
        tape = {**inputs, **{name: inputs[name].detach().requires_grad_() for name in leaves}}
        case.run(tape, "auto")
    return seen


def taken(case: Any, *, training: bool = False) -> str:
    """Return the backend that auto takes for a case on the device."""
    request = comparison.request_of(case, CPU, "training" if training else "inference")
    return backends.automatic(request)[0].name


def write(choices: dict[str, str], name: str = "NVIDIA X") -> Path:
    return preferences.write(name, {key: {"choice": choice, "ms": {choice: 1.0}} for key, choice in choices.items()})


def class_of(case: Any, mode: str = "inference") -> str:
    name = preferences.class_of(comparison.request_of(case, CPU, mode))
    assert name is not None
    return name


def without_class(case: Any) -> str | None:
    return preferences.class_of(comparison.request_of(case, CPU, "inference"))


def test_every_case_has_a_class_of_its_own() -> None:
    names = [
        class_of(case, mode)
        for case in comparison.cases()
        for mode in ("inference", "training")[: len(case.directions)]
    ]
    assert len(names) == len(set(names)) > 300


REQUESTED = (
    ATTENTION,
    self_attention("fp16", 1, 4, 2, 512, 128, True),
    self_attention("fp32", 1, 2, 2, 512, 64, False, mask="bn"),
    self_attention("bf16", 1, 2, 2, 512, 64, False, mask="bmn"),
    self_attention("bf16", 1, 2, 2, 512, 64, False, bias="bhmn"),
    AttentionCase("fp32", Sq=64, Sk=128, D=64, Dv=64, causal=True, align="bottom_right"),
    LAYER,
    LinearCase("fp32", 16, 1024, 1024, "silu", gated=True),
    LinearCase("bf16", 70, 1024, 1024, "gelu"),
    DecodeCase("fp32", H=16, Hkv=2, D=128, Dv=128, capacity=512, lens=(512, 3)),
)


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case in REQUESTED for mode in ("inference", "training")[: len(case.directions)]],
    ids=str,
)
def test_a_case_s_class_is_that_of_the_public_function_s_request(
    monkeypatch: pytest.MonkeyPatch, case: Any, mode: str
) -> None:
    inputs = case.inputs()
    (request,) = asked(monkeypatch, case, mode, inputs)
    with torch.set_grad_enabled(mode == "training"):
        assert preferences.class_of(request) == preferences.class_of(comparison.request_of(case, CPU, mode))


def test_calls_of_no_class() -> None:
    assert without_class(self_attention("bf16", 1, 2, 2, 512, 288, True)) is None  # no kernel of ours
    assert without_class(AttentionCase("bf16", Sq=1, Sk=4096, D=64, Dv=64)) is None  # one query
    assert without_class(AttentionCase("bf16", Sq=512, Sk=512, D=64, Dv=64, causal=True, origin=(5, 0, 0, 0))) is None
    assert without_class(LinearCase("bf16", 64, 512, 4096)) is None
    biased = next(case for case in comparison.cases() if isinstance(case, AttentionCase) and case.bias)
    constant = comparison.request_of(biased, CPU, "training")
    measured = {class_of(case, "training") for case in comparison.cases()}
    assert preferences.class_of(constant) in measured
    constant.call.bias.requires_grad_(False)
    assert preferences.class_of(constant) not in measured
    for operation in OPERATIONS:  # packed sequences, and requests that say less than a call does
        assert preferences.class_of(Request(operation, CPU, torch.bfloat16, (64, 64))) is None


def test_auto_takes_what_the_table_says(caplog: pytest.LogCaptureFixture) -> None:
    with device():
        before = taken(ATTENTION)
        write({class_of(ATTENTION): "reference", class_of(LAYER): "reference"})
        assert taken(ATTENTION) == "reference"
        assert taken(LAYER) == "reference"
        assert taken(ATTENTION, training=True) == before, "a class that the table does not have"
        _, why = backends.automatic(comparison.request_of(ATTENTION, CPU, "inference"))
        assert why == "the fastest here, by fusemesh bench --compare"
        assert taken(self_attention("fp16", 1, 2, 2, 512, 64, True)) == before
    with device("NVIDIA Y"):
        assert taken(ATTENTION) == before
    assert preferences.prefers(comparison.request_of(ATTENTION, CPU, "inference")) is None, "on no device"


def test_what_is_preferred_and_cannot_do_the_call_is_passed_over() -> None:
    with device():
        before = taken(ATTENTION)
        for absent in ("another", ""):
            write({class_of(ATTENTION): absent})
            assert taken(ATTENTION) == before
        request = comparison.request_of(ATTENTION, CPU, "inference")
        request.needs_lse = True
        write({class_of(ATTENTION): "torch"})
        assert taken(ATTENTION) == "torch"
        assert backends.automatic(request)[0].name != "torch", "PyTorch's kernel returns no log-sum-exp"
        assert backends.automatic(request, without=("torch",))[0].name != "torch"


def test_under_torch_compile() -> None:
    """Sizes that are known choose; symbols that may be of several classes choose nothing, and are not guarded on."""
    static, dynamic = (self_attention("fp32", 1, 2, 2, length, 64, True) for length in (96, 80))
    x, y, z = static.inputs()["q"], dynamic.inputs()["q"], dynamic.inputs()["q"]
    torch._dynamo.mark_dynamic(y, 2)  # raises where a guard narrows it
    torch._dynamo.mark_dynamic(z, 2, min=2, max=5000)  # of the first and the second class
    w = torch.ones(1024, 1024)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return fusemesh.flash_attention(x, x, x, causal=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return fusemesh.fused_linear(x, w)

    code: list[str] = []

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=keeping(code), fullgraph=True)

    classes = (class_of(static).replace("S512", f"S{length}") for length in (512, 2048, 8192))
    write({**dict.fromkeys(classes, "reference"), class_of(LAYER): "reference"})
    with device(), torch.no_grad():
        torch.testing.assert_close(compiled(attend)(x), attend(x))
        assert "attention_forward" not in code.pop(), "the reference's formulas are traced into the graph"
        for symbolic in (y, z):
            compiled(attend)(symbolic)
            assert "attention_forward" in code.pop(), "an op: the table chooses nothing for these sizes"
        torch.testing.assert_close(compiled(layer)(torch.ones(16, 1024)), w.sum(1).expand(16, -1))


def keeping(found: list[str]) -> Any:
    """Return a backend of torch.compile that keeps the code of graphs."""

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph.code)
        return graph

    return backend


def test_a_backend_asked_for_by_name_is_taken_whatever_the_table_says() -> None:
    with device():
        write({class_of(ATTENTION): "torch"})
        assert backends.choose("reference", comparison.request_of(ATTENTION, CPU, "inference")).name == "reference"


@pytest.mark.parametrize("damage", ["empty", "truncated", "altered", "no choice", "versions", "another device"])
def test_a_damaged_or_foreign_table_is_none(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    write({class_of(LAYER): "torch"}, "NVIDIA Z")
    path = write({class_of(ATTENTION): "torch"})
    text = path.read_text()
    if damage == "no choice":
        preferences.write("NVIDIA X", {class_of(ATTENTION): {"ms": {}}})
    elif damage == "versions":
        there = preferences._versions()
        monkeypatch.setattr(preferences, "_versions", lambda: {**there, "torch": "1.0"})
        path.rename(preferences.path_of("NVIDIA X") or "")
    elif damage == "another device":
        path.rename(preferences.path_of("NVIDIA Y") or "")
    else:
        texts = {"empty": "", "truncated": text[:-9], "altered": text.replace('"torch"', '"reference"', 1)}
        path.write_text(texts[damage])
    name = "NVIDIA Y" if damage == "another device" else "NVIDIA X"
    assert preferences.read(name) is None
    with device(name):
        assert preferences.prefers(comparison.request_of(ATTENTION, CPU, "inference")) is None


def test_the_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write({class_of(ATTENTION): "torch"})
    read: list[Path] = []
    real = files.read
    monkeypatch.setattr(files, "read", lambda path, *more: read.append(path) or real(path, *more))
    request = comparison.request_of(ATTENTION, CPU, "inference")
    with device():
        assert [preferences.prefers(request) for _ in range(3)] == ["torch"] * 3
    with device("NVIDIA Y"):
        assert [preferences.prefers(request) for _ in range(3)] == [None] * 3
    assert len(read) == 2


def test_forgetting(cache: Path) -> None:
    write({class_of(ATTENTION): "torch"})
    write({class_of(ATTENTION): "torch"}, "NVIDIA Y")
    (cache / "preferences" / "broken.json").touch()
    with device():
        request = comparison.request_of(ATTENTION, CPU, "inference")
        assert preferences.prefers(request) == "torch"
        assert len(preferences.forget()) == 3
        assert preferences.prefers(request) is None
    assert preferences.forget() == []


def test_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "cache_folder", lambda: None)
    assert preferences.read("NVIDIA X") is None and preferences.forget() == []
    with device():
        assert preferences.prefers(comparison.request_of(ATTENTION, CPU, "inference")) is None


def measured(seconds: dict[tuple[str, str], float | str]) -> comparison.Compare:
    """Return a measurement that knows its results: by contender and direction, seconds or why there are none."""

    def compare(case: Any, direction: str, where: Any, roofline: Any, contenders: Any, **times: Any) -> list[Any]:
        rows = []
        for contender in contenders:
            taken = seconds[contender.name, direction]
            row = {"op": case.op, "direction": direction, "case": case.name, "contender": contender.name}
            rows.append({**row, "check": taken} if isinstance(taken, str) else {**row, "check": "ok", "seconds": taken})
        return rows

    return compare


BOTH = {("triton", "forward"): 1.0, ("triton", "backward"): 3.0, ("torch", "forward"): 2.0, ("torch", "backward"): 1.0}


def compared(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[str, str], float | str]) -> dict[str, Any]:
    real = backends.automatic
    monkeypatch.setattr(backends, "automatic", lambda request, without=(): real(request, {*without, "cpu"}))
    return comparison.compare_all(CPU, Clock(1.0), [ATTENTION], ROOFLINE, measured(seconds))


@pytest.mark.parametrize(
    ("changed", "inference", "training"),
    [
        ({}, "triton", "torch"),
        ({("triton", "forward"): 2.0}, "triton", "torch"),  # as fast
        ({("triton", "backward"): 1.5}, "triton", "triton"),
        ({("triton", "forward"): "WRONG: out"}, "torch", "torch"),
        ({("triton", "backward"): "WRONG: dq"}, "triton", "torch"),
        ({("torch", "backward"): "did not run: no memory"}, "triton", "triton"),
        ({("torch", "forward"): "did not run"}, "triton", "triton"),
    ],
    ids=str,
)
def test_the_faster_right_one_is_chosen(
    monkeypatch: pytest.MonkeyPatch, changed: dict[tuple[str, str], float | str], inference: str, training: str
) -> None:
    found = compared(monkeypatch, {**BOTH, **changed})
    choices = {name: entry["choice"] for name, entry in found["classes"].items()}
    assert choices == {class_of(ATTENTION): inference, class_of(ATTENTION, "training"): training}
    assert len(found["rows"]) == 4 and found["left_out"] == []
    table = comparison.table(found["classes"]).splitlines()
    assert [line.split()[-1] for line in table] == ["takes", inference, training]


def test_where_both_are_wrong_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(monkeypatch, dict.fromkeys(BOTH, "WRONG"))["classes"] == {}


def test_what_is_left_out_is_named() -> None:
    def no_memory(*_: Any, **__: Any) -> list[Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 GiB")

    found = comparison.compare_all(CPU, Clock(1.0), [ATTENTION], ROOFLINE, no_memory)
    assert found["left_out"] == [f"OutOfMemoryError: attention {ATTENTION.name} (CUDA out of memory.)"]
    clock = Clock(1e-9)
    found = comparison.compare_all(CPU, clock, [ATTENTION, LAYER], ROOFLINE, no_memory)
    assert found["left_out"] == [f"lack of time: {case.op} {case.name}" for case in (ATTENTION, LAYER)]


@pytest.mark.parametrize(
    "features", [{"causal": True}, {"mask": "bn"}, {"mask": "bmn"}, {"mask": "bhmn", "bias": "bhmn"}], ids=str
)
def test_the_real_contest_on_a_small_case(monkeypatch: pytest.MonkeyPatch, features: dict[str, Any]) -> None:
    """What a GPU does, on CPU tensors: Triton does not run here, and the other one is checked and timed."""
    monkeypatch.setattr(comparison, "TIMES", {"seconds": 0.0, "least": 1, "pause": 0.0})
    case = self_attention("fp32", 2, 2, 1, 64, 64, **{"causal": False, **features})
    found = comparison.compare_all(CPU, Clock(1.0), [case], ROOFLINE)
    assert found["left_out"] == []
    for direction in case.directions:
        ours, *others = (row for row in found["rows"] if row["direction"] == direction)
        assert ours["check"].startswith("did not run: ValueError")
        for other in others:  # the engine's backward is not timed
            assert other["check"] == "ok" and other["seconds"] > 0
    assert {entry["choice"] for entry in found["classes"].values()} == {found["rows"][1]["contender"]}
