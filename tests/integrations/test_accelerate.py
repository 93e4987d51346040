"""Layer: application. accelerate(), install(), uninstall(): what they replace, what they leave, what they put back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusemesh
from fusemesh.integrations.pytorch import functions as torch_functions
from fusemesh.integrations.pytorch import routes as torch_routes
from fusemesh.integrations.pytorch.routes import Route, reset_routes, routes
from fusemesh.kernels import backends
from tests.support.engine_required import AUTO

SDPA, MHA = "F.scaled_dot_product_attention", "F.multi_head_attention_forward"
NATIVE, LAYER = "torch._native_multi_head_attention", "torch._transformer_encoder_layer_fwd"
PLACES = [(namespace, name) for namespace, name, _ in torch_functions.REPLACEMENTS]
ORIGINALS = [getattr(namespace, name) for namespace, name in PLACES]


def functions() -> list[Any]:
    return [getattr(namespace, name) for namespace, name in PLACES]


@pytest.fixture(autouse=True)
def originals_before_and_after() -> Iterator[None]:
    assert functions() == ORIGINALS and torch.backends.mha.get_fastpath_enabled()
    backends.reset_call_counts()
    reset_routes()
    torch.manual_seed(0)
    yield
    assert functions() == ORIGINALS and torch.backends.mha.get_fastpath_enabled()
    assert torch_routes.shared_backend is None and torch_routes.own_backend.get() is None


def encoder(**options: Any) -> nn.TransformerEncoder:
    given = {"dropout": 0.0, "batch_first": True, "dim_feedforward": 48, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, **given), 2)


def attend() -> Route:
    """Where a call of F.scaled_dot_product_attention goes."""
    reset_routes()
    q = torch.randn(1, 2, 4, 16)
    F.scaled_dot_product_attention(q, q, q)
    (route,) = routes() or {Route(SDPA, None, "original"): 1}
    return route


def test_blocks_nest_and_end_in_exceptions() -> None:
    with fusemesh.accelerate(backend="reference"):
        assert not set(functions()) & set(ORIGINALS)
        outer = functions()
        with pytest.raises(KeyError), fusemesh.accelerate():
            assert attend().backend == AUTO
            raise KeyError
        assert functions() == outer and attend().backend == "reference"
        with fusemesh.use_backend("torch"):
            assert attend().backend == "reference"
    assert attend().reason == "original"


def test_installed_until_uninstalled() -> None:
    try:
        fusemesh.install(backend="reference")
        assert attend().backend == "reference"
        fusemesh.install()
        assert attend().backend == AUTO
        with fusemesh.use_backend("reference"):
            assert attend().backend == "reference"
        with fusemesh.accelerate(backend="reference"):
            fusemesh.uninstall()
            assert attend().backend == "reference"
        assert attend().reason == "original"
        fusemesh.install()
    finally:
        fusemesh.uninstall()
    fusemesh.uninstall()


def test_no_such_backend() -> None:
    for call in (fusemesh.install, lambda name: fusemesh.accelerate(name).__enter__()):
        with pytest.raises(ValueError, match=r"backend: expected one of .*received 'flash'"):
            call("flash")


def test_the_flag_of_the_fused_paths_is_left_alone() -> None:
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model, x = encoder().eval(), torch.randn(2, 5, 32)
        with fusemesh.accelerate(), torch.no_grad():
            model(x)
            assert routes() == {Route(SDPA, AUTO, ""): 2}
            torch.backends.mha.set_fastpath_enabled(True)
            model(x)
        assert routes() == {Route(SDPA, AUTO, ""): 2, Route(LAYER, AUTO, ""): 2}
        assert torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_function_that_others_put_over_ours_is_left_to_them() -> None:
    calls = []
    with fusemesh.accelerate():
        ours = F.scaled_dot_product_attention

        def theirs(*args: Any, **options: Any) -> Any:
            calls.append(args)
            return ours(*args, **options)

        F.scaled_dot_product_attention = theirs
        assert attend().backend == AUTO
    try:
        assert F.scaled_dot_product_attention is theirs and attend().reason == "original" and len(calls) == 2
        with fusemesh.accelerate():
            assert attend().backend == AUTO
        assert F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = ORIGINALS[0]


def test_each_thread_has_the_backend_of_its_own_block_and_others_the_last_ones() -> None:
    entered, leave = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    def first() -> None:
        with fusemesh.accelerate(backend="reference"):
            entered.set()
            leave.wait(30)
            found["first"] = attend().backend
        found["left"] = functions() != ORIGINALS

    def other() -> None:
        found.setdefault("other", []).append(attend().backend)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    entered.wait(30)
    with fusemesh.accelerate():  # opened later, ends later: not the order of a stack
        for _ in range(2):
            threads.append(threading.Thread(target=other))
            threads[-1].start()
            threads[-1].join(30)
            leave.set()
            threads[0].join(30)
        assert attend().backend == AUTO
    assert found == {"first": "reference", "left": True, "other": [AUTO, AUTO]}


def test_many_threads_at_once() -> None:
    failures: list[Any] = []

    def work(backend: str) -> None:
        q = torch.randn(1, 2, 4, 16)
        for _ in range(30):
            with fusemesh.accelerate(backend=backend):
                before = torch_routes.active_backend()
                F.scaled_dot_product_attention(q, q, q)
                if before != backend:
                    failures.append(before)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "torch") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == [] and functions() == ORIGINALS


INFERENCE: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "norm_first": {"norm_first": True},
    "no_bias": {"bias": False},
    "odd_heads": {"nhead": 1},
    "seq_first": {"batch_first": False},
    "elu": {"activation": F.elu},
    "not_nested": {"enable_nested_tensor": False},
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("name", INFERENCE)
def test_an_encoder_in_inference_gives_what_pytorch_gives(name: str) -> None:
    options = dict(INFERENCE[name])
    nested = options.pop("enable_nested_tensor", True)
    heads = options.pop("nhead", 2)
    layer = nn.TransformerEncoderLayer(
        32, heads, **{"dim_feedforward": 48, "batch_first": True, **options}, dtype=torch.float64
    )
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32, dtype=torch.float64), enable_nested_tensor=nested).eval()
    x = torch.randn(3, 6, 32, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    padding = torch.arange(6) >= torch.tensor([6, 3, 5])[:, None]
    if not layer.self_attn.batch_first:
        x = x.transpose(0, 1)
    cases: list[dict[str, Any]] = [
        {},
        {"mask": causal},
        {"mask": causal, "is_causal": True},
        {"mask": causal.isinf()},
        {"src_key_padding_mask": padding},
        {"src_key_padding_mask": padding, "mask": causal.isinf()},
    ]
    for case in cases:
        with torch.no_grad():
            want = model(x, **case)
            with fusemesh.accelerate():
                actual = model(x, **case)
        # The padding's rows as well: zeros before the last norm, where PyTorch's encoder takes it out.
        torch.testing.assert_close(actual, want, rtol=0, atol=1e-12)
        assert actual.stride() == want.stride()
    fused = name in ("plain", "gelu", "norm_first", "not_nested")
    assert sum(routes().values()) == 2 * len(cases) and {route.backend for route in routes()} == {"torch"}
    # PyTorch may take the fused path of the attention alone, where it does not take the layer's.
    assert {route.function for route in routes()} <= ({LAYER} if fused else {SDPA, NATIVE})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors() -> None:
    model = encoder().eval()
    attention = model.layers[0].self_attn
    parts = [torch.randn(n, 32) for n in (4, 1, 6)]
    x = torch.nested.nested_tensor(parts)
    with torch.no_grad():
        want, (weighed, _) = model(x), attention(x, x, x, need_weights=False)
        with fusemesh.accelerate():
            actual, (found, _) = model(x), attention(x, x, x, need_weights=False)
        for a, b in ((actual, want), (found, weighed)):
            assert a.is_nested
            for part, expected in zip(a.unbind(), b.unbind(), strict=True):
                torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)
        assert routes() == {Route(LAYER, AUTO, ""): 2, Route(NATIVE, AUTO, ""): 1}
        # Strided ones reach F.scaled_dot_product_attention, too; the op has only jagged ones.
        q = torch.nested.nested_tensor([torch.randn(2, n, 16) for n in (4, 3)])
        want = F.scaled_dot_product_attention(q, q, q)
        with fusemesh.accelerate():
            actual = F.scaled_dot_product_attention(q, q, q)
        torch.testing.assert_close(actual.unbind(), want.unbind())
        sequences = [torch.randn(n, 2, 16) for n in (4, 3)]
        jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
        for is_causal in (False, True):
            heads_first = [part.transpose(0, 1) for part in sequences]
            alone = [F.scaled_dot_product_attention(x, x, x, is_causal=is_causal).transpose(0, 1) for x in heads_first]
            found = []
            with fusemesh.accelerate(backend="reference"):
                found.append(F.scaled_dot_product_attention(jagged, jagged, jagged, is_causal=is_causal))
            if not is_causal:  # which PyTorch refuses on CPU
                with fusemesh.accelerate():
                    found.append(F.scaled_dot_product_attention(jagged, jagged, jagged))
            for actual in found:
                torch.testing.assert_close(actual.transpose(1, 2).values(), torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert ("attention_varlen_forward", "reference") in backends.call_counts()


def test_a_float_mask_is_added_in_inference_as_it_is_in_training() -> None:
    model, x, mask = encoder().eval(), torch.randn(2, 5, 32), torch.randn(5, 5)
    want = model(x, mask=mask)  # with gradients: not the fused path
    with torch.no_grad():
        with fusemesh.accelerate():
            torch.testing.assert_close(model(x, mask=mask), want, rtol=1e-4, atol=1e-5)
        # What PyTorch's fused path makes of it, for the day when this is no longer so.
        assert (model(x, mask=mask) - want).abs().nan_to_num(nan=1.0).max() > 0.01


def test_hooks_are_called_and_subclasses_work() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, query: torch.Tensor, *args: Any, **options: Any) -> Any:
            out, weights = super().forward(2 * query, *args, **options)
            return 2 * out, weights

    model = encoder(batch_first=True).eval()
    model.layers[1].self_attn = copy.deepcopy(model.layers[1].self_attn)
    model.layers[1].self_attn.__class__ = Doubled
    seen: list[str] = []
    hooked = model.layers[0].self_attn
    hooked.register_forward_pre_hook(lambda module, args: seen.append("before"))
    hooked.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))
    model.layers[1].register_forward_hook(lambda module, args, output: seen.append("after"))
    x = torch.randn(2, 5, 32)
    for grad in (torch.enable_grad, torch.no_grad):
        with grad():
            want = model(x)
            seen.clear()
            with fusemesh.accelerate():
                torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
            assert seen == ["before", "after"]
    assert sum(routes().values()) == 4 and {route.backend for route in routes()} == {AUTO}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_scripted_and_quantised_modules_stay_what_they_are() -> None:
    model, x = encoder().eval(), torch.randn(2, 5, 32)
    decoder = nn.TransformerDecoderLayer(32, 2, 48, batch_first=True).eval()
    quantised = torch.ao.quantization.quantize_dynamic(decoder, {nn.Linear}, torch.qint8)
    scripted = torch.jit.script(nn.MultiheadAttention(32, 2, batch_first=True))
    with torch.no_grad():
        wants = model(x), quantised(x, x), scripted(x, x, x)[0]
        with fusemesh.accelerate():
            found = model(x), quantised(x, x), scripted(x, x, x)[0]
    for actual, want in zip(found, wants, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-5)
    # Two layers of the encoder, two attentions of the decoder, and no scripted one.
    assert sum(routes().values()) == 4
    reset_routes()
    with fusemesh.accelerate(), torch.no_grad():
        traced = torch.jit.trace(decoder, (x, x), check_trace=False)
        assert {route.reason for route in routes()} == {"torch.jit.trace"}
        with pytest.raises(Exception, match="can't take variable number of arguments"):
            torch.jit.script(nn.MultiheadAttention(32, 2))
    torch.testing.assert_close(traced(x, x), decoder(x, x))


def test_tensor_subclasses_go_to_pytorch() -> None:
    class Tagged(torch.Tensor):
        pass

    q = torch.randn(1, 2, 4, 16)
    with fusemesh.accelerate():
        out = F.scaled_dot_product_attention(q.as_subclass(Tagged), q, q)
    assert isinstance(out, Tagged)
    assert routes() == {Route(SDPA, None, "a tensor subclass (Tagged)"): 1}


@pytest.mark.parametrize("training", [True, False], ids=["sdpa", "fused_layer"])
def test_forward_mode_is_the_references(training: bool) -> None:
    """PyTorch's kernels have no forward-mode derivatives, its formula has."""
    x, tangent = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    model = encoder().train(training).requires_grad_(False)
    with fusemesh.accelerate():
        have = torch.func.jvp(model, (x,), (tangent,))[1]
    name = SDPA if training else "torch._transformer_encoder_layer_fwd"
    assert set(routes()) == {Route(name, "reference", "")}
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        want = torch.func.jvp(model.train(), (x,), (tangent,))[1]
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_a_checkpointed_layer_is_computed_again_by_the_same_backend() -> None:
    model, x = encoder(), torch.randn(2, 5, 32, requires_grad=True)
    want = torch.autograd.grad(model(x).sum(), x)[0]
    with fusemesh.accelerate():
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        (actual,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-6)
    assert routes() == {Route(SDPA, AUTO, ""): 4}


def test_second_derivatives_which_pytorchs_kernels_do_not_have() -> None:
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)

    def function(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    with fusemesh.accelerate():
        assert torch.autograd.gradgradcheck(function, (q,))


@pytest.mark.interpreter
@pytest.mark.parametrize("train", [pytest.param(True, marks=pytest.mark.slow), False], ids=["train", "eval"])
def test_a_compiled_graph_holds_the_kernels(train: bool) -> None:
    model = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=True).train(train)
    x = torch.randn(2, 5, 32)
    attention = nn.MultiheadAttention(32, 2, batch_first=True).train(train)

    def run(x: torch.Tensor) -> torch.Tensor:
        out, weights = attention(x, x, x)
        return model(x).square().sum() + out.sum() + weights.square().sum()

    parameters = [*model.parameters(), *attention.parameters()]
    with torch.set_grad_enabled(train):
        want = run(x)
        gradients = torch.autograd.grad(want, parameters) if train else ()
        torch._dynamo.reset()
        with fusemesh.accelerate(backend="triton"):
            compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
            for _ in range(2):
                backends.reset_call_counts()
                actual = compiled(x)
                torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-4)
                found = torch.autograd.grad(actual, parameters) if train else ()
                torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-3)
    # The layer, and the attention with weights: what ran in the last step, not what was traced.
    forward, backward = {("attention_forward", "triton"): 2}, {("attention_backward", "triton"): 2}
    assert backends.call_counts() == (forward | backward if train else forward)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compiled_into_one_graph_inside_and_again_outside(train: bool) -> None:
    model = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=True).train(train)
    x = torch.randn(2, 5, 32)
    with torch.set_grad_enabled(train):
        want = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with fusemesh.accelerate(backend="reference"):
            torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
            if train:
                gradients = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
                plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
                torch.testing.assert_close(gradients, plain, rtol=1e-3, atol=1e-4)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
