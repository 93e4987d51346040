"""The check of a case on the emulator: over poisoned memory, copies early and late, by the error budget and by bits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from bench.emulated.tables import Entry
from fusemesh.kernels import backends
from fusemesh.kernels.emulator import emulate
from fusemesh.kernels.matmul.gpu import tiles as linear_tiles
from fusemesh.kernels.proof import first_use
from fusemesh.kernels.testing import poison
from fusemesh.kernels.vocab_loss.gpu import loss
from fusemesh.kernels.vocab_loss.gpu import tiles as loss_tiles

# How the emulator lands copies: as late and as early as the rules allow.
COPIES: tuple[dict[str, Any], ...] = ({"copies": "late"}, {"copies": "early"})
# By chance: copies, and the order of warps and CTAs.
BY_CHANCE: tuple[dict[str, Any], ...] = tuple({"copies": "random", "seed": seed} for seed in (1, 2, 3))
# Elements of NaN around each dimension of a surrounded tensor; 16 of them keep rows aligned as they were.
_MARGIN = 16


@dataclass(frozen=True)
class Result:
    """What a case needed: shares of the allowed errors by tensor, launches, CTAs, instructions, seconds of a core."""

    shares: dict[str, float]
    kernels: tuple[str, ...]
    ctas: int
    instructions: int
    seconds: float


def verify(entry: Entry, target: str, ways: Sequence[dict[str, Any]] = COPIES, *, seed: int = 0) -> Result:
    """Run a case on ``target`` once for each of the emulator's options ``ways``; return what it needed.

    Raises:
        AssertionError: outside the budget, other bits another way, a tensor's surroundings written, or a backend that
            was not the one meant.
        Hazard: the emulator found an access that a GPU may answer in more than one way.
    """
    case, start = entry.case, time.process_time()
    x = case.inputs("cpu", seed)
    want = case.expected(x)
    guarded = {name: _surrounded(value) for name, value in x.items() if _can_be_surrounded(entry, name, value)}
    given = {**x, **{name: inside for name, (_, inside) in guarded.items()}}
    shares: dict[str, float] = {}
    log: list[dict[str, Any]] = []
    first: dict[str, torch.Tensor] = {}
    for options in ways:
        before = backends.call_counts()
        with first_use.mode("off"), poison.poisoned_empty(), _tiles(entry), emulate(target, **options) as emulator:
            outputs = case.compute(given, "triton")
        for op in case.counted:
            calls = backends.call_counts().get((op, "triton"), 0) - before.get((op, "triton"), 0)
            assert calls == 1, f"{op}: expected 1 call of the triton backend, counted {calls}"
        for measured in case.check(outputs, want):
            shares[measured.name] = max(shares.get(measured.name, 0.0), measured.share)
        for name, (guard, _) in guarded.items():
            guard.assert_intact(name)
        first = first or outputs
        differing = [name for name in outputs if not torch.equal(_bits(outputs[name]), _bits(first[name]))]
        assert not differing, f"{options}: other bits than {ways[0]} in {', '.join(differing)}"
        log += emulator.log
    return Result(
        shares,
        tuple(dict.fromkeys(row["kernel"] for row in log)),
        sum(row["ctas"] for row in log),
        sum(row["instructions"] for row in log),
        time.process_time() - start,
    )


def _can_be_surrounded(entry: Entry, name: str, value: Any) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
    return entry.surrounded and is_tensor and value.dtype.itemsize > 1


def _surrounded(value: torch.Tensor) -> tuple[poison.Surrounded, torch.Tensor]:
    """Return the buffer of NaN and the tensor in it, dimensions in memory in the order of their strides."""
    order = sorted(range(value.dim()), key=lambda dim: -value.stride(dim))
    guard = poison.surround(value.permute(order), margin=_MARGIN)
    return guard, guard.view.permute([order.index(dim) for dim in range(value.dim())])


@contextlib.contextmanager
def _tiles(entry: Entry) -> Iterator[None]:
    """Within the block linear layers take the tiles of large results, if the entry asks for them.

    The loss takes its columns in chunks of 192, and programs that go through many of them.
    """
    if not entry.large:
        yield
        return
    with (
        mock.patch.object(linear_tiles, "_ENOUGH_TILES", 1),
        mock.patch.object(loss_tiles, "_ENOUGH_PROGRAMS", 2),
        mock.patch.object(loss, "columns_of_a_chunk", lambda *_: 192),
    ):
        yield


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def tried(entry: Entry, target: str) -> dict[str, Any]:
    """Return the row of a results file for one case: ``check`` is "ok", or why the case failed."""
    row: dict[str, Any] = {"target": target, "op": entry.case.op, "case": entry.name, "dtype": entry.case.dtype}
    start = time.process_time()
    try:
        result = verify(entry, target)
    except Exception as error:
        return {**row, "check": f"{type(error).__name__}: {error}", "seconds": round(time.process_time() - start, 2)}
    shares = {name: round(value, 3) for name, value in result.shares.items()}
    counts = {"ctas": result.ctas, "instructions": result.instructions, "seconds": round(result.seconds, 2)}
    return {**row, "check": "ok", "share_of_budget": shares, "kernels": list(result.kernels), **counts}
