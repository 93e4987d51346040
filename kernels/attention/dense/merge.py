"""Merge of partial attention results over disjoint sets of keys, differentiable, in plain PyTorch.

With (out_i, lse_i) the attention of the same queries over the i-th set of keys, without sinks:

    lse = log sum_i exp(lse_i)          w_i = exp(lse_i) / (sum_j exp(lse_j) + exp(sink))          out = sum_i w_i out_i

which is the attention over all keys: the identity behind FlashAttention's tiles (Dao et al., arXiv:2205.14135), ring
attention (Liu et al., arXiv:2310.01889) and split-KV decoding. A sink is one more key without a value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..call.tensors import has_rest, rest_of
from ..call.validation import wrong


def merge_attention(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    sinks: torch.Tensor | None = None,
    *,
    out_rests: Sequence[torch.Tensor | None] | None = None,
) -> tuple[Any, ...]:
    """Attention over the union of disjoint sets of keys, from its results over each of them.

    Differentiable, any number of times, in outs, lses and sinks; the sums run in fp32 (fp64 for fp64) in the order of
    the parts. The parts are to be computed without sinks, which this function applies once.

    Args:
        outs: at least one [B, H, Sq, Dv], all of one shape and dtype; or packed, [total, H, Dv].
        lses: as many [B, H, Sq], natural log, fp32 (fp64 for fp64 outs); or packed, [H, total]. -inf where a row sees
            no key of the part; what out holds there does not matter.
        sinks: [H], one logit for each head, fp32 or the dtype of outs; or None.
        out_rests: what rounding took from each of outs, as attention_forward(return_rest=True) returns it, None for
            none. The merged out is then of the whole outputs, and its own rest is returned, too.

    Returns:
        out in the shape and dtype of each of ``outs``, and lse in those of each of ``lses``, without the sinks. A row
        that sees no key in any part has out 0 and lse -inf, and no gradient comes from it. With out_rests also the rest
        of out, for attention_backward: in its shape and dtype, None unless these are bf16 or fp16; without gradient.

    Raises:
        ValueError: an argument is wrong; with its name, what was expected, what was received and what to change.
    """
    _check(outs, lses, sinks)
    rests = [None] * len(outs) if out_rests is None else _checked_rests(out_rests, outs)
    is_packed = outs[0].dim() == 3
    dtype = torch.promote_types(outs[0].dtype, torch.float32)
    # [parts, ..., queries by heads as in outs]
    every_lse = torch.stack([lse.t() if is_packed else lse for lse in lses]).to(dtype)
    unseen = every_lse == -math.inf
    empty = unseen.all(0)
    # Rows without a key are computed as rows of zeros and then erased, which also erases whatever gradient comes in.
    every_lse = every_lse.masked_fill(empty, 0.0)
    lse = torch.logsumexp(every_lse, 0).masked_fill(empty, -math.inf)
    logits = every_lse
    if sinks is not None:
        heads = sinks.to(dtype) if is_packed else sinks.to(dtype).unsqueeze(-1)
        logits = torch.cat([every_lse, heads.expand(every_lse.shape[1:]).unsqueeze(0)])
    # softmax and not exp(lse_i - lse): the rounding of a large lse would be that of the weights.
    weights = torch.softmax(logits, 0)
    out = torch.zeros_like(outs[0], dtype=dtype)
    for part, rest, weight, is_unseen in zip(outs, rests, weights[: len(outs)], unseen, strict=True):
        whole = part.to(dtype) if rest is None else part.to(dtype) + rest.to(dtype)
        out = out + weight.unsqueeze(-1) * whole.masked_fill(is_unseen.unsqueeze(-1), 0.0)
    out = out.masked_fill(empty.unsqueeze(-1), 0.0)
    rounded, lse = out.to(outs[0].dtype), (lse.t() if is_packed else lse).to(lses[0].dtype)
    if out_rests is None:
        return rounded, lse
    return rounded, lse, rest_of(out, rounded) if has_rest(rounded.dtype) else None


def _checked_rests(rests: Any, outs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    """Return the rests; raise unless there is one, or None, for each of ``outs``."""
    remedy = "pass the third result of attention_forward(return_rest=True) of each part"
    if not isinstance(rests, (tuple, list)) or len(rests) != len(outs):
        received = f"{len(rests)} of them" if isinstance(rests, (tuple, list)) else type(rests).__name__
        raise wrong("out_rests", f"a tuple or list of {len(outs)}, one for each of outs", received, remedy)
    for i, (x, out) in enumerate(zip(rests, outs, strict=True)):
        if x is None:
            continue
        expected = f"None or a tensor like outs[{i}], shape {tuple(out.shape)}, {out.dtype} on {out.device}"
        if not isinstance(x, torch.Tensor):
            raise wrong(f"out_rests[{i}]", expected, type(x).__name__, remedy)
        if x.shape != out.shape or x.dtype != out.dtype or x.device != out.device:
            received = f"shape {tuple(x.shape)}, {x.dtype} on {x.device}"
            raise wrong(f"out_rests[{i}]", expected, received, remedy)
    return rests


def _check(outs: Any, lses: Any, sinks: Any) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (tuple, list)) or not parts or any(not isinstance(x, torch.Tensor) for x in parts):
            received = f"{len(parts)} of them" if isinstance(parts, (tuple, list)) else type(parts).__name__
            raise wrong(name, "a tuple or list of at least one tensor", received, "pass one tensor for each part")
    if len(outs) != len(lses):
        raise wrong("lses", f"as many as outs, {len(outs)}", len(lses), "each part has an out and an lse")
    first = outs[0]
    if first.dim() not in (3, 4) or not first.dtype.is_floating_point:
        expected = "float tensors [B, H, Sq, Dv] or packed [total, H, Dv]"
        raise wrong("outs", expected, f"shape {tuple(first.shape)}, {first.dtype}", "pass what attention returned")
    lse_shape = tuple(first.shape[:3]) if first.dim() == 4 else (first.shape[1], first.shape[0])
    lse_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    for name, parts, shape, dtype in (
        ("outs", outs, tuple(first.shape), first.dtype),
        ("lses", lses, lse_shape, lse_dtype),
    ):
        for i, x in enumerate(parts):
            if tuple(x.shape) != shape or x.dtype != dtype or x.device != first.device:
                raise wrong(
                    f"{name}[{i}]",
                    f"shape {shape}, {dtype} on {first.device}, as outs[0] has it",
                    f"shape {tuple(x.shape)}, {x.dtype} on {x.device}",
                    "the parts are results of the same queries",
                )
    if sinks is not None:
        heads = first.shape[1]
        expected = f"a tensor [H] = [{heads}], {lse_dtype} or {first.dtype} on {first.device}, or None"
        remedy = "one logit for each query head"
        if not isinstance(sinks, torch.Tensor):
            raise wrong("sinks", expected, type(sinks).__name__, remedy)
        if (
            tuple(sinks.shape) != (heads,)
            or sinks.dtype not in (lse_dtype, first.dtype)
            or sinks.device != first.device
        ):
            raise wrong("sinks", expected, f"shape {tuple(sinks.shape)}, {sinks.dtype} on {sinks.device}", remedy)
