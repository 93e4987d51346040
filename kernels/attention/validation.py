"""Checks of the arguments of attention, and their normal form: what every backend takes.

All of it looks at shapes, dtypes, devices and Python numbers only, so it costs no synchronisation. Limits of a single
backend are not here but with the choice among them (``api.py``) and in the backends themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from . import score_mods
from .score_mods import SOFTCAP, BoundScoreMod
from .spec import FP8, AttentionSpec, Origin, out_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGN = ("top_left", "bottom_right")


@dataclass(frozen=True)
class Call:
    """The tensors of one call besides q, k and v, in the form that backends take, and its numbers."""

    mask: torch.Tensor | None  # 4-D view, each dim 1 or that of [B, H, Sq, Sk]
    bias: torch.Tensor | None  # likewise
    origin: torch.Tensor | None  # int64 [4]: q, k, head, batch
    spec: AttentionSpec
    aux: tuple[torch.Tensor, ...] = ()  # of the score mods
    sinks: torch.Tensor | None = None  # [H]
    seed: torch.Tensor | None = None  # int64 [1]
    descale: torch.Tensor | None = None  # fp32 [B, Hkv, 3], of fp8's q, k, v

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that every backend's functions take."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def wrong(name: str, expected: str, received: object, remedy: str) -> ValueError:
    """The one form of an error about an argument."""
    return ValueError(f"{name}: expected {expected}, received {received}; {remedy}")


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
            raise wrong(name, f"a dtype out of {_names((*DTYPES, FP8))}", x.dtype, "convert it with .to(dtype)")
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
    alibi_slopes: Any = None,
    softcap: Any = None,
    score_mod: Any = None,
    sinks: Any = None,
    dropout_p: Any = 0.0,
    seed: Any = None,
    descale: Any = None,
    deterministic: Any = True,
) -> Call:
    """Check everything besides q, k and v, and bring it into the form that backends take."""
    check_flag("causal", causal)
    check_flag("deterministic", deterministic)
    _check_dropout(dropout_p)
    bound = _score_mods(q, alibi_slopes, softcap, score_mod)
    left, right = _window(window)
    if causal:
        right = 0 if right is None else min(right, 0)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise wrong("scale", "a finite number or None", _short(scale), "None means 1 / sqrt(D)")
    ahead = left is not None or right is not None
    # Softcap looks at no position.
    positional = ahead or any(part.mod is not SOFTCAP for part in bound)
    needs = "causal or window" if ahead else "alibi_slopes or score_mod"
    numbers, tensor = _origins(q, k, align, origin, needs if positional else None)
    if not positional and dropout_p == 0:
        numbers, tensor = (0, 0, 0, 0), None
    return Call(
        mask=_mask(mask, q, k),
        bias=_bias(bias, q, k),
        origin=tensor,
        spec=AttentionSpec(
            float(scale),
            left,
            right,
            *numbers,
            mods=tuple(part.mod.name for part in bound),
            params=tuple(number for part in bound for number in part.params),
            dropout_p=float(dropout_p),
        ),
        aux=tuple(tensor for part in bound for tensor in part.aux),
        sinks=_sinks(sinks, q),
        seed=_seed(seed, q) if dropout_p > 0 else None,
        descale=_descale(descale, q, k),
    )


def check_saved(q: torch.Tensor, v: torch.Tensor, do: Any, out: Any, lse: Any, dlse: Any) -> None:
    """Raise unless do, out, lse and dlse are those of a forward of q, k, v."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.dtype == FP8:
        raise wrong("q", "a dtype with gradients", q.dtype, "fp8 is for the forward; train in bfloat16")
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


def check_seed(dropout_p: Any, seed: Any) -> None:
    """Raise where forward and backward are two calls and would each draw a seed of its own."""
    if isinstance(dropout_p, (int, float)) and 0 < dropout_p < 1 and seed is None:
        remedy = "pass the same seed to attention_forward and attention_backward"
        raise wrong("seed", "an int or an int64 tensor, because dropout_p is given", None, remedy)


def _check_dropout(p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise wrong("dropout_p", "a number in [0, 1)", repr(p), "0.0 switches dropout off")


def _score_mods(q: torch.Tensor, alibi_slopes: Any, softcap: Any, score_mod: Any) -> list[BoundScoreMod]:
    """Softcap, ALiBi and the user's mod, in the contract's order."""
    bound = []
    if softcap is not None:
        bound.append(score_mods.softcap(softcap))
    if alibi_slopes is not None:
        bound.append(score_mods.alibi(alibi_slopes, q))
    if score_mod is not None:
        if not isinstance(score_mod, BoundScoreMod):
            remedy = "pass mod(*aux, **params), with mod from fusemesh.register_score_mod"
            raise wrong("score_mod", "a registered mod with its arguments, or None", _short(score_mod), remedy)
        score_mods.get(score_mod.mod.name)
        for x in score_mod.aux:
            if x.device != q.device or not x.is_contiguous():
                received = f"{_short(x)} on {x.device}, strides {x.stride()}"
                remedy = "move it or call .contiguous()"
                raise wrong("score_mod", f"contiguous aux tensors on q's device {q.device}", received, remedy)
            if x.requires_grad and not score_mod.mod.aux_grad:
                remedy = "detach it, or register the mod with aux_grad=True (reference backend)"
                raise wrong("score_mod", "aux tensors without gradient", "requires_grad=True", remedy)
        bound.append(score_mod)
    return bound


def _descale(descale: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """What fp8's q, k and v are to be multiplied by, fp32 [B, Hkv, 3] on the device; None for other dtypes."""
    if q.dtype != FP8:
        if descale is not None:
            raise wrong("descale", f"None beside q of {q.dtype}", _short(descale), f"it belongs to q, k, v of {FP8}")
        return None
    batch, heads = k.shape[:2]
    expected = f"(q's, k's, v's), each None, a number, or an fp32 tensor of 1 element or [B, Hkv] = [{batch}, {heads}]"
    remedy = (
        "x = descale * fp8(x), for the tensor or for each batch and key head (q's: that of the heads that share it)"
    )
    parts = (None, None, None) if descale is None else descale
    if not isinstance(parts, (tuple, list)) or len(parts) != 3:
        raise wrong("descale", expected, _short(descale), remedy)
    found = []
    for x in parts:
        if isinstance(x, torch.Tensor):
            if x.dtype != torch.float32 or x.device != q.device or (x.numel() != 1 and x.shape != (batch, heads)):
                raise wrong("descale", expected, f"{_short(x)} on {x.device}", remedy)
            found.append(x.reshape(1, 1).expand(batch, heads) if x.numel() == 1 else x)
        elif x is None or (isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)):
            found.append(torch.full((batch, heads), 1.0 if x is None else x, dtype=torch.float32, device=q.device))
        else:
            raise wrong("descale", expected, _short(x), remedy)
    return torch.stack(found, -1)


def _sinks(sinks: Any, q: torch.Tensor) -> torch.Tensor | None:
    if sinks is None:
        return None
    dtype = out_dtype(q.dtype)
    expected = f"a tensor [H] = [{q.shape[1]}] of q's dtype {dtype} or torch.float32 on {q.device}"
    remedy = "one logit for each query head"
    if not isinstance(sinks, torch.Tensor) or sinks.dtype not in (dtype, torch.float32) or sinks.device != q.device:
        received = f"{sinks.dtype} on {sinks.device}" if isinstance(sinks, torch.Tensor) else _short(sinks)
        raise wrong("sinks", expected, received, remedy)
    if tuple(sinks.shape) != (q.shape[1],):
        raise wrong("sinks", expected, f"shape {tuple(sinks.shape)}", remedy)
    return sinks if sinks.is_contiguous() else sinks.contiguous()


def _seed(seed: Any, q: torch.Tensor) -> torch.Tensor:
    """Dropout's seed on the device, int64 [1]; drawn from torch's generator where there is none."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device:
            received = f"a tensor of shape {tuple(seed.shape)}, {seed.dtype} on {seed.device}"
            remedy = "it is read on the device, without a synchronisation"
            raise wrong("seed", f"an int, or an int64 tensor with one element on {q.device}", received, remedy)
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        remedy = "pass the same seed for the same mask; None draws one"
        raise wrong("seed", "an int of 64 bits, an int64 tensor, or None", _short(seed), remedy)
    return torch.full((1,), seed, dtype=torch.int64, device=q.device)


def _origins(
    q: torch.Tensor, k: torch.Tensor, align: Any, origin: Any, needs: str | None
) -> tuple[tuple[int, int, int, int], torch.Tensor | None]:
    """Origins of q, k, head and batch as ints, and the part of them that lives on the device as int64 [4], or None.

    ``needs`` names the arguments that depend on how queries and keys are aligned.
    """
    sq, sk = q.shape[2], k.shape[2]
    if align is not None and align not in ALIGN:
        raise wrong("align", f"one of {ALIGN} or None", _short(align), "see the table of positions in the docstring")
    if align is not None and origin is not None:
        raise wrong("align, origin", "at most one of them", f"align={align!r} and {origin}", "drop one of the two")
    if origin is None:
        if align is None and needs is not None and sq != sk:
            raise wrong(
                "align, origin",
                f"one of them, because {needs} is given and Sq differs from Sk",
                f"neither, with Sq={sq} and Sk={sk}",
                "pass align='top_left' (query 0 stands at key 0), align='bottom_right' (the last query stands at the "
                "last key), or origin=Origin(q=..., k=...)",
            )
        return (sk - sq if align == "bottom_right" else 0, 0, 0, 0), None
    if not isinstance(origin, Origin):
        raise wrong("origin", "a fusemesh.Origin or None", _short(origin), "pass origin=Origin(q=..., k=...)")
    for name in ("q", "k", "head", "batch"):
        _check_position(f"origin.{name}", getattr(origin, name), q.device)
    parts = (origin.q, origin.k, origin.head, origin.batch)
    at_q, at_k, at_head, at_batch = (0 if isinstance(x, torch.Tensor) else x for x in parts)
    numbers = (at_q, at_k, at_head, at_batch)
    if not any(isinstance(x, torch.Tensor) for x in parts):
        return numbers, None
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    tensors = [x.reshape(()).to(torch.int64) if isinstance(x, torch.Tensor) else zero for x in parts]
    return numbers, torch.stack(tensors)


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
    dtype = out_dtype(q.dtype)
    if not isinstance(bias, torch.Tensor) or bias.dtype not in (dtype, torch.float32):
        received = bias.dtype if isinstance(bias, torch.Tensor) else _short(bias)
        raise wrong("bias", f"a tensor of q's dtype {dtype} or torch.float32, or None", received, remedy)
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
