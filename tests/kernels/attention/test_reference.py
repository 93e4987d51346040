"""Layer: one process, CPU, no Triton. The reference in fp64 against numpy loops, finite differences and autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.reference import dense as reference

B = 2


@dataclass(frozen=True)
class Case:
    """One combination of features; masks and biases by their shape, the letters are those of [B, H, Sq, Sk]."""

    name: str
    heads: int = 2
    kv_heads: int = 2
    sq: int = 4
    sk: int = 5
    dim: int = 3
    dim_v: int = 3
    left: int | None = None
    right: int | None = None
    origin: tuple[int, int] = (0, 0)
    device_origin: tuple[int, int, int, int] | None = None
    mask: str = ""
    bias: str = ""

    def shape(self, letters: str) -> tuple[int, ...]:
        sizes = {"B": B, "H": self.heads, "Q": self.sq, "K": self.sk, "1": 1}
        return tuple(sizes[letter] for letter in letters)


CASES = [
    Case("plain"),
    Case("one_by_one", sq=1, sk=1),
    Case("dv_differs", dim=4, dim_v=2),
    Case("gqa", heads=4, kv_heads=2),
    Case("mqa", heads=3, kv_heads=1),
    Case("causal_top_left", right=0),
    Case("causal_bottom_right", right=0, origin=(1, 0)),
    Case("causal_bottom_right_more_queries", sq=6, sk=4, right=0, origin=(-2, 0)),
    Case("window", left=1, right=2),
    Case("window_left_open", right=1),
    Case("window_right_open", left=0),
    Case("window_away_from_all_keys", left=0, right=0, origin=(100, 0)),
    Case("shard", left=2, right=0, origin=(7, 5)),
    Case("origin_on_device", left=2, right=0, origin=(4, 0), device_origin=(3, 5, 0, 0)),
    Case("mask_full", mask="BHQK"),
    Case("mask_keys", mask="B11K"),
    Case("mask_queries", mask="11Q1"),
    Case("bias_full", bias="BHQK"),
    Case("bias_heads", bias="1HQK"),
    Case("bias_keys", bias="B11K"),
    Case("bias_scalar", bias="1111"),
    Case("everything", heads=4, kv_heads=2, left=3, right=0, origin=(1, 0), mask="B1QK", bias="1HQ1", dim_v=2),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def make(case: Case) -> tuple[list[torch.Tensor], dict]:
    """q, k, v in fp64 and the keywords of the reference. Query 1 sees no key under a mask or a full bias."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [
        normal(B, case.heads, case.sq, case.dim),
        normal(B, case.kv_heads, case.sk, case.dim),
        normal(B, case.kv_heads, case.sk, case.dim_v),
    ]
    mask = bias = None
    if case.mask:
        mask = torch.rand(case.shape(case.mask), generator=generator) > 0.4
        if case.mask[2] == "Q":
            mask[:, :, 1] = False
    if case.bias:
        bias = normal(*case.shape(case.bias))
        if case.bias == "BHQK":
            bias[:, :, 1] = -math.inf
            bias[0, 0, 0, 0] = -math.inf
    return tensors, {
        "mask": mask,
        "bias": bias,
        "origin": None if case.device_origin is None else torch.tensor(case.device_origin),
        "spec": AttentionSpec(0.7, case.left, case.right, *case.origin),
    }


def oracle(case: Case, tensors: list[torch.Tensor], keywords: dict) -> tuple[np.ndarray, np.ndarray]:
    """The definition of attention, one query at a time, sharing no line with the reference."""
    q, k, v = (x.numpy() for x in tensors)
    mask, bias = (None if keywords[x] is None else keywords[x].numpy() for x in ("mask", "bias"))
    scores = (B, case.heads, case.sq, case.sk)
    mask = np.ones(scores, dtype=bool) if mask is None else np.broadcast_to(mask, scores)
    bias = np.zeros(scores) if bias is None else np.broadcast_to(bias, scores)
    more_q, more_k = (case.device_origin or (0, 0, 0, 0))[:2]
    out = np.zeros((B, case.heads, case.sq, case.dim_v))
    lse = np.full((B, case.heads, case.sq), -np.inf)
    for b in range(B):
        for h in range(case.heads):
            kv = h * case.kv_heads // case.heads
            for i in range(case.sq):
                weights = {}
                for j in range(case.sk):
                    ahead = (case.origin[1] + more_k + j) - (case.origin[0] + more_q + i)
                    if case.left is not None and ahead < -case.left:
                        continue
                    if case.right is not None and ahead > case.right:
                        continue
                    if mask[b, h, i, j] and bias[b, h, i, j] > -np.inf:
                        weights[j] = math.exp(0.7 * math.fsum(q[b, h, i] * k[b, kv, j]) + bias[b, h, i, j])
                if weights:
                    total = math.fsum(weights.values())
                    lse[b, h, i] = math.log(total)
                    out[b, h, i] = sum(w / total * v[b, kv, j] for j, w in weights.items())
    return out, lse


def test_equals_loops_in_numpy(case: Case) -> None:
    tensors, keywords = make(case)
    out, lse = reference.forward(*tensors, Call(**keywords))
    want_out, want_lse = oracle(case, tensors, keywords)
    np.testing.assert_allclose(out.numpy(), want_out, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=1e-13, atol=1e-14)


def test_cases_force_the_rare_rows() -> None:
    """The list above is only worth something if some rows see no key and others see some."""
    without = {case.name: bool((oracle(case, *make(case))[1] == -np.inf).any()) for case in CASES}
    assert {name for name, found in without.items() if found} >= {
        "causal_bottom_right_more_queries",
        "window_away_from_all_keys",
        "mask_full",
        "mask_queries",
        "bias_full",
        "everything",
    }
    assert not without["plain"] and not without["causal_bottom_right"]


def leaves(case: Case) -> tuple[list[torch.Tensor], dict]:
    """As ``make``, with gradients wanted, and bias among the tensors where there is one."""
    tensors, keywords = make(case)
    if keywords["bias"] is not None:
        tensors = [*tensors, keywords["bias"]]
    return [x.requires_grad_() for x in tensors], keywords


def visible_lse(lse: torch.Tensor) -> torch.Tensor:
    """The lse without its -inf entries, of which there are no finite differences."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def call(keywords: dict, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, *bias = tensors
    return reference.forward(q, k, v, Call(**{**keywords, "bias": bias[0] if bias else None}))


def finite_bias(case: Case, keywords: dict, tensors: list[torch.Tensor]) -> None:
    """Finite differences of a bias of -inf are NaN, so those entries become merely very unlikely."""
    if case.bias:
        with torch.no_grad():
            tensors[3].nan_to_num_(neginf=-8.0)


def test_autograd_equals_finite_differences(case: Case) -> None:
    tensors, keywords = leaves(case)
    finite_bias(case, keywords, tensors)

    def outputs(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = call(keywords, inputs)
        return out, visible_lse(lse)

    assert torch.autograd.gradcheck(outputs, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, tensors, fast_mode=True)


def test_weights_multiply_the_values(case: Case) -> None:
    """Those of the scores and of the lse that forward gave: the same output and the same gradients."""
    tensors, keywords = leaves(case)
    want, lse = call(keywords, tuple(tensors))
    q, k, v, *_ = tensors
    weights = reference.weights(q, k, lse, Call(**keywords))
    groups = case.heads // case.kv_heads
    got = weights @ v.repeat_interleave(groups, dim=1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    do = torch.randn_like(want)
    for mine, theirs in zip(
        *(torch.autograd.grad(x, tensors, do, retain_graph=True) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_weights_take_no_more_matrices_than_the_formula_has_steps() -> None:
    """Two for the product and its scale, one each for the lse that is taken off and for exp."""
    q, k, lse = torch.randn(1, 1, 128, 8), torch.randn(1, 1, 128, 8), torch.randn(1, 1, 128)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        reference.weights(q, k, lse, Call(AttentionSpec(0.3)))
    assert profile.kineto_results is not None
    events = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    assert sorted(size for size in events if size >= 128 * 128) == [4 * 128 * 128] * 4


@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out_and_lse"])
def test_explicit_backward_equals_autograd(case: Case, with_dlse: bool) -> None:
    tensors, keywords = leaves(case)
    out, lse = call(keywords, tuple(tensors))
    do = torch.randn_like(out)
    dlse = torch.randn_like(lse) if with_dlse else None
    outputs, incoming = ([out, lse], [do, dlse]) if with_dlse else ([out], [do])
    want = torch.autograd.grad(outputs, tensors, incoming)
    with torch.no_grad():
        q, k, v, *bias = tensors
        got = reference.backward(do, q, k, v, out, lse, dlse, Call(**keywords), bias_grad=bool(bias))
    assert (got[3] is not None) == bool(bias)
    for name, mine, theirs in zip(("dq", "dk", "dv", "dbias"), got, want, strict=False):
        assert mine is not None and mine.isfinite().all(), name
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def test_explicit_backward_is_differentiable_in_all_its_tensors(case: Case) -> None:
    """What the second derivative of every fused backend is made of."""
    tensors, keywords = leaves(case)
    finite_bias(case, keywords, tensors)
    with torch.no_grad():
        out, lse = call(keywords, tuple(tensors))
    empty = lse == -math.inf
    others = [torch.randn_like(out), *tensors[:3], out, visible_lse(lse), torch.randn_like(lse), *tensors[3:]]
    others = [x.detach().requires_grad_() for x in others]

    def gradients(do, q, k, v, out, lse, dlse, *bias):  # type: ignore[no-untyped-def]
        call = Call(**{**keywords, "bias": bias[0] if bias else None})
        lse = lse.masked_fill(empty, -math.inf)
        found = reference.backward(do, q, k, v, out, lse, dlse, call, bias_grad=bool(bias))
        return tuple(x for x in found if x is not None)

    assert torch.autograd.gradcheck(gradients, others, fast_mode=True)


@pytest.mark.parametrize("how", ["mask", "bias", "window"])
def test_rows_without_keys_give_zeros_and_never_nan(how: str) -> None:
    """Output 0, lse -inf, gradients 0, whatever gradient comes in for the lse; the second derivative is finite too."""
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    row = torch.tensor([False, True, False, False])[:, None]
    bias = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    keywords: dict = {"mask": None, "bias": None, "origin": None, "spec": AttentionSpec(0.5)}
    if how == "mask":
        keywords["mask"] = ~row.expand(1, 1, 4, 4)
    elif how == "bias":
        keywords["bias"] = bias.masked_fill(row, -math.inf).requires_grad_()
    else:
        keywords["spec"] = AttentionSpec(0.5, 0, 0, 10, 0)
    rows = slice(None) if how == "window" else slice(1, 2)
    out, lse = reference.forward(q, k, v, Call(**keywords))
    assert (out[:, :, rows] == 0).all() and (lse[:, :, rows] == -math.inf).all()
    assert out.isfinite().all()
    do, dlse = torch.randn_like(out), torch.randn_like(lse)
    dlse[:, :, rows] = math.nan
    inputs = [x for x in (q, k, v, keywords["bias"]) if x is not None]
    taped = torch.autograd.grad([out, lse], inputs, [do, dlse], create_graph=True)
    explicit = reference.backward(do, q, k, v, out, lse, dlse, Call(**keywords), bias_grad=how == "bias")
    for gradients in (taped, [x for x in explicit if x is not None]):
        assert all(x.isfinite().all() for x in gradients)
        assert (gradients[0][:, :, rows] == 0).all()
        if how == "bias":
            assert (gradients[3][:, :, 1] == 0).all()
        if how == "window":
            assert all((x == 0).all() for x in gradients)
        second = torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs, retain_graph=True)
        assert all(x.isfinite().all() for x in second)


@pytest.mark.parametrize(("sq", "sk"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sequences(sq: int, sk: int) -> None:
    q = torch.randn(2, 2, sq, 4, requires_grad=True)
    k, v = (torch.randn(2, 1, sk, 4, requires_grad=True) for _ in range(2))
    keywords: dict = {"mask": None, "bias": None, "origin": None, "spec": AttentionSpec(0.5)}
    out, lse = reference.forward(q, k, v, Call(**keywords))
    assert out.shape == (2, 2, sq, 4) and (out == 0).all() and (lse == -math.inf).all()
    gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    explicit = reference.backward(out, q, k, v, out, lse, None, Call(**keywords), bias_grad=False)
    for x, mine, taped in zip((q, k, v), explicit, gradients, strict=False):
        assert mine is not None and mine.shape == taped.shape == x.shape
        assert (mine == 0).all() and (taped == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Results in the inputs' dtypes, the lse in fp32 or fp64; half precision is rounded once, at the end."""
    q, k, v = (torch.randn(1, 2, 5, 8).to(dtype) for _ in range(3))
    keywords: dict = {
        "mask": None,
        "bias": torch.randn(1, 1, 5, 5),
        "origin": None,
        "spec": AttentionSpec(0.5, None, 0),
    }
    out, lse = reference.forward(q, k, v, Call(**keywords))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == dtype and lse.dtype == wide
    want_out, want_lse = reference.forward(*(x.to(wide) for x in (q, k, v)), Call(**keywords))
    assert torch.equal(out, want_out.to(dtype)) and torch.equal(lse, want_lse)
    dq, dk, dv, dbias, *_ = reference.backward(out, q, k, v, out, lse, None, Call(**keywords), bias_grad=True)
    assert dq.dtype == dk.dtype == dv.dtype == dtype
    assert dbias is not None and dbias.dtype == torch.float32 and dbias.shape == (1, 1, 5, 5)


def test_autocast_does_not_reach_inside() -> None:
    q, k, v = (torch.randn(1, 1, 5, 8) for _ in range(3))
    keywords: dict = {"mask": None, "bias": None, "origin": None, "spec": AttentionSpec(0.5)}
    out, lse = reference.forward(q, k, v, Call(**keywords))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, lse_again = reference.forward(q, k, v, Call(**keywords))
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_part_of_the_keys_with_the_whole_softmax_gives_their_part_of_the_gradients() -> None:
    """The use that ring attention makes of the explicit backward."""
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    do = torch.randn_like(q)
    whole: dict = {"mask": None, "bias": None, "origin": None, "spec": AttentionSpec(0.5, 3, 0)}
    out, lse = reference.forward(q, k, v, Call(**whole))
    dq, dk, dv, *_ = reference.backward(do, q, k, v, out, lse, None, Call(**whole), bias_grad=False)
    parts = []
    for start in (0, 3):
        spec = AttentionSpec(0.5, 3, 0, 0, start)
        keys = slice(start, start + 3)
        parts.append(
            reference.backward(
                do, q, k[:, :, keys], v[:, :, keys], out, lse, None, Call(**{**whole, "spec": spec}), bias_grad=False
            )
        )
    torch.testing.assert_close(parts[0][0] + parts[1][0], dq, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 2), dk, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(torch.cat([part[2] for part in parts], 2), dv, rtol=1e-13, atol=1e-14)
