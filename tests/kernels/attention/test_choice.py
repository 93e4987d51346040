"""Floor 1, attention: the one rule by which all three ops choose a backend."""

from __future__ import annotations

import logging

import pytest
import torch

from fusemesh.kernels import backends
from fusemesh.kernels.attention.call.choice import Refusal, choose, why_not_engine, why_not_triton

CPU = torch.device("cpu")
NO_CPU = {"cpu": ("one that does X", "'cpu'", "use another")}
TOO_LARGE = Refusal("v", "a head dim from 16 to 256", 300)


def chosen(
    backend: str = "auto",
    *,
    refused: dict | None = None,
    unfit: Refusal | None = None,
    engine: Refusal | None = TOO_LARGE,
) -> str:
    """The choice on a CPU; ``unfit`` keeps Triton out, ``engine`` the C++ engine."""
    options = {"operation": "an_op", "kernels": "its_kernels", "otherwise": ("reference", "the plain formula")}
    return choose(backend, CPU, refused=refused or {}, unfit={"triton": unfit, "cpu": engine}, **options)


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "proven", lambda kernels, device: kernels == "its_kernels" and device == CPU)


def test_auto_takes_what_the_op_says_until_its_kernels_are_proven() -> None:
    assert chosen() == "reference"


@pytest.mark.usefixtures("proven")
def test_auto_takes_proven_kernels_that_can_do_the_call() -> None:
    assert chosen() == "triton"
    assert chosen(unfit=TOO_LARGE) == "reference"


def test_auto_takes_the_engine_where_it_is_there_and_can_do_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_unavailable", lambda backend, device: None)
    assert chosen(engine=None) == "cpu"
    assert chosen() == "reference"
    monkeypatch.setattr(backends, "why_unavailable", lambda backend, device: f"no {backend} on {device}")
    assert chosen(engine=None) == "reference"


@pytest.mark.usefixtures("proven")
def test_auto_says_what_and_why_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level(logging.INFO, logger="fusemesh"):
        for unfit in (TOO_LARGE, None, None):
            chosen(unfit=unfit)
        chosen("reference")
    assert [record.getMessage() for record in caplog.records] == [
        "an_op: auto chose backend 'reference' (the plain formula)",
        "an_op: auto chose backend 'triton' (proven on this GPU)",
    ]


def test_names_come_from_use_backend_too() -> None:
    with backends.use_backend("torch"):
        assert chosen() == "torch"
        assert chosen("reference") == "reference"
    with pytest.raises(ValueError, match="one that does X"), backends.use_backend("cpu"):
        chosen(refused=NO_CPU)


def test_a_refused_name_raises_before_anything_else_is_looked_at() -> None:
    with pytest.raises(ValueError, match=r"^backend: expected one that does X, received 'cpu'; use another$"):
        chosen("cpu", refused=NO_CPU, unfit=TOO_LARGE)


@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_fused_backends_name_the_argument_that_keeps_them_out(name: str) -> None:
    expected = f"v: expected a head dim from 16 to 256 for backend='{name}', received 300; use backend="
    with pytest.raises(ValueError) as error:
        chosen(name, unfit=TOO_LARGE, engine=TOO_LARGE)
    assert str(error.value) == expected + "'auto' or 'reference' or 'torch'"
    with pytest.raises(ValueError) as error:
        chosen(name, unfit=TOO_LARGE, refused={"torch": ("another", "'torch'", "use another")})
    assert str(error.value) == expected + "'auto' or 'reference'", "a remedy must not name what is refused, too"


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_what_keeps_fused_backends_out_is_nothing_to_the_others(name: str) -> None:
    assert chosen(name, unfit=TOO_LARGE) == name


def test_a_name_that_cannot_run_here_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_unavailable", lambda backend, device: f"no {backend} on {device}")
    with pytest.raises(ValueError, match="backend='triton' cannot run here: no triton on cpu"):
        chosen("triton")
    assert chosen() == "reference"


def test_why_not_triton_looks_at_the_dtype_and_at_each_head_dim() -> None:
    sizes = (("q", 16, (16, 256)), ("v_dim", 512, (16, 512)))
    assert why_not_triton(torch.bfloat16, sizes) is None
    assert why_not_triton(torch.float64, sizes) == ("q", "float32, bfloat16 or float16", torch.float64)
    assert why_not_triton(torch.bfloat16, (*sizes, ("k", 15, (16, 256)))) == ("k", "a head dim from 16 to 256", 15)
    assert why_not_triton(torch.bfloat16, (*sizes, ("v_dim", 513, (16, 512)))) == (
        "v_dim",
        "a head dim from 16 to 512",
        513,
    )


def test_why_not_engine_looks_at_the_dtype_and_the_mods() -> None:
    for mods in ((), ("softcap",), ("alibi",), ("softcap", "alibi")):
        assert why_not_engine(torch.float16, mods) is None
    assert why_not_engine(torch.float64, ()) == ("q", "float32, bfloat16 or float16", torch.float64)
    refusal = why_not_engine(torch.float32, ("softcap", "mine"))
    assert refusal == ("score_mod", "softcap and alibi_slopes alone", "'mine'")
