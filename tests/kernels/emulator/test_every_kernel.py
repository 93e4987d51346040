"""Layer: kernels, compiled for GPUs that are absent and run by the emulator. Every kernel keeps the error budget."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fusemesh
from bench.emulated import tables
from bench.emulated.tables import Entry
from bench.emulated.verification import BY_CHANCE, COPIES, verify
from fusemesh.kernels.emulator import emulate
from fusemesh.kernels.measure.cases import AttentionCase, LinearCase
from fusemesh.kernels.measure.cases.common import Tensors, table_mod
from fusemesh.kernels.runtime.launch import TARGETS, any_device, assume_target, intercept
from fusemesh.kernels.testing.table_mod import TABLE

KERNELS = Path(__file__).resolve().parents[3] / "kernels"
SHORT = [(target, entry) for target in tables.EMULATED for entry in tables.short(target)]
CHANCE = [(target, entry) for target in tables.EMULATED for entry in tables.by_chance(target)]
ALL = [(target, entry) for target in tables.EMULATED for entry in tables.entries(target)]


def named(value: Any) -> str | None:
    return str(value) if isinstance(value, (str, Entry)) else None


@pytest.mark.parametrize(("target", "entry"), SHORT, ids=named)
def test_a_call_of_each_kernel_keeps_the_budget(target: str, entry: Entry) -> None:
    assert verify(entry, target).shares


@pytest.mark.slow
@pytest.mark.parametrize(("target", "entry"), ALL, ids=named)
def test_every_call_of_the_matrix_keeps_the_budget(target: str, entry: Entry) -> None:
    assert verify(entry, target).shares


@pytest.mark.slow
@pytest.mark.parametrize(("target", "entry"), CHANCE, ids=named)
def test_orders_by_chance_give_the_same_bits(target: str, entry: Entry) -> None:
    assert verify(entry, target, (COPIES[0], *BY_CHANCE)).shares


@pytest.mark.parametrize("target", tables.EMULATED)
def test_a_score_mods_pair_is_its_twin(target: str) -> None:
    numbers = torch.randn(TABLE, generator=torch.Generator().manual_seed(0))
    with emulate(target) as emulator:
        fusemesh.check_score_mod(table_mod(numbers))
    assert "mod_pair_kernel" in {row["kernel"] for row in emulator.log}


@pytest.mark.parametrize("target", tables.EMULATED)
def test_the_short_part_holds_every_kernel(target: str) -> None:
    source = "\n".join(path.read_text() for path in KERNELS.rglob("*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))
    started: set[str] = set()

    def see(kernel: Any, grid: Any, args: Any, kwargs: dict[str, Any]) -> None:
        started.add(kernel.__name__)
        # triton 3.9 warns where this is left to it, and 3.10 changes what is left to it.
        assert "enable_fp_fusion" in kwargs, kernel.__name__

    with any_device(), assume_target(TARGETS[target]), intercept(see):
        for entry in tables.short(target):
            entry.case.compute(entry.case.inputs(), "triton")
    assert len(kernels) > 10
    assert kernels - started == {"mod_pair_kernel"}  # that of the test above


def planted(monkeypatch: pytest.MonkeyPatch, kind: type, change: Any) -> None:
    """Let cases of this kind compute what ``change`` makes of their results and of how many calls there were."""
    compute, calls = kind.compute, 0

    def changed(self: Any, x: Any, backend: str) -> Tensors:
        nonlocal calls
        calls += 1
        return change(compute(self, x, backend), x, calls)

    monkeypatch.setattr(kind, "compute", changed)


def test_a_value_bits_and_surroundings_that_are_wrong_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(tables.linear("fp32", m=33, n=32, k=48), surrounded=True)
    assert set(verify(entry, "sm_80").shares) == {"y", "dx", "dw", "dbias"}
    with monkeypatch.context() as patch:
        planted(patch, LinearCase, lambda y, x, calls: {**y, "dw": y["dw"] * 1.01})
        with pytest.raises(AssertionError, match="outside the error budget: dw"):
            verify(entry, "sm_80")
    with monkeypatch.context() as patch:
        other = lambda y, calls: torch.nextafter(y, y + 1) if calls == 2 else y  # noqa: E731
        planted(patch, LinearCase, lambda y, x, calls: {**y, "dw": other(y["dw"], calls)})
        with pytest.raises(AssertionError, match=r"other bits than .* in dw"):
            verify(entry, "sm_80")

    def spoilt(y: Tensors, x: Any, calls: int) -> Tensors:
        x["w"]._base[0] = 0.0
        return y

    with monkeypatch.context() as patch:
        planted(patch, LinearCase, spoilt)
        with pytest.raises(AssertionError, match=r"w: \d+ elements outside the view were written"):
            verify(entry, "sm_80")
    with monkeypatch.context() as patch:
        patch.setattr(LinearCase, "compute", lambda self, x, backend: {"y": x["dy"]})
        with pytest.raises(AssertionError, match="expected 1 call of the triton backend, counted 0"):
            verify(entry, "sm_80")


def test_lengths_cover_what_loops_do() -> None:
    swept = [case for case in tables.swept_attention("sm_80") if isinstance(case, AttentionCase)]
    plain = dataclasses.replace(tables.attention(H=1), Sq=19)
    # The forward's tile is 128 keys, and three of them are on their way at a time.
    counts = {(case.Sk // 128, case.Sk % 128 > 0) for case in swept if dataclasses.replace(plain, Sk=case.Sk) == case}
    assert counts >= {(0, True), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True), (4, True)}
