"""Checks of the arguments of attention, and their normal form: what every backend takes.

All of it looks at shapes, dtypes, devices and Python numbers only, so it costs no synchronisation. Limits of a single
backend are not here but in the record of the backend (its folder's ``backend.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ... import compat
from .errors import TRANSPOSE, names, or_transpose, short
from .errors import wrong as wrong
from .option_checks import (
    bound_score_mods,
    checked_dropout,
    checked_scale,
    checked_sinks,
    descale_factors,
    seed_tensor,
)
from .options import Call as Call
from .options import Options as Options
from .scalars import as_flag, as_integer, as_pair, as_truth
from .score_mods import SOFTCAP
from .spec import FP8, AttentionSpec, Origin, out_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGN = ("top_left", "bottom_right")
FARTHEST = 2**60  # positions beyond would overflow when they are subtracted


def check_qkv(q: Any, k: Any, v: Any) -> None:
    """Raise unless q [B, H, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] belong together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise wrong(name, "a torch.Tensor", type(x).__name__, "convert it with torch.as_tensor")
        if x.is_nested:
            raise NotImplementedError(
                f"{name}: jagged tensors need layout=torch.jagged; this one is nested and strided"
            )
        if x.layout != torch.strided:
            raise wrong(name, "a dense tensor (torch.strided)", x.layout, "call .to_dense()")
        if x.dim() != 4:
            letters = "[B, H, Sq, D]" if name == "q" else "[B, Hkv, Sk, D]"
            raise wrong(name, f"4 dimensions {letters}", f"shape {tuple(x.shape)}", "add the missing ones or reshape")
        if x.dtype not in (*DTYPES, FP8):
            raise wrong(name, f"a dtype out of {names((*DTYPES, FP8))}", x.dtype, "convert it with .to(dtype)")
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
        remedy = or_transpose("k and v share heads", v.shape[1:3] == (k.shape[2], k.shape[1]))
        raise wrong("v", f"k's {k.shape[1]} heads", f"{v.shape[1]} (shape {tuple(v.shape)})", remedy)
    if v.shape[2] != k.shape[2]:
        raise wrong("v", f"k's length {k.shape[2]}", f"{v.shape[2]} (shape {tuple(v.shape)})", "one value for each key")
    if heads != 0 and (k.shape[1] == 0 or heads % k.shape[1] != 0):
        raise wrong(
            "k",
            f"a number of heads that divides q's {heads}",
            f"{k.shape[1]} (shape {tuple(k.shape)})",
            f"query head h uses key head h // (H / Hkv); {TRANSPOSE}",
        )
    for name, size in (("q", dim), ("v", v.shape[3])):
        if size == 0:
            raise wrong(name, "a head dim of at least 1", 0, "pass tensors whose last dimension is not empty")


def check_flag(name: str, value: object) -> bool:
    """Return a bool as Python's; raise for all else: a tensor or a string taken for true would be a silent mistake."""
    flag = as_flag(value)
    if flag is None:
        raise wrong(name, "True or False", repr(value), "pass a Python bool")
    return flag


def check_truth(name: str, value: object) -> bool:
    """Return whether ``value`` is true, for signatures in which numbers count as flags; raise for strings and lists."""
    truth = as_truth(value)
    if truth is None:
        raise wrong(name, "True or False", short(value), "pass a bool, or a number that counts as one")
    return truth


def normalise(q: torch.Tensor, k: torch.Tensor, options: Options) -> Call:
    """Check every option, and return the call in the form that backends take."""
    causal = check_flag("causal", options.causal)
    dropout_p = checked_dropout(options.dropout_p)
    bound = bound_score_mods(q, options)
    left, right = window_sides(options.window)
    if causal:
        right = 0 if right is None else min(right, 0)
    scale = checked_scale(options.scale, q)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    ahead = left is not None or right is not None
    # Softcap looks at no position.
    positional = ahead or any(part.mod is not SOFTCAP for part in bound)
    needs = "causal or window" if ahead else "alibi_slopes or score_mod"
    numbers, tensor = _origins(q, k, options.align, options.origin, needs if positional else None)
    if not positional and dropout_p == 0:
        numbers, tensor = (0, 0, 0, 0), None
    return Call(
        AttentionSpec(
            scale,
            left,
            right,
            *numbers,
            mods=tuple(part.mod.name for part in bound),
            params=tuple(number for part in bound for number in part.params),
            dropout_p=dropout_p,
        ),
        mask=_mask(options.mask, q, k),
        bias=_bias(options.bias, q, k),
        origin=tensor,
        aux=tuple(tensor for part in bound for tensor in part.aux),
        sinks=checked_sinks(options.sinks, q),
        seed=seed_tensor(options.seed, q) if dropout_p > 0 else None,
        descale=descale_factors(options.descale, q, k),
    )


def check_saved(q: torch.Tensor, v: torch.Tensor, do: Any, out: Any, lse: Any, dlse: Any, out_rest: Any) -> None:
    """Raise unless do, out, lse, dlse and out_rest are those of a forward of q, k, v."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.dtype == FP8:
        raise wrong("q", "a dtype with gradients", q.dtype, "fp8 is for the forward; train in bfloat16")
    rows = tuple(q.shape[:3])
    for name, x, shape, dtype in (
        ("do", do, (*rows, v.shape[3]), q.dtype),
        ("out", out, (*rows, v.shape[3]), q.dtype),
        ("lse", lse, rows, lse_dtype),
        ("dlse", dlse, rows, lse_dtype),
        ("out_rest", out_rest, (*rows, v.shape[3]), q.dtype),
    ):
        if name in ("dlse", "out_rest") and x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise wrong(name, "a torch.Tensor", type(x).__name__, "pass what the forward returned or its gradient")
        if tuple(x.shape) != shape:
            letters = "[B, H, Sq, Dv]" if len(shape) == 4 else "[B, H, Sq]"
            received = tuple(x.shape)
            is_turned = (received[0:1] + received[2:0:-1] + received[3:]) == shape
            remedy = or_transpose("pass it as attention_forward shapes it", is_turned)
            raise wrong(name, f"shape {letters} = {shape}", received, remedy)
        if x.dtype != dtype:
            raise wrong(name, f"dtype {dtype}", x.dtype, "convert it with .to(dtype)")
        if x.device != q.device:
            raise wrong(name, f"q's device {q.device}", x.device, "move it with .to(device)")


def window_sides(window: Any) -> tuple[int | None, int | None]:
    """Return (left, right) of a window, each None where it is open."""
    if window is None:
        return None, None
    expected = "None or (left, right), each None or an int >= 0"
    remedy = "left and right count keys besides the query's own position; None leaves a side open"
    pair = as_pair(window)
    if pair is None:
        raise wrong("window", expected, short(window), remedy)
    left, right = pair
    if left is not None:
        left = as_integer(left)
        if left is None or left < 0:
            raise wrong("window", expected, short(window), remedy)
    if right is not None:
        right = as_integer(right)
        if right is None or right < 0:
            raise wrong("window", expected, short(window), remedy)
    return _bounded(left), _bounded(right)


def _bounded(side: int | None) -> int | None:
    """Return a side of a window, no larger than all positions are apart, so that 64 bits hold its sum with one."""
    # A number that torch.compile traces may be a symbol, which it would have to decide.
    return side if not isinstance(side, int) or torch.compiler.is_compiling() else min(side, 4 * FARTHEST)


def _origins(
    q: torch.Tensor, k: torch.Tensor, align: Any, origin: Any, needs: str | None
) -> tuple[tuple[int, int, int, int], torch.Tensor | None]:
    """Origins of q, k, head and batch as ints, and the part of them that lives on the device as int64 [4], or None.

    ``needs`` names the arguments that depend on how queries and keys are aligned.
    """
    sq, sk = q.shape[2], k.shape[2]
    if align is not None and align not in ALIGN:
        raise wrong("align", f"one of {ALIGN} or None", short(align), "see the table of positions in the docstring")
    if align is not None and origin is not None:
        raise wrong("align, origin", "at most one of them", f"align={align!r} and {origin}", "drop one of the two")
    if origin is None:
        if align is None and needs is not None and sq != sk:
            remedy = (
                "pass align='top_left' (query 0 stands at key 0), align='bottom_right' (the last query stands at the "
                "last key), or origin=Origin(q=..., k=...)"
            )
            if sk > 0 and sq % sk == 0 and q.shape[1] == k.shape[1]:  # as heads, with fewer for keys, would be third
                received = f"shapes {tuple(q.shape)} and {tuple(k.shape)}"
                raise wrong("q, k", "heads second", received, f"{TRANSPOSE}; if {sq} and {sk} are lengths, {remedy}")
            raise wrong(
                "align, origin",
                f"one of them, because {needs} is given and Sq differs from Sk",
                f"neither, with Sq={sq} and Sk={sk}",
                remedy,
            )
        return (sk - sq if align == "bottom_right" else 0, 0, 0, 0), None
    if not isinstance(origin, Origin):
        raise wrong("origin", "a fusemesh.Origin or None", short(origin), "pass origin=Origin(q=..., k=...)")
    parts = [_position(f"origin.{name}", getattr(origin, name), q.device) for name in ("q", "k", "head", "batch")]
    at_q, at_k, at_head, at_batch = (0 if isinstance(x, torch.Tensor) else x for x in parts)
    numbers = (at_q, at_k, at_head, at_batch)
    if not any(isinstance(x, torch.Tensor) for x in parts):
        return numbers, None
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    tensors = [x.reshape(()).to(torch.int64) if isinstance(x, torch.Tensor) else zero for x in parts]
    return numbers, torch.stack(tensors)


def _position(name: str, value: object, device: torch.device) -> int | torch.Tensor:
    """Return a position as an int, or as the tensor that it is."""
    remedy = "an int costs nothing; a tensor is read on the device, without a synchronisation"
    expected = f"an int, or an integer tensor with one element on {device}"
    if isinstance(value, torch.Tensor):
        integer = not value.dtype.is_floating_point and not value.dtype.is_complex and value.dtype != torch.bool
        if value.numel() != 1 or not integer or value.device != device:
            received = f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
            raise wrong(name, expected, received, remedy)
        return value
    number = as_integer(value)
    if number is None:
        raise wrong(name, expected, short(value), remedy)
    if isinstance(number, int) and not torch.compiler.is_compiling() and not -FARTHEST <= number <= FARTHEST:
        raise wrong(name, "a position within +-2^60", short(value), "beyond, distances overflow; count from elsewhere")
    return number


def _mask(mask: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    remedy = "mask is boolean, True = attend; numbers to be added to the scores go to bias"
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        received = mask.dtype if isinstance(mask, torch.Tensor) else short(mask)
        raise wrong("mask", "a torch.bool tensor or None", received, remedy)
    view = _four_dims("mask", mask, q, k)
    for dim in broadcast_dims(view):
        view = view.narrow(dim, 0, 1)
    return view


def _bias(bias: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    remedy = "bias is added to the scores; a boolean mask goes to mask"
    dtype = out_dtype(q.dtype)
    if not isinstance(bias, torch.Tensor) or bias.dtype not in (dtype, torch.float32):
        received = bias.dtype if isinstance(bias, torch.Tensor) else short(bias)
        raise wrong("bias", f"a tensor of q's dtype {dtype} or torch.float32, or None", received, remedy)
    view = _four_dims("bias", bias, q, k)
    dims = broadcast_dims(view)
    # Derivatives of a transform are those of the tensor that was passed, whatever its strides.
    if not dims or compat.transforms():
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
        remedy = "each dimension, counted from the last, is 1 or that of the scores; insert a dimension with unsqueeze"
        transposed = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        fits = view.dim() == 4 and all(a in (1, b) for a, b in zip(view.shape, transposed, strict=True))
        remedy = or_transpose(remedy, fits and q.shape[1] != q.shape[2])
        raise wrong(name, f"a shape that broadcasts to [B, H, Sq, Sk] = {scores}", tuple(x.shape), remedy)
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
