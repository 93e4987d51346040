"""flash_attention_varlen: attention of packed sequences, each with its own length, without padding."""

from __future__ import annotations

from typing import Any

import torch

from ... import env
from ..call import tensors as entry
from ..call.choice import HEAD_DIMS, choose, why_not_engine, why_not_triton
from ..call.packed import Packed, check_contents
from ..call.spec import Origin
from ..call.validation import ALIGN, DTYPES, Call, check_flag, check_qkv, normalise, wrong
from . import ops

INDEX_DTYPES = (torch.int32, torch.int64)


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
        align: where each sequence's queries stand among its keys: ``"top_left"`` puts the first query at the first key,
            ``"bottom_right"`` the last at the last. Must be given with causal, window, alibi_slopes and score_mod.
        mask, bias: as in flash_attention, broadcast to [B, H, max_seqlen_q, max_seqlen_k] and indexed by position
            within the sequence; what lies beyond a sequence's lengths is not read, and its gradient is 0.
        alibi_slopes: [H] or [B, H].
        score_mod: its i_b is the index of the sequence; i_q and i_k count within it, from where align puts them.
        dropout_p, seed: as in flash_attention of a batch: an element's counter is the index of its sequence, its head
            and its positions within the sequence (under bottom_right the query's is moved as align says).
        return_lse: also return the log-sum-exp, through which gradients flow, too.
        backend: ``reference`` (plain PyTorch, one sequence after the other; reads the lengths on the host), ``cpu`` or
            ``triton``; ``torch`` takes no packed sequences. ``auto`` takes triton on a GPU where that is proven, cpu on
            CPUs unless score_mod or fp64 keeps it from it, else reference.
        causal, window, softcap, sinks, scale, descale, deterministic: as in flash_attention.

    Returns:
        out [total_q, H, Dv] in q's dtype; with return_lse also lse [H, total_q], natural log, fp32 (fp64 for fp64). A
        query that sees no key, and one of the padding, has out 0 and lse -inf, and no gradient comes from it.

    Raises:
        ValueError: an argument is wrong, or a backend given by name cannot do the call; before anything runs. The
            contents of cu_seqlens are looked at only under FUSEMESH_CHECK=1 and by the reference.
        NotImplementedError: an argument is right but not built yet; named in the message.
    """
    q, k, v = entry.autocast(q, k, v)
    _check_tensors(q, k, v)
    _check_lengths(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_flag("return_lse", return_lse)
    _check_align(align, causal=causal, window=window, alibi_slopes=alibi_slopes, score_mod=score_mod)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, align == "bottom_right")
    like_q, like_k, like_v = _longest_batch(q, k, v, packed)
    check_qkv(like_q, like_k, like_v)
    call = normalise(
        like_q,
        like_k,
        causal=causal,
        align=None,
        window=window,
        mask=mask,
        bias=bias,
        scale=scale,
        # Each sequence's own shift is added where its lengths are read.
        origin=Origin(),
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        score_mod=score_mod,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        descale=descale,
        deterministic=deterministic,
    )
    chosen = _choose(backend, like_q, like_v, call)
    if env.CHECK and not torch.compiler.is_compiling():
        check_contents(packed, q.shape[0], k.shape[0])
    out, lse = _forward(chosen, q, k, v, packed, call)
    return (out, lse) if return_lse else out


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


def _forward(
    chosen: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    if chosen == "reference" and not torch.compiler.is_compiling():
        from ..reference import varlen as reference

        entry.count("attention_varlen_forward", "reference")
        # Positions are the sequences' own, and fp8 has been refused.
        options = {name: value for name, value in call.arguments().items() if name not in ("origin", "descale")}
        return reference.forward(q, k, v, packed, **options)
    # The reference reads lengths on the host, which a compiled graph holds only inside an op.
    q, k, v = (entry.unit_last_stride(x) for x in (q, k, v))
    tensors = (packed.cu_q, packed.cu_k, call.mask, call.bias, list(call.aux), call.sinks, call.seed)
    numbers = (packed.max_q, packed.max_k, packed.is_bottom_right, *ops.numbers_of(call.spec))
    out, lse = torch.ops.fusemesh.attention_varlen_forward(q, k, v, *tensors, *numbers, chosen)
    return out, lse


def _choose(backend: str, q: torch.Tensor, v: torch.Tensor, call: Call) -> str:
    """The backend that runs; for one given by name, ValueError if it cannot do this call."""
    expected, remedy = (
        "one that takes packed sequences (reference, cpu, triton)",
        "use backend='auto', 'reference', 'cpu' or 'triton'",
    )
    unfit = {
        "triton": why_not_triton(q.dtype, (("q", q.shape[3], HEAD_DIMS), ("v", v.shape[3], HEAD_DIMS))),
        "cpu": why_not_engine(q.dtype, call.spec.mods),
    }
    return choose(
        backend,
        q.device,
        operation="attention_varlen",
        kernels="attention",
        refused={"torch": (expected, "'torch'", remedy)},
        unfit=unfit,
        otherwise=("reference", "PyTorch's kernel takes no packed sequences"),
    )


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
        raise wrong("v", f"k's {k.shape[0]} rows", f"{v.shape[0]} (shape {tuple(v.shape)})", "one value for each key")


def _check_lengths(q: torch.Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any) -> None:
    """Raise unless there is a beginning for each sequence's queries and keys, and a longest length of both."""
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _check_starts(name, cu, q)
    if cu_k.shape != cu_q.shape:
        expected = f"as many numbers as cu_seqlens_q, {cu_q.shape[0]}"
        raise wrong("cu_seqlens_k", expected, cu_k.shape[0], "each sequence has queries and keys, maybe none")
    for name, most in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
        if isinstance(most, bool) or not isinstance(most, (int, torch.SymInt)) or most < 0:
            received = _short(most)
            raise wrong(name, "an int of at least 0", received, "pass the longest length, or any larger number")


def _check_starts(name: str, cu: Any, q: torch.Tensor) -> None:
    expected = f"an int32 or int64 tensor [B + 1] on {q.device}"
    remedy = "the running sum of the lengths, from 0: torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
    if not isinstance(cu, torch.Tensor):
        raise wrong(name, expected, type(cu).__name__, remedy)
    if cu.dim() != 1 or cu.shape[0] == 0 or cu.dtype not in INDEX_DTYPES or cu.device != q.device:
        raise wrong(name, expected, f"shape {tuple(cu.shape)}, {cu.dtype} on {cu.device}", remedy)
    if cu.stride(0) != 1 and cu.shape[0] > 1:
        raise wrong(name, "a contiguous tensor", f"strides {cu.stride()}", "call .contiguous()")


def _check_align(align: Any, **positional: Any) -> None:
    """Raise unless align is given where an argument depends on it."""
    if align is not None and align not in ALIGN:
        raise wrong("align", f"one of {ALIGN} or None", repr(align), "name the corner where each sequence is aligned")
    given = [name for name, value in positional.items() if value is not None and value is not False]
    if given and align is None:
        raise wrong(
            "align",
            f"'top_left' or 'bottom_right' with {', '.join(given)}",
            None,
            "with packed sequences it is never implied: 'top_left' puts the first query of each at its first key, "
            "'bottom_right' the last query at the last key",
        )


def _short(value: object) -> str:
    """A value as an error message shows it."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
