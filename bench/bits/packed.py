"""Packed sequences, and jagged tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import fusemesh
from bench.bits.dense import BOTTOM, Attention, features_of
from bench.bits.draw import DTYPES, Draw, Tensors, add, with_gradients

LENGTHS_Q, LENGTHS_K = (17, 0, 1, 40, 3), (23, 5, 9, 40, 0)
LONGEST, GAP = 40, 3  # GAP: rows of padding before the first sequence and after the last

PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "lse": {"lse": True},
    "causal_top_left": {"options": {"causal": True, "align": "top_left"}},
    "causal_bottom_right": {"lse": True, "options": BOTTOM},
    "window": {"options": {"window": (9, 3), "align": "bottom_right"}},
    "mask_bhmn": {"mask": "bhmn"},
    "mask_bn": {"mask": "bn"},
    "bias_bhmn": {"bias": "bhmn"},
    "bias_hmn": {"bias": "hmn", "options": {**BOTTOM, "dropout_p": 0.25, "seed": 6}},
    "bias_bmn": {"bias": "bmn"},
    "bias_bn": {"bias": "bn"},
    "bias_hm": {"bias": "hm", "lse": True},
    "bias_h": {"bias": "h"},
    "alibi": {"alibi": "h", "options": {"align": "bottom_right"}},
    "alibi_of_sequences": {"alibi": "bh", "options": {"align": "top_left"}},
    "softcap": {"options": {"softcap": 1.5}},
    "score_mod": {"mod": "table", "options": {"align": "bottom_right"}},
    "sinks": {"sinks": "same", "lse": True},
    "dropout": {"options": {"dropout_p": 0.3, "seed": 2**40 + 7}},
    "layout": {"layout": "strided"},
    "everything": {
        "mask": "mn",
        "bias": "hmn",
        "alibi": "h",
        "mod": "table",
        "sinks": "same",
        "lse": True,
        "options": {**BOTTOM, "window": (25, None), "softcap": 3.0, "dropout_p": 0.15, "seed": -5},
    },
    "everything_but_mods": {
        "mask": "hmn",
        "bias": "bn",
        "alibi": "bh",
        "sinks": "fp32",
        "lse": True,
        "layout": "heads_first",
        "options": {**BOTTOM, "window": (25, None), "softcap": 3.0, "dropout_p": 0.15, "seed": torch.tensor(4)},
    },
}


def borders(lengths: tuple[int, ...], dtype: torch.dtype, gap: int = GAP) -> Tensor:
    """Return where each sequence begins, and where the last one ends."""
    return torch.tensor([gap + sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=dtype)


def packed(draw: Draw, backend: str, *, case: Attention) -> Tensors:
    """flash_attention_varlen and its gradients."""
    index = torch.int64 if case.lse else torch.int32
    leaves, views = {}, []
    rows = {"q": sum(LENGTHS_Q) + 2 * GAP, "k": sum(LENGTHS_K) + 2 * GAP, "v": sum(LENGTHS_K) + 2 * GAP}
    for name, heads, dim in (("q", case.H, case.D), ("k", case.Hkv, case.D), ("v", case.Hkv, case.Dv)):
        dtype = DTYPES[case.dtype]
        if case.layout == "strided":
            leaves[name] = draw.leaf(rows[name], heads, 2 * dim, dtype=dtype)
            views.append(leaves[name][..., ::2])
        elif case.layout == "heads_first":
            leaves[name] = draw.leaf(heads, rows[name], dim, dtype=dtype)
            views.append(leaves[name].transpose(0, 1))
        else:
            leaves[name] = draw.leaf(rows[name], heads, dim, dtype=dtype)
            views.append(leaves[name])
    options, more = features_of(draw, case, (LONGEST, LONGEST))
    cu = borders(LENGTHS_Q, index), borders(LENGTHS_K, index)
    result = fusemesh.flash_attention_varlen(
        *views, *cu, LONGEST, LONGEST, **options, return_lse=case.lse, backend=backend
    )
    outputs = {"out": result[0], "lse": result[1]} if isinstance(result, tuple) else {"out": result}
    return with_gradients(draw, outputs, {**leaves, **more})


def longer_than_any(draw: Draw, backend: str) -> Tensors:
    """Packed sequences whose longest length is given as more than it is."""
    q, k, v = (draw.leaf(30, heads, 16) for heads in (4, 2, 2))
    cu = borders((11, 19), torch.int32, 0)
    out = fusemesh.flash_attention_varlen(q, k, v, cu, cu, 70, 50, causal=True, align="top_left", backend=backend)
    return with_gradients(draw, {"out": out}, {"q": q, "k": k, "v": v})


def jagged(draw: Draw, backend: str, *, dtype: torch.dtype, lse: bool) -> Tensors:
    """flash_attention of jagged tensors."""
    lengths = (9, 33, 1, 20)
    offsets = borders(lengths, torch.int64, 0)
    leaves = {name: draw.leaf(sum(lengths), heads, 16, dtype=dtype) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    qkv = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in leaves.values()]
    result = fusemesh.flash_attention(*qkv, causal=True, return_lse=lse, backend=backend)
    outputs = {"out": result[0], "lse": result[1]} if isinstance(result, tuple) else {"out": result}
    return with_gradients(draw, {name: x.values() for name, x in outputs.items()}, leaves)


def add_packed() -> None:
    """Packed sequences and jagged tensors."""
    sizes: dict[str, Any] = {"B": len(LENGTHS_Q), "H": 4, "Hkv": 2, "Dv": 24}
    for name, changed in PACKED.items():
        for dtype in DTYPES:
            add(f"packed/{name}/{dtype}", functools.partial(packed, case=Attention(dtype, **sizes, **changed)))
    add("packed/longer_than_any/fp32", longer_than_any)
    for dtype in ("fp32", "bf16"):
        add(f"jagged/{dtype}", functools.partial(jagged, dtype=DTYPES[dtype], lse=dtype == "bf16"))
