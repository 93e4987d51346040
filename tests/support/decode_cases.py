"""Calls of attention over a cache for the tests of decode: tables of cases, guarded runs, and the comparison.

Tensors lie in seas of NaN, and so do the caches, which must be written in the new slots alone.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from fusemesh.kernels.measure.cases import DecodeCase
from fusemesh.kernels.testing import poison


class Caches:
    """The caches of a call in seas of NaN, and the table of their pages."""

    def __init__(self, case: DecodeCase, x: dict[str, Any]) -> None:
        self.case = case
        self.arranged = case.arranged(x)
        self.table: torch.Tensor | None = self.arranged["block_table"]
        self.keys = self._surround("k_cache")
        self.values = None if case.latent else self._surround("v_cache")

    def _surround(self, name: str) -> poison.Surrounded:
        cache = self.arranged[name]
        if self.case.layout == "bshd":
            guarded = poison.surround(cache.transpose(1, 2))
            guarded.view = guarded.view.transpose(1, 2)
            return guarded
        return poison.surround(cache)

    def check(self, x: dict[str, Any]) -> None:
        """Assert that the new rows stand in their slots, to the bit, and that nothing else was written."""
        wanted = self.case.appended({**self.arranged, **{name: x[name] for name in ("keys", "values")}})
        for name, cache in (("k_cache", self.keys), ("v_cache", self.values)):
            if cache is not None:
                cache.assert_intact("a cache")
                bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted[name].element_size()]
                assert torch.equal(cache.view.contiguous().view(bits), wanted[name].contiguous().view(bits))


def run(case: DecodeCase, backend: str, **changed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse of the call, inputs in seas of NaN, outputs poisoned; the caches are checked."""
    x = {**case.tensors(), **changed}
    caches = Caches(case, x)
    guarded = {**caches.arranged, "q": poison.surround(x["q"]).view, "k_cache": caches.keys.view}
    guarded["v_cache"] = None if caches.values is None else caches.values.view
    for name in ("k_new", "v_new"):
        guarded[name] = None if guarded[name] is None else poison.surround(guarded[name]).view
    with poison.poisoned_empty():
        out, lse = case.run(guarded, backend, return_lse=True)
    caches.check(x)
    return out, lse


def compare(case: DecodeCase, out: torch.Tensor, lse: torch.Tensor, **changed: Any) -> None:
    """Assert that both are within the error budget, or in fp64 within 1e-13."""
    x = {**case.tensors(), **changed}
    if case.dtype == "fp64":
        want_out, want_lse = case.exact(x, torch.float64)
        torch.testing.assert_close(out, want_out, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)
        return
    case.check({"out": out, "lse": lse}, case.expected(case.arranged(x)))


def run_and_compare(case: DecodeCase, backend: str) -> None:
    """Do :func:`run` and :func:`compare`."""
    compare(case, *run(case, backend))


# One feature each, over two sequences of which the shorter one ends inside a tile.
FEATURES = {
    "plain": DecodeCase(),
    "four_queries": DecodeCase(Sq=4, causal=True),
    "four_queries_that_see_all": DecodeCase(Sq=4),
    "grouped_queries": DecodeCase(H=6, Hkv=2, Sq=4, causal=True),
    "one_key_head": DecodeCase(H=5, Hkv=1, Sq=4, causal=True),
    "more_rows_than_a_tile": DecodeCase(H=12, Hkv=2, Sq=7, causal=True),
    "other_head_dims": DecodeCase(D=80, Dv=48),
    "large_head_dims": DecodeCase(H=1, Hkv=1, D=192, Dv=129),
    "no_keys": DecodeCase(lens=(0, 0), Sq=2, sinks=True),
    "lengths": DecodeCase(lens=(0, 1, 70, 32, 33, 64), Sq=2, causal=True),
    "fewer_keys_than_queries": DecodeCase(lens=(3, 1, 0), Sq=5, causal=True, sinks=True),
    "append": DecodeCase(added=1, lens=(69, 33)),
    "append_into_nothing": DecodeCase(added=3, Sq=3, lens=(0, 31), causal=True),
    "append_many": DecodeCase(added=19, Sq=19, H=4, lens=(40, 51), causal=True),
    "append_more_than_are_asked": DecodeCase(added=5, Sq=2, lens=(65, 30), causal=True),
    "starts": DecodeCase(starts=(0, 21), lens=(70, 40)),
    "starts_hide_all": DecodeCase(starts=(70, 12), lens=(70, 13), Sq=3, causal=True),
    "starts_and_append": DecodeCase(starts=(5, 40), lens=(60, 41), added=2, Sq=2, causal=True, window=(30, None)),
    "window": DecodeCase(window=(20, None), Sq=4, causal=True),
    "window_ahead": DecodeCase(window=(7, 2), Sq=4),
    "window_of_none": DecodeCase(window=(0, 0), Sq=4),
    "huge_window": DecodeCase(window=(2**40, 2**40), Sq=4),
    "mask": DecodeCase(mask="bhmn", Sq=3),
    "mask_over_keys": DecodeCase(mask="bn", H=4, Hkv=2),
    "mask_over_heads": DecodeCase(mask="h", H=4, Hkv=2, lens=(17, 40)),
    "bias": DecodeCase(bias="bhmn", Sq=3, H=4, Hkv=2),
    "bias_over_keys": DecodeCase(bias="n"),
    "bias_and_mask_and_starts": DecodeCase(bias="hn", mask="mn", Sq=4, starts=(11, 1), H=4, Hkv=2),
    "softcap": DecodeCase(softcap=2.0, q_size=4.0),
    "alibi": DecodeCase(alibi="h", Sq=4, causal=True, H=4, Hkv=2),
    "alibi_of_batches": DecodeCase(alibi="bh", starts=(3, 9), H=4, Hkv=2),
    "sinks": DecodeCase(sinks=True, H=4, Hkv=2),
    "all_at_once": DecodeCase(
        **{"H": 4, "Hkv": 2, "Sq": 4, "added": 2, "lens": (60, 33), "starts": (2, 0), "causal": True, "sinks": True},
        **{"window": (40, None), "mask": "bmn", "bias": "hmn", "softcap": 5.0, "alibi": "h", "page": 14},
    ),
    "negative_scale": DecodeCase(scale=-0.3),
    "heads_inside_positions": DecodeCase(layout="bshd", H=4, added=1, lens=(69, 3)),
    "wide_indices": DecodeCase(indices=torch.int64, starts=(3, 4), added=1, lens=(60, 33), page=35),
    "pages_of_1": DecodeCase(page=1, capacity=40, lens=(37, 8), added=2),
    "pages_of_16": DecodeCase(page=16, capacity=80, lens=(70, 15), added=2, Sq=2, causal=True),
    "pages_of_17": DecodeCase(page=17, capacity=85, lens=(83, 17), added=1, starts=(20, 0)),
    "pages_of_64": DecodeCase(page=64, capacity=128, lens=(100, 63), added=4, Sq=4, causal=True, layout="bshd"),
    "pages_and_window": DecodeCase(page=16, capacity=160, lens=(150, 80), window=(20, None)),
    "latent": DecodeCase(latent=True, H=4, Hkv=1, D=40, Dv=32, added=1, lens=(69, 33)),
    "latent_pages": DecodeCase(latent=True, H=4, Hkv=1, D=24, Dv=16, page=16, capacity=80, Sq=2, causal=True, added=2),
    "latent_all_columns": DecodeCase(latent=True, H=2, Hkv=1, D=32, Dv=32),
    "latent_large": DecodeCase(latent=True, H=3, Hkv=1, D=576, Dv=512, capacity=40, lens=(40, 7), added=0),
    "large_without_latent": DecodeCase(H=2, Hkv=1, D=576, Dv=512, capacity=40, lens=(40, 7)),
    "huge_logits": DecodeCase(q_size=20.0, sinks=True),
}


def refilled(case: DecodeCase, **changed: Any) -> DecodeCase:
    """Return the case with other fields, its lengths short enough for its cache."""
    case = replace(case, **changed)
    return replace(case, lens=tuple(min(n, case.capacity - case.added) for n in case.lens))


FEATURES = {name: refilled(case) for name, case in FEATURES.items()}


def combinations(count: int, seed: int) -> list[DecodeCase]:
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
            DecodeCase(
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
