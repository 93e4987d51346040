"""F.scaled_dot_product_attention, computed by FuseMesh: the same signature, the same shapes, the same values.

    from fusemesh.integrations.pytorch.sdpa import scaled_dot_product_attention

The signature leaves no room for ``backend=``, so the backend is chosen by ``fusemesh.use_backend(...)``, by
FUSEMESH_BACKEND, or automatically. What PyTorch leaves open, or answers differently from device to device, is one rule
here; the docstring of the function says which.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fusemesh.kernels import backend_record, backends
from fusemesh.kernels.attention.call.errors import TRANSPOSE, or_transpose
from fusemesh.kernels.attention.call.option_checks import checked_dropout, checked_scale, without_keys
from fusemesh.kernels.attention.call.validation import check_flag, wrong
from fusemesh.kernels.attention.dense.api import flash_attention


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return softmax(scale * query key^T + mask) value, as ``torch.nn.functional.scaled_dot_product_attention`` does.

    Differentiable in query, key, value and a float attn_mask. Source of the semantics: the formula in the docstring of
    PyTorch 2.13's function, and its C++ implementation of that formula where the docstring is silent (broadcasting).

    Args:
        query: [..., Hq, L, E]. Two dimensions or more; with two there is one head, with three the first counts heads.
        key: [..., H, S, E]. Leading dimensions broadcast against query's, the one of heads included.
        value: [..., H, S, Ev]; Ev may differ from E. Leading dimensions broadcast against those of query and key.
        attn_mask: broadcasts to [..., Hq, L, S]. bool, True = takes part; or floating (query's dtype or fp32), added to
            the scores, with a gradient in its own shape.
        dropout_p: probability with which an attention weight is dropped, always applied; 1 drops all.
        is_causal: query i sees keys 0 to i, whatever L and S are (aligned to the first key). Not with attn_mask.
        scale: factor of query key^T; None means 1 / sqrt(E).
        enable_gqa: key and value may have fewer heads than query, each a divisor of query's: query head h uses key head
            h // (Hq / H).

    Returns:
        [..., Hq, L, Ev] in query's dtype, leading dimensions broadcast over all three.

    A row that sees no key (all False, or all -inf) is 0 and has no gradient. So it is in PyTorch 2.13, whereas its
    formula above, PyTorch before 2.5, and a row of NaN in the float mask give NaN. Dropped weights differ from
    PyTorch's: the same seed of torch's generator gives another mask.

    No copy is made of inputs with up to four dimensions. Beyond four, the leading ones are flattened, which copies
    tensors that broadcast in some of them; so does enable_gqa where key and value differ in heads. Triton asked for by
    name computes head dims below 16 on tensors padded to 16.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, attn_mask and is_causal are both given (PyTorch's docstring
            forbids it; some of its kernels combine them, others raise), or the backend asked for cannot do the call.
    """
    return attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, backend="auto"
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str,
) -> torch.Tensor:
    """Return :func:`scaled_dot_product_attention` by a backend that flash_attention takes."""
    is_causal, enable_gqa = check_flag("is_causal", is_causal), check_flag("enable_gqa", enable_gqa)
    _check(query, key, value)
    if attn_mask is not None and is_causal:
        remedy = "put the causal part into attn_mask, or drop one of them"
        raise wrong("attn_mask, is_causal", "at most one of them", "both", remedy)
    dropout_p = checked_dropout(dropout_p, takes_all=True)
    lead, q, k, v = _four_dims(query, key, value, enable_gqa)
    mask, bias = _mask(attn_mask, lead, q, k)
    if dropout_p == 1:
        dropout_p, mask = 0.0, without_keys(q)
    head_dim = v.shape[-1]
    q, k, v, scale = widened(q, k, v, checked_scale(scale, q), backend)
    out = flash_attention(
        q,
        k,
        v,
        causal=is_causal,
        align="top_left" if is_causal else None,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        scale=scale,
        backend=backend,
    )
    assert isinstance(out, torch.Tensor)
    return out[..., :head_dim].reshape(*lead, *out.shape[2:3], head_dim)


def widened(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float | None]:
    """Return q, k, v padded to head dims that the backend takes, and the scale for the original ones.

    Zeros up to the least head dim of flash_attention, or of the fused backend asked for, change no score.
    """
    record = backend_record.records().get(backends.requested(backend))
    least = 1 if record is None else record.least_head_dim
    if min(q.shape[-1], v.shape[-1]) < least:
        scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
        q, k, v = (F.pad(x, (0, max(least - x.shape[-1], 0))) for x in (q, k, v))
    return q, k, v, scale


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Check what flash_attention, which receives reshaped tensors, could only report in other terms."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor):
            raise wrong(name, "a torch.Tensor", type(x).__name__, "convert it with torch.as_tensor")
        if x.is_nested:
            raise wrong(
                name, "a dense tensor", "a nested one", "call fusemesh.flash_attention, which takes [B, H, j, D]"
            )
        if x.dim() < 2:
            raise wrong(name, "2 dimensions or more", f"shape {tuple(x.shape)}", "insert one with unsqueeze")
    if key.shape[-1] != query.shape[-1]:
        raise wrong("key", f"query's head dim {query.shape[-1]}", tuple(key.shape), "query and key need the same")
    if value.shape[-2] != key.shape[-2]:
        is_turned = value.dim() > 2 and value.shape[-3:-1] == key.shape[-3:-1][::-1]
        remedy = or_transpose("one value for each key", is_turned)
        raise wrong("value", f"key's length {key.shape[-2]}", tuple(value.shape), remedy)


def _four_dims(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output's leading dimensions, and the three as [B, H, L, E], [B, Hkv, S, E], [B, Hkv, S, Ev]."""
    shapes = {"query": query.shape[:-2], "key": key.shape[:-2], "value": value.shape[:-2]}
    if enable_gqa:
        if query.dim() < 3 or key.dim() < 3 or value.dim() < 3:
            shown = {name: tuple(x.shape) for name, x in (("query", query), ("key", key), ("value", value))}
            raise wrong("enable_gqa", "False where there is no dimension of heads", shown, "insert one with unsqueeze")
        heads, kv_heads = query.shape[-3], (key.shape[-3], value.shape[-3])
        for name, own in zip(("key", "value"), kv_heads, strict=True):
            if own == 0 or heads % own != 0:
                raise wrong(
                    name, f"a number of heads that divides query's {heads}", own, f"see enable_gqa; {TRANSPOSE}"
                )
        if kv_heads[0] != kv_heads[1]:
            # Rare: one of them would need its own grouping, which no kernel has.
            key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
        shapes = {name: shape[:-1] for name, shape in shapes.items()}
    try:
        lead = tuple(torch.broadcast_shapes(*shapes.values()))
    except RuntimeError:
        received = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        remedy = f"expand them, or pass enable_gqa=True where key and value have fewer heads; {TRANSPOSE}"
        raise wrong("query, key, value", "leading dimensions that broadcast", received, remedy) from None
    if enable_gqa:
        batch = lead
        out_lead = (*lead, query.shape[-3])
        kept = [x.shape[-3] for x in (query, key, value)]
    else:
        batch, heads = lead[:-1], lead[-1] if lead else 1
        out_lead = lead
        shared = all(x.dim() < 3 or x.shape[-3] == 1 for x in (key, value))
        kept = [heads, *([1, 1] if shared else [heads, heads])]  # one key head for all is what a kernel takes as it is
    tensors = (
        x.expand(*batch, n, *x.shape[-2:]).reshape(math.prod(batch), n, *x.shape[-2:])
        for x, n in zip((query, key, value), kept, strict=True)
    )
    q, k, v = tensors
    return out_lead, q, k, v


def _mask(
    attn_mask: torch.Tensor | None, lead: tuple[int, ...], q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return attn_mask as (mask, bias) of flash_attention, one of which is None."""
    if attn_mask is None:
        return None, None
    if not isinstance(attn_mask, torch.Tensor):
        raise wrong("attn_mask", "a torch.Tensor or None", type(attn_mask).__name__, "convert it with torch.as_tensor")
    is_boolean = attn_mask.dtype == torch.bool
    if not is_boolean and not attn_mask.dtype.is_floating_point:
        remedy = "convert a mask of 0 and 1 with .bool()"
        raise wrong("attn_mask", "a bool or floating tensor", attn_mask.dtype, remedy)
    scores = (*lead, q.shape[2], k.shape[2])
    x = attn_mask[(None,) * (len(scores) - attn_mask.dim())] if attn_mask.dim() < len(scores) else attn_mask
    if x.dim() != len(scores) or any(a not in (1, b) for a, b in zip(x.shape, scores, strict=True)):
        transposed = (*q.shape[:1], q.shape[2], q.shape[1], k.shape[1])[-attn_mask.dim() :]
        fits = attn_mask.dim() <= 4 and all(a in (1, b) for a, b in zip(attn_mask.shape, transposed, strict=True))
        remedy = "each dimension, counted from the last, is 1 or that of the scores"
        remedy = or_transpose(remedy, fits and q.shape[1] != q.shape[2])
        raise wrong("attn_mask", f"a shape that broadcasts to {scores}", tuple(attn_mask.shape), remedy)
    while x.dim() < 4:
        x = x.unsqueeze(0)
    if x.dim() > 4:
        batch = lead[:-1]
        if any(size != 1 for size in x.shape[:-3]):
            x = x.expand(*batch, *x.shape[-3:])
        x = x.reshape(-1, *x.shape[-3:]) if x.numel() else x.new_empty((math.prod(batch), *x.shape[-3:]))
    return (x, None) if is_boolean else (None, x)
