"""Floor 1: the transforms of torch.func, and forward mode, of every operation.

Under ``auto`` each gives what plain autograd makes of the reference in fp64, and in fp32 the reference's bits; a
backend asked for by name is right or refuses by name, before anything runs; and an op called by itself loses no tangent
in silence. Triton's rows run in its interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd import functional as autograd
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fusemesh
from fusemesh.kernels import backends, compat
from fusemesh.kernels.attention.call.options import Options
from fusemesh.kernels.attention.call.validation import normalise
from fusemesh.kernels.attention.dense.ops import FIELDS
from fusemesh.kernels.matmul import parallel
from fusemesh.kernels.matmul.ops import linear_forward
from fusemesh.kernels.testing import budget
from fusemesh.kernels.vocab_loss import api as vocab_loss
from fusemesh.kernels.vocab_loss.linear import fused_linear_cross_entropy

B, H, HKV, S, D = 2, 4, 2, 4, 16
Function = Callable[[torch.Tensor], torch.Tensor]
TRITON = pytest.param("triton", marks=pytest.mark.interpreter)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def everything(dtype: torch.dtype) -> dict[str, Any]:
    """Every option of a call of attention; the second query sees no key."""
    mask = normal(S, S, seed=5) > -0.8
    mask[1] = False
    return {
        "causal": True,
        "window": (2, None),
        "mask": mask,
        "bias": normal(1, 1, 1, S, seed=6, dtype=dtype).expand(B, H, S, S),
        "alibi_slopes": normal(H, seed=7, dtype=dtype).abs(),
        "softcap": 2.0,
        "sinks": normal(H, seed=8, dtype=dtype),
        "dropout_p": 0.2,
        "seed": torch.tensor([5]),
    }


class Case(NamedTuple):
    """An operation as a function of one tensor."""

    make: Callable[[torch.dtype, str], Function]
    shape: tuple[int, ...]
    plain: Callable[[torch.dtype, str], Function] | None = None  # the same by functions with autograd
    without_autograd: bool = False


def dense(dtype: torch.dtype, backend: str, with_options: bool = False) -> Function:
    k, v = normal(B, HKV, S, D, seed=1, dtype=dtype), normal(B, HKV, S, D, seed=2, dtype=dtype)
    options = everything(dtype) if with_options else {}
    return lambda q: fusemesh.flash_attention(q, k, v, **options, backend=backend)


def forward(dtype: torch.dtype, backend: str) -> Function:
    k, v = normal(B, HKV, S, D, seed=1, dtype=dtype), normal(B, HKV, S, D, seed=2, dtype=dtype)
    options = everything(dtype)
    return lambda q: fusemesh.attention_forward(q, k, v, **options, backend=backend)[0]


def backward(dtype: torch.dtype, backend: str) -> Function:
    k, v = normal(B, HKV, S, D, seed=1, dtype=dtype), normal(B, HKV, S, D, seed=2, dtype=dtype)
    do, options = normal(B, H, S, D, seed=3, dtype=dtype), everything(dtype)

    def gradient(q: torch.Tensor) -> torch.Tensor:
        out, lse = fusemesh.attention_forward(q, k, v, **options, backend=backend)
        return fusemesh.attention_backward(do, q, k, v, out, lse, **options, backend=backend).dq

    return gradient


def backward_by_autograd(dtype: torch.dtype, backend: str) -> Function:
    function, do = dense(dtype, backend, with_options=True), normal(B, H, S, D, seed=3, dtype=dtype)

    def gradient(q: torch.Tensor) -> torch.Tensor:
        q = q if q.requires_grad else q.detach().requires_grad_()
        return torch.autograd.grad(function(q), q, do, create_graph=True)[0]

    return gradient


def packed(dtype: torch.dtype, backend: str) -> Function:
    k, v = normal(6, HKV, D, seed=1, dtype=dtype), normal(6, HKV, D, seed=2, dtype=dtype)
    cu = torch.tensor([0, 2, 5])
    options = everything(dtype) | {"mask": None, "bias": normal(1, H, 1, 3, seed=6, dtype=dtype), "align": "top_left"}
    return lambda q: fusemesh.flash_attention_varlen(q, k, v, cu, cu, 3, 3, **options, backend=backend)


def merge(dtype: torch.dtype, backend: str) -> Function:
    other, lses = normal(B, H, S, D, seed=1, dtype=dtype), [normal(B, H, S, seed=i, dtype=dtype) for i in (2, 3)]
    return lambda out: fusemesh.merge_attention([out, other], [lses[0], lses[1] + out.sum(-1)])[0]


def linear(dtype: torch.dtype, backend: str) -> Function:
    w, up, bias = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((16, 16), (16, 16), (16,))))
    return lambda x: fusemesh.fused_linear(x, w, bias, activation="gelu", w_up=up, backend=backend)


def loss(dtype: torch.dtype, backend: str) -> Function:
    targets = torch.tensor([3, -100, 15, 0])
    return lambda z: vocab_loss.vocab_parallel_cross_entropy(z, targets, vocab_start=0)


def loss_by_definition(dtype: torch.dtype, backend: str) -> Function:
    targets = torch.tensor([3, -100, 15, 0])
    return lambda z: torch.nn.functional.cross_entropy(z, targets, reduction="none")


CASES = {
    "plain": Case(dense, (B, H, S, D)),
    "everything": Case(functools.partial(dense, with_options=True), (B, H, S, D)),
    "forward": Case(forward, (B, H, S, D), plain=functools.partial(dense, with_options=True), without_autograd=True),
    "backward": Case(backward, (B, H, S, D), plain=backward_by_autograd, without_autograd=True),
    "packed": Case(packed, (6, H, D)),
    "merge": Case(merge, (B, H, S, D)),
    "linear": Case(linear, (3, 16)),
    "loss": Case(loss, (4, 16), plain=loss_by_definition),
}


def squares(f: Function) -> Function:
    return lambda x: f(x).square().sum()


def by_duals(f: Function, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def own_gradient(f: Function, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).square().sum(), x)[0]


# name -> (the transform of f at x and t, the same by plain autograd and loops)
TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "jvp": (lambda f, x, t: jvp(f, (x,), (t,))[1], lambda f, x, t: autograd.jvp(f, x, t)[1]),
    "forward_ad": (by_duals, lambda f, x, t: autograd.jvp(f, x, t)[1]),
    "jvp_of_jvp": (
        lambda f, x, t: jvp(lambda y: jvp(f, (y,), (t,))[1], (x,), (t,))[1],
        lambda f, x, t: autograd.jvp(lambda y: autograd.jvp(f, y, t, create_graph=True)[1], x, t)[1],
    ),
    "grad": (lambda f, x, t: grad(squares(f))(x), lambda f, x, t: own_gradient(f, x)),
    "vjp": (lambda f, x, t: vjp(squares(f), x)[1](x.new_ones(()))[0], lambda f, x, t: own_gradient(f, x)),
    "jvp_of_grad": (
        lambda f, x, t: jvp(grad(squares(f)), (x,), (t,))[1],
        lambda f, x, t: autograd.hvp(squares(f), x, t)[1],
    ),
    "grad_of_grad": (
        lambda f, x, t: grad(lambda y: (grad(squares(f))(y) * t).sum())(x),
        lambda f, x, t: autograd.hvp(squares(f), x, t)[1],
    ),
    "vmap": (
        lambda f, x, t: vmap(f, in_dims=1)(torch.stack([x, t], 1)),
        lambda f, x, t: torch.stack([f(x), f(t)]),
    ),
    "gradients_of_samples": (
        lambda f, x, t: vmap(grad(squares(f)))(torch.stack([x, t])),
        lambda f, x, t: torch.stack([own_gradient(f, x), own_gradient(f, t)]),
    ),
    "vmap_of_jvp": (
        lambda f, x, t: vmap(lambda y: jvp(f, (x,), (y,))[1])(torch.stack([x, t])),
        lambda f, x, t: torch.stack([autograd.jvp(f, x, y)[1] for y in (x, t)]),
    ),
}
ALONE = ("jvp", "forward_ad", "vmap", "vmap_of_jvp", "jvp_of_jvp")  # those that ask no gradient


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_auto_gives_the_formulas_derivatives(case: str, transform: str) -> None:
    """In fp64 those of plain autograd, which is another way through PyTorch; in fp32 the reference's bits."""
    own, ours = CASES[case], TRANSFORMS[transform][0]
    if own.without_autograd and transform not in ALONE:
        with pytest.raises(ValueError, match=r"without autograd.* call flash_attention"):
            ours(own.make(torch.float64, "auto"), normal(*own.shape), normal(*own.shape, seed=9))
        return
    x, t = normal(*own.shape), normal(*own.shape, seed=9)
    have = ours(own.make(torch.float64, "auto"), x, t)
    want = TRANSFORMS[transform][1]((own.plain or own.make)(torch.float64, "reference"), x, t)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
    assert have.count_nonzero() > 0.5 * have.numel() or case == "loss"
    x, t = x.float(), t.float()
    narrow, reference = (ours(own.make(torch.float32, backend), x, t) for backend in ("auto", "reference"))
    if case == "linear":  # F.linear, which the formula only nearly equals
        budget.check(transform, narrow, want, reference, absolute=want.abs() + 1)
    else:
        assert torch.equal(narrow, reference)


@pytest.mark.parametrize("outer", [jacfwd, jacrev, hessian])
def test_whole_matrices(outer: Callable[..., Any]) -> None:
    function, x = dense(torch.float64, "auto"), normal(1, H, 2, D)
    small = lambda y: function(y.expand(B, H, 2, D)).square().sum((0, 1, 2))  # noqa: E731
    if outer is hessian:
        have, want = outer(lambda y: small(y).sum())(x), autograd.hessian(lambda y: small(y).sum(), x)
    else:
        have, want = outer(small)(x), autograd.jacobian(small, x)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


def test_every_tensor_of_a_call_has_derivatives() -> None:
    """k, v, the bias, the sinks and a mod's tensors, forward and in reverse; one of stride 0 is not narrowed."""
    mod = fusemesh.register_score_mod(
        fusemesh.ScoreMod("transforms_table", None, None, lambda s, b, h, i, j, t: s * t[h % 2].to(s.dtype), 1, 0, True)
    )
    tensors = [normal(B, HKV, S, D, seed=i) for i in (1, 2)] + [normal(H, S, S), normal(H), normal(2)]
    tangents = [normal(*x.shape, seed=20 + i) for i, x in enumerate(tensors)]
    q = normal(B, H, S, D)

    def function(backend: str) -> Callable[..., torch.Tensor]:
        def call(k: Any, v: Any, bias: Any, sinks: Any, table: Any) -> torch.Tensor:
            return fusemesh.flash_attention(q, k, v, bias=bias, sinks=sinks, score_mod=mod(table), backend=backend)

        return call

    have = jvp(function("auto"), tuple(tensors), tuple(tangents))[1]
    want = autograd.jvp(function("reference"), tuple(tensors), tuple(tangents))[1]
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
    bias, tangent = normal(1, H, 1, S), normal(1, H, 1, S, seed=4)
    wide = lambda bias: fusemesh.flash_attention(q, *tensors[:2], bias=bias.expand(B, H, S, S))  # noqa: E731
    have = jvp(wide, (bias,), (tangent,))[1]
    torch.testing.assert_close(have, autograd.jvp(wide, bias, tangent)[1], rtol=1e-10, atol=1e-10)


def test_numbers_given_as_tensors_have_no_derivative() -> None:
    """What would be read as a number is refused where a derivative of it is asked for."""
    q, scale = normal(1, 1, S, D), torch.tensor(0.25, dtype=torch.float64)
    call = lambda scale: fusemesh.flash_attention(q, q, q, scale=scale).sum()  # noqa: E731
    have = jvp(lambda q: fusemesh.flash_attention(q, q, q, scale=scale), (q,), (q,))[0]
    assert torch.equal(have, fusemesh.flash_attention(q, q, q, scale=0.25, backend="reference"))
    for transform in (
        lambda: jvp(call, (scale,), (scale,)),
        lambda: grad(call)(scale),
        lambda: vmap(call)(scale.expand(2)),
        lambda: vmap(lambda t: jvp(call, (scale,), (t,))[1])(scale.expand(2)),
        lambda: jvp(lambda s: vmap(lambda x: call(s) + x)(torch.zeros(2)), (scale,), (scale,)),
        lambda: by_duals(call, scale, scale),
    ):
        with pytest.raises(ValueError, match="scale: expected a finite number or None"):
            transform()


# What a backend by name has a rule for; it refuses the others.
NAMED = {"cpu": ("vmap",), "triton": ("vmap",), "torch": tuple(TRANSFORMS)}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ("plain", "cpu"),
        ("plain", "torch"),
        ("packed", "cpu"),
        ("forward", "cpu"),
        ("backward", "cpu"),
        pytest.param("plain", "triton", marks=pytest.mark.interpreter),
        pytest.param("packed", "triton", marks=pytest.mark.interpreter),
        pytest.param("linear", "triton", marks=pytest.mark.interpreter),
    ],
)
def test_a_backend_by_name_is_right_or_refuses_by_name(case: str, backend: str, transform: str) -> None:
    own, (ours, by_loops) = CASES[case], TRANSFORMS[transform]
    x, t = normal(*own.shape, dtype=torch.float32), normal(*own.shape, seed=9, dtype=torch.float32)
    if transform in NAMED[backend]:
        have = ours(own.make(torch.float32, backend), x, t)
        exact = by_loops(own.make(torch.float64, "reference"), x.double(), t.double())
        eager = by_loops(own.make(torch.float32, "reference"), x, t)
        budget.check(transform, have, exact, eager, absolute=exact.abs() + 1)
        return
    backends.reset_call_counts()
    what = (
        "without autograd" if own.without_autograd and transform not in ALONE else f"a rule for .* {backend!r}, whose"
    )
    with pytest.raises(ValueError, match=what):
        ours(own.make(torch.float32, backend), x, t)
    assert backends.call_counts() == {}


def test_functions_without_autograd_run_where_no_gradient_is_asked_of_them() -> None:
    """A tape of one's own: torch.func runs its forward as it would outside, on any backend."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return fusemesh.attention_forward(q, q, q, backend="cpu")

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs, *output)

        @staticmethod
        def backward(ctx: Any, do: torch.Tensor, dlse: torch.Tensor) -> torch.Tensor:
            q, out, lse = ctx.saved_tensors
            with torch.no_grad():
                return sum(fusemesh.attention_backward(do, q, q, q, out, lse, dlse, backend="cpu")[:3])

    q = normal(1, 1, S, D, dtype=torch.float32)
    have = grad(lambda q: Attention.apply(q)[0].square().sum())(q)
    torch.testing.assert_close(have, own_gradient(lambda q: fusemesh.flash_attention(q, q, q), q))


@pytest.mark.parametrize(
    "case", ["plain", "everything", "packed", pytest.param("linear", marks=pytest.mark.interpreter)]
)
def test_many_gradients_at_once(case: str) -> None:
    """torch.autograd calls a backward op inside an older vmap, of ops that an ordinary forward has taken."""
    own = CASES[case]
    backend = "triton" if case == "linear" else "cpu"
    x, many = normal(*own.shape, dtype=torch.float32).requires_grad_(), normal(3, *own.shape, dtype=torch.float32)
    out = own.make(torch.float32, backend)(x)
    (have,) = torch.autograd.grad(out, x, many, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in many])
    assert torch.equal(have, want) and have.any()
    if case == "plain":
        function = squares(lambda y: own.make(torch.float32, "cpu")(y.expand(B, H, 1, D)))
        small = normal(1, 1, 1, D, dtype=torch.float32)
        have, want = (autograd.hessian(function, small, vectorize=vectorize) for vectorize in (True, False))
        torch.testing.assert_close(have, want)


def test_vmap_over_no_sample() -> None:
    for backend in ("cpu", "reference"):
        assert vmap(dense(torch.float32, backend))(torch.empty(0, B, H, S, D)).shape == (0, B, H, S, D)


def test_gradients_around_vmap_are_asked_for() -> None:
    """Inside vmap a tensor does not show that it requires a gradient."""
    x = normal(2, B, H, S, D, dtype=torch.float32).requires_grad_()
    for backend in ("auto", "cpu", "torch"):
        function = dense(torch.float32, backend)
        (have,) = torch.autograd.grad(vmap(function)(x).square().sum(), x)
        torch.testing.assert_close(have, torch.stack([own_gradient(function, one) for one in x]))
    cache = normal(2, H, 8, D, dtype=torch.float32)
    with pytest.raises(ValueError, match="q: expected a tensor that requires no gradient"):
        vmap(lambda q: fusemesh.flash_attention_decode(q, cache, cache, cache_lens=torch.tensor([4, 5])))(x)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference", TRITON])
def test_decode(backend: str) -> None:
    """It has no derivative, and vmap calls it for each sample, whose caches it changes."""
    q, new = normal(3, B, H, 1, D, dtype=torch.float32), normal(3, B, HKV, 1, D, seed=1, dtype=torch.float32)
    keys, values = (normal(3, B, HKV, 8, D, seed=i, dtype=torch.float32) for i in (2, 3))
    lens = torch.tensor([[1, 2], [3, 4], [5, 7]])

    def step(q: Any, k: Any, v: Any, lens: Any, new: Any) -> Any:
        options = {"k_new": new, "v_new": new, "return_lse": True, "backend": backend}
        return fusemesh.flash_attention_decode(q, k, v, cache_lens=lens, **options)

    k, v = keys.clone(), values.clone()
    want = [torch.stack(x) for x in zip(*(step(*one) for one in zip(q, k, v, lens, new, strict=True)), strict=True)]
    have = vmap(step)(q, keys, values, lens, new)
    assert all(torch.equal(x, y) for x, y in zip((*have, keys, values), (*want, k, v), strict=True))
    with pytest.raises(ValueError, match="k_cache: expected a cache for each sample"):
        vmap(step, in_dims=(0, None, None, None, 0))(q, k[0], v[0], lens[0], new)
    with pytest.raises(ValueError, match="outside forward-mode derivatives"):
        jvp(lambda q: step(q, k[0], v[0], lens[0], new[0])[0], (q[0],), (q[0],))


def test_lengths_that_vmap_maps_are_refused() -> None:
    x, cu = normal(2, 5, H, D), torch.tensor([[0, 2, 5], [0, 1, 5]])
    with pytest.raises(ValueError, match="cu_seqlens_q: expected lengths that all samples"):
        vmap(lambda x, cu: fusemesh.flash_attention_varlen(x, x, x, cu, cu, 5, 5))(x, cu)


def test_ops_by_themselves_lose_no_tangent_in_silence() -> None:
    q = normal(B, H, S, D, dtype=torch.float32)
    values = FIELDS.pack(normalise(q, q, Options()))
    calls = [
        lambda x: torch.ops.fusemesh.attention_forward(x, x, x, *values, "reference")[0],
        lambda x: torch.ops.fusemesh.attention_forward(x, x, x, *values, "cpu")[0],
        lambda x: linear_forward(x, x[0, 0], None, None, None, False, False, "triton")[0],
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"fusemesh::\w+_forward, which has none"):
            jvp(call, (q,), (q,))


def test_programs_traced_before_refuse_by_name() -> None:
    """What they hold is an op; traced of the reference they hold its formula."""
    q = normal(B, H, S, D, dtype=torch.float32)
    program = make_fx(dense(torch.float32, "cpu"))(q)

    def linear_op(x: torch.Tensor) -> torch.Tensor:
        return linear_forward(x, x[0, 0], None, None, None, False, False, "triton")[0]

    for name, traced in (("attention", program), ("linear", linear_op)):
        for transform in (
            lambda f: grad(lambda x: f(x).sum())(q),
            lambda f: jvp(f, (q,), (q,)),
            lambda f: jacrev(f)(q),
        ):
            with pytest.raises(ValueError, match=rf"fusemesh::{name}_forward, .*trace it with backend='reference'"):
                transform(traced)
    formula, want = make_fx(dense(torch.float32, "reference"))(q), dense(torch.float32, "reference")
    torch.testing.assert_close(grad(lambda x: formula(x).sum())(q), grad(lambda x: want(x).sum())(q))
    torch.testing.assert_close(jvp(formula, (q,), (q,)), jvp(want, (q,), (q,)))


def test_collectives_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the group had two ranks: the refusal comes before any communication."""
    monkeypatch.setattr(parallel, "group_size", lambda group: 2)
    monkeypatch.setattr(vocab_loss.dist, "get_world_size", lambda group: 2)
    group: Any = object()
    x = normal(2, 4, 4)
    functions: dict[str, Function] = {
        "copy_to_group": lambda x: parallel.copy_to_group(x, group),
        "reduce_from_group": lambda x: parallel.reduce_from_group(x, group),
        "gather_from_sequence": lambda x: parallel.gather_from_sequence(x, group),
        "reduce_scatter_to_sequence": lambda x: parallel.reduce_scatter_to_sequence(x, group),
        "scatter_to_sequence": lambda x: parallel.scatter_to_sequence(x, group),
        "gather_from_columns": lambda x: parallel.gather_from_columns(x, group, 8),
        "vocab_parallel_cross_entropy": lambda x: vocab_loss.vocab_parallel_cross_entropy(
            x, torch.zeros(2, 4, dtype=torch.long), vocab_start=0, group=group
        ),
        "fused_linear_cross_entropy": lambda x: fused_linear_cross_entropy(
            x, x.new_zeros(5, 4), torch.zeros(2, 4, dtype=torch.long), group=group
        ),
    }
    for name, function in functions.items():
        for transform in ("jvp", "grad", "vmap"):
            with pytest.raises(ValueError, match=f"group: expected one rank in {name}"):
                TRANSFORMS[transform][0](function, x, x)


def test_functionalize_is_no_transform_of_ours() -> None:
    q = normal(B, H, S, D, dtype=torch.float32)
    assert torch.equal(functionalize(dense(torch.float32, "cpu"))(q), dense(torch.float32, "cpu")(q))


def test_one_graph_outside_and_inside_of_a_transform() -> None:
    q, t = normal(B, H, S, D, dtype=torch.float32), normal(B, H, S, D, seed=9, dtype=torch.float32)
    function, reference = dense(torch.float32, "auto"), dense(torch.float32, "reference")

    def both(q: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return function(q), jvp(function, (q,), (t,))[1]

    plain, tangent = torch.compile(both, backend="eager", fullgraph=True)(q, t)
    assert torch.equal(plain, function(q))
    torch.testing.assert_close(tangent, jvp(reference, (q,), (t,))[1])


def test_transforms_are_looked_up_by_functions_that_are_not_compiled() -> None:
    """torch.compile leaves a function under jvp as it is, and from then on compiles what it calls by itself."""
    x = torch.ones(2)
    compiled = torch.compile(lambda x: x * len(compat.transforms()), backend="eager")
    jvp(compiled, (x,), (x,))
    assert not compiled(x).any()
    assert torch.equal(grad(lambda x: compiled(x).sum())(x), x)


@pytest.mark.slow
def test_compiled_calls_are_chosen_anew_inside_a_transform() -> None:
    """What a graph outside has been compiled for does not hold inside, and the other way round."""
    q, t = normal(B, H, S, D, dtype=torch.float32), normal(B, H, S, D, seed=9, dtype=torch.float32)
    function, reference = dense(torch.float32, "auto"), dense(torch.float32, "reference")
    compiled = torch.compile(function, backend="eager")
    assert torch.equal(compiled(q), function(q))
    torch.testing.assert_close(jvp(compiled, (q,), (t,))[1], jvp(reference, (q,), (t,))[1])
    assert torch.equal(compiled(q), function(q))
