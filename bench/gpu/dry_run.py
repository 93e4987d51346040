"""What stands in for a GPU in a dry run: launches are recorded, and known values take the place of their results."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bench.gpu import cases as gpu_cases
from fusemesh import benchmark, kernel_bench, peers


def verify(case: gpu_cases.Case, device: torch.device) -> list[Any]:
    """What gpu_cases.verify does, with eager PyTorch's values in place of those that no kernel has computed."""
    x = case.inputs(device, 0)
    want = case.expected(x)
    with gpu_cases.recorded() as names:
        outputs = case.compute(x)
    if len(names) < len(case.counted):
        raise AssertionError(f"expected a launch for each of {case.counted}, recorded {names}")
    eager = case.stand_in(want)
    for name, value in outputs.items():
        if value.shape != eager[name].shape or value.dtype != eager[name].dtype:
            raise AssertionError(
                f"{name}: expected {eager[name].shape} {eager[name].dtype}, received {value.shape} {value.dtype}"
            )
    return case.check({name: eager[name] for name in outputs}, want)


class DryAttention(peers.AttentionCase):
    """A case of the sweep whose contenders with Triton kernels only record them."""

    def outputs(self, contender: peers.Contender, inputs: peers.Tensors, direction: str) -> peers.Tensors:
        """A contender's own outputs, or a known backend's."""
        return known_outputs(super().outputs, self.ours("reference"), contender, inputs, direction)


class DryLinear(peers.LinearCase):
    """A case of the sweep whose contenders with Triton kernels only record them."""

    def outputs(self, contender: peers.Contender, inputs: peers.Tensors, direction: str) -> peers.Tensors:
        """A contender's own outputs, or a known backend's."""
        return known_outputs(super().outputs, self.ours("torch"), contender, inputs, direction)


RECORDED = ("triton", "triton tutorial")


def known_outputs(compute: Any, known: peers.Contender, contender: Any, inputs: Any, direction: str) -> peers.Tensors:
    """A contender's own outputs, except those of kernels that were recorded: a known backend's, same shapes."""
    outputs = compute(contender, inputs, direction)
    if contender.name not in RECORDED:
        return outputs
    right = compute(known, inputs, direction)
    assert {n: (x.shape, x.dtype) for n, x in outputs.items()} == {n: (x.shape, x.dtype) for n, x in right.items()}
    return right


def small(case: peers.Case) -> peers.Case:
    """The features of a case of the sweep on a shape for any machine."""
    if isinstance(case, peers.AttentionCase):
        groups = case.heads // case.kv_heads
        dtype = case.dtype if case.dtype == torch.float8_e4m3fn else torch.float32
        return DryAttention(1, 2 * groups, 2, 128, 16, case.causal, dtype)
    return DryLinear(33, 16, 24, case.activation, case.gated, torch.float32)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the sweep; where no kernel ran, a time says nothing."""
    return benchmark.refused(row["op"], row["direction"], row["case"], row["contender"], row["check"])


def measure_tile(bench: kernel_bench.Bench, tile: Any, device: torch.device, timing: dict[str, Any]) -> dict[str, Any]:
    """What kernel_bench.measure_tile does, but with known values where no kernel has computed any, and no time."""
    case = bench.job.case
    results, before, own = bench.record(tile)
    kernel_bench.start([*before, own, *bench.after])
    known: Any = case.ours("torch" if isinstance(case, peers.LinearCase) else "reference")
    right = case.outputs(known, bench.inputs, "forward" if bench.job.is_forward else "backward")
    for name, value in results.items():
        assert (value.shape, value.dtype) == (right[name].shape, right[name].dtype), name
    row: dict[str, Any] = {"tile": dataclasses.asdict(tile), "check": "ok"}
    try:
        case.check({name: right[name] for name in results}, bench.want)
    except AssertionError as error:
        row["check"] = f"WRONG: {error}"
    return row
