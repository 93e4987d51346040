"""Layer: kernels. Attention over a cache: the reference in fp64 here, the Triton kernels in Triton's interpreter.

Whatever a call must not read holds NaN, and so do its outputs before they are written (decode_cases.py).
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_cases import Caches, Case, run, run_and_compare

from fusemesh import flash_attention_decode
from fusemesh.kernels import backends
from fusemesh.kernels.attention import decode, decode_tiles, decode_validation
from fusemesh.kernels.attention.tiles import Tile
from fusemesh.kernels.launch import intercept

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


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_reference(feature: str, dtype: str) -> None:
    run_and_compare(replace(FEATURES[feature], dtype=dtype), "reference")


@pytest.mark.interpreter
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(feature: str) -> None:
    """One dtype and one number of splits each, in turn; the long sweep has all of them."""
    turn = list(FEATURES).index(feature)
    with decode_tiles.force(splits=(1, 3, 2)[turn % 3]):
        run_and_compare(replace(FEATURES[feature], dtype=("bf16", "fp32", "fp16", "bf16")[turn % 4]), "triton")


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_in_all_dtypes(feature: str, dtype: str, splits: int) -> None:
    with decode_tiles.force(splits=splits):
        run_and_compare(replace(FEATURES[feature], dtype=dtype), "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (128, 128), (80, 80)])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_head_dims(dtype: str, D: int, Dv: int) -> None:
    case = Case(dtype=dtype, D=D, Dv=Dv, H=4, Hkv=2, added=1, lens=(69, 20), page=35)
    with decode_tiles.force(splits=2):
        run_and_compare(case, "triton")


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


@pytest.mark.parametrize("case", combinations(60, seed=0), ids=str)
def test_combinations_of_the_reference(case: Case) -> None:
    run_and_compare(replace(case, dtype="fp64"), "reference")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", combinations(20, seed=1), ids=str)
def test_combinations(case: Case) -> None:
    with decode_tiles.force(splits=1 + len(str(case)) % 4):
        run_and_compare(case, "triton")


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", combinations(400, seed=2), ids=str)
def test_many_combinations(case: Case) -> None:
    with decode_tiles.force(splits=1 + len(str(case)) % 4):
        run_and_compare(case, "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (32, 128)], ids=str)
def test_every_tile_and_split_count_gives_the_right_answer(blocks: tuple[int, int]) -> None:
    case = Case(H=10, Hkv=1, Sq=3, causal=True, lens=(65, 70), sinks=True, D=33, Dv=24, mask="n")
    for splits in (1, 5, 20):
        with decode_tiles.force(tile=Tile(*blocks, num_warps=4, num_stages=2), splits=splits):
            run_and_compare(case, "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_bits_twice(dtype: str) -> None:
    case = Case(dtype=dtype, H=4, Hkv=2, Sq=2, causal=True, page=14, sinks=True, added=2, lens=(60, 50))
    for splits in (1, 3):
        with decode_tiles.force(splits=splits):
            first, second = run(case, "triton"), run(case, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.interpreter
def test_pages_change_no_bit() -> None:
    """Where a key stands in memory is no part of the arithmetic."""
    case = Case(dtype="bf16", H=4, Hkv=2, capacity=64, lens=(61, 30), added=1)
    results = [
        run(replace(case, page=page, layout=layout), "triton")
        for page in (None, 1, 16, 64)
        for layout in ("bhsd", "bshd")
    ]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.interpreter
def test_rows_of_one_query_are_those_of_flash_attention() -> None:
    """With full lengths and bottom-right alignment decode is flash_attention."""
    from fusemesh import flash_attention

    case = Case(H=4, Hkv=2, Sq=5, lens=(70, 70), causal=True, softcap=3.0, sinks=True, alibi="h")
    x = case.tensors()
    options = {name: x[name] for name in ("sinks", "alibi_slopes")}
    out, lse = flash_attention(
        *(x[name] for name in ("q", "keys", "values")),
        causal=True,
        align="bottom_right",
        softcap=3.0,
        return_lse=True,
        backend="reference",
        **options,
    )
    for backend in ("reference", "triton"):
        got_out, got_lse = run(case, backend)
        torch.testing.assert_close(got_out, out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_lse, lse, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("splits", [1, 2])
def test_lengths_beyond_the_cache_count_as_its_end(splits: int) -> None:
    """Without FUSEMESH_CHECK nothing is read or written beyond the cache, whatever the lengths say."""
    case = Case(capacity=32, lens=(32, 20), Sq=2, causal=True)
    x = case.tensors()
    lens = torch.tensor([999, 20], dtype=torch.int32)
    new = torch.ones(2, 2, 3, 16)
    for backend in ("reference", "triton"):
        caches = Caches(case, x)
        k, v = caches.keys.view, caches.values.view
        with decode_tiles.force(splits=splits):
            out = flash_attention_decode(
                x["q"], k, v, cache_lens=lens, k_new=new, v_new=new, causal=True, align="bottom_right", backend=backend
            )
        caches.keys.assert_intact()
        caches.values.assert_intact()
        assert out.isfinite().all() and torch.equal(k[0], x["keys"][0]) and (k[1, :, 20:23] == 1).all()
        want = flash_attention_decode(
            x["q"], k.clone(), v.clone(), cache_lens=torch.tensor([32, 23]), causal=True, align="bottom_right"
        )
        torch.testing.assert_close(out, want)


def recorded(case: Case, lens: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """(kernel, grid, constants) of the launches of a call."""
    found: list[tuple[Any, ...]] = []

    def hook(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        numbers = tuple(x for x in args if isinstance(x, (int, tuple)))
        found.append((kernel.__name__, grid, numbers, tuple(sorted((k, repr(v)) for k, v in kwargs.items()))))

    case = replace(case, lens=lens)
    x = case.tensors()
    with intercept(hook):
        flash_attention_decode(
            x["q"],
            x["keys"],
            x["values"],
            cache_lens=torch.tensor(lens),
            k_new=x["keys"][:, :, :1],
            v_new=x["values"][:, :, :1],
            backend="triton",
        )
    return found


@pytest.mark.interpreter
def test_launches_depend_on_shapes_only() -> None:
    """What a CUDA graph records holds for any lengths: grids, numbers and constants are the same."""
    case = Case(capacity=1024, H=4, Hkv=2)
    first, second = recorded(case, (1000, 3)), recorded(case, (0, 512))
    assert first == second
    names = [name for name, *_ in first]
    assert names == ["decode_append_kernel"] * 2 + ["decode_split_kernel", "decode_combine_kernel"]


@pytest.mark.interpreter
def test_the_triton_kernels_do_the_work() -> None:
    before = backends.call_counts()
    with backends.use_backend("triton"):
        run(Case(lens=(3, 4)), "auto")
    after = backends.call_counts()
    assert {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)} == {
        ("attention_decode", "triton"): 1
    }


def op_arguments(case: Case, backend: str) -> tuple[Any, ...]:
    """The op's own arguments for a call."""
    x = case.tensors()
    found: list[tuple[Any, ...]] = []

    class Op:
        def attention_decode(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            found.append(args)
            return x["q"], x["q"]

    class Ops:
        fusemesh = Op()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.torch, "ops", Ops())
        # Slots that hold nothing hold NaN, which opcheck's comparisons do not take for equal.
        patch.setattr(math, "nan", 0.0)
        run(replace(case, added=0), backend)
    args = list(found[0])
    if case.added:
        args[6] = x["keys"][:, :, : case.added].clone()
        args[7] = None if case.latent else x["values"][:, :, : case.added].clone()
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)


OPCHECK = {
    "plain": Case(dtype="fp32"),
    "append": Case(added=2, lens=(60, 30), bias="n", mask="n", softcap=4.0, alibi="h", sinks=True),
    "pages": Case(page=35, added=1, lens=(50, 3), starts=(3, 0)),
    "latent": Case(latent=True, H=2, Hkv=1, D=24, Dv=16, added=1, lens=(60, 30)),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(decode.attention_decode, op_arguments(OPCHECK[name], "reference"))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["append", "latent"])
def test_opcheck_of_triton(name: str) -> None:
    torch.library.opcheck(decode.attention_decode, op_arguments(OPCHECK[name], "triton"))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_generation_under_compile(backend: str) -> None:
    """Steps of generation, compiled once: caches grow in place, and the result is that of one call over all tokens."""
    compilations = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compilations.append(graph)
        return graph.forward

    @torch.compile(backend=count, fullgraph=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_new: Any, v_new: Any, lens: torch.Tensor) -> Any:
        out = flash_attention_decode(q, k, v, cache_lens=lens, k_new=k_new, v_new=v_new, backend=backend)
        return out * 2, k.sum()

    case = Case(H=4, Hkv=2, capacity=12, lens=(12, 12), Sq=12, causal=True)
    x = case.tensors()
    want = run(replace(case, dtype="fp64"), "reference", **{n: x[n].double() for n in ("q", "keys", "values")})[0]
    k, v = torch.zeros(2, 2, 12, 16), torch.zeros(2, 2, 12, 16)
    for i in range(12):
        new = [x[name][:, :, i : i + 1] for name in ("q", "keys", "values")]
        out, total = step(new[0], k, v, new[1], new[2], torch.full((2,), i, dtype=torch.int32))
        torch.testing.assert_close(out.double() / 2, want[:, :, i : i + 1], rtol=1e-5, atol=1e-6)
        # The read of the cache after the op sees what the op wrote.
        torch.testing.assert_close(total, x["keys"][:, :, : i + 1].sum())
    assert torch.equal(k, x["keys"]) and torch.equal(v, x["values"])
    assert len(compilations) == 1


def test_functionalised_writes_arrive(backend: str = "reference") -> None:
    """Through AOTAutograd, which turns mutation into values and back, the caches still change in place."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, new: torch.Tensor, lens: torch.Tensor) -> Any:
        return flash_attention_decode(q, k, v, cache_lens=lens, k_new=new, v_new=new, backend=backend)

    for capacity in (9, 14):
        q, k, v = torch.randn(2, 2, 1, 16), torch.zeros(2, 2, capacity, 16), torch.zeros(2, 2, capacity, 16)
        new, lens = torch.randn(2, 2, 1, 16), torch.tensor([0, 4])
        plain_k, plain_v = k.clone(), v.clone()
        out = step(q, k, v, new, lens)
        want = flash_attention_decode(q, plain_k, plain_v, cache_lens=lens, k_new=new, v_new=new, backend=backend)
        assert torch.equal(out, want) and torch.equal(k, plain_k) and torch.equal(v, plain_v) and k.any()


def test_the_seas_of_nan_are_seen() -> None:
    """The guard itself: a length that is one too large reads a slot without a key, and a wrong write is noticed."""
    case = Case(lens=(40, 33))
    x = case.tensors()
    caches = Caches(case, x)
    assert caches.values is not None
    keys, values = caches.keys.view, caches.values.view
    out = flash_attention_decode(x["q"], keys, values, cache_lens=torch.tensor([40, 34]), backend="reference")
    assert out[0].isfinite().all() and out[1].isnan().all()
    caches.check(x)
    keys[1, 0, 33, 0] = 0.0
    with pytest.raises(AssertionError):
        caches.check(x)


B, H, HKV, SQ, S, D, DV = 2, 4, 2, 3, 9, 16, 8


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def index(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return t(*shape, dtype=dtype)


RIGHT = {"q": t(B, H, SQ, D), "k_cache": t(B, HKV, S, D), "v_cache": t(B, HKV, S, DV), "cache_lens": index(B)}
PAGED = {"k_cache": t(5, HKV, 4, D), "v_cache": t(5, HKV, 4, DV), "block_table": index(B, 3)}
NEW = {"k_new": t(B, HKV, 1, D), "v_new": t(B, HKV, 1, DV)}
LATENT = {"v_cache": None, "v_dim": 8}

# name in the message, what differs from a right call, what the message must say was expected and received
WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "q_a_list": ("q", {"q": [1.0]}, "a torch.Tensor", "list"),
    "q_three_dims": ("q", {"q": t(H, SQ, D)}, "[B, H, Sq, D]", "(4, 3, 16)"),
    "q_integers": ("q", {"q": t(B, H, SQ, D, dtype=torch.int64)}, "torch.float32", "torch.int64"),
    "cache_dtype": ("k_cache", {"k_cache": RIGHT["k_cache"].half()}, "q's dtype", "torch.float16"),
    "cache_device": ("v_cache", {"v_cache": RIGHT["v_cache"].to("meta")}, "on cpu", "on meta"),
    "cache_three_dims": ("k_cache", {"k_cache": t(HKV, S, D)}, "[B, Hkv, S, D]", "(2, 9, 16)"),
    "pages_three_dims": ("v_cache", {**PAGED, "v_cache": t(5, 4, DV)}, "pages [N, Hkv, page, Dv]", "(5, 4, 8)"),
    "cache_stride": ("k_cache", {"k_cache": t(B, HKV, D, S).mT}, "stride 1", "(288, 144, 1, 9)"),
    "cache_batch": ("k_cache", {"k_cache": t(3, HKV, S, D), "v_cache": t(3, HKV, S, DV)}, "batch size 2", "3 (shape"),
    "cache_head_dim": ("k_cache", {"k_cache": t(B, HKV, S, 8)}, "q's head dim 16", "(2, 2, 9, 8)"),
    "cache_empty_dim": ("v_cache", {"v_cache": t(B, HKV, S, 0)}, "a head dim of at least 1", "0"),
    "cache_heads": ("k_cache", {"k_cache": t(B, 3, S, D), "v_cache": t(B, 3, S, DV)}, "divides q's 4", "3 (shape"),
    "cache_lengths": ("v_cache", {"v_cache": t(B, HKV, 7, DV)}, "(2, 2, 9)", "(2, 2, 7, 8)"),
    "pages_of_none": (
        "k_cache",
        {**PAGED, "k_cache": t(5, HKV, 0, D), "v_cache": t(5, HKV, 0, DV)},
        "at least one",
        "0",
    ),
    "lens_an_int": ("cache_lens", {"cache_lens": 3}, "int32 or int64 tensor [B] with B = 2", "int"),
    "lens_floats": ("cache_lens", {"cache_lens": t(B)}, "int32 or int64", "torch.float32"),
    "lens_shape": ("cache_lens", {"cache_lens": index(B, 1)}, "[B]", "(2, 1)"),
    "lens_device": ("cache_lens", {"cache_lens": index(B).to("meta")}, "on cpu", "on meta"),
    "table_shape": ("block_table", {**PAGED, "block_table": index(3, 3)}, "B = 2", "(3, 3)"),
    "table_flat": ("block_table", {**PAGED, "block_table": index(B)}, "[B, pages of a sequence]", "(2,)"),
    "starts_dtype": ("cache_starts", {"cache_starts": t(B, dtype=torch.int16)}, "int32 or int64", "torch.int16"),
    "no_values": ("v_cache, v_dim", {"v_cache": None}, "one of them", "neither"),
    "two_values": ("v_cache, v_dim", {"v_dim": 8}, "one of them", "both"),
    "v_dim_large": ("v_dim", {"v_cache": None, "v_dim": 17}, "an int from 1 to k_cache's 16", "17"),
    "v_dim_a_float": ("v_dim", {"v_cache": None, "v_dim": 8.0}, "an int", "8.0"),
    "only_v_new": ("v_new", {"v_new": NEW["v_new"]}, "None without k_new", "Tensor"),
    "only_k_new": ("v_new", {"k_new": NEW["k_new"]}, "beside k_new", "None"),
    "latent_v_new": ("v_new", {**LATENT, **NEW}, "None without v_cache", "Tensor"),
    "new_three_dims": ("k_new", {**NEW, "k_new": t(B, HKV, D)}, "[B, Hkv, Sn, D]", "(2, 2, 16)"),
    "new_shape": ("k_new", {**NEW, "k_new": t(B, H, 1, D)}, "(2, 2, 1, 16)", "(2, 4, 1, 16)"),
    "new_lengths": ("v_new", {**NEW, "v_new": t(B, HKV, 2, DV)}, "(2, 2, 1, 8)", "(2, 2, 2, 8)"),
    "new_dtype": ("v_new", {**NEW, "v_new": NEW["v_new"].half()}, "torch.float32", "torch.float16"),
    "new_too_long": ("k_new", {"k_new": t(B, HKV, 10, D), "v_new": t(B, HKV, 10, DV)}, "at most 9 tokens", "10"),
    "causal_a_string": ("causal", {"causal": "yes"}, "True or False", "'yes'"),
    "lse_a_string": ("return_lse", {"return_lse": "yes"}, "True or False", "'yes'"),
    "causal_unaligned": ("align", {"causal": True}, "'bottom_right' with causal", "None"),
    "window_unaligned": ("align", {"window": (3, None)}, "'bottom_right' with causal, window", "None"),
    "alibi_unaligned": ("align", {"alibi_slopes": t(H)}, "or alibi_slopes", "None"),
    "top_left": ("align", {"causal": True, "align": "top_left"}, "'bottom_right'", "'top_left'"),
    "window_negative": ("window", {"window": (-1, 0), "align": "bottom_right"}, "an int >= 0", "(-1, 0)"),
    "mask_floats": ("mask", {"mask": t(SQ, S)}, "a torch.bool tensor", "torch.float32"),
    "mask_shape": ("mask", {"mask": t(SQ, S + 1, dtype=torch.bool)}, "= (2, 4, 3, 9)", "(3, 10)"),
    "mask_of_pages": ("mask", {**PAGED, "mask": t(SQ, S, dtype=torch.bool)}, "= (2, 4, 3, 12)", "(3, 9)"),
    "bias_dtype": ("bias", {"bias": t(SQ, S, dtype=torch.float16)}, "torch.float32", "torch.float16"),
    "alibi_shape": ("alibi_slopes", {"alibi_slopes": t(HKV), "align": "bottom_right"}, "[H] = [4]", "(2,)"),
    "softcap_zero": ("softcap", {"softcap": 0.0}, "above 0", "0.0"),
    "sinks_shape": ("sinks", {"sinks": t(HKV)}, "[H] = [4]", "(2,)"),
    "scale_nan": ("scale", {"scale": math.nan}, "a finite number", "nan"),
    "q_gradient": ("q", {"q": t(B, H, SQ, D).requires_grad_()}, "requires no gradient", "requires_grad=True"),
    "sinks_gradient": ("sinks", {"sinks": t(H).requires_grad_()}, "requires no gradient", "requires_grad=True"),
    "new_gradient": ("v_new", {**NEW, "v_new": t(B, HKV, 1, DV).requires_grad_()}, "no gradient", "requires_grad=True"),
    "torch_backend": ("backend", {"backend": "torch"}, "reference or triton", "'torch'"),
    "cpu_backend": ("backend", {"backend": "cpu"}, "reference or triton", "'cpu'"),
    "triton_v_dim": ("v_dim", {"backend": "triton"}, "a head dim from 16 to 512 for backend='triton'", "8"),
    "triton_head_dim": (
        "q",
        {"backend": "triton", "q": t(B, H, SQ, 600), "k_cache": t(B, HKV, S, 600), "v_cache": t(B, HKV, S, 16)},
        "a head dim from 16 to 576 for backend='triton'",
        "600",
    ),
    "triton_fp64": (
        "q",
        {"backend": "triton", **{n: RIGHT[n].double() for n in ("q", "k_cache", "v_cache")}},
        "float32, bfloat16 or float16 for backend='triton'",
        "torch.float64",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    name, changes, expected, received = WRONG[case]
    backends.reset_call_counts()
    with pytest.raises(ValueError) as caught:
        flash_attention_decode(**{**RIGHT, **changes})
    text = str(caught.value)
    assert text.startswith(f"{name}: expected ") and "; " in text, text
    assert expected in text.partition(", received ")[0] and received in text.partition(", received ")[2], text
    assert not backends.call_counts(), "something ran before the call was refused"


def test_parameters_pass_without_a_tape() -> None:
    """Sinks of a model are parameters; under no_grad nothing asks for their gradient."""
    sinks = torch.zeros(H, requires_grad=True)
    with torch.no_grad():
        out = flash_attention_decode(**RIGHT, sinks=sinks)
    assert not out.requires_grad


CONTENTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "length_too_large": ("cache_lens[1]", {"cache_lens": torch.tensor([9, 10])}, "from 0 to 9", "10"),
    "length_negative": ("cache_lens[0]", {"cache_lens": torch.tensor([-1, 3])}, "from 0 to 9", "-1"),
    "no_room": ("cache_lens[0]", {**NEW, "cache_lens": torch.tensor([9, 3])}, "9 slots less 1 new", "9"),
    "start_beyond": (
        "cache_starts[1]",
        {"cache_lens": torch.tensor([3, 4]), "cache_starts": torch.tensor([3, 5])},
        "from 0 to the sequence's length 4",
        "5",
    ),
    "page_beyond": (
        "block_table[1, 1]",
        {**PAGED, "cache_lens": torch.tensor([1, 5]), "block_table": torch.tensor([[4, 9, 9], [0, 5, 9]])},
        "a page from 0 to 4",
        "5",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_are_checked_when_asked_for(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes, expected, received = CONTENTS[case]
    monkeypatch.setattr(decode.env, "CHECK", True)
    with pytest.raises(ValueError) as caught:
        flash_attention_decode(**{**RIGHT, **changes})
    text = str(caught.value)
    assert text.startswith(f"{name}: expected ") and expected in text, text
    assert received in text.partition(", received ")[2], text
    monkeypatch.setattr(decode.env, "CHECK", False)
    flash_attention_decode(**{**RIGHT, **changes})


def test_right_contents_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.env, "CHECK", True)
    for feature in ("plain", "pages_of_17", "append_into_nothing", "starts_hide_all", "lengths"):
        run(FEATURES[feature], "reference")
    assert decode_validation.HEAD_DIMS == (16, 576)


@pytest.mark.parametrize(("B", "Sq", "capacity"), list(itertools.product((0, 2), (0, 1), (0, 4))))
def test_empty_tensors(B: int, Sq: int, capacity: int) -> None:
    q, k, v = t(B, H, Sq, D), t(B, HKV, capacity, D), t(B, HKV, capacity, DV)
    options = {"cache_lens": index(B), "return_lse": True, "backend": "reference"}
    out, lse = flash_attention_decode(q, k, v, sinks=t(H), **options)
    assert out.shape == (B, H, Sq, DV) and (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(("B", "Sq", "capacity"), list(itertools.product((0, 2), (0, 1), (0, 4))))
def test_empty_tensors_of_triton(B: int, Sq: int, capacity: int) -> None:
    q, k, v = t(B, H, Sq, D), t(B, HKV, capacity, D), t(B, HKV, capacity, D)
    options = {"cache_lens": index(B), "return_lse": True, "backend": "triton"}
    out, lse = flash_attention_decode(q, k, v, sinks=t(H), **options)
    assert out.shape == (B, H, Sq, D) and (out == 0).all() and (lse == -math.inf).all()
