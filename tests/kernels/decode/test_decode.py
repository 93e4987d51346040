"""Layer: kernels. Attention over a cache: the reference in fp64 here, the Triton kernels in Triton's interpreter.

Whatever a call must not read holds NaN, and so do its outputs before they are written (decode_cases.py).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fusemesh import flash_attention_decode
from fusemesh.kernels import backends, env
from fusemesh.kernels.attention.decode import api as decode
from fusemesh.kernels.attention.gpu import decode_tiles as decode_tiles
from fusemesh.kernels.attention.gpu.tiles import Tile
from fusemesh.kernels.measure.cases import DecodeCase
from fusemesh.kernels.runtime.launch import intercept
from tests.support.decode_cases import FEATURES, Caches, combinations, run, run_and_compare


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
    case = DecodeCase(dtype=dtype, D=D, Dv=Dv, H=4, Hkv=2, added=1, lens=(69, 20), page=35)
    with decode_tiles.force(splits=2):
        run_and_compare(case, "triton")


@pytest.mark.parametrize("case", combinations(60, seed=0), ids=str)
def test_combinations_of_the_reference(case: DecodeCase) -> None:
    run_and_compare(replace(case, dtype="fp64"), "reference")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", combinations(20, seed=1), ids=str)
def test_combinations(case: DecodeCase) -> None:
    with decode_tiles.force(splits=1 + len(str(case)) % 4):
        run_and_compare(case, "triton")


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", combinations(400, seed=2), ids=str)
def test_many_combinations(case: DecodeCase) -> None:
    with decode_tiles.force(splits=1 + len(str(case)) % 4):
        run_and_compare(case, "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (32, 128)], ids=str)
def test_every_tile_and_split_count_gives_the_right_answer(blocks: tuple[int, int]) -> None:
    case = DecodeCase(H=10, Hkv=1, Sq=3, causal=True, lens=(65, 70), sinks=True, D=33, Dv=24, mask="n")
    for splits in (1, 5, 20):
        with decode_tiles.force(tile=Tile(*blocks, num_warps=4, num_stages=2), splits=splits):
            run_and_compare(case, "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_bits_twice(dtype: str) -> None:
    case = DecodeCase(dtype=dtype, H=4, Hkv=2, Sq=2, causal=True, page=14, sinks=True, added=2, lens=(60, 50))
    for splits in (1, 3):
        with decode_tiles.force(splits=splits):
            first, second = run(case, "triton"), run(case, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.interpreter
def test_pages_change_no_bit() -> None:
    """Where a key stands in memory is no part of the arithmetic."""
    case = DecodeCase(dtype="bf16", H=4, Hkv=2, capacity=64, lens=(61, 30), added=1)
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

    case = DecodeCase(H=4, Hkv=2, Sq=5, lens=(70, 70), causal=True, softcap=3.0, sinks=True, alibi="h")
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
    case = DecodeCase(capacity=32, lens=(32, 20), Sq=2, causal=True)
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


def recorded(case: DecodeCase, lens: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """(kernel, grid, constants) of the launches of a call."""
    found: list[tuple[Any, ...]] = []

    def hook(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flat = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
        numbers = tuple(x for x in flat if not isinstance(x, torch.Tensor))
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
    case = DecodeCase(capacity=1024, H=4, Hkv=2)
    first, second = recorded(case, (1000, 3)), recorded(case, (0, 512))
    assert first == second
    names = [name for name, *_ in first]
    assert names == ["decode_append_kernel"] * 2 + ["decode_split_kernel", "decode_combine_kernel"]


@pytest.mark.interpreter
def test_the_triton_kernels_do_the_work() -> None:
    before = backends.call_counts()
    with backends.use_backend("triton"):
        run(DecodeCase(lens=(3, 4)), "auto")
    after = backends.call_counts()
    assert {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)} == {
        ("attention_decode", "triton"): 1
    }


def op_arguments(case: DecodeCase, backend: str) -> tuple[Any, ...]:
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
    "plain": DecodeCase(dtype="fp32"),
    "append": DecodeCase(added=2, lens=(60, 30), bias="n", mask="n", softcap=4.0, alibi="h", sinks=True),
    "pages": DecodeCase(page=35, added=1, lens=(50, 3), starts=(3, 0)),
    "latent": DecodeCase(latent=True, H=2, Hkv=1, D=24, Dv=16, added=1, lens=(60, 30)),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(torch.ops.fusemesh.attention_decode.default, op_arguments(OPCHECK[name], "reference"))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["append", "latent"])
def test_opcheck_of_triton(name: str) -> None:
    torch.library.opcheck(torch.ops.fusemesh.attention_decode.default, op_arguments(OPCHECK[name], "triton"))


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

    case = DecodeCase(H=4, Hkv=2, capacity=12, lens=(12, 12), Sq=12, causal=True)
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


def test_functionalised_writes_arrive() -> None:
    """Through AOTAutograd, which turns mutation into values and back, the caches still change in place."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, new: torch.Tensor, lens: torch.Tensor) -> Any:
        return flash_attention_decode(q, k, v, cache_lens=lens, k_new=new, v_new=new)

    for capacity in (9, 14):
        q, k, v = torch.randn(2, 2, 1, 16), torch.zeros(2, 2, capacity, 16), torch.zeros(2, 2, capacity, 16)
        new, lens = torch.randn(2, 2, 1, 16), torch.tensor([0, 4])
        plain_k, plain_v = k.clone(), v.clone()
        out = step(q, k, v, new, lens)
        want = flash_attention_decode(q, plain_k, plain_v, cache_lens=lens, k_new=new, v_new=new)
        assert torch.equal(out, want) and torch.equal(k, plain_k) and torch.equal(v, plain_v) and k.any()


def test_the_seas_of_nan_are_seen() -> None:
    """The guard itself: a length that is one too large reads a slot without a key, and a wrong write is noticed."""
    case = DecodeCase(lens=(40, 33))
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


def test_right_contents_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "CHECK", True)
    for feature in ("plain", "pages_of_17", "append_into_nothing", "starts_hide_all", "lengths"):
        run(FEATURES[feature], "reference")


def check_empty(B: int, Sq: int, capacity: int, backend: str) -> None:
    q, k, v = torch.zeros(B, 4, Sq, 16), torch.zeros(B, 2, capacity, 16), torch.zeros(B, 2, capacity, 24)
    lens = torch.zeros(B, dtype=torch.int32)
    out, lse = flash_attention_decode(q, k, v, cache_lens=lens, sinks=torch.zeros(4), return_lse=True, backend=backend)
    assert out.shape == (B, 4, Sq, 24) and (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize(("B", "Sq", "capacity"), list(itertools.product((0, 2), (0, 1), (0, 4))))
def test_empty_tensors(B: int, Sq: int, capacity: int) -> None:
    check_empty(B, Sq, capacity, "reference")


@pytest.mark.interpreter
@pytest.mark.parametrize(("B", "Sq", "capacity"), list(itertools.product((0, 2), (0, 1), (0, 4))))
def test_empty_tensors_of_triton(B: int, Sq: int, capacity: int) -> None:
    check_empty(B, Sq, capacity, "triton")
