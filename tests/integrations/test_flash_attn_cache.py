"""Layer: application. flash_attn_with_kvcache gives what flash-attn 2 publishes: append, rotary, pages, padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh.integrations.flash_attn.functions import flash_attn_with_kvcache
from fusemesh.kernels import backends
from fusemesh.kernels.testing import budget
from tests.support import flash_attn_semantics as published
from tests.support.flash_attn_semantics import SCORES, Scores

H, HKV, D, SLOTS, BATCH = 4, 2, 16, 12, 3


@dataclass(frozen=True)
class Case:
    """One call; the caches hold NaN wherever no key stands."""

    lens: tuple[int, ...] = (7, 2, 10)  # before the append
    added: int = 0
    queries: int = 1
    scores: Scores = SCORES["plain"]
    leftpad: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None  # cache_batch_idx
    page: int | None = None
    rotary: int = 0  # dimensions that are turned
    interleaved: bool = True
    as_int: bool = False  # cache_seqlens is one int
    full: bool = False  # cache_seqlens is None

    def new(self, name: str, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """q, the keys and values in order of slots, and those to append."""
        sizes = {"q": (self.queries, H), "keys": (SLOTS, HKV), "values": (SLOTS, HKV)}
        sizes |= {"k": (self.added, HKV), "v": (self.added, HKV)}
        return {name: self.new(name, BATCH, n, heads, D).to(dtype) for name, (n, heads) in sizes.items()}

    @property
    def angles(self) -> torch.Tensor:
        return self.new("angles", SLOTS + 3, self.rotary // 2)

    def where(self, b: int, slot: int) -> tuple[int, int]:
        """Where a slot of sequence b is in the caches."""
        if self.page is not None:
            return int(self.table[b, slot // self.page]), slot % self.page
        return (b if self.rows is None else self.rows[b]), slot

    @property
    def table(self) -> torch.Tensor:
        assert self.page is not None
        pages = SLOTS // self.page
        order = torch.randperm(BATCH * pages + 2, generator=torch.Generator().manual_seed(7))
        return order[: BATCH * pages].view(BATCH, pages).int()


CASES = {
    "one-token": Case(),
    "full": Case(lens=(SLOTS,) * BATCH, full=True),
    "int": Case(lens=(5,) * BATCH, as_int=True, added=2, queries=2),
    **{f"score-{name}": Case(queries=4, scores=scores) for name, scores in SCORES.items()},
    "more-queries-than-keys": Case(lens=(2, 0, 3), queries=5, scores=Scores(causal=True)),
    "append": Case(added=1),
    "append-causal": Case(added=2, queries=2, scores=Scores(causal=True)),
    "append-into-nothing": Case(lens=(0, 0, 1), added=4, queries=4, scores=Scores(causal=True)),
    "leftpad": Case(leftpad=(2, 0, 9), queries=2, scores=SCORES["all"]),
    "leftpad-append-rotary": Case(
        leftpad=(2, 1, 4), added=2, queries=2, scores=Scores(causal=True), rotary=8, interleaved=False
    ),
    "rows": Case(rows=(4, 0, 3)),
    "rows-append": Case(rows=(3, 4, 0), added=2, queries=2, scores=Scores(causal=True), leftpad=(1, 0, 0)),
    "pages": Case(page=4, queries=2, scores=SCORES["causal-window"]),
    "pages-append-leftpad": Case(page=3, added=2, queries=2, leftpad=(4, 0, 0), scores=Scores(causal=True)),
    "rotary-interleaved": Case(added=2, queries=2, scores=Scores(causal=True), rotary=16),
    "rotary-halves": Case(added=2, queries=2, scores=Scores(causal=True), rotary=16, interleaved=False),
    "rotary-part": Case(added=2, queries=2, scores=Scores(window_size=(5, 0)), rotary=8),
    "rotary-all-at-one-place": Case(lens=(7, 2, 9), added=3, queries=3, rotary=16, interleaved=False),
    "rotary-pages": Case(added=1, page=4, rotary=16, scores=Scores(causal=True)),
}


def want(
    case: Case, dtype: torch.dtype, inputs: dict[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, list[torch.Tensor]]]:
    """out [B, Sq, H, D], lse [B, H, Sq], and each sequence's keys and values afterwards, by slot."""
    x = {name: tensor.to(dtype) for name, tensor in (inputs or case.tensors(dtype)).items()}
    slopes = case.scores.slopes(BATCH, H)
    outs, lses = [], []
    after: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
    follows = case.scores.causal or case.scores.window_size != (-1, -1)
    for b, length in enumerate(case.lens):
        q, k = x["q"][b], x["k"][b]
        if case.rotary:
            at = [length + (i if follows else 0) for i in range(case.queries)]
            q = published.rotated(q, at, case.angles, case.interleaved)
            k = published.rotated(k, [length + j for j in range(case.added)], case.angles, case.interleaved)
        keys, values = (torch.cat([x[n][b, :length], new]) for n, new in (("keys", k), ("values", x["v"][b])))
        after["keys"].append(keys)
        after["values"].append(values)
        start = 0 if case.leftpad is None else case.leftpad[b]
        slope = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = published.attend(q, keys[start:], values[start:], case.scores, slope)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses), after


def run(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The call through FuseMesh's function; asserts that the caches hold the new rows and nothing else has changed."""
    x = case.tensors(dtype)
    shape = (BATCH + 2, SLOTS) if case.page is None else (BATCH * SLOTS // case.page + 2, case.page)
    if case.page is None and case.rows is None:
        shape = (BATCH, SLOTS)
    caches = {name: torch.full((*shape, HKV, D), math.nan, dtype=dtype) for name in ("keys", "values")}
    for name, cache in caches.items():
        for b, length in enumerate(case.lens):
            for slot in range(0 if case.leftpad is None else case.leftpad[b], length):
                cache[case.where(b, slot)] = x[name][b, slot]
    expected = {name: cache.clone() for name, cache in caches.items()}
    lens = torch.tensor(case.lens, dtype=torch.int32)
    options = case.scores.arguments(BATCH, H)
    if case.rotary:
        options |= {"rotary_cos": case.angles.cos().to(dtype), "rotary_sin": case.angles.sin().to(dtype)}
    found = flash_attn_with_kvcache(
        x["q"],
        *caches.values(),
        *((x["k"], x["v"]) if case.added else (None, None)),
        cache_seqlens=None if case.full else case.lens[0] if case.as_int else lens,
        cache_batch_idx=None if case.rows is None else torch.tensor(case.rows, dtype=torch.int32),
        cache_leftpad=None if case.leftpad is None else torch.tensor(case.leftpad, dtype=torch.int32),
        block_table=None if case.page is None else case.table,
        rotary_interleaved=case.interleaved,
        num_splits=3,
        return_softmax_lse=True,
        **options,
    )
    _, _, after = want(case, torch.float64)
    for name, cache in caches.items():
        for b, length in enumerate(case.lens):
            for slot in range(length, length + case.added):
                place = case.where(b, slot)
                torch.testing.assert_close(cache[place].double(), after[name][b][slot], rtol=0, atol=1e-6)
                expected[name][place] = cache[place]
        torch.testing.assert_close(cache, expected[name], rtol=0, atol=0, equal_nan=True)
    assert isinstance(found, tuple)
    return found


@pytest.fixture(autouse=True)
def counted() -> None:
    backends.reset_call_counts()


@pytest.mark.parametrize("name", CASES)
def test_reference_in_fp64(name: str) -> None:
    with fusemesh.use_backend("reference"):
        out, lse = run(CASES[name], torch.float64)
    assert backends.call_counts() == {("attention_decode", "reference"): 1}
    want_out, want_lse, _ = want(CASES[name], torch.float64)
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_triton_is_within_the_budget(name: str) -> None:
    case = CASES[name]
    with fusemesh.use_backend("triton"):
        out, lse = run(case, torch.float32)
    assert backends.call_counts() == {("attention_decode", "triton"): 1}
    # Of the inputs as fp32 holds them.
    inputs = case.tensors(torch.float32)
    (exact, exact_lse, _), (eager, eager_lse, _) = (want(case, t, inputs) for t in (torch.float64, torch.float32))
    budget.check("out", out, exact, eager)
    budget.check("lse", lse, exact_lse, eager_lse)


@pytest.mark.parametrize("cached", [False, True])
def test_without_the_log_sum_exp_the_output_alone_comes(cached: bool) -> None:
    x = Case(lens=(SLOTS,) * BATCH).tensors(torch.float32)
    lens = {"cache_seqlens": SLOTS} if cached else {}
    out = flash_attn_with_kvcache(x["q"], x["keys"], x["values"], **lens)
    assert isinstance(out, torch.Tensor) and out.shape == (BATCH, 1, H, D) and out.is_contiguous()


Q, CACHE = torch.zeros(2, 1, 4, 16), torch.zeros(2, 8, 2, 16)
NEW, TABLE, IDX = torch.zeros(2, 1, 2, 16), torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
COS = torch.zeros(8, 8)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: flash_attn_with_kvcache(Q[0], CACHE, CACHE), "q: expected a tensor of 4 dimensions"),
    "values": (lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, NEW), "k, v: expected both or none"),
    "lengths": (lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW), "cache_seqlens: expected .* with k and v"),
    "too long": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, cache_seqlens=9),
        "cache_seqlens: expected from 0 to",
    ),
    "shape": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, cache_seqlens=IDX[:1]),
        r"cache_seqlens: expected an int32 or int64 tensor \[B\] = \[2\].*an int, or the keys",
    ),
    "batch": (
        lambda: flash_attn_with_kvcache(Q, CACHE[:1], CACHE[:1]),
        "k_cache: expected q's batch size 2.*batch_idx",
    ),
    "both": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, cache_batch_idx=IDX, block_table=TABLE),
        "cache_batch_idx: expected None with block_table",
    ),
    "idx": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, cache_batch_idx=IDX.float()),
        r"cache_batch_idx: expected an int32 or int64 tensor \[B\] = \[2\]",
    ),
    "leftpad": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, cache_leftpad=[0, 1]),
        r"cache_leftpad: expected an int32 or int64 tensor \[B\] = \[2\]",
    ),
    "new": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW[..., :8], cache_seqlens=0),
        r"v: expected shape \[B, Sn, Hkv, D\] = \(2, 1, 2, 16\)",
    ),
    "sin": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW, COS, cache_seqlens=0),
        "rotary_sin: expected a table beside the other one",
    ),
    "rotary alone": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, rotary_cos=COS, rotary_sin=COS),
        "rotary_cos, rotary_sin: expected None without k and v",
    ),
    "wide": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW, COS.repeat(1, 2), COS.repeat(1, 2), 0),
        "rotary_cos: expected from 1 to 8 columns",
    ),
    "short": (
        lambda: flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW, COS[:7], COS[:7], 0),
        "rotary_cos: expected a row for each of the cache's 8 slots",
    ),
    "gradient": (
        lambda: flash_attn_with_kvcache(Q.clone().requires_grad_(), CACHE, CACHE),
        r"q: expected a tensor that requires no gradient.*no_grad",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_speak_flash_attns_names(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
