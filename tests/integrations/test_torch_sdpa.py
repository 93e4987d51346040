"""Layer: application. FuseMesh's scaled_dot_product_attention gives what PyTorch's gives."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusemesh
from fusemesh.integrations.pytorch.sdpa import scaled_dot_product_attention
from fusemesh.kernels import backends
from fusemesh.kernels.testing import budget


@dataclass(frozen=True)
class Shapes:
    """Leading dimensions of query, key, value, and lengths and head dims."""

    query: tuple[int, ...] = (2, 4)
    key: tuple[int, ...] = (2, 4)
    value: tuple[int, ...] = (2, 4)
    L: int = 5
    S: int = 7
    E: int = 16
    Ev: int = 16
    gqa: bool = False

    def inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        shapes = (*self.query, self.L, self.E), (*self.key, self.S, self.E), (*self.value, self.S, self.Ev)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        return q, k, v


SHAPES = {
    "4d": Shapes(),
    "square": Shapes(L=6, S=6),
    "more-queries": Shapes(L=7, S=4),
    "2d": Shapes((), (), ()),
    "3d": Shapes((3,), (3,), (3,)),
    "5d": Shapes((2, 3, 2), (2, 3, 2), (2, 3, 2)),
    "6d": Shapes((1, 2, 2, 2), (1, 2, 2, 2), (1, 2, 2, 2)),
    "batch-of-query-broadcasts": Shapes((1, 4), (2, 4), (2, 4)),
    "batch-of-value-differs": Shapes((1, 2), (1, 2), (3, 2)),
    "fewer-dims-of-query": Shapes((4,), (2, 4), (2, 4)),
    "fewer-dims-of-key": Shapes((2, 4), (4,), ()),
    "one-key-head": Shapes((2, 4), (2, 1), (2, 1)),
    "one-key-head-3d": Shapes((4,), (1,), (1,)),
    "one-query-head": Shapes((2, 1), (2, 3), (2, 3)),
    "one-value-head": Shapes((2, 3), (2, 3), (2, 1)),
    "5d-broadcasts": Shapes((2, 1, 2), (1, 3, 2), (3, 2)),
    "gqa": Shapes((2, 4), (2, 2), (2, 2), gqa=True),
    "mqa": Shapes((2, 4), (2, 1), (2, 1), gqa=True),
    "gqa-of-equal-heads": Shapes(gqa=True),
    "gqa-3d": Shapes((4,), (2,), (2,), gqa=True),
    "gqa-5d": Shapes((2, 2, 4), (2, 2, 2), (2, 2, 2), gqa=True),
    "gqa-broadcasts": Shapes((1, 4), (2, 2), (2, 2), gqa=True),
    "gqa-of-unlike-heads": Shapes((2, 4), (2, 2), (2, 1), gqa=True),
    "small-head-dims": Shapes(E=3, Ev=5),
    "large-head-dims": Shapes(E=40, Ev=24),
    "head-dim-zero": Shapes(E=0, Ev=4),
    "no-queries": Shapes(L=0),
    "no-keys": Shapes(S=0),
    "empty-batch": Shapes((0, 2), (0, 2), (0, 2)),
}


def masks(shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Keyword arguments of the calls, by name; masks of every shape that broadcasts to the scores."""
    heads = shapes.query if shapes.gqa else torch.broadcast_shapes(shapes.query, shapes.key)
    scores = (*heads, shapes.L, shapes.S)
    generator = torch.Generator().manual_seed(4)
    found: dict[str, dict[str, Any]] = {"plain": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3}}
    # PyTorch takes masks of two dimensions or more, and says so by an IndexError.
    for kept in range(2, len(scores) + 1):
        some = [(True,) * kept, (True, *[False] * (kept - 1))]
        for full in itertools.product((False, True), repeat=2) if kept == 2 else some:
            shape = tuple(n if own else 1 for n, own in zip(scores[-kept:], full, strict=True))
            name = "x".join(map(str, shape))
            found[f"bool-{name}"] = {"attn_mask": torch.rand(shape, generator=generator) > 0.3}
            found[f"float-{name}"] = {"attn_mask": torch.randn(shape, generator=generator)}
    return found


def output_gradient(out: torch.Tensor) -> torch.Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)


def run(function: Any, shapes: Shapes, dtype: torch.dtype, **arguments: Any) -> dict[str, torch.Tensor]:
    """The output, and the gradients of query, key, value and a float mask."""
    leaves = dict(zip("qkv", (x.requires_grad_() for x in shapes.inputs(dtype)), strict=True))
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        leaves["mask"] = arguments["attn_mask"] = mask.to(dtype).requires_grad_()
    out = function(leaves["q"], leaves["k"], leaves["v"], enable_gqa=shapes.gqa, **arguments)
    gradients = torch.autograd.grad(out, list(leaves.values()), output_gradient(out), materialize_grads=True)
    return {"out": out.detach(), **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}


def by_pytorch(shapes: Shapes, dtype: torch.dtype, **arguments: Any) -> dict[str, torch.Tensor]:
    """That of PyTorch's own function, by its C++ formula: its fused kernels do not take every case of the grid."""
    with sdpa_kernel(SDPBackend.MATH):
        return run(F.scaled_dot_product_attention, shapes, dtype, **arguments)


def test_the_signature_is_pytorchs() -> None:
    documented = F.scaled_dot_product_attention.__doc__
    assert documented is not None
    ours = inspect.signature(scaled_dot_product_attention)
    names = ", ".join(
        name if parameter.default is inspect.Parameter.empty else f"{name}={parameter.default}"
        for name, parameter in ours.parameters.items()
    )
    assert " ".join(documented.split()).startswith(f"scaled_dot_product_attention({names}) -> Tensor:")


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_equal_pytorchs_in_fp64(name: str) -> None:
    shapes = SHAPES[name]
    calls = masks(shapes)
    backends.reset_call_counts()
    for label, arguments in calls.items():
        want = by_pytorch(shapes, torch.float64, **arguments)
        for backend in ("reference", "torch"):
            with fusemesh.use_backend(backend):
                actual = run(scaled_dot_product_attention, shapes, torch.float64, **arguments)
            assert actual.keys() == want.keys()
            for key in want:
                assert actual[key].shape == want[key].shape, f"{key} of {label} on {backend}"
                error = (actual[key] - want[key]).abs().max().item() if want[key].numel() else 0.0
                size = max(1.0, want[key].abs().max().item()) if want[key].numel() else 1.0
                assert error <= 1e-12 * size, f"{key} of {label} on {backend}: error {error}"
    expected = {("attention_forward", backend): len(calls) for backend in ("reference", "torch")}
    assert backends.call_counts() == expected


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_a_key_are_zero_and_have_no_gradient(kind: str) -> None:
    shapes = SHAPES["4d"]
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(6)) > 0.3
    mask[0, 0, 2] = False
    given = mask if kind == "bool" else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    want = by_pytorch(shapes, torch.float64, attn_mask=given)
    with fusemesh.use_backend("reference"):
        actual = run(scaled_dot_product_attention, shapes, torch.float64, attn_mask=given)
    for result in (actual, want):
        assert (result["out"][0, :, 2] == 0).all() and (result["dq"][0, :, 2] == 0).all()
    for key in want:
        torch.testing.assert_close(actual[key], want[key], rtol=1e-12, atol=1e-12)


def test_every_weight_dropped_gives_zeros() -> None:
    with fusemesh.use_backend("reference"):
        result = run(scaled_dot_product_attention, SHAPES["4d"], torch.float64, dropout_p=1.0)
    assert all((x == 0).all() for x in result.values())


def test_dropout_is_applied_whatever_the_mode() -> None:
    q, k, v = (torch.randn(2, 3, 40, 16, dtype=torch.float64) for _ in range(3))
    eye = torch.eye(40, dtype=torch.float64).expand(2, 3, 40, 40)
    torch.manual_seed(0)
    with fusemesh.use_backend("reference"):
        p = scaled_dot_product_attention(q, k, eye)
        dropped = scaled_dot_product_attention(q, k, eye, dropout_p=0.25)
        torch.manual_seed(1)
        first = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
        torch.manual_seed(1)
        assert torch.equal(first, scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], p[kept] / 0.75, rtol=1e-12, atol=0)
    # 9600 weights: five standard deviations of the share that is kept.
    assert abs(kept.double().mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"attn_mask": torch.ones(5, 7, dtype=torch.bool), "is_causal": True},
            "attn_mask, is_causal: expected at most",
        ),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, "attn_mask: expected a bool or floating tensor"),
        (
            {"attn_mask": torch.ones(5, 6, dtype=torch.bool)},
            r"attn_mask: expected a shape that broadcasts to \(2, 4, 5",
        ),
        ({"attn_mask": torch.ones(3, 2, 4, 5, 7, dtype=torch.bool)}, "attn_mask: expected a shape that broadcasts"),
        ({"dropout_p": 1.5}, r"dropout_p: expected a number in \[0, 1\]"),
        (
            {"key": torch.zeros(2, 2, 7, 16)},
            "query, key, value: expected leading dimensions that broadcast.*enable_gqa",
        ),
        (
            {"key": torch.zeros(2, 3, 7, 16), "enable_gqa": True},
            "key: expected a number of heads that divides query's 4",
        ),
        ({"key": torch.zeros(7, 16), "enable_gqa": True}, "enable_gqa: expected False where there is no dimension"),
        ({"key": torch.zeros(2, 4, 7, 8)}, "key: expected query's head dim 16"),
        ({"value": torch.zeros(2, 4, 6, 16)}, "value: expected key's length 7"),
        ({"query": torch.zeros(16)}, "query: expected 2 dimensions or more"),
        ({"key": torch.zeros(2, 4, 7, 16, dtype=torch.float64)}, "k: expected q's dtype"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x),
)
def test_what_pytorch_refuses_is_refused_with_the_remedy(change: dict[str, Any], message: str) -> None:
    q, k, v = SHAPES["4d"].inputs(torch.float32)
    arguments = {"query": q, "key": k, "value": v, **change}
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(**arguments)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises((RuntimeError, IndexError)):
        F.scaled_dot_product_attention(**arguments)


def test_compiles_into_one_graph_with_dynamic_shapes() -> None:
    compiled = torch.compile(scaled_dot_product_attention, backend="eager", fullgraph=True, dynamic=True)
    with fusemesh.use_backend("torch"):
        for name in ("4d", "gqa"):
            q, k, v = SHAPES[name].inputs(torch.float32)
            for arguments in ({"is_causal": True}, {"attn_mask": torch.randn(5, 7)}):
                arguments["enable_gqa"] = SHAPES[name].gqa
                torch.testing.assert_close(
                    compiled(q, k, v, **arguments), scaled_dot_product_attention(q, k, v, **arguments)
                )


def absolute(shapes: Shapes, out: torch.Tensor, **arguments: Any) -> dict[str, torch.Tensor]:
    """The gradients in fp64 with the absolute values of all factors, for the floor of the budget."""
    inputs = shapes.inputs(torch.float64)
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        arguments["attn_mask"] = mask.double()
    leaves = [x.abs().requires_grad_() for x in inputs]

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(shapes.query[-1] // x.shape[-3], -3) if shapes.gqa else x

    eye = torch.eye(shapes.S, dtype=torch.float64).expand(*repeated(inputs[1]).shape[:-2], -1, -1)
    with sdpa_kernel(SDPBackend.MATH):
        p = F.scaled_dot_product_attention(inputs[0], repeated(inputs[1]), eye, **arguments)
    do = output_gradient(out).abs()
    q, k, v = leaves[0], repeated(leaves[1]), repeated(leaves[2])
    ds = (p * (do @ v.transpose(-1, -2) + (do * (p @ v)).sum(-1, keepdim=True))).detach()
    # Linear in q, k and v, so that autograd sums over what was broadcast or repeated.
    linear = (arguments.get("scale") or shapes.E**-0.5) * (ds * (q @ k.transpose(-1, -2))).sum() + (do * (p @ v)).sum()
    found = {f"d{name}": x for name, x in zip("qkv", torch.autograd.grad(linear, leaves), strict=True)}
    if mask is not None and mask.dtype != torch.bool:
        found["dmask"] = ds.sum_to_size(mask.shape)
    return found


TRITON = {
    "4d": ("plain", "causal", "float-2x4x5x7"),
    "3d": ("causal", "float-5x7", "bool-3x5x7"),
    "2d": ("scale",),
    "5d": ("float-2x3x2x5x7",),
    "one-key-head": ("causal",),
    "batch-of-query-broadcasts": ("bool-2x1x1x1",),
    "one-query-head": ("plain",),
    "gqa": ("causal", "float-1x7"),
    "gqa-of-unlike-heads": ("plain",),
    "small-head-dims": ("float-5x1", "causal"),
    "more-queries": ("causal",),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", TRITON)
def test_triton_is_within_the_budget_of_pytorchs_formula(name: str) -> None:
    shapes = SHAPES[name]
    calls = {label: masks(shapes)[label] for label in TRITON[name]}
    backends.reset_call_counts()
    for label, arguments in calls.items():
        with fusemesh.use_backend("triton"):
            actual = run(scaled_dot_product_attention, shapes, torch.float32, **arguments)
        exact = by_pytorch(shapes, torch.float64, **arguments)
        eager = by_pytorch(shapes, torch.float32, **arguments)
        floors = absolute(shapes, exact["out"], **arguments)
        for key, want in exact.items():
            budget.check(f"{key} of {label}", actual[key], want, eager[key], absolute=floors.get(key))
    assert backends.call_counts() == {
        ("attention_forward", "triton"): len(calls),
        ("attention_backward", "triton"): len(calls),
    }


@pytest.mark.parametrize(
    ("query", "key", "value", "options"),
    [
        ((2, 7, 6, 16), (2, 12, 3, 16), (2, 12, 3, 16), {}),
        ((2, 7, 6, 16), (2, 12, 3, 16), (2, 12, 3, 16), {"enable_gqa": True}),
        ((2, 6, 7, 16), (2, 3, 12, 16), (2, 12, 3, 16), {"enable_gqa": True}),
        ((2, 12, 6, 16), (2, 12, 6, 16), (2, 12, 6, 16), {"attn_mask": torch.ones(12, 12, dtype=torch.bool)}),
    ],
    ids=["heads", "gqa", "value", "mask"],
)
def test_heads_that_stand_where_lengths_belong(query: Any, key: Any, value: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="heads stand second"):
        scaled_dot_product_attention(torch.ones(query), torch.ones(key), torch.ones(value), **options)
