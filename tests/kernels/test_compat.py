"""Floor 1: each private name of torch and triton is there and behaves as the floor relies on.

A failure names what is gone; ``fusemesh.kernels.compat.PRIVATE`` says what it was for and what to do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jvp, vmap
from torch.nn import functional as F

from fusemesh.kernels import compat
from fusemesh.kernels.attention.dense.module import MultiheadAttention
from tests.support.private_names import ROOT, private_names

KERNELS = ROOT / "kernels"


def test_private_names_stand_in_compat_alone_and_in_its_table() -> None:
    found = private_names(KERNELS)
    assert [use for use in found if use.file != "compat.py"] == []
    named = {use.name for use in found}
    others = {"._LangPatchScope", "triton.language.core.is_builtin", "torch._C.DispatchKey.AutogradFunctionality"}
    unexplained = {name for name in named - others if not any(known in name for known in compat.PRIVATE)}
    assert named and unexplained == set()


def test_torch_compile_takes_a_marked_result_as_a_constant() -> None:
    calls = []

    def answer(x: int) -> int:
        calls.append(len(repr(torch)) + id(calls))  # which cannot be traced
        return x + 1

    compat.assume_constant_result(answer)
    f = torch.compile(lambda x: x * answer(2), fullgraph=True, backend="eager")
    assert torch.equal(f(torch.ones(2)), torch.full((2,), 3.0)) and calls


def test_the_kernel_is_not_the_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 3, 8)
    want = F.scaled_dot_product_attention(q, q, q)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    assert torch.equal(compat.scaled_dot_product_attention(q, q, q, None, 0.0, False), want)


def test_autograd_records_inside_an_op() -> None:
    library = torch.library.Library("fusemesh_test", "FRAGMENT")
    library.define("derivative(Tensor x) -> Tensor")

    def derivative(x: torch.Tensor) -> torch.Tensor:
        with compat.recording(), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad((leaf**3).sum(), leaf)[0]

    library.impl("derivative", derivative, "CompositeExplicitAutograd")
    torch.library.register_autograd("fusemesh_test::derivative", lambda ctx, g: g, lib=library)
    x = torch.full((2,), 2.0, requires_grad=True)
    assert torch.equal(torch.ops.fusemesh_test.derivative(x), torch.full((2,), 12.0))


def test_jagged_tensors() -> None:
    parts = [torch.randn(n, 2, 4) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert compat.ragged_dim(x) == 1 and compat.ragged_dim(x.transpose(1, 2)) == 2
    fresh = torch.nested.nested_tensor_from_jagged(x.values(), x.offsets().clone())
    assert not compat.longest_is_known(fresh)
    assert compat.longest_of(fresh) == 5 and compat.longest_is_known(fresh)
    known = torch.nested.nested_tensor_from_jagged(x.values(), x.offsets().clone(), max_seqlen=7)
    assert compat.longest_is_known(known) and compat.longest_of(known) == 7


def test_transforms_have_names() -> None:
    seen: list[tuple[str, ...]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.transforms())
        return x.sum()

    x = torch.ones(2, 2)
    look(x)
    vmap(look)(x)
    grad(look)(x)
    jvp(look, (x,), (x,))
    functionalize(look)(x)
    hessian(look)(x)
    with forward_ad.dual_level():
        look(x)
    look(x)
    names = ((), ("vmap",), ("grad",), ("jvp",), (), ("vmap", "grad", "jvp"), ("jvp",), ())
    assert tuple(seen) == names


def test_what_the_wrappers_of_transforms_hide() -> None:
    found: list[tuple[bool, bool, bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append((x.requires_grad, compat.requires_grad(x), compat.is_mapped(x)))
        return x.sum()

    x = torch.ones(2, 2)
    vmap(look)(x)
    vmap(look)(x.clone().requires_grad_())
    grad(lambda y: vmap(look)(y).sum())(x)
    grad(look)(x)
    assert found == [(False, False, True), (False, True, True), (False, True, True), (True, True, False)]


def test_the_older_vmap_is_taken_apart() -> None:
    seen: list[Any] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            samples = compat.samples_of(dy, compat.older_vmap_level())
            seen.append((compat.older_vmap_level(), samples))
            return dy if samples is None else compat.as_mapped(2 * samples, 1)

    x = torch.ones(3, requires_grad=True)
    many = torch.arange(6.0).reshape(2, 3)
    (found,) = torch.autograd.grad(Double.apply(x), x, many, is_grads_batched=True)
    assert torch.equal(found, 2 * many) and seen[0][0] == 1 and torch.equal(seen[0][1], many)
    Double.apply(x).sum().backward()
    assert seen[1] == (0, None)


def test_encoder_layers_call_marked_modules_in_inference() -> None:
    """A layer goes past PyTorch's own module, and calls ours, which is marked."""
    x, seen = torch.randn(2, 3, 8), []
    for attention in (nn.MultiheadAttention(8, 2, batch_first=True), MultiheadAttention(8, 2, batch_first=True)):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        layer.self_attn = attention  # type: ignore[assignment]
        calls = []
        original = attention.forward
        attention.forward = lambda *a, original=original, calls=calls, **k: calls.append(1) or original(*a, **k)
        with torch.inference_mode():
            layer.eval()(x)
        seen.append(bool(calls))
    assert seen == [False, True]


@pytest.mark.aot
def test_jit_functions_have_keys_and_the_driver_can_be_named() -> None:
    """That a launch compiles without starting is what every test of machine code shows (test_aot.py)."""
    from triton.runtime import driver

    from fusemesh.kernels.attention.gpu.device import mods

    keys = {compat.source_key(function) for function in (mods.softcap, mods.alibi)}
    assert len(keys) == 2 and all(len(key) > 16 for key in keys), keys
    named = SimpleNamespace(get_current_device=lambda: "named")
    before = driver._active
    with compat.driver(named):
        assert driver.active.get_current_device() == "named"
        with compat.driver(SimpleNamespace(get_current_device=lambda: "inner")):
            assert driver.active.get_current_device() == "inner"
        assert driver.active.get_current_device() == "named"
    assert driver._active is before


@pytest.mark.interpreter
def test_the_interpreter_has_the_parts_that_are_replaced() -> None:
    parts = compat.interpreter()
    for name in (parts.dot, parts.cast, parts.fp_to_fp):
        assert callable(getattr(parts.builder_class, name)), name
    for name in (parts.numpy_dtype, parts.patch_lang):
        assert callable(getattr(parts.module, name)), name
    assert isinstance(parts.builder, parts.builder_class)
    assert parts.lang_scope() is not None
    import triton.language as tl

    assert parts.is_builtin(tl.load) and not parts.is_builtin(print)
