"""A standard set of calls, run by the Triton kernels and checked against fp64: what `fusemesh doctor --prove` does.

The calls are small, of shapes for which the kernels are compiled as for large ones: each kernel, dtype and feature that
training and generation commonly use. Whoever uses others has them proven at their first use.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..proof import first_use
from ..runtime import launch
from .cases import AttentionCase, Case, DecodeCase, LinearCase, PackedCase, VocabLossCase

DTYPES = ("bf16", "fp16", "fp32")
FEATURES: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"causal": True, "Hkv": 2},
    {"causal": True, "window": (96, 0)},
    {"mask": "bmn"},
    {"bias": "hmn"},
    {"causal": True, "dropout": 0.1},
)
LAYERS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"activation": "relu2"},
    {"activation": "silu", "gated": True},
)
HEADS: tuple[dict[str, Any], ...] = ({}, {"has_bias": True}, {"softcap": 30.0})


def cases() -> list[Case]:
    """Return the calls, those that most users wait for first.

    Lengths are multiples of 16, as most are and as Triton compiles for, and end within a tile.
    """
    found: list[Case] = []
    sizes: dict[str, Any] = {"B": 2, "H": 4, "Hkv": 4, "Sq": 272, "Sk": 272}
    for dtype in DTYPES:
        for d in (64, 128):
            found += [AttentionCase(dtype, **{**sizes, "D": d, "Dv": d, **feature}) for feature in ({}, *FEATURES)]
            packed: dict[str, Any] = {"lens_q": (272, 1, 143), "lens_k": (272, 1, 143), "causal": True}
            found.append(PackedCase(dtype, **packed, align="top_left", H=4, Hkv=2, D=d, Dv=d, dlse=False))
            cache: dict[str, Any] = {"capacity": 512, "lens": (500, 33), "H": 8, "Hkv": 2, "D": d, "Dv": d}
            found += [DecodeCase(dtype, **cache), DecodeCase(dtype, **cache, page=64)]
        found += [LinearCase(dtype, 272, 256, 512, **layer) for layer in LAYERS]
        found += [VocabLossCase(dtype, 272, 256, 1025, ignored=7, **head) for head in HEADS]
    return found


def devices() -> list[torch.device]:
    """Return the devices on which compiled kernels run: all GPUs, or the CPU where a program stands for one."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found or [x for x in (torch.device("cpu"),) if launch.has_compiled_kernels(x)]


def name_of(device: torch.device) -> str:
    """Return the name of one of :func:`devices`."""
    executor = launch.executor_of(device)
    assert executor is not None
    return executor.name


def prove(device: torch.device, chosen: Iterable[Case]) -> Iterator[dict[str, Any]]:
    """Yield a row for each case, forward and backward: right, wrong or not run, and how far off.

    Keys: ``device``, ``operation``, ``case``, ``verdict`` ("right", "wrong", "did not run"), ``share`` (the largest
    error as a share of the budget, of all results; None where nothing was measured), ``ms`` (compilation and proof
    included) and ``why`` ("" where right).
    """
    for case in chosen:
        start = time.perf_counter()
        share, verdict, why = None, "right", ""
        try:
            # Whatever is kept: a kernel is proven anew, once in this process.
            with (
                torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(),
                first_use.mode("always"),
            ):
                inputs = case.inputs(device)
                outputs = case.compute(inputs, "triton")
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                ms = 1e3 * (time.perf_counter() - start)
                share = max(measured.share for measured in case.check(outputs, case.expected(inputs)))
        except Exception as error:
            is_wrong = isinstance(error, AssertionError) or (isinstance(error, first_use.NotProven) and error.is_wrong)
            verdict, why = ("wrong", str(error)) if is_wrong else ("did not run", f"{type(error).__name__}: {error}")
            ms = 1e3 * (time.perf_counter() - start)
        row = {"device": str(device), "operation": case.op, "case": case.name, "verdict": verdict}
        yield {**row, "share": share, "ms": round(ms, 1), "why": why}
