"""flash-attn 2's functions, computed by FuseMesh: the same signatures, layouts and values, on GPUs and CPUs.

    from fusemesh.integrations.flash_attn import flash_attn_func  # in place of: from flash_attn import flash_attn_func

The signatures are those of flash-attn 2.8 (Dao, arXiv:2307.08691). They leave no room for ``backend=``, so the backend
is chosen by ``fusemesh.use_backend(...)``, by FUSEMESH_BACKEND, or automatically.

Common to all functions:

- Heads stand third: q [B, Sq, H, D] and k, v [B, Sk, Hkv, D], or packed [total, H, D]. H is a multiple of Hkv. Tensors
  are read where they are; nothing is copied but a last dimension that is not contiguous.
- ``causal`` and ``window_size`` align the last query with the last key: query i stands at i + Sk - Sq.
- ``window_size`` (left, right): keys before and after its own position that a query sees; a negative side is open.
- ``softcap`` above 0: scores become softcap * tanh(score / softcap). ``alibi_slopes`` [H] or [B, H]: then
  -slope * |i + Sk - Sq - j| is added.
- ``dropout_p``: the mask is FuseMesh's own, its seed drawn from torch's generator. ``deterministic``: gradients have
  the same bits at every run in either case.
- ``return_attn_probs``, for tests: also return softmax_lse and S_dmask. With dropout S_dmask holds the probabilities of
  the call, in q's dtype, before dropout and without its factor 1 / (1 - dropout_p); negative where dropped. The plain
  formula makes it, H * Sq * Sk numbers for each sequence and about 130 bytes a number meanwhile; it has no gradient.
  Without dropout it is empty, as flash-attn's is.
- Numbers are taken as flash-attn takes them: numpy's, tensors of one element, numbers as flags, any two integers as a
  window. A tensor on a GPU is waited for; one that requires a gradient is refused, because it would get none.
- A query that sees no key has output 0.

Where this is more than flash-attn: fp32 and fp64 (the latter on the reference and torch backends), any head dim (on
triton 16 to 256), values of another head dim than the keys, softcap with dropout, pages of any
size, left padding of a paged cache. Where it differs: a query without a key has log-sum-exp -inf (flash-attn: +inf), a
gradient flows through the log-sum-exp (flash-attn drops it), S_dmask has the documented shape (flash-attn rounds it up
to multiples of 128) and holds probabilities (flash-attn: terms of an unfinished sum), and what cannot be computed is a
ValueError.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from fusemesh.kernels.attention.call.errors import short, wrong
from fusemesh.kernels.attention.call.validation import check_truth
from fusemesh.kernels.attention.dense.api import flash_attention
from fusemesh.kernels.attention.varlen.api import flash_attention_varlen

from .cache import flash_attn_with_kvcache
from .options import length, score_options
from .probabilities import dense_probabilities, dropout_options, packed_probabilities

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Return the attention of q [B, Sq, H, D] over k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv]; differentiable in all three.

    Args:
        softmax_scale: factor of q k^T; None means 1 / sqrt(D).
        return_attn_probs: also return softmax_lse and S_dmask, with dropout Sq x Sk numbers for each head.
        The others: see the top of this module.

    Returns:
        out [B, Sq, H, Dv]; with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse [B, H, Sq], natural log,
        fp32 (fp64 for fp64), and S_dmask [B, H, Sq, Sk], without dropout [0].

    Raises:
        ValueError: shapes do not fit, or an argument has no meaning.
    """
    _check_layout(("q", q, "[B, Sq, H, D]"), ("k", k, "[B, Sk, Hkv, D]"), ("v", v, "[B, Sk, Hkv, Dv]"))
    options = score_options(q, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return_attn_probs = check_truth("return_attn_probs", return_attn_probs)
    deterministic = check_truth("deterministic", deterministic)
    options |= dropout_options(q, dropout_p, return_attn_probs)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    result = flash_attention(q, k, v, **options, deterministic=deterministic, return_lse=return_attn_probs)
    if isinstance(result, tuple):
        out, lse = result
        probabilities = out.new_empty(0)
        if options["dropout_p"] > 0:
            probabilities = dense_probabilities(q, k, lse, options).to(out.dtype)
        return out.transpose(1, 2), lse, probabilities
    return result.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of one tensor qkv [B, S, 3, H, D], which holds q, k and v in this order.

    Its gradient is one tensor, too. Arguments, returns and errors are those of :func:`flash_attn_func`.
    """
    q, k, v = _unpacked("qkv", qkv, "[B, S, 3, H, D]")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of q [B, Sq, H, D] and one tensor kv [B, Sk, 2, Hkv, D], which holds k and v.

    Arguments, returns and errors are those of :func:`flash_attn_func`.
    """
    k, v = _unpacked("kv", kv, "[B, Sk, 2, Hkv, D]")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Result:
    """:func:`flash_attn_func` of each of B sequences that stand one after the other in packed tensors.

    Args:
        q: [total_q, H, D]; k, v: [total_k, Hkv, D], or with block_table pages [N, page, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1]: where each sequence begins, and where the last one ends.
        max_seqlen_q, max_seqlen_k: ints; no sequence is longer.
        block_table: int32 or int64 [B, pages of a sequence]: key j of sequence b is row j % page of page
            block_table[b, j // page]. The keys and values are gathered from the pages first, B * max_seqlen_k rows of
            each; in generation :func:`flash_attn_with_kvcache` reads pages where they are.
        The others: see the top of this module and :func:`flash_attn_func`; positions count within a sequence.

    Returns:
        out [total_q, H, Dv]; with return_attn_probs (out, softmax_lse [H, total_q], S_dmask), S_dmask [B, H,
        max_seqlen_q, max_seqlen_k] with zeros beyond a sequence's lengths, without dropout [0].

    Raises:
        ValueError: as in :func:`flash_attn_func`. What cu_seqlens hold is checked by the reference backend and under
            FUSEMESH_CHECK=1.
    """
    paged = block_table is not None
    where = "[N, page, Hkv, D]" if paged else "[total_k, Hkv, D]"
    _check_layout(("q", q, "[total_q, H, D]"), ("k", k, where), ("v", v, where.replace("D]", "Dv]")))
    options = score_options(q, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return_attn_probs = check_truth("return_attn_probs", return_attn_probs)
    deterministic = check_truth("deterministic", deterministic)
    options |= dropout_options(q, dropout_p, return_attn_probs)
    max_q, max_k = length("max_seqlen_q", max_seqlen_q), length("max_seqlen_k", max_seqlen_k)
    if paged:
        k, v = _from_pages(k, v, cu_seqlens_k, max_k, block_table)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    result = flash_attention_varlen(
        q, k, v, *lengths, **options, deterministic=deterministic, return_lse=return_attn_probs
    )
    if isinstance(result, tuple):
        out, lse = result
        probabilities = out.new_empty(0)
        if options["dropout_p"] > 0:
            probabilities = packed_probabilities(q, k, lse, lengths, options).to(out.dtype)
        return out, lse, probabilities
    return result


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of one tensor qkv [total, 3, H, D]; queries and keys have the same lengths.

    Arguments, returns and errors are those of :func:`flash_attn_varlen_func`.
    """
    q, k, v = _unpacked("qkv", qkv, "[total, 3, H, D]")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of q [total_q, H, D] and one tensor kv [total_k, 2, Hkv, D].

    Arguments, returns and errors are those of :func:`flash_attn_varlen_func`.
    """
    k, v = _unpacked("kv", kv, "[total_k, 2, Hkv, D]")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


def _check_layout(*tensors: tuple[str, Any, str]) -> None:
    """Raise unless q, k and v have these dimensions, in the words of flash-attn's layout, and belong together."""
    for name, x, letters in tensors:
        if not isinstance(x, torch.Tensor):
            raise wrong(name, "a torch.Tensor", type(x).__name__, "convert it with torch.as_tensor")
        if x.dim() != letters.count(",") + 1:
            raise wrong(name, letters, f"shape {tuple(x.shape)}", "heads stand before the head dim, the last dimension")
    (_, q, _), (_, k, at_k), (_, v, at_v) = tensors
    if k.shape[-1] != q.shape[-1]:
        raise wrong("k", f"{at_k} with q's head dim {q.shape[-1]}", tuple(k.shape), "q and k need the same")
    if v.shape[:-1] != k.shape[:-1]:
        expected = f"{at_v}, but for the last dimension of k's shape {tuple(k.shape)}"
        raise wrong("v", expected, tuple(v.shape), "one value for each key")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads and (kv_heads == 0 or heads % kv_heads):
        expected = f"{at_k} with a number of heads Hkv that divides q's {heads}"
        remedy = "query head h uses key head h // (H / Hkv); heads stand before the head dim, the last dimension"
        raise wrong("k", expected, tuple(k.shape), remedy)
    if q.dim() == 4 and k.shape[0] != q.shape[0]:
        raise wrong("k", f"{at_k} with q's batch size {q.shape[0]}", tuple(k.shape), "expand it")


def _unpacked(name: str, packed: Any, letters: str) -> tuple[torch.Tensor, ...]:
    """Return the tensors that stand side by side in ``packed``, as views."""
    sizes = letters.strip("[]").split(", ")
    dim = next(i for i, size in enumerate(sizes) if size.isdigit())
    if not isinstance(packed, torch.Tensor) or packed.dim() != len(sizes) or packed.shape[dim] != int(sizes[dim]):
        received = f"shape {tuple(packed.shape)}" if isinstance(packed, torch.Tensor) else short(packed)
        raise wrong(name, f"a tensor {letters}", received, "stack the parts with torch.stack")
    return packed.unbind(dim)


def _from_pages(
    k: torch.Tensor, v: torch.Tensor, cu_seqlens_k: Any, max_seqlen_k: int, block_table: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of all sequences, packed; rows after the last sequence are undefined."""
    batch = cu_seqlens_k.numel() - 1 if isinstance(cu_seqlens_k, torch.Tensor) else None
    integers = (torch.int32, torch.int64)
    if not isinstance(block_table, torch.Tensor) or block_table.dim() != 2 or block_table.dtype not in integers:
        remedy = "one row of page numbers for each sequence"
        raise wrong("block_table", "an int32 or int64 tensor [B, pages of a sequence]", short(block_table), remedy)
    if batch is None or block_table.shape[0] != batch:
        expected = f"{block_table.shape[0] + 1} numbers, one more than block_table has rows"
        raise wrong("cu_seqlens_k", expected, short(cu_seqlens_k), "they are the running sum of the lengths, from 0")
    page = k.shape[1]
    capacity = block_table.shape[1] * page
    if max_seqlen_k > capacity:
        expected = f"an int from 0 to {capacity}, what the pages of one sequence hold"
        raise wrong("max_seqlen_k", expected, max_seqlen_k, "add columns to block_table")
    if batch == 0 or k.shape[0] == 0:
        return k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])
    # The lengths are on the device, so as many rows are gathered as there could be.
    rows = torch.arange(batch * max_seqlen_k, device=k.device)
    starts = cu_seqlens_k.long()
    sequence = (torch.searchsorted(starts, rows, right=True) - 1).clamp(0, batch - 1)
    slot = (rows - starts[sequence]).clamp(0, max(capacity - 1, 0))
    # Entries beyond a sequence's pages may be no pages at all.
    pages = block_table.long()[sequence, slot // page].clamp(0, k.shape[0] - 1)
    offsets = slot % page
    return cast(tuple[torch.Tensor, torch.Tensor], tuple(x[pages, offsets] for x in (k, v)))
