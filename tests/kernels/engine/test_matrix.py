"""Layer: kernels, on one process. The C++ engine by the matrix that the Triton kernels pass, on every instruction set
that this processor has: forward and every gradient, packed sequences, decode."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import fusemesh
from fusemesh.kernels import backends, engine
from fusemesh.kernels.attention.call.spec import Origin
from fusemesh.kernels.attention.dense.api import flash_attention
from fusemesh.kernels.attention.engine import dense as cpu
from fusemesh.kernels.attention.reference import dense as reference
from fusemesh.kernels.measure.cases import AttentionCase, DecodeCase
from fusemesh.kernels.testing import poison
from tests.support import decode_cases, varlen_cases
from tests.support.attention_cases import (
    DTYPES,
    FEATURES,
    Guard,
    case_of,
    combinations,
    compare,
    pairwise,
    run,
    surrounded,
    without_a_key,
)
from tests.support.engine_required import require_engine

require_engine()

ISAS = engine.isas()
# Without the user's own mods, which this engine has not.
CASES = {name: case for name, case in FEATURES.items() if not case.mod} | {
    "everything": replace(FEATURES["everything"], mod=False)
}


@pytest.fixture(params=[ISAS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ISAS[1:])])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; the best one, which calls use, in the short run, too."""
    with engine.use_isa(request.param):
        assert engine.build_info()["isa"] == request.param
        yield request.param


def run_and_compare(case: AttentionCase) -> None:
    """Forward and gradients, inputs in seas of NaN, outputs poisoned and surrounded by NaN that must stay intact."""
    guard = Guard()
    with poison.poisoned_empty(), mock.patch.object(cpu, "empty_laid_out_like", guard.empty_laid_out_like):
        result = run(case, cpu, **{name: surrounded(tensor) for name, tensor in case.inputs().items()})
    assert guard.outputs, "the launchers take their outputs from elsewhere"
    guard.assert_intact()
    compare(case, result)


@pytest.mark.parametrize("feature", CASES)
def test_each_feature(feature: str, isa: str) -> None:
    for dtype in DTYPES:
        run_and_compare(replace(CASES[feature], dtype=dtype))


@pytest.mark.parametrize("first", range(0, len(pairwise()), 20))
def test_every_pair_of_options(first: int, isa: str) -> None:
    """Each value of each option meets each value of every other."""
    for options in pairwise()[first : first + 20]:
        run_and_compare(case_of({**options, "mod": False}))


@pytest.mark.parametrize("name", ISAS[1:])
def test_some_of_everything_on_the_others(name: str) -> None:
    with engine.use_isa(name):
        for turn, options in enumerate(pairwise()[:40:4]):
            run_and_compare(case_of({**options, "mod": False, "dtype": list(DTYPES)[turn % 3]}))
        for feature in ("all_at_once", "append", "pages_of_17", "latent_pages"):
            decode_cases.run_and_compare(decode_cases.FEATURES[feature], "cpu")
        varlen_cases.run_and_compare(replace(varlen_cases.FEATURES["everything"], mod=False), "cpu")


def drawn(seed: int) -> Iterator[AttentionCase]:
    """Calls that draw every option at random."""
    draw = random.Random(seed)
    for case in combinations(250, seed=seed):
        yield replace(
            case,
            softcap=draw.choice([None, None, 2.0]),
            alibi=draw.choice([None, None, "h", "bh"]),
            sinks=draw.random() < 0.3,
            dropout=draw.choice([0.0, 0.0, 0.2]),
            scale=draw.choice([None, None, None, -0.3, 0.0]),
            origin=(case.origin[0], 0, draw.choice([0, 3]), 0),
        )


# Of results of about 1: what rounding of inputs, probabilities and sums can do, and no wrong element hides behind it.
# A bias that is one number for all scores sums 20,000 gradients that cancel: 1.6e-4 was seen of it in fp32.
FUZZ = {"fp32": 5e-4, "fp16": 3e-2, "bf16": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed: int, isa: str) -> None:
    """20 seeds of 250 calls on every instruction set, others on each: 20,000 where there are four. Against fp64."""
    for case in drawn(seed + 20 * ISAS.index(isa)):
        x: dict[str, Any] = case.inputs()
        wide = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in x.items()}
        call = case.call(wide)
        call = call.replace(aux=tuple(t.double() for t in call.aux))
        out, lse = reference.forward(wide["q"], wide["k"], wide["v"], call)
        bias_grad = x["bias"] is not None
        gradients = reference.backward(
            wide["do"], wide["q"], wide["k"], wide["v"], out, lse, wide["dlse"], call, bias_grad=bias_grad
        )[:5]
        want = dict(zip(("out", "lse", "dq", "dk", "dv", "dbias", "dsinks"), (out, lse, *gradients), strict=True))
        for name, value in run(case, cpu).items():
            assert torch.equal(value.isinf(), want[name].isinf()), (name, case)
            finite = ~want[name].isinf()
            error = (value.double() - want[name])[finite].abs().max() if finite.any() else torch.zeros(())
            most = want[name][finite].abs().max() if finite.any() else torch.zeros(())
            assert error <= FUZZ[case.dtype] * (1 + most), (name, float(error), float(most), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str, isa: str) -> None:
    """Bottom-right causal: rows without a key; blocks of 64 rows and tiles of 96 keys whole, cut and skipped."""
    for Sq, Sk in itertools.product((1, 64, 130), (2, 95, 97, 200)):
        run_and_compare(
            AttentionCase(dtype=dtype, H=2, Hkv=1, Sq=Sq, Sk=Sk, D=40, Dv=72, causal=True, align="bottom_right")
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_whatever_the_threads(dtype: str, isa: str) -> None:
    """50 runs; heads are few, so that the keys' gradients are made of several parts."""
    case = AttentionCase(
        dtype=dtype, B=1, H=4, Hkv=2, Sq=600, Sk=210, D=32, Dv=48, mask="n", bias="hn", window=(None, 30), dlse=True
    )
    threads, first = torch.get_num_threads(), run(case, cpu)
    try:
        for turn in range(49):
            torch.set_num_threads(1 + turn % 3)
            again = run(case, cpu)
            assert all(torch.equal(first[name], again[name]) for name in first), (turn, case)
    finally:
        torch.set_num_threads(threads)
    compare(case, first)


@pytest.mark.parametrize("why", ["mask", "bias", "window"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_key(why: str, dtype: str, isa: str) -> None:
    """Output 0, LSE -inf and no gradient, even where the gradient of the LSE is NaN; the other rows as ever."""
    case, changed, empty = without_a_key(why, dtype=dtype, sinks=True)
    result = run(case, cpu, **changed)
    compare(case, result, **changed)
    assert (result["out"][:, :, empty] == 0).all() and (result["lse"][:, :, empty] == -math.inf).all()
    assert (result["dq"][:, :, empty] == 0).all() and (result["dbias"][:, :, empty] == 0).all()
    changed["dlse"][:, :, empty] = math.nan
    again = run(case, cpu, **changed)
    assert all(torch.equal(result[name], again[name]) for name in result)


@pytest.mark.parametrize("low", [-1e10, -1e30, torch.finfo(torch.float32).min])
def test_rows_hidden_by_a_large_negative_bias(low: float, isa: str) -> None:
    """Where all keys of a row have it they are alike again: the mean of the values, not NaN, and not zero."""
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    bias = torch.zeros(1, 1, 70, 70)
    bias[:, :, 3:7], bias[:, :, 20:, 60:] = low, low
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, want = (fusemesh.flash_attention(*leaves, bias=bias, backend=name) for name in ("cpu", "reference"))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(out[:, :, 3:7], v.mean(2, keepdim=True).expand(-1, -1, 4, -1))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


def test_softcap_where_tanh_is_flat(isa: str) -> None:
    q, k, v = (torch.randn(1, 1, 20, 16) * size for size in (30, 30, 1))
    out, want = (fusemesh.flash_attention(q, k, v, softcap=1.0, backend=name) for name in ("cpu", "reference"))
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("sink", [100.0, -100.0])
def test_gradient_of_the_lse_beside_a_sink_far_from_it(sink: float, isa: str) -> None:
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    found = []
    for name in ("cpu", "reference"):
        sinks = torch.full((2,), sink, requires_grad=True)
        out, lse = fusemesh.flash_attention(q, k, v, sinks=sinks, return_lse=True, backend=name)
        found.append(torch.autograd.grad(lse.sum() + out.sum(), (q, k, v, sinks)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("B", "Sq", "Sk"), [(1, 0, 17), (1, 17, 0), (1, 0, 0), (0, 17, 17)])
@pytest.mark.parametrize("bias", [None, "mn", "m", "n", ""])
def test_empty_tensors(B: int, Sq: int, Sk: int, bias: str | None) -> None:
    run_and_compare(AttentionCase(B=B, Sq=Sq, Sk=Sk, causal=True, bias=bias, dlse=True))


def test_any_stride(isa: str) -> None:
    """The last dimension, too, may lie anywhere; no copy is made by PyTorch."""
    case = AttentionCase(dtype="bf16", B=2, H=4, Hkv=4, Sq=17, Sk=40, D=24, Dv=24, bias="mn", dlse=True)
    x = case.inputs()
    changed = {}
    for name in ("q", "k", "v", "do", "bias"):
        tensor = x[name]
        assert tensor is not None
        changed[name] = tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        assert changed[name].stride() != tensor.stride()
    want = run(case, cpu)
    got = run(case, cpu, **changed)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_offsets_beyond_32_bits(dtype: str) -> None:
    """Rows, heads and the mask lie more than 2^31 elements apart; only touched pages of the memory exist."""
    case = AttentionCase(dtype=dtype, H=2, Hkv=2, Sq=3, Sk=3, mask="hmn", bias="hmn", window=(None, 1))
    x = case.inputs()
    far = 2**30 + 64
    changed = {}
    for name in ("q", "k", "v", "do", "bias", "mask"):
        tensor = x[name]
        assert tensor is not None
        # Heads follow each other closely, positions do not: the last one starts beyond 2^31 elements.
        changed[name] = torch.empty(2 * far + 64, dtype=tensor.dtype).as_strided(tensor.shape, (0, 32, far, 1))
        changed[name].copy_(tensor)
    compare(case, run(case, cpu, **changed))


def test_dropout_drops_what_the_reference_drops(isa: str) -> None:
    """The probabilities themselves (v is the identity): the same are 0 on both, whatever the positions."""
    q, k = torch.randn(2, 3, 145, 16), torch.randn(2, 3, 148, 16)
    v = torch.eye(148).expand(2, 3, 148, 148)
    options = {"dropout_p": 0.3, "seed": -7, "origin": Origin(q=torch.tensor(2**31 - 9), k=6, head=2, batch=1)}
    native = flash_attention(q, k, v, backend="cpu", **options)
    plain = flash_attention(q, k, v, backend="reference", **options)
    assert torch.equal(native == 0, plain == 0)
    assert 0.28 < (plain == 0).float().mean() < 0.32
    torch.testing.assert_close(native, plain)


@pytest.mark.parametrize("feature", [name for name in varlen_cases.FEATURES if name != "score_mod"])
def test_packed_sequences(feature: str, isa: str) -> None:
    for dtype, index in (("fp32", torch.int32), ("bf16", torch.int64)):
        case = replace(varlen_cases.FEATURES[feature], dtype=dtype, mod=False)
        before = backends.call_counts().get(("attention_varlen_backward", "cpu"), 0)
        with poison.poisoned_empty():
            varlen_cases.run_and_compare(case, "cpu", index)
        assert backends.call_counts()["attention_varlen_backward", "cpu"] == before + 1


@pytest.mark.parametrize("feature", decode_cases.FEATURES)
def test_decode(feature: str, isa: str) -> None:
    for dtype in ("fp32", "bf16", "fp16"):
        decode_cases.run_and_compare(replace(decode_cases.FEATURES[feature], dtype=dtype), "cpu")


def test_decode_in_many_combinations(isa: str) -> None:
    for case in decode_cases.combinations(25, seed=3):
        decode_cases.run_and_compare(case, "cpu")


@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (8, 40), (33, 17), (6, 128), (128, 224)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_decode_of_any_number_of_rows(dtype: str, dims: tuple[int, int], isa: str) -> None:
    """Rows share vectors, and tiles of registers, by how many there are; 129 keys are a tile or four and then some."""
    for group, queries in ((1, 1), (2, 1), (3, 1), (5, 1), (8, 1), (3, 3), (15, 1), (17, 1), (12, 3), (21, 4)):
        case = DecodeCase(
            dtype=dtype,
            H=2 * group,
            Sq=queries,
            D=dims[0],
            Dv=dims[1],
            capacity=131,
            lens=(129, 7),
            causal=queries == 3,
        )
        decode_cases.run_and_compare(case, "cpu")


@pytest.mark.parametrize("page", [None, 16])
def test_decode_of_lengths_and_starts_beyond_reason(page: int | None, isa: str) -> None:
    """Lengths beyond the cache count as its end, and no sum of what a tensor holds goes astray."""
    most = 2**63 - 1
    shape = (1, 2, 64, 16) if page is None else (4, 2, page, 16)
    k, v = torch.randn(shape), torch.randn(shape)
    table = None if page is None else torch.arange(4, dtype=torch.int32)[None]
    q, new = torch.randn(1, 2, 66, 16), torch.randn(1, 2, 1, 16)

    def decode(length: int, start: int, new: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        lens, starts = torch.tensor([length]), torch.tensor([start])
        return fusemesh.flash_attention_decode(
            q, k.clone(), v.clone(), cache_lens=lens, cache_starts=starts, block_table=table, k_new=new, v_new=new,
            causal=True, align="bottom_right", return_lse=True, backend="cpu",
        )  # fmt: skip

    for extra in (None, new):
        for length in (most, 2**62):
            assert all(torch.equal(a, b) for a, b in zip(decode(length, 0, extra), decode(64, 0, extra), strict=True))
        for length, start in ((-most, 0), (0 if extra is None else -1, 0), (64, most), (0, most), (-most, -most)):
            out, lse = decode(length, start, extra)
            assert not out.any() and (lse == -torch.inf).all(), (length, start)


@pytest.mark.parametrize("page", [None, 16, 1])
def test_decode_splits_long_caches(page: int | None, isa: str) -> None:
    """Thousands of keys are shared out among threads, and the parts merged; the same bits whatever the threads."""
    lengths = (3000, 1, 0) if page is None else (3000, 17, 0)
    case = DecodeCase(H=4, Hkv=1, Sq=2, D=32, Dv=48, causal=True, capacity=3008, lens=lengths, page=page, sinks=True)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(decode_cases.run(case, "cpu"))
        finally:
            torch.set_num_threads(before)
    decode_cases.compare(case, *results[0])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
