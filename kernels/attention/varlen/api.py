"""flash_attention_varlen: attention of packed sequences, each with its own length, without padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ... import compat, env
from ...backend_record import Request, implementation, needs_gradient
from ...backends import choose, count
from ..call.errors import or_transpose, short, wrong
from ..call.options import Options
from ..call.packed import TRANSPOSE, Packed, check_contents
from ..call.scalars import as_integer
from ..call.spec import Origin
from ..call.tensors import autocast, has_values, rest_is_needed, unit_last_stride
from ..call.validation import ALIGN, DTYPES, check_flag, check_qkv, normalise
from .ops import FIELDS

INDEX_DTYPES = (torch.int32, torch.int64)
_HUGE = 2**24


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    align: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    scale: float | None = None,
    origin: Origin | None = None,
    descale: Any = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`fusemesh.flash_attention` of each of B sequences that stand one after the other in packed tensors.

    Sequence b owns the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1]``; queries see keys of their own sequence only, and positions count within it. The lengths
    stay on the device: nothing waits for them, and other lengths compile nothing anew.

    Args:
        q: [total_q, H, D]. Any strides; only a last dimension that is not contiguous is copied.
        k: [total_k, Hkv, D], H a multiple of Hkv (GQA, MQA).
        v: [total_k, Hkv, Dv]; Dv may differ from D.
        cu_seqlens_q, cu_seqlens_k: [B + 1], int32 or int64, on q's device: where each sequence begins and, last, where
            the last one ends. Lengths may be 0. Rows before the first and after the last number are padding.
        max_seqlen_q, max_seqlen_k: ints; no sequence is longer. They size the grid: too large costs programs that
            return at once, too small is an error that only FUSEMESH_CHECK=1 and the reference report.
        causal, window, softcap, sinks, scale, descale, deterministic: as in flash_attention.
        align: where each sequence's queries stand among its keys: ``"top_left"`` puts the first query at the first key,
            ``"bottom_right"`` the last at the last. Must be given with causal, window, alibi_slopes and score_mod.
        mask, bias: as in flash_attention, broadcast to [B, H, max_seqlen_q, max_seqlen_k] and indexed by position
            within the sequence; what lies beyond a sequence's lengths is not read, and its gradient is 0.
        alibi_slopes: [H] or [B, H].
        score_mod: its i_b is the index of the sequence; i_q and i_k count within it, from where align puts them.
        dropout_p, seed: as in flash_attention of a batch: an element's counter is the index of its sequence, its head
            and its positions within the sequence (under bottom_right the query's is moved as align says).
        origin: where head 0 and sequence 0 stand in the whole, for a shard's score_mod and dropout: ``Origin(head=...,
            batch=...)`` of ints. Where queries and keys stand is align's matter.
        return_lse: also return the log-sum-exp, through which gradients flow, too.
        backend: ``reference`` (plain PyTorch, one sequence after the other; reads the lengths on the host), ``cpu`` or
            ``triton``; ``torch`` takes no packed sequences. ``auto`` takes triton on a GPU where that is proven, cpu on
            CPUs unless score_mod or fp64 keeps it from it, else reference.

    Returns:
        out [total_q, H, Dv] in q's dtype; with return_lse also lse [H, total_q], natural log, fp32 (fp64 for fp64). A
        query that sees no key, and one of the padding, has out 0 and lse -inf, and no gradient comes from it.

    Raises:
        ValueError: an argument is wrong, or a backend given by name cannot do the call; before anything runs. The
            contents of cu_seqlens are looked at only under FUSEMESH_CHECK=1 and by the reference.
        NotImplementedError: an argument is right but not built yet; named in the message.
    """
    options = Options(
        causal=causal,
        align=align,
        window=window,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        score_mod=score_mod,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        scale=scale,
        origin=origin,
        descale=descale,
    )
    check_flag("deterministic", deterministic)
    check_flag("return_lse", return_lse)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = attend(q, k, v, lengths, options, return_lse=return_lse, backend=backend)
    return (out, lse) if return_lse else out


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor, int, int],
    options: Options,
    *,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse of :func:`flash_attention_varlen`.

    Args:
        lengths: cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k.
    """
    q, k, v = autocast(q, k, v)
    _check_tensors(q, k, v)
    longest = _check_lengths(q, *lengths)
    _check_align(options)
    widest = _HUGE if options.mask is None and options.bias is None else 2**40
    longest = _within(longest[0], q, widest), _within(longest[1], k, widest)
    packed = Packed(*lengths[:2], *longest, options.align == "bottom_right")
    like_q, like_k, like_v = _longest_batch(q, k, v, packed)
    check_qkv(like_q, like_k, like_v)
    # Each sequence's own shift is added where its lengths are read.
    options = dataclasses.replace(options, align=None, origin=_checked_origin(options.origin))
    call = normalise(like_q, like_k, options).replace(packed=packed, origin=None)
    needs_grad = needs_gradient(q, k, v, *call.differentiable)
    dims = (q.shape[2], v.shape[2])
    scores = (*like_q.shape[:3], like_k.shape[2])
    asked = Request("attention_varlen", q.device, q.dtype, dims, call, needs_grad, return_lse, scores=scores)
    record = choose(backend, asked)
    can_read = has_values(lengths[0])
    if env.CHECK and can_read:
        check_contents(packed, q.shape[0], k.shape[0])
    # The reference reads lengths on the host, which a compiled graph holds only inside an op; and that has no rule for
    # a transform.
    is_formula = "attention_varlen" in record.differentiable
    if is_formula and (can_read or (torch.compiler.is_compiling() and compat.transforms())):
        count("attention_varlen_forward", record.name)
        found: tuple[torch.Tensor, torch.Tensor]
        found = implementation(record.name, "attention_varlen").forward(q, k, v, call)
        return found
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    keeping = {"keep_rest": True} if rest_is_needed(record, q, k, call) else {}
    out, lse, _ = torch.ops.fusemesh.attention_varlen_forward(q, k, v, *FIELDS.pack(call), record.name, **keeping)
    return out, lse


def _checked_origin(origin: Any) -> Origin:
    """Return the origin of heads and sequences; raise for one of queries or keys, or one that lies on the device."""
    if origin is None:
        return Origin()
    parts = [as_integer(getattr(origin, name, None)) for name in ("q", "k", "head", "batch")]
    if not isinstance(origin, Origin) or None in parts or parts[0] != 0 or parts[1] != 0:
        remedy = "positions count within each sequence, and align says where its queries stand"
        raise wrong("origin", "None or Origin(head=..., batch=...) of ints", short(origin), remedy)
    return origin


def _longest_batch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences of the longest lengths, without memory: what masks, biases and slopes are checked against."""
    lengths = (packed.max_q, packed.max_k, packed.max_k)
    like_q, like_k, like_v = (
        x.detach().new_empty(()).expand(packed.batch, x.shape[1], length, x.shape[2])
        for x, length in zip((q, k, v), lengths, strict=True)
    )
    return like_q, like_k, like_v


def _check_tensors(q: Any, k: Any, v: Any) -> None:
    """Raise unless q, k and v are packed; what else must hold between them is check_qkv's matter."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        letters = {"q": "[total_q, H, D]", "k": "[total_k, Hkv, D]", "v": "[total_k, Hkv, Dv]"}[name]
        if not isinstance(x, torch.Tensor):
            raise wrong(name, "a torch.Tensor", type(x).__name__, "convert it with torch.as_tensor")
        if x.is_nested or x.layout != torch.strided:
            raise wrong(name, f"a dense tensor {letters}", x.layout, "pass the values of a jagged tensor")
        if x.dim() != 3:
            remedy = "packed sequences have no batch dimension: one stands after the other"
            raise wrong(name, f"3 dimensions {letters}", f"shape {tuple(x.shape)}", remedy)
        if x.dtype not in DTYPES:
            raise wrong(name, f"a dtype out of {DTYPES}", x.dtype, "convert it with .to(dtype)")
        if x.dtype != q.dtype or x.device != q.device:
            expected, received = f"q's dtype and device, {q.dtype} on {q.device}", f"{x.dtype} on {x.device}"
            raise wrong(name, expected, received, "convert one of them with .to()")
    if v.shape[0] != k.shape[0]:
        remedy = or_transpose("one value for each key", v.shape[:2] == (k.shape[1], k.shape[0]), TRANSPOSE)
        raise wrong("v", f"k's {k.shape[0]} rows", f"{v.shape[0]} (shape {tuple(v.shape)})", remedy)
    if q.shape[1] != 0 and (k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0):
        received = f"{k.shape[1]} (shape {tuple(k.shape)})"
        raise wrong("k", f"a number of heads that divides q's {q.shape[1]}", received, TRANSPOSE)


def _check_lengths(q: torch.Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any) -> tuple[int, int]:
    """Return the longest lengths; raise unless there is a beginning for each sequence's queries and keys."""
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _check_starts(name, cu, q)
    if cu_k.shape != cu_q.shape:
        expected = f"as many numbers as cu_seqlens_q, {cu_q.shape[0]}"
        raise wrong("cu_seqlens_k", expected, cu_k.shape[0], "each sequence has queries and keys, maybe none")
    return _longest("max_seqlen_q", max_q), _longest("max_seqlen_k", max_k)


def _within(most: int, x: torch.Tensor, widest: int) -> int:
    """Return a longest length, or the rows of all sequences above ``widest``: sizes must fit 64 bits."""
    is_huge = isinstance(most, int) and not torch.compiler.is_compiling() and most > widest
    return min(most, max(x.shape[0], _HUGE)) if is_huge else most


def _longest(name: str, most: Any) -> int:
    number = as_integer(most)
    if number is None or number < 0:
        raise wrong(name, "an int of at least 0", short(most), "pass the longest length, or any larger number")
    return number


def _check_starts(name: str, cu: Any, q: torch.Tensor) -> None:
    expected = f"an int32 or int64 tensor [B + 1] on {q.device}"
    remedy = "the running sum of the lengths, from 0: torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
    if not isinstance(cu, torch.Tensor):
        raise wrong(name, expected, type(cu).__name__, remedy)
    if cu.dim() != 1 or cu.shape[0] == 0 or cu.dtype not in INDEX_DTYPES or cu.device != q.device:
        raise wrong(name, expected, f"shape {tuple(cu.shape)}, {cu.dtype} on {cu.device}", remedy)
    if compat.VMAP in compat.transforms() and not torch.compiler.is_compiling() and compat.is_mapped(cu):
        remedy = "pack the sequences of all samples into one call, or call it for each sample"
        raise wrong(name, "lengths that all samples of torch.func.vmap share", "lengths that vmap maps", remedy)
    if cu.stride(0) != 1 and cu.shape[0] > 1:
        raise wrong(name, "a contiguous tensor", f"strides {cu.stride()}", "call .contiguous()")


def _check_align(options: Options) -> None:
    """Raise unless align is given where an argument depends on it."""
    align = options.align
    if align is not None and align not in ALIGN:
        raise wrong("align", f"one of {ALIGN} or None", repr(align), "name the corner where each sequence is aligned")
    given = [name for name in ("window", "alibi_slopes", "score_mod") if getattr(options, name) is not None]
    if check_flag("causal", options.causal):
        given.insert(0, "causal")
    if given and align is None:
        raise wrong(
            "align",
            f"'top_left' or 'bottom_right' with {', '.join(given)}",
            None,
            "with packed sequences it is never implied: 'top_left' puts the first query of each at its first key, "
            "'bottom_right' the last query at the last key",
        )
