"""Layer: kernels, Triton's interpreter. Attention forward and every gradient against fp64 by the error budget.

Outputs hold NaN before the kernels write them, inputs and outputs lie in seas of NaN, and sizes are odd.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from fusemesh.kernels import backends
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec, Origin
from fusemesh.kernels.attention.dense.api import flash_attention
from fusemesh.kernels.attention.gpu import forward as triton_forward
from fusemesh.kernels.attention.gpu import tiles
from fusemesh.kernels.attention.gpu.device import masks
from fusemesh.kernels.measure.cases import AttentionCase
from fusemesh.kernels.runtime.launch import launch
from tests.support.attention_cases import (
    DTYPES,
    FEATURES,
    case_of,
    combinations,
    compare,
    guarded_outputs,
    pairwise,
    run,
    run_and_compare,
    surrounded,
    without_a_key,
)

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(feature: str, dtype: str) -> None:
    run_and_compare(replace(FEATURES[feature], dtype=dtype))


@pytest.mark.parametrize("case", [case_of(options) for options in pairwise()], ids=str)
def test_every_pair_of_options(case: AttentionCase) -> None:
    """Each value of each option meets each value of every other."""
    run_and_compare(case)


@pytest.mark.parametrize("blocks", [(16, 16), (32, 64), (64, 32)], ids=str)
def test_dropout_drops_what_the_reference_drops(blocks: tuple[int, int]) -> None:
    """The probabilities themselves (v is the identity): the same are 0 on both, whatever the tiles and positions."""
    q, k = torch.randn(2, 3, 45, 16), torch.randn(2, 3, 48, 16)
    v = torch.eye(48).expand(2, 3, 48, 48)
    options = {"dropout_p": 0.3, "seed": -7, "origin": Origin(q=torch.tensor(2**31 - 9), k=6, head=2, batch=1)}
    with tiles.force(tiles.Tile(*blocks, num_warps=4, num_stages=1)):
        fused = flash_attention(q, k, v, backend="triton", **options)
    plain = flash_attention(q, k, v, backend="reference", **options)
    assert torch.equal(fused == 0, plain == 0)
    assert 0.28 < (plain == 0).float().mean() < 0.32
    torch.testing.assert_close(fused, plain)


@pytest.mark.slow
@pytest.mark.parametrize("case", combinations(300, seed=1), ids=str)
def test_many_combinations(case: AttentionCase) -> None:
    run_and_compare(case)


@pytest.mark.parametrize(("Sq", "Sk"), list(itertools.product((1, 17, 113, 203), repeat=2)))
def test_sizes(Sq: int, Sk: int) -> None:
    """Bottom-right causal, so that rows without a key, whole, cut and skipped tiles all occur."""
    dtype = list(DTYPES)[(Sq + Sk) % 3]
    run_and_compare(AttentionCase(dtype=dtype, H=1, Hkv=1, Sq=Sq, Sk=Sk, causal=True, align="bottom_right"))


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16), (128, 32)], ids=str)
def test_every_tile_gives_the_right_answer(blocks: tuple[int, int]) -> None:
    case = AttentionCase(dtype="fp32", H=2, Hkv=1, Sq=75, Sk=90, D=24, window=(40, 2), mask="n", bias="mn", dlse=True)
    with tiles.force(tiles.Tile(*blocks, num_warps=4, num_stages=2)):
        run_and_compare(case)
        run_and_compare(replace(case, mask=None, bias=None, dtype="bf16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice(dtype: str) -> None:
    case = AttentionCase(dtype=dtype, B=2, H=4, Hkv=2, Sq=17, Sk=70, mask="n", bias="hmn", window=(None, 30), dlse=True)
    first, second = run(case), run(case)
    assert all(torch.equal(first[name], second[name]) for name in first), case


@pytest.mark.parametrize("why", ["mask", "bias", "window"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_key(why: str, dtype: str) -> None:
    """Output 0, LSE -inf and no gradient, even where the gradient of the LSE is NaN; the other rows as ever."""
    case, changed, empty = without_a_key(why, dtype=dtype)
    with guarded_outputs():
        result = run(case, **changed)
    compare(case, result, **changed)
    assert (result["out"][:, :, empty] == 0).all() and (result["lse"][:, :, empty] == -math.inf).all()
    assert (result["dq"][:, :, empty] == 0).all() and (result["dbias"][:, :, empty] == 0).all()
    changed["dlse"][:, :, empty] = math.nan
    again = run(case, **changed)
    assert all(torch.equal(result[name], again[name]) for name in result)


@pytest.mark.parametrize(("B", "Sq", "Sk"), [(1, 0, 17), (1, 17, 0), (1, 0, 0), (0, 17, 17)])
@pytest.mark.parametrize("bias", [None, "mn", "m", "n", ""])
def test_empty_tensors(B: int, Sq: int, Sk: int, bias: str | None) -> None:
    case = AttentionCase(B=B, Sq=Sq, Sk=Sk, causal=True, bias=bias, dlse=True)
    with guarded_outputs():
        result = run(case)
    compare(case, result)


@pytest.mark.parametrize("how", ["sliced", "expanded", "transposed", "expanded_do", "strided_lse"])
def test_strides(how: str) -> None:
    case = AttentionCase(dtype="bf16", B=2, H=4, Hkv=4, Sq=17, Sk=40, D=24, Dv=24, bias="mn", dlse=True)
    x = case.inputs()
    q, k, v, do, bias, dlse = (x[name] for name in ("q", "k", "v", "do", "bias", "dlse"))
    assert q is not None and k is not None and v is not None and do is not None
    assert bias is not None and dlse is not None
    if how == "sliced":
        # One projection holds q, k and v side by side, heads inside positions.
        packed = torch.randn(2, 40, 3, 4, 24, generator=torch.Generator().manual_seed(5)).bfloat16()
        q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
        q = q[:, :, 3:20]
    elif how == "expanded":
        k, v = k[:, :1].expand(2, 4, 40, 24), v[:1].expand(2, 4, 40, 24)
        bias = bias[:, :, :1].expand(1, 1, 17, 40)
    elif how == "transposed":
        q, v, do, bias = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, v, do, bias))
    elif how == "expanded_do":
        do = torch.ones((), dtype=torch.bfloat16).expand_as(do)
        dlse = torch.full((1, 1, 1), 0.5).expand_as(dlse)
    else:
        dlse = dlse.transpose(1, 2).contiguous().transpose(1, 2)
    changed = {"q": q, "k": k, "v": v, "do": do, "bias": bias, "dlse": dlse}
    before = {name: tensor.clone() for name, tensor in changed.items()}
    with guarded_outputs():
        result = run(case, **changed)
    compare(case, result, **changed)
    assert all(torch.equal(before[name], changed[name]) for name in changed), "an input was written"


def test_outputs_are_laid_out_as_inputs_are() -> None:
    """Heads inside positions stay so, and the projection after attention needs no copy."""
    result = run(AttentionCase(B=2, H=4, Hkv=2, Sq=5, Sk=7, layout="bshd"))
    for name in ("out", "dq", "dk", "dv"):
        assert result[name].transpose(1, 2).is_contiguous(), name
    assert all(tensor.is_contiguous() for tensor in run(AttentionCase(B=2, H=4, Hkv=2, Sq=5, Sk=7)).values())


def test_offsets_beyond_32_bits() -> None:
    """Rows, heads and the mask lie more than 2^31 elements apart; only touched pages of the memory exist."""
    case = AttentionCase(dtype="fp16", H=2, Hkv=2, Sq=3, Sk=3, mask="hmn", bias="hmn", window=(None, 1))
    x = case.inputs()
    far = 2**30 + 64
    changed = {}
    for name in ("q", "k", "v", "do", "bias"):
        tensor = x[name]
        assert tensor is not None
        # Heads follow each other closely, positions do not: the last one starts beyond 2^31 elements.
        changed[name] = torch.empty(2 * far + 64, dtype=torch.float16).as_strided(tensor.shape, (0, 32, far, 1))
        changed[name].copy_(tensor)
    mask = x["mask"]
    assert mask is not None
    changed["mask"] = torch.empty(2 * far + 64, dtype=torch.bool).as_strided(mask.shape, (0, 32, far, 1)).copy_(mask)
    compare(case, run(case, **changed))


def test_tiles_outside_the_window_are_not_read() -> None:
    case = AttentionCase(Sq=20, Sk=150, D=16, causal=True, window=(10, None), origin=(60, 0, 0, 0))
    x = case.inputs()
    k, v = x["k"], x["v"]
    assert k is not None and v is not None
    want = run(case)
    # Queries stand at 60 to 79 and see keys 50 to 79, in tiles that start at 48 and end at 80 or earlier.
    for poisoned in (k, v):
        poisoned[:, :, :48], poisoned[:, :, 80:] = math.nan, math.nan
    with tiles.force(tiles.Tile(16, 16, num_warps=4, num_stages=1)), guarded_outputs():
        result = run(case, k=k, v=v)
    for name in ("out", "lse", "dq"):
        torch.testing.assert_close(result[name], want[name])
    for name in ("dk", "dv"):
        torch.testing.assert_close(result[name][:, :, 50:80], want[name][:, :, 50:80])
        assert (result[name][:, :, :48] == 0).all() and (result[name][:, :, 80:] == 0).all()


@triton.jit(do_not_specialize=["i_start", "lo", "hi", "rows", "columns"])
def _range_kernel(
    p_out,
    i_start,
    lo,
    hi,
    rows,
    columns,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
):
    ranges = masks.tile_range(i_start, lo, hi, rows, columns, 16, 32, HAS_LEFT, HAS_RIGHT, WHOLE_ROWS, WHOLE_COLUMNS)
    for PART in tl.static_range(3):
        i_from, i_to = masks.range_part(ranges, PART)
        tl.store(p_out + 2 * PART, i_from)
        tl.store(p_out + 2 * PART + 1, i_to)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_tile_ranges(flags: tuple[bool, bool, bool, bool]) -> None:
    """Every pair that is seen lies in a visited tile, none is visited twice, and the middle needs no mask."""
    has_left, has_right, whole_rows, whole_columns = flags
    draw = random.Random(str(flags))
    found = torch.zeros(6, dtype=torch.int32)
    middles = 0
    for _ in range(40):
        rows, columns = draw.randint(1, 70), draw.randint(0, 140)
        i_start = 16 * draw.randint(0, (rows - 1) // 16)
        lo, hi = (max(-rows, min(columns, draw.randint(-150, 150))) for _ in range(2))
        launch(_range_kernel, (1,), found, i_start, lo, hi, rows, columns, *flags)
        parts = found.view(3, 2).tolist()
        visited = [list(range(first, bound, 32)) for first, bound in parts]
        tiles_seen = [tile for part in visited for tile in part]
        assert len(tiles_seen) == len(set(tiles_seen)) and all(tile % 32 == 0 for tile in tiles_seen)
        block = range(i_start, min(i_start + 16, rows))
        seen = {
            (i, j)
            for i in block
            for j in range(columns)
            if (not has_left or i + lo <= j) and (not has_right or j <= i + hi)
        }
        assert {j // 32 * 32 for _, j in seen} <= set(tiles_seen)
        for tile in visited[1]:
            in_tile = [j for j in range(tile, tile + 32) if j < columns or whole_columns]
            assert all((i, j) in seen for i in block for j in in_tile), (lo, hi, rows, columns, i_start, tile)
            assert not whole_rows or i_start + 16 <= rows
        middles += len(visited[1])
    assert middles > 0, "no tile in the middle: the test shows nothing"


class TestPublicFunction:
    """flash_attention with backend='triton': its own autograd, and no other backend does the work."""

    def test_gradients(self) -> None:
        case = AttentionCase(
            dtype="bf16", H=4, Hkv=2, Sq=17, Sk=33, causal=True, align="bottom_right", bias="hmn", dlse=True
        )
        x = case.inputs()
        leaves = {name: x[name].clone().requires_grad_() for name in ("q", "k", "v", "bias")}
        before = backends.call_counts()
        out, lse = flash_attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            bias=leaves["bias"],
            causal=True,
            align="bottom_right",
            return_lse=True,
            backend="triton",
        )
        torch.autograd.backward((out, lse), (x["do"], x["dlse"]))
        after = backends.call_counts()
        assert {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)} == {
            ("attention_forward", "triton"): 1,
            ("attention_backward", "triton"): 1,
        }
        result = {"out": out, "lse": lse, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}
        compare(case, result)

    @pytest.mark.parametrize("dlse", [False, True])
    @pytest.mark.parametrize("dims", ["", "h", "bm", "hm"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_bias_that_is_the_same_for_all_keys(self, dtype: str, dims: str, dlse: bool) -> None:
        case = AttentionCase(dtype=dtype, B=2, Sq=33, Sk=17, causal=True, origin=(0, 2, 0, 0), bias=dims, dlse=dlse)
        x = case.inputs()
        bias = x["bias"].requires_grad_()
        origin = Origin(*case.origin)
        options = {"causal": True, "origin": origin, "bias": bias, "return_lse": True, "backend": "triton"}
        out, lse = flash_attention(x["q"], x["k"], x["v"], **options)
        outputs, grads = ((out, lse), (x["do"], x["dlse"])) if dlse else ((out,), (x["do"],))
        torch.autograd.backward(outputs, grads)
        compare(case, {"out": out.detach(), "lse": lse.detach(), "dbias": bias.grad}, bias=bias.detach())

    def test_only_the_lse_is_used(self) -> None:
        case = AttentionCase(dtype="fp32", Sq=17, Sk=33)
        x = case.inputs()
        q, k, v = (x[name].requires_grad_() for name in ("q", "k", "v"))
        _, lse = flash_attention(q, k, v, return_lse=True, backend="triton")
        lse.sum().backward()
        assert v.grad is not None and (v.grad == 0).all()
        want = torch.logsumexp(case.spec.scale * (q.detach().double() @ k.detach().double().mT), -1)
        torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
        (exact,) = torch.autograd.grad(
            torch.logsumexp(case.spec.scale * (q.double() @ k.detach().double().mT), -1).sum(), q
        )
        torch.testing.assert_close(q.grad, exact, rtol=1e-5, atol=1e-6)

    def test_double_backward(self) -> None:
        """Second derivatives through the op equal the reference's."""
        case = AttentionCase(dtype="fp32", H=2, Hkv=1, Sq=5, Sk=7, causal=True, align="bottom_right")
        grads = []
        for backend in ("triton", "reference"):
            q, k, v = (case.inputs()[name].requires_grad_() for name in ("q", "k", "v"))
            out = flash_attention(q, k, v, causal=True, align="bottom_right", backend=backend)
            first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
            grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)))
        for fused, plain in zip(*grads, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)

    def test_compiled_whole(self) -> None:
        """Under torch.compile the op stays one node, for lengths that were not traced as well."""

        @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
        def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return flash_attention(q, k, v, causal=True, align="top_left", backend="triton").float().square().sum()

        for Sq, Sk in ((5, 7), (19, 17)):
            x = AttentionCase(Sq=Sq, Sk=Sk).inputs()
            leaves = [x[name].requires_grad_() for name in ("q", "k", "v")]
            compiled = torch.autograd.grad(loss(*leaves), leaves)
            plain = flash_attention(*leaves, causal=True, align="top_left", backend="triton").square().sum()
            for got, want in zip(compiled, torch.autograd.grad(plain, leaves), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": torch.float64}, r"q: expected float32, .* for backend='triton', received torch.float64"),
        ({"D": 8}, r"q: .*a head dim from 16 to 256 .*received 8"),
        ({"D": 257}, r"q: .*received 257"),
        ({"Dv": 260}, r"v: .*received 260"),
    ],
    ids=str,
)
def test_refusals(changed: dict[str, object], message: str) -> None:
    D, Dv = changed.get("D", 16), changed.get("Dv", 16)
    q, k, v = (torch.zeros(1, 1, 3, d, dtype=changed.get("dtype", torch.float32)) for d in (D, D, Dv))
    with pytest.raises(ValueError, match=message):
        triton_forward.forward(q, k, v, Call(AttentionSpec(scale=1.0)))


def test_the_seas_of_nan_are_seen() -> None:
    """The guard itself: reading one row beyond the keys, or writing one beyond the output, is noticed."""
    case = AttentionCase(Sq=17, Sk=20)
    x = case.inputs()
    k, v = surrounded(x["k"]), surrounded(x["v"])
    assert k is not None and v is not None
    longer_k = k.as_strided((1, 2, 21, 16), k.stride(), k.storage_offset())
    longer_v = v.as_strided((1, 2, 21, 16), v.stride(), v.storage_offset())
    assert run(replace(case, Sk=21), k=longer_k, v=longer_v)["out"].isnan().any()
    with pytest.raises(AssertionError, match="written"), guarded_outputs():
        out = run(case)["out"]
        out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0.0)
