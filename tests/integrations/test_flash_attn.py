"""Layer: application. flash-attn 2's attention functions give what flash-attn 2 publishes, values and gradients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh.integrations.flash_attn import functions as ours
from fusemesh.kernels import backends
from fusemesh.kernels.testing import budget
from tests.support import flash_attn_semantics as published
from tests.support.flash_attn_inputs import LENS_K, LENS_Q, SHAPES, bounds, dense, new, ragged
from tests.support.flash_attn_semantics import SCORES, Scores

# By flash-attn 2.8: what a user who changes the import alone relies on.
OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, {OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {OPTIONS}, block_table=None",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {OPTIONS}",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {OPTIONS}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


@pytest.fixture(autouse=True)
def counted() -> None:
    backends.reset_call_counts()


def results(function: Callable[..., Any], inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """out and lse of a function, and the gradients of its inputs through both."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*inputs)[:2]
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    seen = lse.isfinite()
    loss = (out * new(*out.shape, seed=7, dtype=out.dtype)).sum()
    loss = loss + (torch.where(seen, lse, 0) * new(*lse.shape, seed=8, dtype=lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, inputs)
    return {"out": out.detach(), "lse": lse.detach(), **{f"d{i}": x for i, x in enumerate(gradients)}}


def close(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def within_budget(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], eager: dict[str, Any]) -> None:
    assert found.keys() == exact.keys()
    for name, x in exact.items():
        budget.check(name, found[name], x, eager[name])


def dense_function(scores: Scores) -> Callable[..., Any]:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return ours.flash_attn_func(q, k, v, **scores.arguments(2, q.shape[2]), return_attn_probs=True)

    return function


def varlen_function(scores: Scores) -> Callable[..., Any]:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        lengths = (bounds(LENS_Q), bounds(LENS_K), max(LENS_Q), max(LENS_K))
        options = scores.arguments(len(LENS_Q), q.shape[1])
        return ours.flash_attn_varlen_func(q, k, v, *lengths, **options, return_attn_probs=True)

    return function


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_flash_attns(name: str) -> None:
    parameters = inspect.signature(getattr(ours, name)).parameters.values()
    text = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    assert text == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert name in ours.__all__


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCORES)
def test_reference_in_fp64(name: str, shape: str) -> None:
    inputs = dense(shape)
    with fusemesh.use_backend("reference"):
        found = results(dense_function(SCORES[name]), inputs)
    assert backends.call_counts() == {("attention_forward", "reference"): 1}
    close(found, results(lambda *x: published.batched(*x, SCORES[name]), inputs))


@pytest.mark.parametrize("name", SCORES)
def test_packed_reference_in_fp64(name: str) -> None:
    with fusemesh.use_backend("reference"):
        found = results(varlen_function(SCORES[name]), ragged())
    assert backends.call_counts() == {("attention_varlen_forward", "reference"): 1}
    close(found, results(lambda *x: published.packed(*x, LENS_Q, LENS_K, SCORES[name]), ragged()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["plain", "scale", "causal"])
def test_torch_in_fp64(name: str, shape: str) -> None:
    """PyTorch's kernel has no log-sum-exp; what else it expresses it computes, also where ``auto`` chooses."""
    inputs = [x.requires_grad_() for x in dense(shape)]
    want, _ = published.batched(*inputs, SCORES[name])
    for backend in ("torch", "auto"):
        with fusemesh.use_backend(backend):
            out = ours.flash_attn_func(*inputs, **SCORES[name].arguments(2, inputs[0].shape[2]))
        assert isinstance(out, torch.Tensor)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        do = new(*out.shape, seed=7)
        pairs = zip(torch.autograd.grad(out, inputs, do), torch.autograd.grad(want, inputs, do, True), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert backends.call_counts() == {("attention_forward", "torch"): 2}


@pytest.mark.interpreter
@pytest.mark.parametrize("name, shape", [(name, list(SHAPES)[i % 3]) for i, name in enumerate(SCORES)])
def test_triton_is_within_the_budget(name: str, shape: str) -> None:
    inputs, scores = dense(shape, torch.float32), SCORES[name]
    with fusemesh.use_backend("triton"):
        found = results(dense_function(scores), inputs)
    assert backends.call_counts() == {("attention_forward", "triton"): 1, ("attention_backward", "triton"): 1}
    exact, eager = (results(lambda *x: published.batched(*x, scores), [x.to(t) for x in inputs]) for t in TWO)
    within_budget(found, exact, eager)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["plain", "causal", "window", "all"])
def test_packed_triton_is_within_the_budget(name: str) -> None:
    inputs, scores = ragged(torch.float32), SCORES[name]
    with fusemesh.use_backend("triton"):
        found = results(varlen_function(scores), inputs)
    counts = {("attention_varlen_forward", "triton"): 1, ("attention_varlen_backward", "triton"): 1}
    assert backends.call_counts() == counts
    both = ([x.to(t) for x in inputs] for t in TWO)
    exact, eager = (results(lambda *x: published.packed(*x, LENS_Q, LENS_K, scores), inputs) for inputs in both)
    within_budget(found, exact, eager)


TWO = (torch.float64, torch.float32)


def test_packed_forms_are_the_same_and_have_one_gradient() -> None:
    scores = SCORES["causal-window"].arguments(2, 4)
    qkv, q, kv = new(2, 5, 3, 4, 16, seed=1), new(2, 3, 4, 16, seed=2), new(2, 5, 2, 2, 16, seed=3)
    flat, flat_kv = new(9, 3, 4, 16, seed=4), new(9, 2, 2, 16, seed=5)
    cu, cu_q = bounds([4, 5]), bounds([2, 1])
    calls: list[tuple[list[torch.Tensor], Callable[..., Any], Callable[..., Any]]] = [
        ([qkv], ours.flash_attn_qkvpacked_func, lambda x, **o: ours.flash_attn_func(*x.unbind(2), **o)),
        ([q, kv], ours.flash_attn_kvpacked_func, lambda x, y, **o: ours.flash_attn_func(x, *y.unbind(2), **o)),
        (
            [flat],
            lambda x, **o: ours.flash_attn_varlen_qkvpacked_func(x, cu, 5, **o),
            lambda x, **o: ours.flash_attn_varlen_func(*x.unbind(1), cu, cu, 5, 5, **o),
        ),
        (
            [q[0], flat_kv],
            lambda x, y, **o: ours.flash_attn_varlen_kvpacked_func(x, y, cu_q, cu, 2, 5, **o),
            lambda x, y, **o: ours.flash_attn_varlen_func(x, *y.unbind(1), cu_q, cu, 2, 5, **o),
        ),
    ]
    for inputs, packed, separate in calls:
        found, want = (
            results(lambda *x, f=f: f(*x, **scores, return_attn_probs=True), inputs) for f in (packed, separate)
        )
        for name, x in want.items():
            assert torch.equal(found[name], x), name
        assert found["d0"].shape == inputs[0].shape


@pytest.mark.parametrize("causal", [False, True])
def test_packed_keys_in_pages(causal: bool) -> None:
    """Pages in any order; what no sequence owns, and entries of the table beyond one, hold anything."""
    lens_q, lens_k, page = [2, 3, 1], [5, 7, 0], 3
    q = new(sum(lens_q), 4, 16, seed=0)
    tables, pages = [[4, 1, -9], [6, 0, 3], [2**31 - 1] * 3], {}
    rows = {name: new(sum(lens_k), 2, 16, seed=i) for i, name in enumerate("kv", 1)}
    for name, x in rows.items():
        pages[name] = torch.full((8, page, 2, 16), math.nan, dtype=x.dtype)
        for own, part in zip(tables, x.split(lens_k), strict=True):
            for j, row in enumerate(part):
                pages[name][own[j // page], j % page] = row
    table = torch.tensor(tables, dtype=torch.int32)
    lengths = (bounds(lens_q), bounds(lens_k), 3, 7)
    out = ours.flash_attn_varlen_func(q, pages["k"], pages["v"], *lengths, causal=causal, block_table=table)
    want, _ = published.packed(q, rows["k"], rows["v"], lens_q, lens_k, Scores(causal=causal))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_zeroes_a_share_and_scales_the_rest(packed: bool) -> None:
    """With values that are unit vectors the output is the dropped probabilities themselves."""
    heads, length, p = 2, 64, 0.25
    q, k = (new(1, length, heads, 16, seed=i) for i in (1, 2))
    v = torch.eye(length, dtype=q.dtype)[None, :, None, :].expand(1, -1, heads, -1).requires_grad_()
    scores = Scores(causal=True, softcap=2.0)
    want, _ = published.batched(q, k, v, scores)
    torch.manual_seed(0)

    def call() -> torch.Tensor:
        with fusemesh.use_backend("reference"):
            if not packed:
                return ours.flash_attn_func(q, k, v, p, causal=True, softcap=2.0)  # type: ignore[return-value]
            cu = bounds([length])
            flat = (x[0] for x in (q, k, v))
            out = ours.flash_attn_varlen_func(*flat, cu, cu, length, length, p, causal=True, softcap=2.0)
            return out[None]  # type: ignore[index]

    out, again = call(), call()
    kept = out != 0
    torch.testing.assert_close(out[kept], want[kept] / (1 - p), rtol=1e-9, atol=0)
    share = kept.sum() / (want != 0).sum()
    assert abs(share.item() - (1 - p)) < 0.03
    assert not torch.equal(out, again)  # another call, another seed
    torch.manual_seed(0)
    assert torch.equal(call(), out)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    columns = out.detach().sum(1)[0]  # [H, Sk]: the gradient of value j is the sum of what it was weighed by
    torch.testing.assert_close(dv, columns.T[None, :, :, None].expand_as(dv), rtol=1e-9, atol=1e-12)


def test_probabilities_are_empty_without_dropout() -> None:
    q, k, v = dense("few", torch.float32)
    for result in (dense_function(Scores())(q, k, v), varlen_function(Scores())(*ragged(torch.float32))):
        assert len(result) == 3 and result[2].shape == (0,) and result[2].dtype == torch.float32
    nothing = bounds([0, 0])
    out = ours.flash_attn_varlen_func(q[0, :0], k[0, :0], v[0, :0], nothing, nothing, 3, 2, 0.5, return_attn_probs=True)
    assert out[2].shape == (2, 4, 3, 2) and not out[2].any()


def test_half_precision_and_no_copies() -> None:
    """The layout of the output is the input's, so that heads go into the next projection as they are."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs = dense("few", dtype)
        out = ours.flash_attn_func(*inputs, causal=True)
        assert isinstance(out, torch.Tensor) and out.dtype == dtype and out.is_contiguous()
        exact, _ = published.batched(*(x.double() for x in inputs), Scores(causal=True))
        assert (out.double() - exact).abs().max() < 2e-2


Q, K = torch.zeros(2, 3, 4, 16), torch.zeros(2, 5, 2, 16)
CU = bounds([2, 1])
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: ours.flash_attn_func(Q[0], K, K), r"q: expected \[B, Sq, H, D\], received shape \(3, 4, 16\)"),
    "tensor": (lambda: ours.flash_attn_func(Q, None, K), "k: expected a torch.Tensor, received NoneType"),
    "heads": (lambda: ours.flash_attn_func(Q[:, :, :3], K, K), "k: expected .* that divides q's 3"),
    "head dim": (lambda: ours.flash_attn_func(Q[..., :8], K, K), "k: expected .* with q's head dim 8"),
    "values": (lambda: ours.flash_attn_func(Q, K, K[:, 1:]), "v: expected .* one value for each key"),
    "batch": (lambda: ours.flash_attn_func(Q, K[:1], K[:1]), "k: expected .* with q's batch size 2"),
    "scale": (lambda: ours.flash_attn_func(Q, K, K, softmax_scale="1"), "softmax_scale: expected a finite number"),
    "window": (lambda: ours.flash_attn_func(Q, K, K, window_size=3), r"window_size: expected two ints \(left, right\)"),
    "softcap": (lambda: ours.flash_attn_func(Q, K, K, softcap=None), "softcap: expected a finite number"),
    "causal": (lambda: ours.flash_attn_func(Q, K, K, causal="yes"), "causal: expected True or False"),
    "dropout": (lambda: ours.flash_attn_func(Q, K, K, 1.0), r"dropout_p: expected a number in \[0, 1\)"),
    "slopes": (
        lambda: ours.flash_attn_func(Q, K, K, alibi_slopes=torch.ones(3)),
        "alibi_slopes: expected .* one slope",
    ),
    "qkv": (lambda: ours.flash_attn_qkvpacked_func(Q[:, :, None]), r"qkv: expected a tensor \[B, S, 3, H, D\]"),
    "kv": (lambda: ours.flash_attn_kvpacked_func(Q, K), r"kv: expected a tensor \[B, Sk, 2, Hkv, D\]"),
    "packed rank": (
        lambda: ours.flash_attn_varlen_func(Q, K, K, CU, CU, 2, 2),
        r"q: expected \[total_q, H, D\], received shape \(2, 3, 4, 16\)",
    ),
    "pages": (
        lambda: ours.flash_attn_varlen_func(Q[0], K, K, CU, CU, 2, 99, block_table=torch.zeros(2, 2).int()),
        "max_seqlen_k: expected an int from 0 to 10.*block_table",
    ),
    "table": (
        lambda: ours.flash_attn_varlen_func(Q[0], K, K, CU, CU, 2, 2, block_table=torch.zeros(3, 2).int()),
        "cu_seqlens_k: expected 4 numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_speak_flash_attns_names(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_import_alone_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code written for flash-attn runs with ours under its name."""
    import sys

    monkeypatch.setitem(sys.modules, "flash_attn", ours)
    code = """
from flash_attn import flash_attn_func, flash_attn_with_kvcache
out = flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=True)
step = flash_attn_with_kvcache(out[:, -1:], cache, cache.clone(), k[:, :1], v[:, :1], cache_seqlens=3, causal=True)
"""
    names: dict[str, Any] = dict(zip("qkv", dense("few", torch.float32), strict=True))
    names["cache"] = torch.zeros(2, 8, 2, 16)
    exec(code, names)
    assert names["step"].shape == (2, 1, 4, 16) and torch.equal(names["cache"][:, 3], names["k"][:, 0])
