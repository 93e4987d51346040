"""The Triton kernels against PyTorch's on this GPU, class by class: what `fusemesh bench --compare` does.

Each class of calls (kernels/proof/preferences.py) has one case that stands for it. Both backends are checked against
fp64 and then timed, the forward alone for inference, forward and backward for training. Times are the GPU's: what the
host takes to launch, which small calls wait for, is in none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import backends
from ..attention.call.options import Call
from ..attention.call.spec import AttentionSpec
from ..backend_record import Request
from ..proof import preferences
from . import contest, timing
from .cases import AttentionCase, DecodeCase, LinearCase, common, self_attention

OURS = "triton"
TIMES: dict[str, Any] = {"seconds": 0.1, "pause": 0.02}
_SPEC = AttentionSpec(1.0)
TOKENS, WIDTH = 16384, 2048  # of the large calls; WIDTH is heads times head dim
Compare = Callable[..., list[dict[str, Any]]]


def cases() -> list[contest.TimedCase]:
    """Return a case for each class, those that most calls wait for first: a run whose time is up leaves out the end."""
    found: list[contest.TimedCase] = []
    for dtype in ("bf16", "fp16", "fp32"):
        for d in (128, 64, 256) if dtype == "bf16" else (128, 64):
            found += _attention(dtype, d)
        layers: tuple[dict[str, Any], ...] = ({}, {"activation": "gelu"}, {"activation": "silu", "gated": True})
        found += [LinearCase(dtype, rows, 4096, 8192, **layer) for layer in layers for rows in (4096, 256, 16)]
        if dtype != "fp32":
            found += _decode(dtype)
    return found


def _attention(dtype: str, d: int) -> list[AttentionCase]:
    heads = WIDTH // d
    found = []
    for length in (2048, 8192, 512):
        samples = TOKENS // length
        found += [self_attention(dtype, samples, heads, heads, length, d, causal) for causal in (True, False)]
        found.append(self_attention(dtype, samples, heads, heads // 4, length, d, True))
        if length < 8192:
            found += [self_attention(dtype, 1, heads, heads, length, d, causal) for causal in (True, False)]
            extras: tuple[dict[str, Any], ...] = ({"mask": "bn"}, {"mask": "bmn"}, {"bias": "bhmn"})
            found += [self_attention(dtype, samples, heads, heads, length, d, False, **extra) for extra in extras]
    return found


def _decode(dtype: str) -> list[DecodeCase]:
    return [
        DecodeCase(dtype, H=8 * rows, Hkv=8, D=128, Dv=128, capacity=length, lens=(length,) * 16)
        for length in (2048, 8192, 512)
        for rows in (1, 8, 16)
    ]


def request_of(case: contest.TimedCase, device: torch.device, mode: str) -> Request:
    """Return the request that the public function makes of the case; tensors in it have shapes alone."""
    is_training = mode == "training"

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", requires_grad=is_training)

    if isinstance(case, LinearCase):
        w = new(case.out_features, case.in_features)
        bias, w_up = new(case.out_features) if case.has_bias else None, w if case.gated else None
        layer = (new(case.rows, case.in_features), w, bias, w_up, case.activation)
        return Request("linear", device, case.torch_dtype, layer=layer)
    dims = (case.D, case.Dv)
    if isinstance(case, DecodeCase):
        rows, scores = case.H // case.Hkv * case.Sq, (len(case.lens), case.H, case.Sq, case.capacity)
        return Request("attention_decode", device, case.torch_dtype, dims, Call(_SPEC), rows=rows, scores=scores)
    scores = (case.B, case.H, case.Sq, case.Sk)
    mask, bias = (None if x is None else new(*common.broadcast_shape(x, scores)) for x in (case.mask, case.bias))
    call = Call(case.spec, mask=mask, bias=bias)
    more: dict[str, Any] = {"scores": scores, "kv_heads": case.Hkv}
    return Request("attention", device, case.torch_dtype, dims, call, is_training, **more)


def compare_on(device: torch.device, clock: timing.Clock) -> dict[str, Any]:
    """Return what :func:`compare_all` does for all cases on a GPU."""
    with torch.cuda.device(device):
        return compare_all(device, clock, cases(), timing.measure_roofline(device, torch.bfloat16))


def compare_all(
    device: torch.device,
    clock: timing.Clock,
    chosen: Iterable[contest.TimedCase],
    roofline: timing.Roofline,
    compare: Compare = contest.compare,
) -> dict[str, Any]:
    """Time every case by both backends.

    Args:
        device: where.
        clock: the time for all cases.
        chosen: the cases, in their order.
        roofline: for the rows.
        compare: checks and times contenders on one case, as :func:`contest.compare` does.

    Returns:
        ``rows`` of both backends; ``classes`` as the table of preferences has them: the case, the milliseconds of each
        backend that is right, and as the choice the faster one; and ``left_out``, cases for which there was no time or
        no memory.
    """
    rows: list[dict[str, Any]] = []
    classes: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    for case in chosen:
        if not clock.allows_another():
            left_out.append(f"lack of time: {case.op} {case.name}")
            continue
        start = time.monotonic()
        other = backends.automatic(request_of(case, device, "inference"), without=(OURS,))[0].name
        contenders = [contest.our_backend(case, name) for name in (OURS, other)]
        found: dict[str, list[dict[str, Any]]] = {}
        try:
            found = {way: compare(case, way, device, roofline, contenders, **TIMES) for way in case.directions}
        except Exception as error:  # of the reference, whose memory is the largest
            left_out.append(f"{type(error).__name__}: {case.op} {case.name} ({_first_line(error)})")
        for mode, directions in (("inference", case.directions[:1]), ("training", case.directions)):
            if not found or (mode == "training" and len(directions) == 1):
                continue
            ms = _milliseconds([row for way in directions for row in found[way]], (OURS, other), len(directions))
            name = preferences.class_of(request_of(case, device, mode))
            if name is not None and ms:
                classes[name] = {"choice": min(ms, key=lambda x: ms[x]), "ms": ms, "case": case.name}
        rows += [row for of_way in found.values() for row in of_way]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        clock.took(time.monotonic() - start)
    return {"rows": rows, "classes": classes, "left_out": left_out}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _milliseconds(rows: list[dict[str, Any]], names: tuple[str, ...], directions: int) -> dict[str, float]:
    """Return the time of each backend that was right in every direction."""
    found = {}
    for name in names:
        seconds = [row["seconds"] for row in rows if row["contender"] == name and "seconds" in row]
        if len(seconds) == directions:
            found[name] = round(1e3 * sum(seconds), 4)
    return found


def table(classes: dict[str, dict[str, Any]]) -> str:
    """Return the classes as a table for people."""
    lines = [("class", "triton ms", "other ms", "x", "auto takes")]
    for name, entry in classes.items():
        ours = entry["ms"].get(OURS)
        other = next((ms for backend, ms in entry["ms"].items() if backend != OURS), None)
        ratio = "-" if ours is None or other is None else f"{other / ours:.2f}"
        cells = ("-" if ms is None else f"{ms:.3f}" for ms in (ours, other))
        lines.append((name, *cells, ratio, entry["choice"]))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join("  ".join(f"{x:{w}}" for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)
