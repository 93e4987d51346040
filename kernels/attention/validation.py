"""Checks of the arguments of attention, and their normal form: what every backend takes.

All of it looks at shapes, dtypes, devices and Python numbers only, so it costs no synchronisation. Limits of a single
backend are not here but with the choice among them (``api.py``) and in the backends themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .spec import AttentionSpec, Origin

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGN = ("top_left", "bottom_right")


@dataclass(frozen=True)
class Call:
    """The tensors of one call besides q, k and v, in the form that backends take, and its numbers."""

    mask: torch.Tensor | None  # 4-D view, each dim 1 or that of [B, H, Sq, Sk]
    bias: torch.Tensor | None  # likewise
    origin: torch.Tensor | None  # int64 [2]
    spec: AttentionSpec


def wrong(name: str, expected: str, received: object, remedy: str) -> ValueError:
    """The one form of an error about an argument."""
    return ValueError(f"{name}: expected {expected}, received {received}; {remedy}")


def check_qkv(q: Any, k: Any, v: Any) -> None:
    """Raise unless q [B, H, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] belong together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise wrong(name, "a torch.Tensor", type(x).__name__, "convert it with torch.as_tensor")
        if x.is_nested:
            raise NotImplementedError(f"{name}: jagged (nested) tensors are not built yet; pad and pass mask")
        if x.layout != torch.strided:
            raise wrong(name, "a dense tensor (torch.strided)", x.layout, "call .to_dense()")
        if x.dim() != 4:
            letters = "[B, H, Sq, D]" if name == "q" else "[B, Hkv, Sk, D]"
            raise wrong(name, f"4 dimensions {letters}", f"shape {tuple(x.shape)}", "add the missing ones or reshape")
        if x.dtype not in DTYPES:
            raise wrong(name, f"a dtype out of {_names(DTYPES)}", x.dtype, "convert it with .to(dtype)")
    batch, heads, _, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise wrong(name, f"q's dtype {q.dtype}", x.dtype, "convert one of them with .to(dtype)")
        if x.device != q.device:
            raise wrong(name, f"q's device {q.device}", x.device, "move one of them with .to(device)")
        if x.shape[0] != batch:
            raise wrong(name, f"q's batch size {batch}", f"{x.shape[0]} (shape {tuple(x.shape)})", "expand it")
    if k.shape[3] != dim:
        raise wrong("k", f"q's head dim {dim}", f"{k.shape[3]} (shape {tuple(k.shape)})", "q and k need the same")
    if v.shape[1] != k.shape[1]:
        raise wrong("v", f"k's {k.shape[1]} heads", f"{v.shape[1]} (shape {tuple(v.shape)})", "k and v share heads")
    if v.shape[2] != k.shape[2]:
        raise wrong("v", f"k's length {k.shape[2]}", f"{v.shape[2]} (shape {tuple(v.shape)})", "one value for each key")
    if heads != 0 and (k.shape[1] == 0 or heads % k.shape[1] != 0):
        raise wrong(
            "k",
            f"a number of heads that divides q's {heads}",
            f"{k.shape[1]} (shape {tuple(k.shape)})",
            "query head h uses key head h // (H / Hkv); where heads stand third, pass x.transpose(1, 2)",
        )
    for name, size in (("q", dim), ("v", v.shape[3])):
        if size == 0:
            raise wrong(name, "a head dim of at least 1", 0, "pass tensors whose last dimension is not empty")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is a bool: a tensor or a string taken for true would be a silent mistake."""
    if not isinstance(value, bool):
        raise wrong(name, "True or False", repr(value), "pass a Python bool")


def refuse_unbuilt(
    *,
    alibi_slopes: object,
    softcap: object,
    score_mod: object,
    sinks: object,
    dropout_p: object,
    seed: object,
    descale: object,
    deterministic: object,
) -> None:
    """Refuse, by name, what the contract holds and no backend computes yet."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise wrong("dropout_p", "a number in [0, 1)", repr(dropout_p), "0.0 switches dropout off")
    check_flag("deterministic", deterministic)
    for name, value in (
        ("softcap", softcap),
        ("alibi_slopes", alibi_slopes),
        ("score_mod", score_mod),
        ("sinks", sinks),
        ("seed", seed),
        ("descale", descale),
    ):
        if value is not None:
            raise NotImplementedError(f"{name}: not built yet; expected None, received a {type(value).__name__}")
    if dropout_p > 0:
        raise NotImplementedError(f"dropout_p: not built yet; expected 0.0, received {dropout_p}")
    if not deterministic:
        raise NotImplementedError("deterministic: a faster backward is not built yet; expected True, received False")


def normalise(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool,
    align: str | None,
    window: tuple[int | None, int | None] | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
    origin: Origin | None,
) -> Call:
    """Check everything besides q, k and v, and bring it into the form that backends take."""
    check_flag("causal", causal)
    left, right = _window(window)
    if causal:
        right = 0 if right is None else min(right, 0)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise wrong("scale", "a finite number or None", _short(scale), "None means 1 / sqrt(D)")
    positional = left is not None or right is not None
    numbers, tensor = _origins(q, k, align, origin, positional)
    if not positional:
        numbers, tensor = (0, 0), None
    return Call(
        mask=_mask(mask, q, k),
        bias=_bias(bias, q, k),
        origin=tensor,
        spec=AttentionSpec(float(scale), left, right, *numbers),
    )


def check_saved(q: torch.Tensor, v: torch.Tensor, do: Any, out: Any, lse: Any, dlse: Any) -> None:
    """Raise unless do, out, lse and dlse are those of a forward of q, k, v."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = tuple(q.shape[:3])
    for name, x, shape, dtype in (
        ("do", do, (*rows, v.shape[3]), q.dtype),
        ("out", out, (*rows, v.shape[3]), q.dtype),
        ("lse", lse, rows, lse_dtype),
        ("dlse", dlse, rows, lse_dtype),
    ):
        if name == "dlse" and x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise wrong(name, "a torch.Tensor", type(x).__name__, "pass what the forward returned or its gradient")
        if tuple(x.shape) != shape:
            letters = "[B, H, Sq, Dv]" if len(shape) == 4 else "[B, H, Sq]"
            raise wrong(name, f"shape {letters} = {shape}", tuple(x.shape), "pass it as attention_forward shapes it")
        if x.dtype != dtype:
            raise wrong(name, f"dtype {dtype}", x.dtype, "convert it with .to(dtype)")
        if x.device != q.device:
            raise wrong(name, f"q's device {q.device}", x.device, "move it with .to(device)")


def _window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    expected = "None or (left, right), each None or an int >= 0"
    remedy = "left and right count keys besides the query's own position; None leaves a side open"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise wrong("window", expected, _short(window), remedy)
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise wrong("window", expected, _short(window), remedy)
    return window[0], window[1]


def _origins(
    q: torch.Tensor, k: torch.Tensor, align: Any, origin: Any, positional: bool
) -> tuple[tuple[int, int], torch.Tensor | None]:
    """(origin_q, origin_k) as ints, and the part of it that lives on the device as int64 [2], or None."""
    sq, sk = q.shape[2], k.shape[2]
    if align is not None and align not in ALIGN:
        raise wrong("align", f"one of {ALIGN} or None", _short(align), "see the table of positions in the docstring")
    if align is not None and origin is not None:
        raise wrong("align, origin", "at most one of them", f"align={align!r} and {origin}", "drop one of the two")
    if origin is None:
        if align is None and positional and sq != sk:
            raise wrong(
                "align, origin",
                "one of them, because causal or window is given and Sq differs from Sk",
                f"neither, with Sq={sq} and Sk={sk}",
                "pass align='top_left' (query 0 stands at key 0), align='bottom_right' (the last query stands at the "
                "last key), or origin=Origin(q=..., k=...)",
            )
        return (sk - sq if align == "bottom_right" else 0, 0), None
    if not isinstance(origin, Origin):
        raise wrong("origin", "a fusemesh.Origin or None", _short(origin), "pass origin=Origin(q=..., k=...)")
    for name in ("q", "k", "head", "batch"):
        _check_position(f"origin.{name}", getattr(origin, name), q.device)
    numbers = [0 if isinstance(x, torch.Tensor) else x for x in (origin.q, origin.k)]
    if not isinstance(origin.q, torch.Tensor) and not isinstance(origin.k, torch.Tensor):
        return (numbers[0], numbers[1]), None
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    parts = [x.reshape(()).to(torch.int64) if isinstance(x, torch.Tensor) else zero for x in (origin.q, origin.k)]
    return (numbers[0], numbers[1]), torch.stack(parts)


def _check_position(name: str, value: object, device: torch.device) -> None:
    remedy = "an int costs nothing; a tensor is read on the device, without a synchronisation"
    expected = f"an int, or an integer tensor with one element on {device}"
    if isinstance(value, torch.Tensor):
        integer = not value.dtype.is_floating_point and not value.dtype.is_complex and value.dtype != torch.bool
        if value.numel() != 1 or not integer or value.device != device:
            received = f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
            raise wrong(name, expected, received, remedy)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, expected, _short(value), remedy)


def _mask(mask: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    remedy = "mask is boolean, True = attend; numbers to be added to the scores go to bias"
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        received = mask.dtype if isinstance(mask, torch.Tensor) else _short(mask)
        raise wrong("mask", "a torch.bool tensor or None", received, remedy)
    view = _four_dims("mask", mask, q, k)
    for dim in broadcast_dims(view):
        view = view.narrow(dim, 0, 1)
    return view


def _bias(bias: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    remedy = "bias is added to the scores; a boolean mask goes to mask"
    if not isinstance(bias, torch.Tensor) or bias.dtype not in (q.dtype, torch.float32):
        received = bias.dtype if isinstance(bias, torch.Tensor) else _short(bias)
        raise wrong("bias", f"a tensor of q's dtype {q.dtype} or torch.float32, or None", received, remedy)
    view = _four_dims("bias", bias, q, k)
    dims = broadcast_dims(view)
    if not dims:
        return view
    result: torch.Tensor = _Unbroadcast.apply(view, dims)
    return result


def _four_dims(name: str, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A 4-D view of ``x``; raises unless it broadcasts to [B, H, Sq, Sk]."""
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if x.device != q.device:
        raise wrong(name, f"q's device {q.device}", x.device, "move it with .to(device)")
    view = x[(None,) * (4 - x.dim())] if x.dim() < 4 else x
    if view.dim() != 4 or any(size not in (1, full) for size, full in zip(view.shape, scores, strict=True)):
        raise wrong(
            name,
            f"a shape that broadcasts to [B, H, Sq, Sk] = {scores}",
            tuple(x.shape),
            "each dimension, counted from the last, is 1 or that of the scores; insert a dimension with unsqueeze",
        )
    return view


def broadcast_dims(x: torch.Tensor) -> tuple[int, ...]:
    """The dimensions along which ``x`` repeats one element (stride 0), as ``expand`` makes them."""
    return tuple(dim for dim in range(x.dim()) if x.shape[dim] > 1 and x.stride(dim) == 0)


class _Unbroadcast(torch.autograd.Function):
    """Narrow dimensions of stride 0 to size 1, so that their gradient, too, has one element and not the whole shape.

    The gradient of one stored element goes back in equal parts to the n places that show it; the ``expand`` that made
    them sums these parts.
    """

    @staticmethod
    def forward(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        for dim in dims:
            x = x.narrow(dim, 0, 1)
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, tuple[int, ...]], output: torch.Tensor) -> None:
        ctx.shape = inputs[0].shape
        ctx.copies = 1
        for dim in inputs[1]:
            ctx.copies *= ctx.shape[dim]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (gradient / ctx.copies).expand(ctx.shape), None


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "(" + ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) + ")"


def _short(value: object) -> str:
    """A value as an error message shows it: a tensor by its shape and dtype, since its contents may be on a device."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return repr(value)
