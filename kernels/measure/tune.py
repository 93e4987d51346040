"""Tile sizes tried on a GPU: for each kernel the shipped tile and its neighbours, checked against fp64, then timed.

What `fusemesh bench --tune` and `bench/on_gpu.py --stage tune` run. The result is a table for people to read and to
enter in kernels/attention/gpu/tiles.py and kernels/matmul/gpu/tiles.py; nothing reads it at run time, and no call is
tuned.

Neighbours differ from the shipped tile in one number, or in two that are exchanged for each other, as far as the
predicate of the tiles' own module admits them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import backends, env
from ..runtime import launch
from . import results, timing
from .cases import AttentionCase, DecodeCase, LinearCase, self_attention
from .tile_bench import SKINNY_ROWS, TileBench, TuneJob, measure_tile

ATTENTION_KERNELS = ("forward", "dkdv", "dq")
BIAS_KERNELS = (*ATTENTION_KERNELS, "dbias")
LINEAR_KERNELS = ("forward", "dgrad", "wgrad")
SKINNY_KERNELS = ("forward", "dgrad")
TIMES: dict[str, Any] = {"seconds": 0.1, "pause": 0.02}


def jobs() -> list[TuneJob]:
    """Every kernel, bf16: attention of 16384 tokens with H * D = 2048, causal; linear layers of 8192 tokens.

    Then what has tables of its own: decode over 8192 keys, linear layers of a few tokens, and attention that reads a
    bias (or a mask) for each score, 4096 tokens. Those that most calls wait for come first, because a run whose time is
    up leaves out the end.
    """
    found = []
    linear = {
        128: LinearCase("bf16", 8192, 4096, 8192, "silu", gated=True),
        64: LinearCase("bf16", 8192, 4096, 8192),
        256: LinearCase("bf16", 8192, 4096, 8192, "gelu"),
    }
    for d, layer in linear.items():
        attention = self_attention("bf16", 4, 2048 // d, 2048 // d, 4096, d, causal=True)
        found += [TuneJob(kernel, attention) for kernel in ATTENTION_KERNELS]
        found += [TuneJob(kernel, layer) for kernel in LINEAR_KERNELS]
    full: dict[str, Any] = {"dtype": "bf16", "capacity": 8192, "lens": (8192,) * 16}
    found += [TuneJob("split", DecodeCase(H=32, Hkv=8, D=d, Dv=d, **full)) for d in linear]
    found.append(TuneJob("split", DecodeCase(H=16, Hkv=1, D=576, Dv=512, latent=True, **full)))
    few = [dataclasses.replace(layer, rows=SKINNY_ROWS) for layer in linear.values()]
    found += [TuneJob(kernel, layer) for layer in few for kernel in SKINNY_KERNELS]
    for d in linear:
        biased = self_attention("bf16", 1, 2048 // d, 2048 // d, 4096, d, causal=True, bias="bhmn")
        found += [TuneJob(kernel, biased) for kernel in BIAS_KERNELS]
    return found


def small(job: TuneJob) -> TuneJob:
    """The same kernel on a shape for any machine."""
    if isinstance(job.case, AttentionCase):
        changed: Any = dataclasses.replace(job.case, B=1, H=2, Hkv=1, Sq=33, Sk=33)
    elif isinstance(job.case, DecodeCase):
        changed = dataclasses.replace(job.case, H=4, Hkv=1, capacity=600, lens=(600, 600))
    else:
        rows = min(job.case.rows, 33)
        changed = dataclasses.replace(job.case, rows=rows, in_features=16, out_features=24)
    return dataclasses.replace(job, case=changed)


def shipped(job: TuneJob, target: launch.Target) -> Any:
    """The tile that the kernel takes today."""
    case = job.case
    if isinstance(case, AttentionCase):
        from ..attention.gpu import tiles as attention_tiles

        if job.kernel == "dbias":
            return attention_tiles.choose_dbias(target, case.torch_dtype, *_blocks(case))
        choose = getattr(attention_tiles, f"choose_{job.kernel}")
        return choose(target, case.torch_dtype, *_blocks(case), None, "mn" if case.bias else None)
    if isinstance(case, DecodeCase):
        from ..attention.gpu import decode_tiles

        rows, sequences = case.H // case.Hkv, len(case.lens) * case.Hkv
        return decode_tiles.choose(target, *_decode_arguments(case), rows, sequences, case.capacity).tile
    from ..matmul.gpu import tiles as linear_tiles

    shape = (case.rows, case.out_features, case.in_features)
    return linear_tiles.choose(job.kernel, target, case.torch_dtype, shape, job.form)


def candidates(job: TuneJob, target: launch.Target) -> list[Any]:
    """The shipped tile, then its neighbours that are valid on ``target``; a dozen or fewer."""
    first = shipped(job, target)
    found = [first]
    for changes in _NEIGHBOURS[job.op]:
        values = {name: change(getattr(first, name)) for name, change in changes.items()}
        tile = dataclasses.replace(first, **values)
        if tile not in found and _is_valid(tile, job, target):
            found.append(tile)
    return found


def _twice(size: int) -> int:
    return 2 * size


def _half(size: int) -> int:
    return size // 2


def _next(count: int) -> int:
    return count + 1


def _previous(count: int) -> int:
    return count - 1


_Changes = tuple[dict[str, Callable[[int], int]], ...]
_BLOCKS: _Changes = (
    {"num_stages": _next},
    {"num_stages": _previous},
    {"block_n": _half},
    {"block_n": _twice},
    {"block_m": _half},
    {"block_m": _twice},
    {"num_warps": _half},
    {"num_warps": _twice},
    {"block_m": _half, "num_warps": _half},
    {"block_n": _half, "num_stages": _next},
    {"block_m": _twice, "block_n": _half},
)
_NEIGHBOURS: dict[str, _Changes] = {
    "attention": _BLOCKS,
    "decode": _BLOCKS,
    "linear": (
        {"num_stages": _next},
        {"num_stages": _previous},
        {"cols": _half},
        {"cols": _twice},
        {"rows": _half},
        {"rows": _twice},
        {"depth": _half},
        {"depth": _twice},
        {"num_warps": _half},
        {"depth": _half, "num_stages": _next},
        {"rows": _twice, "cols": _half},
    ),
}


def _is_valid(tile: Any, job: TuneJob, target: launch.Target) -> bool:
    case = job.case
    if isinstance(case, AttentionCase):
        from ..attention.gpu import tiles as attention_tiles

        return attention_tiles.is_valid(
            tile, job.kernel, target, case.torch_dtype, *_blocks(case), has_tiles=case.bias is not None
        )
    if isinstance(case, DecodeCase):
        from ..attention.gpu import decode_tiles

        return decode_tiles.is_valid(tile, target, *_decode_arguments(case))
    from ..matmul.gpu import tiles as linear_tiles

    return linear_tiles.is_valid(tile, job.kernel, target, case.torch_dtype, job.form)


def _decode_arguments(case: DecodeCase) -> tuple[torch.dtype, int, int, bool]:
    """dtype, D, Dv, and whether values are columns of the keys."""
    return case.torch_dtype, case.D, case.Dv, case.latent


def _blocks(case: AttentionCase) -> tuple[int, int]:
    block = 1 << (case.D - 1).bit_length()
    return block, block


def why_not_here() -> str | None:
    """Why tiles cannot be timed on this machine, and what to do, or None."""
    if env.INTERPRET:
        return "TRITON_INTERPRET: expected it unset, received 1; unset it: on a GPU the kernels are compiled"
    if not torch.cuda.is_available():
        return "device: expected a GPU that PyTorch can use, received none; run this on a machine with one"
    reason = backends.why_unavailable("triton", "cuda")
    return None if reason is None else f"triton: expected it to run here: {reason}"


def tune_tiles(
    device: torch.device,
    clock: timing.Clock,
    *,
    chosen: list[TuneJob] | None = None,
    measure: Callable[[TileBench, Any, torch.device, dict[str, Any]], dict[str, Any]] = measure_tile,
    times: dict[str, Any] = TIMES,
) -> dict[str, Any]:
    """Time the candidates of every job.

    Args:
        device: a GPU; the CPU where launches are recorded or interpreted.
        clock: no candidate starts once its time is up; jobs cut short are named in ``left_out``.
        chosen: the jobs, by default :func:`jobs`.
        measure: how a candidate is measured; a dry run gives its own.
        times: passed to :func:`timing.time_call`.

    Returns:
        {"device", "date", "target": names, "rows": one for each job (:func:`summary`), "left_out": names}.
    """
    rows, left_out = [], []
    target = launch.target_of(device)
    for job in jobs() if chosen is None else chosen:
        tried: list[dict[str, Any]] = []
        if clock.allows_another():
            begin = time.monotonic()
            bench = TileBench(job, device)
            clock.took(time.monotonic() - begin)
            for tile in candidates(job, target):
                if not clock.allows_another():
                    left_out.append(f"{job.name}: candidates after the first {len(tried)}")
                    break
                begin = time.monotonic()
                tried.append(measure(bench, tile, device, times))
                clock.took(time.monotonic() - begin)
        else:
            left_out.append(job.name)
        if tried:
            rows.append(summary(job, tried))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    record = results.machine()
    name = record.get("gpu") or record["cpu"]
    return {"device": name, "date": record["date"], "target": target.name, "rows": rows, "left_out": left_out}


def summary(job: TuneJob, tried: list[dict[str, Any]]) -> dict[str, Any]:
    """A job's row: the shipped tile (the first one tried), the fastest right one, and all that were tried."""
    right = [row for row in tried if "seconds" in row]
    best = min(right, key=lambda row: row["seconds"], default=None)
    # A valid tile may not compile on some GPU; one that computes something else is a bug, whoever takes it.
    wrong = [row["check"] for row in tried if row["check"].startswith("WRONG")]
    return {
        "op": job.op,
        "kernel": job.kernel,
        "entry": job.entry,
        "dtype": str(job.case.torch_dtype).removeprefix("torch."),
        "case": job.case.name,
        "contender": "triton",
        "check": wrong[0] if wrong else tried[0]["check"],
        "shipped_tile": tried[0]["tile"],
        "shipped_seconds": tried[0].get("seconds"),
        "best_tile": None if best is None else best["tile"],
        "best_seconds": None if best is None else best["seconds"],
        "candidates": tried,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each kernel: the shipped tile's time, the best tile, its time, and how much faster it is."""
    lines = [("kernel", "tried", "shipped tile", "ms", "best tile", "ms", "x shipped")]
    for row in rows:
        times = [row["shipped_seconds"], row["best_seconds"]]
        ms = ["-" if seconds is None else f"{seconds * 1e3:.3f}" for seconds in times]
        ratio = "-" if None in times else f"{times[0] / times[1]:.2f}"
        right = sum(candidate["check"] == "ok" for candidate in row["candidates"])
        lines.append(
            (
                f"{row['op']} {row['kernel']} {row['entry']} {row['dtype']}",
                f"{right} of {len(row['candidates'])} right",
                _short(row["shipped_tile"]),
                ms[0],
                _short(row["best_tile"]),
                ms[1],
                ratio,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    wrong = [
        f"{row['op']} {row['kernel']} {row['entry']} {_short(candidate['tile'])}: {candidate['check'][:200]}"
        for row in rows
        for candidate in row["candidates"]
        if candidate["check"] != "ok"
    ]
    return "\n".join(text + wrong)


def _short(tile: dict[str, int] | None) -> str:
    """128x64 w8 s2, a linear layer's 128x256x64 w8 s3."""
    if tile is None:
        return "-"
    sizes = [value for name, value in tile.items() if name not in ("num_warps", "num_stages", "group")]
    return f"{'x'.join(map(str, sizes))} w{tile['num_warps']} s{tile['num_stages']}"
