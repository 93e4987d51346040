"""Layer: kernels, ahead of time. The loss's kernels in every shipped tile, as machine code for absent GPUs.

The launchers themselves choose the tiles, on tensors whose memory nobody reads, so that the code is what a GPU would
run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusemesh.kernels import aot
from fusemesh.kernels.runtime.launch import TARGETS
from fusemesh.kernels.vocab_loss.chunked import Head
from fusemesh.kernels.vocab_loss.gpu import loss, tiles
from tests.support.ptxas_log import ptxas_log

pytestmark = pytest.mark.aot

N, V = 64, 4097
# A weight of 2 GiB and more, which AMD's targets address in another way.
LARGE = 300_000
# Matrix instructions of each target: mma.sync, wgmma, tcgen05, mfma.
MATRIX = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTC",), "gfx942": ("v_mfma",)}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHIPPED = {(op, target, dtype, form): tile for op, target, dtype, form, tile in tiles.shipped()}
Case = tuple[str, torch.dtype, str, bool]  # target, dtype, form, has_bias


def launches(
    dtype: torch.dtype, form: str, has_bias: bool, is_capped: bool | None = None, V: int = V
) -> Callable[[], None]:
    """The forward and one chunk of the backward; unaligned with a softcap, unless that is said."""
    E = 4097 if form == "unaligned" else 4096
    cap = 30.0 if (form != "plain" if is_capped is None else is_capped) else None

    def new(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def run() -> None:
        h, head, local = new(N, E), Head(new(V, E), new(V) if has_bias else None, 1.0, cap), new(N, dtype=torch.int64)
        loss.forward(h, head, local)
        loss.backward(new(3, N, dtype=torch.float32), h, head, local, (False, False, has_bias), width=4096)

    return run


def faults(report: aot.Report, case: Case) -> list[str]:
    """What is wrong with the machine code of a case."""
    target, dtype, form, _ = case
    tile = SHIPPED[report.kernel.removeprefix("vocab_loss_").removesuffix("_kernel"), target, dtype, form]
    found = {
        "another tile": not report.constants.items() >= tiles.launch_arguments(tile).items(),
        "spills": report.spill_stores + report.spill_loads > 0,
        "more shared memory than the GPU has": not report.fits,
        f"other matrix instructions than {MATRIX[target]}": not report.tensor_core
        or not all(name.startswith(MATRIX[target]) for name in report.tensor_core),
        "atomics, so that results may differ from run to run": bool(report.atomics),
    }
    return [fault for fault, is_so in found.items() if is_so]


def check(cases: list[Case], *more: Any) -> None:
    """Compile every case; fail with a table of what is wrong."""
    wrong = []
    for case in cases:
        reports = aot.compile_launches(launches(*case[1:], *more), case[0])
        assert {x.kernel for x in reports} == {"vocab_loss_forward_kernel", "vocab_loss_dz_kernel"}
        bad = [(x, faults(x, case)) for x in reports]
        wrong += [f"{case}: {'; '.join(found)}\n{aot.table([x])}" for x, found in bad if found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("target", MATRIX)
def test_a_head_with_softcap_and_bias(target: str) -> None:
    check([(target, torch.bfloat16, "capped", True)])


@pytest.mark.slow
def test_other_dtypes_and_forms() -> None:
    check([("sm_90", torch.float32, "plain", False), ("sm_80", torch.float16, "unaligned", True)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", MATRIX)
def test_every_shipped_tile(target: str, dtype: str) -> None:
    for columns in (V, LARGE) if target == "gfx942" else (V,):
        for has_bias in (False, True):
            check([(target, TYPES[dtype], form, has_bias) for form in tiles.FORMS], None, columns)
            check([(target, TYPES[dtype], "unaligned", has_bias)], False, columns)


def remarks(dtype: torch.dtype, form: str) -> list[str]:
    """What ptxas says of both kernels beside its result, on sm_90."""
    items = aot.record_launches(launches(dtype, form, True), TARGETS["sm_90"])
    return [ptxas_log(item, TARGETS["sm_90"]) for item in items[:2]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_hoppers_matrix_instructions_stay_asynchronous(dtype: str) -> None:
    for form in ("plain", "capped"):
        assert not any("wgmma" in text for text in remarks(TYPES[dtype], form))


def test_a_tile_that_spills_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles._TILES, ("dz", "capped", 2), tiles.Tile(128, 256, 64, 8))
    case = ("sm_90", torch.bfloat16, "capped", False)
    (report,) = (x for x in aot.compile_launches(launches(*case[1:]), "sm_90") if "dz" in x.kernel)
    assert set(faults(report, case)) == {"another tile", "spills"}
