"""Stand-ins for a GPU in a dry run: launches are recorded, and known values take the place of their results."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bench.gpu.verification import recorded
from fusemesh.kernels.measure import contest, results, tile_bench
from fusemesh.kernels.measure.cases import (
    AttentionCase,
    Case,
    DecodeCase,
    LinearCase,
    PackedCase,
    VocabLossCase,
    self_attention,
)
from fusemesh.kernels.measure.cases.common import Inputs, Tensors

RECORDED = ("triton", "triton tutorial")


def tiny(case: Case) -> Case:
    """Return the features of a case of the tables on a shape for any machine."""
    if isinstance(case, AttentionCase):
        return dataclasses.replace(case, Sq=min(case.Sq, 19), Sk=min(case.Sk, 23 if case.Sk != case.Sq else 19))
    if isinstance(case, LinearCase):
        sizes = {"rows": 19, "out_features": 17, "in_features": 23}
        return dataclasses.replace(case, **{name: min(getattr(case, name), most) for name, most in sizes.items()})
    if isinstance(case, VocabLossCase):
        sizes = {"rows": 19, "features": 23, "columns": 29}
        return dataclasses.replace(case, **{name: min(getattr(case, name), most) for name, most in sizes.items()})
    if isinstance(case, PackedCase):
        lens = {name: tuple(n % 23 for n in getattr(case, name)) for name in ("lens_q", "lens_k")}
        return dataclasses.replace(case, **lens)
    assert isinstance(case, DecodeCase)
    lens = tuple(max(1, n % 41) for n in case.lens)
    page = case.page or 1
    return dataclasses.replace(case, lens=lens, capacity=-(-(max(lens) + case.added) // page) * page)


def verify(case: Case, device: torch.device) -> list[Any]:
    """Do what verification.verify does, with eager PyTorch's values in place of those that no kernel has computed."""
    x = case.inputs(device, 0)
    want = case.expected(x)
    with recorded() as names:
        outputs = case.compute(x, "triton")
    if len(names) < len(case.counted):
        raise AssertionError(f"expected a launch for each of {case.counted}, recorded {names}")
    eager = stand_in(case, want)
    for name, value in outputs.items():
        if value.shape != eager[name].shape or value.dtype != eager[name].dtype:
            raise AssertionError(
                f"{name}: expected {eager[name].shape} {eager[name].dtype}, received {value.shape} {value.dtype}"
            )
    return case.check({name: eager[name] for name in outputs}, want)


def stand_in(case: Case, want: Any) -> Tensors:
    """Return the values that stand in the place of a kernel's."""
    return case.eager(want)


def small(case: AttentionCase | LinearCase) -> AttentionCase | LinearCase:
    """Return the features of a case of the sweep on a shape for any machine."""
    if isinstance(case, AttentionCase):
        dtype = "fp8" if case.dtype == "fp8" else "fp32"
        return self_attention(dtype, 1, 2 * case.H // case.Hkv, 2, 128, 16, case.causal)
    return dataclasses.replace(case, dtype="fp32", rows=33, in_features=16, out_features=24)


def known_outputs(case: Any, contender: contest.Contender, inputs: Inputs, direction: str) -> Tensors:
    """Return a contender's own outputs, or those of a known backend, same shapes, where its kernels were recorded."""
    outputs = contest.outputs(case, contender, inputs, direction)
    if contender.name not in RECORDED:
        return outputs
    right = contest.outputs(case, known(case), inputs, direction)
    assert {n: (x.shape, x.dtype) for n, x in outputs.items()} == {n: (x.shape, x.dtype) for n, x in right.items()}
    return right


def known(case: Any) -> contest.Contender:
    """Return a backend that computes the case right on a CPU."""
    return contest.our_backend(case, "torch" if isinstance(case, LinearCase) else "reference")


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the sweep without its times, which say nothing where no kernel ran."""
    return results.refused(row["op"], row["direction"], row["case"], row["contender"], row["check"])


def measure_tile(bench: tile_bench.TileBench, tile: Any, device: torch.device, times: dict[str, Any]) -> dict[str, Any]:
    """Do what tile_bench.measure_tile does, with known values where no kernel has computed any, and without a time."""
    case = bench.job.case
    recorded_results, before, own = bench.record(tile)
    tile_bench.start([*before, own, *bench.after])
    right = contest.outputs(case, known(case), bench.inputs, "forward" if bench.job.is_forward else "backward")
    for name, value in recorded_results.items():
        assert (value.shape, value.dtype) == (right[name].shape, right[name].dtype), name
    row: dict[str, Any] = {"tile": dataclasses.asdict(tile), "check": "ok"}
    try:
        case.check({name: right[name] for name in recorded_results}, bench.want)
    except AssertionError as error:
        row["check"] = f"WRONG: {error}"
    return row
