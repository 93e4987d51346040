"""Layer: kernels, ahead of time. The linear layer's kernels in every shipped tile, as machine code for absent GPUs.

The launchers themselves choose the tiles, on tensors without memory and of a real layer's sizes, so that the code is
what a GPU would run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusemesh.kernels import aot
from fusemesh.kernels.matmul import ops
from fusemesh.kernels.matmul.api import ACTIVATIONS
from fusemesh.kernels.matmul.gpu import linear as triton_matmul
from fusemesh.kernels.matmul.gpu import tiles
from fusemesh.kernels.runtime.launch import TARGETS
from tests.support.ptxas_log import ptxas_log

pytestmark = pytest.mark.aot

# (M, N, K) for which the launchers choose the tile of that size, whatever the target and dtype.
SHAPES = {"large": (8192, 4096, 4096), "small": (512, 512, 512), "skinny": (16, 4096, 4096)}
# Rows that are moved element by element: only N, as a vocabulary's, only K, or both.
ODD = {"N": (8192, 50257, 4096), "K": (8192, 4096, 4097), "N and K": (8192, 50257, 4097)}
SHAPES |= {"unaligned": ODD["N and K"], "unaligned skinny": (16, 50257, 4097)}
# Matrix instructions of each target: mma.sync, wgmma, tcgen05, mfma. The 16 rows of a skinny tile are too few for
# wgmma and tcgen05, which take 64 and more.
MATRIX = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTC",), "gfx942": ("v_mfma",)}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# op, target, dtype, form, size
Case = tuple[str, str, torch.dtype, str, str]
SHIPPED: dict[Case, tiles.Tile] = {
    (op, target.name, dtype, form, size): tile for op, target, dtype, form, size, tile in tiles.shipped()
}


def activations(op: str, form: str) -> tuple[str | None, ...]:
    """Those that make code of its own: forward computes them, backward sees the dtypes in which slopes are kept."""
    if form == "plain":
        return (None,)
    if op == "forward":
        return tuple(ACTIVATIONS)
    return ("silu", "relu2") if form == "sloped" else ("silu",)


def launches(
    op: str, dtype: torch.dtype, form: str, shape: tuple[int, int, int], activation: str | None
) -> Callable[[], None]:
    """One launch of ``op``, with the bias and every result that the form has."""
    M, N, K = shape
    gated = form == "gated"
    slope_dtype = ops.slope_dtype(dtype, activation, gated)

    def new(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def run() -> None:
        x, w, w_up = new(M, K), new(N, K), new(N, K) if gated else None
        if op == "forward":
            triton_matmul.forward(
                x,
                w,
                new(N),
                w_up,
                activation=activation,
                save_slope=activation is not None,
                save_slope_up=gated,
                slope_dtype=slope_dtype,
            )
            return
        weights = op == "wgrad"
        triton_matmul.backward(
            new(M, N),
            x,
            w,
            w_up,
            None if activation is None else new(M, N, dtype=slope_dtype),
            new(M, N) if gated else None,
            x_grad=not weights,
            w_grad=weights,
            bias_grad=weights,
            w_up_grad=weights and gated,
        )

    return run


def faults(report: aot.Report, case: Case) -> list[str]:
    """What is wrong with the machine code of a case."""
    op, target, dtype, form, size = case
    tile = SHIPPED[case]
    bound = tiles.shared_memory(tile, op, TARGETS[target], dtype, form)
    matrix = ("HMMA",) if "skinny" in size and target != "gfx942" else MATRIX[target]
    found = {
        "another tile": not report.constants.items() >= tile.launch_arguments(op).items(),
        # None is allowed: for each that was found there was a tile without.
        "spills": report.spill_stores + report.spill_loads > 0,
        "more shared memory than the GPU has": not report.fits,
        f"more shared memory than tiles.shared_memory's {bound}": report.shared_memory > bound,
        f"other matrix instructions than {matrix}": not report.tensor_core
        or not all(name.startswith(matrix) for name in report.tensor_core),
        "atomics, so that results may differ from run to run": bool(report.atomics),
    }
    return [fault for fault, is_so in found.items() if is_so]


def check(
    cases: list[Case],
    select: Callable[[Case], tuple[str | None, ...]],
    shape: tuple[int, int, int] | None = None,
) -> None:
    """Compile every case with its activations, on its size's shape or ``shape``; fail with a table of what is wrong."""
    assert cases
    wrong = []
    for case in cases:
        op, target, dtype, form, size = case
        for activation in select(case):
            (report,) = aot.compile_launches(launches(op, dtype, form, shape or SHAPES[size], activation), target)
            found = faults(report, case)
            if found:
                wrong.append(f"{case}, {activation}: {'; '.join(found)}\n{aot.table([report])}")
    assert not wrong, "\n".join(wrong)


def first_activation(case: Case) -> tuple[str | None, ...]:
    # The dearest for forward (erf), and the widest slopes for backward.
    return (None if case[3] == "plain" else "gelu",)


def all_activations(case: Case) -> tuple[str | None, ...]:
    return activations(case[0], case[3])


@pytest.mark.parametrize("op", tiles.OPS)
def test_large_bf16_tiles_for_hopper(op: str) -> None:
    check([(op, "sm_90", torch.bfloat16, form, "large") for form in tiles.FORMS], first_activation)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_one_tile_of_each_op_elsewhere(target: str) -> None:
    forms = {"forward": "plain", "dgrad": "gated", "wgrad": "sloped"}
    check([(op, target, torch.bfloat16, form, "large") for op, form in forms.items()], first_activation)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_vocabulary_of_50257_spills_nothing(target: str) -> None:
    """In the tiles for rows on 16 bytes these kernels spill from 24 bytes to 14 KiB."""
    cases = [(op, "plain") for op in tiles.OPS] + [("forward", "sloped"), ("dgrad", "gated")]
    check([(op, target, torch.bfloat16, form, "unaligned") for op, form in cases], first_activation, ODD["N"])


def test_the_same_in_tiles_for_aligned_rows_is_found() -> None:
    """What the choice would be if it did not look at strides."""
    case = ("forward", "sm_90", torch.bfloat16, "sloped", "unaligned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_matmul, "_is_aligned", lambda *_: True)
        (report,) = aot.compile_launches(launches("forward", torch.bfloat16, "sloped", ODD["N"], "gelu"), "sm_90")
    assert {"spills", "another tile"} <= set(faults(report, case))


@pytest.mark.slow
@pytest.mark.parametrize("odd", ["N", "K"])
@pytest.mark.parametrize("target", MATRIX)
@pytest.mark.parametrize("op", tiles.OPS)
def test_every_unaligned_tile_where_one_of_the_two_is_odd(op: str, target: str, odd: str) -> None:
    cases = [case for case in SHIPPED if case[:2] == (op, target) and case[4] == "unaligned"]
    check(cases, first_activation, ODD[odd])


def test_tiles_of_other_dtypes_and_sizes() -> None:
    check(
        [
            ("forward", "sm_90", torch.float32, "sloped", "large"),
            ("wgrad", "sm_90", torch.float16, "sloped", "small"),
            ("dgrad", "sm_90", torch.bfloat16, "gated", "skinny"),
            ("forward", "sm_90", torch.bfloat16, "gated", "unaligned skinny"),
        ],
        first_activation,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", MATRIX)
@pytest.mark.parametrize("op", tiles.OPS)
def test_every_shipped_tile(op: str, target: str, dtype: str) -> None:
    check([case for case in SHIPPED if case[:3] == (op, target, TYPES[dtype])], all_activations)


def remarks(case: Case, activation: str | None) -> str:
    """What ptxas says of the kernel beside its result."""
    op, target, dtype, form, size = case
    (item,) = aot.record_launches(launches(op, dtype, form, SHAPES[size], activation), TARGETS[target])
    return ptxas_log(item, TARGETS[target])


def check_asynchronous(cases: list[Case], select: Callable[[Case], tuple[str | None, ...]]) -> None:
    """ptxas serialises wgmma where it cannot follow the accumulators, at a great loss of speed, and only remarks it."""
    found = {(case, a): remarks(case, a) for case in cases for a in select(case)}
    assert found and not any("wgmma" in text for text in found.values()), found


def test_hoppers_matrix_instructions_stay_asynchronous() -> None:
    # Those whose neighbours in the table do not.
    check_asynchronous(
        [
            ("dgrad", "sm_90", torch.bfloat16, "sloped", "small"),
            ("wgrad", "sm_90", torch.float16, "sloped", "small"),
        ],
        first_activation,
    )


def test_serialised_matrix_instructions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel that does not wait for the product which reads its registers, and a tile for which ptxas notices.
    monkeypatch.setattr(triton_matmul, "_waits", lambda *_: False)
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.Tile(64, 64, 64, 4))
    assert "C7515" in remarks(("dgrad", "sm_90", torch.bfloat16, "sloped", "small"), "silu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", tiles.OPS)
def test_all_of_hoppers_matrix_instructions_stay_asynchronous(op: str, dtype: str) -> None:
    cases = [case for case in SHIPPED if case[:3] == (op, "sm_90", TYPES[dtype]) and case[4] in ("large", "small")]
    check_asynchronous(cases, all_activations)


def test_faults_are_found() -> None:
    case = ("forward", "sm_90", torch.bfloat16, "plain", "large")
    # What would be wrong for a launch without a tile of the table, too large, too slow and in no fixed order.
    report = aot.Report(
        kernel="kernel",
        target="sm_90",
        constants={},
        registers=255,
        spill_stores=4,
        spill_loads=0,
        loop_spills=0,
        shared_memory=1 << 20,
        shared_memory_limit=1 << 17,
        tensor_core={"HMMA": 1},
        atomics={"RED": 1},
        instructions=9,
        launches=1,
        seconds=0.0,
    )
    assert len(faults(report, case)) == 6
