"""Layer: application. Inside accelerate() PyTorch's attention functions give what they give outside, gradients too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusemesh
from fusemesh.integrations.pytorch.routes import reset_routes, routes
from fusemesh.kernels import backends
from fusemesh.kernels.testing import budget
from tests.support import attention_modules as modules
from tests.support.engine_required import AUTO

SDPA, MHA = "F.scaled_dot_product_attention", "F.multi_head_attention_forward"
NATIVE = "torch._native_multi_head_attention"


@pytest.fixture(autouse=True)
def counted() -> None:
    backends.reset_call_counts()
    reset_routes()
    torch.manual_seed(0)


def module_and_masks(name: str, masks: str, how: str, dtype: torch.dtype) -> tuple[Any, list[torch.Tensor], Any]:
    options = modules.CONSTRUCTORS[name]
    module = nn.MultiheadAttention(modules.E, modules.H, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    qkv = modules.inputs(module, how, dtype)
    length = qkv[0].shape[1 if module.batch_first and how != "single" else 0]
    return module, qkv, modules.masks(masks, how, length, dtype)


# Every constructor with every mask once, ways to call it in turn; weights in three forms.
GRID = [
    (
        name,
        masks,
        ("self", "cross", "key_is_value", "single")[(i + j) % 4],
        ("none", "average", "heads")[(i + 2 * j) % 3],
    )
    for i, name in enumerate(modules.CONSTRUCTORS)
    for j, masks in enumerate(modules.MASKS)
]
SHORT = [case for index, case in enumerate(GRID) if index % 3 == 0]
FORMS: dict[str, dict[str, bool]] = {
    "none": {"need_weights": False},
    "average": {},
    "heads": {"average_attn_weights": False},
}


def check_module(name: str, masks: str, how: str, form: str) -> None:
    module, qkv, given = module_and_masks(name, masks, how, torch.float64)
    options = {**given, **FORMS[form]}
    want = modules.everything(module, qkv, **options)
    with fusemesh.accelerate(backend="reference"):
        actual = modules.everything(module, qkv, **options)
    modules.assert_equal(actual, want)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("name, masks, how, form", SHORT)
def test_modules_equal_pytorchs_in_fp64(name: str, masks: str, how: str, form: str) -> None:
    check_module(name, masks, how, form)
    # Once for the output; the weights are of the same call.
    assert backends.call_counts() == {("attention_forward", "reference"): 1}
    assert list(routes()) == [(SDPA if form == "none" else MHA, "reference", "")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("how", ["self", "cross", "key_is_value", "single"])
@pytest.mark.parametrize("form", FORMS)
def test_every_module_equals_pytorchs_in_fp64(how: str, form: str) -> None:
    for name in modules.CONSTRUCTORS:
        for masks in modules.MASKS:
            check_module(name, masks, how, form)
    assert backends.call_counts() == {("attention_forward", "reference"): len(GRID)}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("L, S", [(7, 7), (5, 9)])
def test_the_causal_hint(need_weights: bool, L: int, S: int) -> None:
    mask = torch.ones(L, S, dtype=torch.bool).triu(1)
    module = nn.MultiheadAttention(modules.E, modules.H, dtype=torch.float64)
    qkv = [torch.randn(n, 2, modules.E, dtype=torch.float64, requires_grad=True) for n in (L, S, S)]
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    want = modules.everything(module, qkv, **options)
    with fusemesh.accelerate(backend="reference"):
        modules.assert_equal(modules.everything(module, qkv, **options), want)
        for flag in (False, True):
            with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
                module(*qkv, is_causal=True, need_weights=flag)


FUNCTIONAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "separate": {"use_separate_proj_weight": True},
    "static_k": {"static": "k"},
    "static_kv": {"static": "kv", "mask": True},
    "static_kv_zero": {"static": "kv", "zero": True, "mask": True},
    "bias_kv_zero": {"bias_kv": True, "zero": True, "mask": True},
    "eval": {"training": False, "dropout_p": 0.5},
}


def functional(case: dict[str, Any], dtype: torch.dtype, need_weights: bool) -> dict[str, torch.Tensor]:
    """Output, weights and gradients of F.multi_head_attention_forward, called as its own users do."""
    E, H, B, L, S = 32, 2, 2, 5, 7
    generator = torch.Generator().manual_seed(1)

    def new(*shape: int) -> torch.Tensor:
        return (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    separate = case.get("use_separate_proj_weight", False)
    names = {
        "query": new(L, B, E),
        "key": new(S, B, E),
        "value": new(S, B, E),
        "in_proj_weight": None if separate else new(3 * E, E),
        "in_proj_bias": new(3 * E),
        "bias_k": new(1, 1, E) if "bias_kv" in case else None,
        "bias_v": new(1, 1, E) if "bias_kv" in case else None,
        "out_proj_weight": new(E, E),
        "out_proj_bias": new(E),
        **{f"{x}_proj_weight": new(E, E) if separate else None for x in "qkv"},
        **{f"static_{x}": new(B * H, S, E // H) if x in case.get("static", "") else None for x in "kv"},
        "attn_mask": new(L, S) if "mask" in case else None,
    }
    out, weights = F.multi_head_attention_forward(
        **names,
        embed_dim_to_check=E,
        num_heads=H,
        add_zero_attn="zero" in case,
        dropout_p=case.get("dropout_p", 0.0),
        training=case.get("training", True),
        use_separate_proj_weight=separate,
        need_weights=need_weights,
    )
    leaves = {name: x for name, x in names.items() if x is not None}
    loss = (out * new(*out.shape).detach()).sum()
    if weights is not None:
        loss = loss + (weights * new(*weights.shape).detach()).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    found = {"out": out.detach()} | ({} if weights is None else {"weights": weights.detach()})
    return found | {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_the_function_equals_pytorchs(name: str, need_weights: bool) -> None:
    case = FUNCTIONAL[name]
    exact = functional(case, torch.float64, need_weights)
    with fusemesh.accelerate(backend="reference"):
        modules.assert_equal(functional(case, torch.float64, need_weights), exact)
    for dtype in (torch.float32, torch.bfloat16):
        eager = functional(case, dtype, need_weights)
        with fusemesh.accelerate(backend="reference" if need_weights else "torch"):
            actual = functional(case, dtype, need_weights)
        for key, want in exact.items():
            assert (actual[key].shape, actual[key].dtype) == (eager[key].shape, eager[key].dtype)
            # Biases of keys have no gradient but rounding, in PyTorch as in ours.
            budget.check(f"{key} of {name}", actual[key], want, eager[key], absolute=want.abs() + 1)
    expected = {("attention_forward", "reference"): 3 if need_weights else 1}
    assert backends.call_counts() == expected | ({} if need_weights else {("attention_forward", "torch"): 2})


def test_weights_of_the_fused_path_in_inference() -> None:
    module = nn.MultiheadAttention(32, 2, batch_first=True, dtype=torch.float64).eval()
    x = torch.randn(3, 6, 32, dtype=torch.float64)
    padding = torch.arange(6) >= torch.tensor([6, 4, 5])[:, None]
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    heads = torch.rand(3 * 2, 6, 6) < 0.3
    heads[..., 0] = False
    with torch.no_grad():
        for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": heads}):
            masks_of_both = [masks, {**masks, "key_padding_mask": padding}]
            for given in masks_of_both:
                for form in FORMS.values():
                    want = module(x, x, x, **given, **form)
                    with fusemesh.accelerate(backend="reference"):
                        actual = module(x, x, x, **given, **form)
                    torch.testing.assert_close(actual, want, rtol=0, atol=1e-12)
        # The module gives it float masks; these are bool ones, of all three shapes.
        parameters = (module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
        for kind, mask in enumerate((causal, padding, heads.unflatten(0, (3, 2)))):
            arguments = (x, x, x, 32, 2, *parameters, mask, True, True, kind)
            want = torch._native_multi_head_attention(*arguments)
            with fusemesh.accelerate(backend="reference"):
                actual = torch._native_multi_head_attention(*arguments)
            torch.testing.assert_close(actual, want, rtol=0, atol=1e-12)
    assert routes() == {(NATIVE, "reference", ""): 27}
    assert backends.call_counts() == {("attention_forward", "reference"): 27}


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_without_keys_gets_zeros(need_weights: bool) -> None:
    module = nn.MultiheadAttention(32, 2, batch_first=True)
    x = torch.randn(2, 6, 32, requires_grad=True)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1] = True
    with fusemesh.accelerate(backend="reference"):
        out, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert out.isfinite().all() and torch.equal(out[1], module.out_proj.bias.expand(6, 32))
    assert weights is None or (weights[1] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.isfinite().all() and (gradient[1] == 0).all()
    # PyTorch's differ from each other.
    out, _ = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert out[1].isnan().all() if need_weights else torch.equal(out[1], module.out_proj.bias.expand(6, 32))


def test_dropped_weights_are_those_of_the_output() -> None:
    """With values of ones and projections of identity, each output is the sum of the weights that were not dropped."""
    module = nn.MultiheadAttention(16, 1, dropout=0.4, bias=False)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(16).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(16))
    q, k, v = torch.randn(9, 2, 16), torch.randn(11, 2, 16), torch.ones(11, 2, 16)
    with fusemesh.accelerate(backend="reference"):
        out, weights = module(q, k, v)
    assert weights is not None and (weights == 0).float().mean().item() > 0.2
    torch.testing.assert_close(out, weights.sum(-1).transpose(0, 1)[..., None].expand(-1, -1, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 16), (3, 5, 16), (2, 3, 5, 16), (2, 2, 3, 5, 16)], ids=len)
def test_scaled_dot_product_attention_in_the_dtypes_of_training(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The grid of fp64 is test_torch_sdpa.py's; here it is called under PyTorch's name, by auto."""
    tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    mask = torch.randn(5, 5, dtype=torch.float64)

    def run(to: torch.dtype, options: dict[str, Any]) -> list[torch.Tensor]:
        leaves = [x.to(dtype).to(to).requires_grad_() for x in tensors[:3]]
        given = {
            name: x.to(dtype).to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in options.items()
        }
        out = F.scaled_dot_product_attention(*leaves, **given)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(dtype).to(to))]

    cases: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"attn_mask": mask},
        {"attn_mask": mask > -1},
        {"scale": 0.5},
    ]
    for options in cases:
        exact, eager = run(torch.float64, options), run(dtype, options)
        with fusemesh.accelerate():
            actual = run(dtype, options)
        for name, have, want, near in zip(("out", "dq", "dk", "dv"), actual, exact, eager, strict=True):
            assert have.dtype == dtype and have.shape == near.shape
            budget.check(name, have, want, near, absolute=want.abs() + 1)
    assert backends.call_counts() == {
        (f"attention_{step}", AUTO): len(cases) for step in (["forward", "backward"] if AUTO == "cpu" else ["forward"])
    }
    assert routes() == {(SDPA, AUTO, ""): len(cases)}


def test_what_auto_leaves_to_pytorch_is_what_pytorch_gives_and_is_counted_with_the_reason() -> None:
    q, k, v = (torch.randn(2, 2, 6, 16) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool)
    module = nn.MultiheadAttention(32, 2)
    x = torch.randn(6, 2, 32)
    calls = [
        (
            lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=True),
            "refused: attn_mask, is_causal: expected",
        ),
        (lambda: module(x, x, x), "only the eager reference has attention weights (need_weights) here"),
        (lambda: torch.func.vmap(F.scaled_dot_product_attention)(q, k, v), "a transform of torch.func"),
    ]
    for call, reason in calls:
        reset_routes()
        torch.manual_seed(3)
        want = call()
        torch.manual_seed(3)
        with fusemesh.accelerate():
            actual = call()
        torch.testing.assert_close(actual, want, rtol=0, atol=0)
        (((function, backend, why), count),) = routes().items()
        assert (backend, count) == (None, 1) and why.startswith(reason) and function in (SDPA, MHA)
    assert backends.call_counts() == {}


def test_errors_of_pytorch_stay_pytorchs_and_a_named_backend_raises() -> None:
    q = torch.randn(2, 2, 6, 16)
    with fusemesh.accelerate(), pytest.raises(RuntimeError, match="Expected size for first two dimensions"):
        F.scaled_dot_product_attention(q, q[..., :8], q)
    with fusemesh.accelerate(), pytest.raises(TypeError):
        F.scaled_dot_product_attention(q, q, q, None, 0.0, False, 0.5)  # scale by position, which PyTorch refuses
    with fusemesh.accelerate(backend="torch"):
        with pytest.raises(ValueError, match="backend: expected a backend that can do this call"):
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        with pytest.raises(ValueError, match="return_lse"):
            nn.MultiheadAttention(32, 2)(*[torch.randn(6, 2, 32)] * 3)
    with (
        fusemesh.accelerate(backend="cpu"),
        pytest.raises(ValueError, match=r"one with a rule for gradients of torch\.func"),
    ):
        torch.func.grad(lambda q: F.scaled_dot_product_attention(q, q, q).sum())(q)
    assert routes() == {}


def test_autocast_gives_the_dtypes_that_pytorch_gives() -> None:
    module = nn.MultiheadAttention(32, 2)
    x = torch.randn(6, 2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        for form in FORMS.values():
            want, weights = module(x, x, x, **form)
            with fusemesh.accelerate(backend="reference"):
                out, found = module(x, x, x, **form)
            assert out.dtype == want.dtype == torch.bfloat16
            torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)
            if weights is not None:
                assert found.dtype == weights.dtype
                torch.testing.assert_close(found, weights, rtol=0.02, atol=0.02)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["plain", pytest.param("kdim_vdim", marks=pytest.mark.slow), "bias_kv_zero_attn"])
@pytest.mark.parametrize("form", ["none", "average", pytest.param("heads", marks=pytest.mark.slow)])
def test_triton_in_modules(name: str, form: str) -> None:
    """Head dims of 16, and of 8, which no kernel has; within the budget of PyTorch's module in fp32."""
    for heads in (4, 8) if name == "plain" else (4,):
        module = nn.MultiheadAttention(64, heads, **modules.CONSTRUCTORS[name])
        exact = nn.MultiheadAttention(64, heads, dtype=torch.float64, **modules.CONSTRUCTORS[name])
        exact.load_state_dict(module.state_dict())
        qkv = [x.detach().requires_grad_() for x in modules.inputs(module, "cross", torch.float32)]
        mask = torch.rand(modules.L, modules.S) < 0.4
        mask[:, 0] = False
        options = {"attn_mask": mask, **FORMS[form]}
        want = modules.everything(exact, [x.detach().double().requires_grad_() for x in qkv], **options)
        eager = modules.everything(module, qkv, **options)
        backends.reset_call_counts()
        with fusemesh.accelerate(backend="triton"):
            actual = modules.everything(module, qkv, **options)
        assert backends.call_counts() == {("attention_forward", "triton"): 1, ("attention_backward", "triton"): 1}
        for key in want:
            budget.check(f"{key}, {heads} heads", actual[key], want[key], eager[key], absolute=want[key].abs() + 1)
    assert math.isfinite(actual["out"].sum())
