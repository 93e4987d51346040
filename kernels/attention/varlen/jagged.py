"""Attention of jagged (nested) tensors [B, H, j, D]: the packed op on their values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ... import compat
from ..call.options import Options
from ..call.validation import wrong
from .api import attend


def attention(q: Any, k: Any, v: Any, options: Options, *, return_lse: bool, backend: str) -> Any:
    """:func:`fusemesh.flash_attention` of jagged q, k and v, sequence by sequence.

    Args:
        q: [B, H, j, D], jagged in j: ``torch.nested.nested_tensor(..., layout=torch.jagged).transpose(1, 2)``.
        k, v: [B, Hkv, j, D] and [B, Hkv, j, Dv], jagged by the same offsets as each other.
        options: those of flash_attention_varlen; mask and bias broadcast to [B, H, longest q, longest k]. Where q has
            the offsets of k, lengths are equal and ``align`` may be None.
        return_lse: also return the log-sum-exp.
        backend: as flash_attention takes it.

    Returns:
        out [B, H, j, Dv], jagged as q is, and with return_lse lse [B, H, j], too. The longest lengths are what the
        tensors know (nested_tensor_from_jagged takes max_seqlen); where they do not, PyTorch finds them with one
        synchronisation and keeps them, and a compiled graph takes the number of all rows instead.

    Raises:
        ValueError: the tensors are not all jagged in their third dimension, or something of flash_attention_varlen's.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        expected = "a jagged tensor [B, H, j, D], as q, k or v is nested"
        if not isinstance(x, torch.Tensor):
            raise wrong(name, expected, type(x).__name__, "make all three jagged")
        if not x.is_nested or x.layout != torch.jagged:
            received = f"layout {x.layout}" if x.is_nested else "a dense tensor"
            raise wrong(name, expected, received, "make all three jagged, with layout=torch.jagged")
        if x.dim() != 4 or compat.ragged_dim(x) != 2:
            remedy = "where heads stand third, pass x.transpose(1, 2)"
            raise wrong(name, expected, f"{x.dim()} dimensions, jagged in dimension {compat.ragged_dim(x)}", remedy)
        if _has_holes(x):
            raise wrong(name, "a jagged tensor without holes", "one with lengths of its own", "call .contiguous()")
    if k.shape[2] != v.shape[2]:
        raise wrong("v", "the offsets of k", "others", "make v with offsets=k.offsets()")
    if q.shape[0] != k.shape[0]:
        raise wrong("k", f"q's batch size {q.shape[0]}", k.shape[0], "each sequence has queries and keys")
    if options.align is None and q.shape[2] == k.shape[2]:
        options = dataclasses.replace(options, align="top_left")
    out, lse = attend(
        q.values().transpose(0, 1),
        k.values().transpose(0, 1),
        v.values().transpose(0, 1),
        (q.offsets(), k.offsets(), _longest(q), _longest(k)),
        options,
        return_lse=return_lse,
        backend=backend,
    )
    if not return_lse:
        return _as_jagged(out, q)
    return _as_jagged(out, q), _as_jagged(lse.transpose(0, 1), q)


def _has_holes(x: Any) -> bool:
    return x.lengths() is not None


def _longest(x: Any) -> int:
    """The length of the longest sequence, or while a graph is traced and nobody knows it, that of all together."""
    if torch.compiler.is_compiling() and not compat.longest_is_known(x):
        rows: int = x.values().shape[1]
        return rows
    return compat.longest_of(x)


def _as_jagged(x: torch.Tensor, like: Any) -> torch.Tensor:
    """Packed [total, H, ...] as [B, H, j, ...], jagged as ``like`` is."""
    jagged: torch.Tensor = torch.nested.nested_tensor_from_jagged(x, like.offsets())
    return jagged.transpose(1, 2)
