"""Attention over a cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusemesh
from bench.bits.dense import BOTTOM, mask_of, over_scores
from bench.bits.draw import DTYPES, Draw, Tensors, add


@dataclass(frozen=True)
class Decode:
    """One call of flash_attention_decode. ``options`` go to it as they are."""

    dtype: str = "fp32"
    H: int = 2
    Hkv: int = 2
    Sq: int = 1
    D: int = 16
    Dv: int = 16
    capacity: int = 64
    lens: tuple[int, ...] = (64, 33)  # keys before the append; as many as sequences
    starts: tuple[int, ...] | None = None
    new: int = 0
    page: int | None = None
    latent: bool = False
    layout: str = "bhsd"
    mask: str | None = None
    bias: str | None = None
    alibi: str | None = None
    sinks: str | None = None
    index: torch.dtype = torch.int32
    size: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


LATENT = {"latent": True, "D": 48, "Dv": 32, "H": 6, "Hkv": 1}
PAGED = {"page": 16, "lens": (50, 33), "index": torch.int64}
DECODE: dict[str, dict[str, Any]] = {
    "plain": {},
    "four_queries": {"Sq": 4, "options": BOTTOM},
    "four_queries_that_see_all": {"Sq": 4},
    "queries_without_a_key": {"Sq": 5, "lens": (3, 0), "sinks": "fp32", "options": BOTTOM},
    "grouped_heads": {"H": 6, "Hkv": 2, "Sq": 4, "options": BOTTOM},
    "one_key_head": {"H": 5, "Hkv": 1, "Sq": 3, "options": BOTTOM},
    "new": {"new": 1, "lens": (40, 7)},
    "new_four": {"new": 4, "Sq": 4, "lens": (60, 0), "options": BOTTOM},
    "new_more_than_queries": {"new": 5, "Sq": 2, "lens": (9, 31), "options": BOTTOM},
    "starts": {"Sq": 3, "starts": (5, 31), "options": BOTTOM},
    "starts_alibi_bias": {"Sq": 3, "starts": (5, 30), "alibi": "h", "bias": "n", "options": BOTTOM},
    "window": {"Sq": 4, "options": {"window": (9, 1), "align": "bottom_right"}},
    "mask_bn": {"Sq": 4, "mask": "bn"},
    "mask_bhmn": {"Sq": 4, "mask": "bhmn"},
    "bias_bhmn": {"Sq": 4, "bias": "bhmn"},
    "bias_hm": {"Sq": 4, "bias": "hm"},
    "alibi_of_batches": {"Sq": 4, "alibi": "bh", "options": {"align": "bottom_right"}},
    "softcap": {"options": {"softcap": 1.5}},
    "sinks": {"Sq": 2, "sinks": "same"},
    "scale": {"size": 8.0, "options": {"scale": 0.7}},
    "layout": {"layout": "bshd", "new": 1, "lens": (40, 7)},
    "dims": {"D": 33, "Dv": 20, "Sq": 2},
    "long": {"capacity": 700, "lens": (700, 301), "H": 4, "Hkv": 1, "D": 32, "Dv": 32},
    "paged": {**PAGED},
    "paged_new": {**PAGED, "new": 3, "Sq": 3, "H": 4, "options": BOTTOM},
    "paged_odd": {**PAGED, "page": 8, "D": 33, "Dv": 20, "mask": "mn", "starts": (0, 9)},
    "paged_long": {**PAGED, "capacity": 640, "lens": (640, 200), "H": 4, "Hkv": 1},
    "latent": {**LATENT},
    "latent_new": {**LATENT, "new": 2, "Sq": 2, "lens": (50, 0), "options": BOTTOM},
    "latent_paged": {**LATENT, **PAGED, "new": 1, "sinks": "fp32"},
    "everything": {
        **PAGED,
        "H": 4,
        "Sq": 3,
        "new": 3,
        "starts": (2, 20),
        "mask": "bmn",
        "bias": "hmn",
        "alibi": "bh",
        "sinks": "fp32",
        "options": {**BOTTOM, "window": (30, None), "softcap": 3.0},
    },
}


def decode(draw: Draw, backend: str, *, case: Decode) -> Tensors:
    """flash_attention_decode: what it returns, and the caches after it."""
    dtype, B = DTYPES[case.dtype], len(case.lens)
    table, rows, first = None, case.capacity, B
    if case.page is not None:
        count = case.capacity // case.page
        rows, first = case.page, B * count + 2
        table = draw.order(first)[: B * count].view(B, count).to(case.index)

    def cache(dim: int) -> Tensor:
        if case.layout == "bshd":
            return draw.normal(first, rows, case.Hkv, dim, dtype=dtype).transpose(1, 2)
        return draw.normal(first, case.Hkv, rows, dim, dtype=dtype)

    q = draw.normal(B, case.H, case.Sq, case.D, dtype=dtype, size=case.size)
    keys = cache(case.D)
    values = None if case.latent else cache(case.Dv)
    options = dict(case.options)
    if case.new:
        options["k_new"] = draw.normal(B, case.Hkv, case.new, case.D, dtype=dtype)
        options["v_new"] = None if case.latent else draw.normal(B, case.Hkv, case.new, case.Dv, dtype=dtype)
    sizes = (B, case.H, case.Sq, case.capacity)
    if case.mask is not None:
        options["mask"] = mask_of(draw, case.mask, sizes)
    if case.bias is not None:
        options["bias"] = over_scores(case.bias, sizes, functools.partial(draw.normal, dtype=dtype))[1]
    if case.alibi is not None:
        options["alibi_slopes"] = draw.normal(*(B, case.H) if case.alibi == "bh" else (case.H,)).abs() / 4
    if case.sinks is not None:
        options["sinks"] = draw.normal(case.H, dtype=dtype if case.sinks == "same" else DTYPES[case.sinks])
    if case.starts is not None:
        options["cache_starts"] = torch.tensor(case.starts, dtype=case.index)
    out, lse = fusemesh.flash_attention_decode(
        q,
        keys,
        values,
        cache_lens=torch.tensor(case.lens, dtype=case.index),
        block_table=table,
        v_dim=case.Dv if case.latent else None,
        return_lse=True,
        backend=backend,
        **options,
    )
    found = {"out": out, "lse": lse}
    if case.new:
        found["k_cache"] = keys
        if values is not None:
            found["v_cache"] = values
    return found


def add_decode() -> None:
    """Attention over a cache."""
    for name, changed in DECODE.items():
        for dtype in DTYPES:
            add(f"decode/{name}/{dtype}", functools.partial(decode, case=Decode(dtype, **changed)))
