"""Calls of attention over a cache for the tests of decode: their inputs, their exact answer, their comparison.

What a call must not read holds NaN: slots without a key, slots before cache_starts, pages of no sequence, and all that
lies around the tensors. Entries of the table beyond a sequence's pages are no pages at all.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusemesh import flash_attention_decode
from fusemesh.kernels.testing import budget, poison

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One call. Dims of mask and bias are written as a subset of "bhmn", the dimensions in which they are not 1."""

    dtype: str = "fp32"
    H: int = 2
    Hkv: int = 2
    Sq: int = 1
    D: int = 16
    Dv: int = 16
    capacity: int = 70
    lens: tuple[int, ...] = (70, 33)  # keys before the append; its length is B
    starts: tuple[int, ...] | None = None
    added: int = 0
    page: int | None = None
    latent: bool = False  # the values are the first Dv columns of the keys
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: str | None = None
    bias: str | None = None
    softcap: float | None = None
    alibi: str | None = None  # "h" or "bh"
    sinks: bool = False
    scale: float | None = None
    q_size: float = 1.0
    layout: str = "bhsd"  # or "bshd": positions outside heads in memory
    indices: torch.dtype = torch.int32

    def __str__(self) -> str:
        default = Case()
        changed = [
            f"{name}={getattr(self, name)}".replace(" ", "")
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(default, name)
        ]
        return "-".join(changed) or "default"

    @property
    def lengths(self) -> list[int]:
        return [length + self.added for length in self.lens]

    def tensors(self) -> dict[str, Any]:
        """q, the sequences' keys and values in order, and everything besides; the same at every call."""
        generator = torch.Generator().manual_seed(4321)
        dtype, B = DTYPES[self.dtype], len(self.lens)

        def new(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        def shape(dims: str) -> tuple[int, ...]:
            whole = {"b": B, "h": self.H, "m": self.Sq, "n": self.capacity}
            return tuple(size if name in dims else 1 for name, size in whole.items())

        keys = new(B, self.Hkv, self.capacity, self.D)
        x = {
            "q": new(B, self.H, self.Sq, self.D, size=self.q_size),
            "keys": keys,
            "values": keys[..., : self.Dv] if self.latent else new(B, self.Hkv, self.capacity, self.Dv),
            "sinks": new(self.H, dtype=torch.float32) if self.sinks else None,
            "mask": None,
            "bias": None,
            "alibi_slopes": None,
        }
        if self.mask is not None:
            x["mask"] = torch.rand(shape(self.mask), generator=generator) > 0.3
        if self.bias is not None:
            x["bias"] = new(*shape(self.bias))
        if self.alibi is not None:
            x["alibi_slopes"] = new(*([B, self.H] if self.alibi == "bh" else [self.H]), dtype=torch.float32).abs() / 4
        return x


def exact(case: Case, x: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in ``dtype``, one query of one head at a time and by its sequence's keys alone."""
    B = len(case.lens)
    out = torch.zeros(B, case.H, case.Sq, case.Dv, dtype=dtype)
    lse = torch.full((B, case.H, case.Sq), -math.inf, dtype=dtype)
    scale = case.D**-0.5 if case.scale is None else case.scale
    left, right = case.window or (None, None)
    right = 0 if case.causal else right
    for b, length in enumerate(case.lengths):
        start = 0 if case.starts is None else case.starts[b]
        slots = torch.arange(start, length)
        for h in range(case.H):
            k, v = (x[name][b, h // (case.H // case.Hkv), start:length].to(dtype) for name in ("keys", "values"))
            for i in range(case.Sq):
                at = length - case.Sq + i
                s = scale * (k @ x["q"][b, h, i].to(dtype))
                if case.softcap is not None:
                    s = case.softcap * torch.tanh(s / case.softcap)
                if x["alibi_slopes"] is not None:
                    slope = x["alibi_slopes"].expand(B, case.H)[b, h].to(dtype)
                    s = s - slope * (at - slots).abs().to(dtype)
                full = (B, case.H, case.Sq, case.capacity)
                if x["bias"] is not None:
                    s = s + x["bias"].expand(full)[b, h, i, start:length].to(dtype)
                seen = torch.ones_like(slots, dtype=torch.bool)
                if x["mask"] is not None:
                    seen &= x["mask"].expand(full)[b, h, i, start:length]
                if left is not None:
                    seen &= slots >= at - left
                if right is not None:
                    seen &= slots <= at + right
                if seen.any():
                    s = s[seen]
                    sink = torch.tensor(-math.inf, dtype=dtype) if x["sinks"] is None else x["sinks"][h].to(dtype)
                    out[b, h, i] = torch.cat([s, sink[None]]).softmax(0)[:-1] @ v[seen]
                    lse[b, h, i] = torch.logsumexp(s, 0)
    return out, lse


class Caches:
    """The caches of a call, in seas of NaN, and the table of their pages."""

    def __init__(self, case: Case, x: dict[str, Any]) -> None:
        self.case = case
        self.table: torch.Tensor | None = None
        B = len(case.lens)
        if case.page is not None:
            pages = -(-case.capacity // case.page)
            assert pages * case.page == case.capacity, "the capacity is whole pages"
            order = torch.randperm(B * pages + 3, generator=torch.Generator().manual_seed(7))
            self.table = order[: B * pages].view(B, pages).to(case.indices)
        self.keys = self._place(x["keys"])
        self.values = None if case.latent else self._place(x["values"])
        self.before = [cache.view.clone() for cache in (self.keys, self.values) if cache is not None]
        if self.table is not None and case.page is not None:
            for b, length in enumerate(case.lengths):
                self.table[b, -(-length // case.page) :] = 2**31 - 1 if b % 2 else -5

    def where(self, b: int, slot: int) -> tuple[int, int]:
        """First and third index of a slot of sequence b in the cache."""
        if self.table is None or self.case.page is None:
            return b, slot
        return int(self.table[b, slot // self.case.page]), slot % self.case.page

    def _place(self, rows: torch.Tensor) -> poison.Surrounded:
        case = self.case
        if self.table is None:
            cache = torch.full_like(rows, math.nan)
        else:
            shape = (self.table.numel() + 3, case.Hkv, case.page, rows.shape[3])
            cache = torch.full(shape, math.nan, dtype=rows.dtype)
        for b, length in enumerate(case.lens):
            for slot in range(0 if case.starts is None else case.starts[b], length):
                i, j = self.where(b, slot)
                cache[i, :, j] = rows[b, :, slot]
        if case.layout == "bshd":
            guarded = poison.surround(cache.transpose(1, 2))
            guarded.view = guarded.view.transpose(1, 2)
            return guarded
        return poison.surround(cache)

    def check(self, x: dict[str, Any]) -> None:
        """Assert that the new rows stand in their slots, to the bit, and that nothing else was written."""
        caches = [(self.keys, x["keys"]), (self.values, x["values"])]
        for (cache, rows), want in zip([pair for pair in caches if pair[0] is not None], self.before, strict=True):
            assert cache is not None
            cache.assert_intact("a cache")
            for b, length in enumerate(self.case.lens):
                for slot in range(length, length + self.case.added):
                    i, j = self.where(b, slot)
                    want[i, :, j] = rows[b, :, slot]
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
            assert torch.equal(cache.view.contiguous().view(bits), want.contiguous().view(bits))


def run(case: Case, backend: str, **changed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The call by ``flash_attention_decode``, inputs in seas of NaN, outputs poisoned; the caches are checked."""
    x = {**case.tensors(), **changed}
    caches = Caches(case, x)
    new: dict[str, Any] = {}
    if case.added:
        for name, rows in (("k_new", "keys"), ("v_new", "values")):
            parts = [x[rows][b, :, n : n + case.added] for b, n in enumerate(case.lens)]
            new[name] = poison.surround(torch.stack(parts)).view
        if case.latent:
            del new["v_new"]
    positional = case.causal or case.window is not None or case.alibi is not None
    with poison.poisoned_empty():
        out, lse = flash_attention_decode(
            poison.surround(x["q"]).view,
            caches.keys.view,
            None if caches.values is None else caches.values.view,
            cache_lens=torch.tensor(case.lens, dtype=case.indices),
            block_table=caches.table,
            cache_starts=None if case.starts is None else torch.tensor(case.starts, dtype=case.indices),
            v_dim=case.Dv if case.latent else None,
            causal=case.causal,
            align="bottom_right" if positional else None,
            window=case.window,
            softcap=case.softcap,
            scale=case.scale,
            return_lse=True,
            backend=backend,
            **new,
            **{name: x[name] for name in ("mask", "bias", "alibi_slopes", "sinks")},
        )
    caches.check(x)
    return out, lse


def compare(case: Case, out: torch.Tensor, lse: torch.Tensor, **changed: Any) -> None:
    """Assert that both are within the error budget, or in fp64 within 1e-13."""
    x = {**case.tensors(), **changed}
    want_out, want_lse = exact(case, x, torch.float64)
    dtype = DTYPES[case.dtype]
    if dtype == torch.float64:
        torch.testing.assert_close(out, want_out, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)
        return
    budget.check("out", out, want_out, exact(case, x, dtype)[0])
    budget.check("lse", lse, want_lse, exact(case, x, torch.float32)[1])


def run_and_compare(case: Case, backend: str) -> None:
    """:func:`run` and :func:`compare`."""
    compare(case, *run(case, backend))


# One feature each, over two sequences of which the shorter one ends inside a tile.
FEATURES = {
    "plain": Case(),
    "four_queries": Case(Sq=4, causal=True),
    "four_queries_that_see_all": Case(Sq=4),
    "grouped_queries": Case(H=6, Hkv=2, Sq=4, causal=True),
    "one_key_head": Case(H=5, Hkv=1, Sq=4, causal=True),
    "more_rows_than_a_tile": Case(H=12, Hkv=2, Sq=7, causal=True),
    "other_head_dims": Case(D=80, Dv=48),
    "large_head_dims": Case(H=1, Hkv=1, D=192, Dv=129),
    "no_keys": Case(lens=(0, 0), Sq=2, sinks=True),
    "lengths": Case(lens=(0, 1, 70, 32, 33, 64), Sq=2, causal=True),
    "fewer_keys_than_queries": Case(lens=(3, 1, 0), Sq=5, causal=True, sinks=True),
    "append": Case(added=1, lens=(69, 33)),
    "append_into_nothing": Case(added=3, Sq=3, lens=(0, 31), causal=True),
    "append_many": Case(added=19, Sq=19, H=4, lens=(40, 51), causal=True),
    "append_more_than_are_asked": Case(added=5, Sq=2, lens=(65, 30), causal=True),
    "starts": Case(starts=(0, 21), lens=(70, 40)),
    "starts_hide_all": Case(starts=(70, 12), lens=(70, 13), Sq=3, causal=True),
    "starts_and_append": Case(starts=(5, 40), lens=(60, 41), added=2, Sq=2, causal=True, window=(30, None)),
    "window": Case(window=(20, None), Sq=4, causal=True),
    "window_ahead": Case(window=(7, 2), Sq=4),
    "window_of_none": Case(window=(0, 0), Sq=4),
    "huge_window": Case(window=(2**40, 2**40), Sq=4),
    "mask": Case(mask="bhmn", Sq=3),
    "mask_over_keys": Case(mask="bn", H=4, Hkv=2),
    "mask_over_heads": Case(mask="h", H=4, Hkv=2, lens=(17, 40)),
    "bias": Case(bias="bhmn", Sq=3, H=4, Hkv=2),
    "bias_over_keys": Case(bias="n"),
    "bias_and_mask_and_starts": Case(bias="hn", mask="mn", Sq=4, starts=(11, 1), H=4, Hkv=2),
    "softcap": Case(softcap=2.0, q_size=4.0),
    "alibi": Case(alibi="h", Sq=4, causal=True, H=4, Hkv=2),
    "alibi_of_batches": Case(alibi="bh", starts=(3, 9), H=4, Hkv=2),
    "sinks": Case(sinks=True, H=4, Hkv=2),
    "all_at_once": Case(
        **{"H": 4, "Hkv": 2, "Sq": 4, "added": 2, "lens": (60, 33), "starts": (2, 0), "causal": True, "sinks": True},
        **{"window": (40, None), "mask": "bmn", "bias": "hmn", "softcap": 5.0, "alibi": "h", "page": 14},
    ),
    "negative_scale": Case(scale=-0.3),
    "heads_inside_positions": Case(layout="bshd", H=4, added=1, lens=(69, 3)),
    "wide_indices": Case(indices=torch.int64, starts=(3, 4), added=1, lens=(60, 33), page=35),
    "pages_of_1": Case(page=1, capacity=40, lens=(37, 8), added=2),
    "pages_of_16": Case(page=16, capacity=80, lens=(70, 15), added=2, Sq=2, causal=True),
    "pages_of_17": Case(page=17, capacity=85, lens=(83, 17), added=1, starts=(20, 0)),
    "pages_of_64": Case(page=64, capacity=128, lens=(100, 63), added=4, Sq=4, causal=True, layout="bshd"),
    "pages_and_window": Case(page=16, capacity=160, lens=(150, 80), window=(20, None)),
    "latent": Case(latent=True, H=4, Hkv=1, D=40, Dv=32, added=1, lens=(69, 33)),
    "latent_pages": Case(latent=True, H=4, Hkv=1, D=24, Dv=16, page=16, capacity=80, Sq=2, causal=True, added=2),
    "latent_all_columns": Case(latent=True, H=2, Hkv=1, D=32, Dv=32),
    "latent_large": Case(latent=True, H=3, Hkv=1, D=576, Dv=512, capacity=40, lens=(40, 7), added=0),
    "large_without_latent": Case(H=2, Hkv=1, D=576, Dv=512, capacity=40, lens=(40, 7)),
    "huge_logits": Case(q_size=20.0, sinks=True),
}


def refilled(case: Case, **changed: Any) -> Case:
    """The case with other fields, its lengths short enough for its cache."""
    case = replace(case, **changed)
    return replace(case, lens=tuple(min(n, case.capacity - case.added) for n in case.lens))


FEATURES = {name: refilled(case) for name, case in FEATURES.items()}


def combinations(count: int, seed: int) -> list[Case]:
    """Calls that draw every feature at random, the same ones at every run."""
    draw = random.Random(seed)
    dims = ["mn", "n", "m", "", "bhmn", "hmn", "bn", "bm", "b", "h"]
    cases = []
    for _ in range(count):
        page = draw.choice([None, None, 1, 16, 17, 64])
        capacity = 64 if page is None else page * draw.choice([1, 2, 3]) if page > 1 else 30
        added = draw.choice([0, 0, 1, 3])
        lens = tuple(draw.randint(0, max(capacity - added, 0)) for _ in range(draw.choice([1, 2, 3])))
        Hkv = draw.choice([1, 2])
        latent = draw.choice([False, False, True])
        cases.append(
            Case(
                dtype=draw.choice(["fp32", "fp16", "bf16"]),
                H=Hkv * draw.choice([1, 3, 8]),
                Hkv=Hkv,
                Sq=draw.choice([1, 1, 2, 5]),
                D=draw.choice([33, 64, 80]),
                Dv=draw.choice([16, 24, 32]),
                capacity=capacity,
                lens=lens,
                starts=draw.choice([None, tuple(draw.randint(0, n + added) for n in lens)]),
                added=added,
                page=page,
                latent=latent,
                causal=draw.choice([False, True]),
                window=draw.choice([None, None, (draw.randint(0, 40), None), (None, 1), (9, 4)]),
                mask=draw.choice([None, None, *dims]),
                bias=draw.choice([None, None, *dims]),
                softcap=draw.choice([None, 3.0]),
                alibi=draw.choice([None, "h", "bh"]),
                sinks=draw.choice([False, True]),
                layout=draw.choice(["bhsd", "bshd"]),
            )
        )
    return cases
