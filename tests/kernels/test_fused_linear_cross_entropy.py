"""Layer: kernels and distributed. The head's product and the cross entropy in one, against the whole logits in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.kernels.testing import budget
from fusemesh.kernels.vocab_loss import chunked, reference
from fusemesh.kernels.vocab_loss.linear import fused_linear_cross_entropy
from tests.support.ranks import parallel as parallel_ranks

ROWS, FEATURES, VOCABULARY = (3, 7), 24, 333
OPTIONS = list(itertools.product((False, True), (1.0, 0.25), (None, 3.0)))


class Call:
    """A head, its input and targets, of which some are ignored; computed by ours and by the definition."""

    def __init__(self, dtype: torch.dtype, has_bias: bool = False, scale: float = 1.0, softcap: float | None = None):
        torch.manual_seed(0)
        self.h, self.weight, self.bias = (torch.randn(*shape, dtype=dtype) for shape in self.shapes)
        self.targets = torch.randint(0, VOCABULARY, ROWS)
        self.targets[0, :4] = -100
        self.targets[1, 0], self.targets[1, 1] = 0, VOCABULARY - 1
        self.has_bias, self.scale, self.softcap = has_bias, scale, softcap
        self.dloss = torch.randn(ROWS, dtype=torch.float64)

    shapes = ((*ROWS, FEATURES), (VOCABULARY, FEATURES), (VOCABULARY,))

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [self.h, self.weight, *([self.bias] if self.has_bias else [])]

    def ours(self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return fused_linear_cross_entropy(h, weight, self.targets, bias, scale=self.scale, softcap=self.softcap)

    def plain(self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        z = self.scale * torch.nn.functional.linear(h, weight, bias)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return reference.cross_entropy(z, self.targets)

    def results(self, function: Any, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """The loss and the gradients of all inputs."""
        inputs = [x.to(dtype or x.dtype, copy=True).requires_grad_() for x in self.inputs]
        loss = function(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs, self.dloss.to(loss.dtype))]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one ragged."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)


@pytest.mark.parametrize(("has_bias", "scale", "softcap"), OPTIONS)
def test_fp64(has_bias: bool, scale: float, softcap: float | None) -> None:
    call = Call(torch.float64, has_bias, scale, softcap)
    for found, exact in zip(call.results(call.ours), call.results(call.plain), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("has_bias", "scale", "softcap"), [OPTIONS[0], OPTIONS[-1]])
def test_narrow_dtypes(dtype: torch.dtype, has_bias: bool, scale: float, softcap: float | None) -> None:
    """The loss keeps the error budget of fp32, a gradient is rounded once; bf16 is no worse than PyTorch's."""
    call = Call(dtype, has_bias, scale, softcap)
    found, exact = call.results(call.ours), call.results(call.plain, torch.float64)
    plain = call.results(call.plain, dtype if dtype == torch.bfloat16 else torch.float32)
    for name, ours, right, eager in zip(("loss", "dh", "dweight", "dbias"), found, exact, plain, strict=False):
        assert ours.dtype == (torch.float32 if name == "loss" else dtype)
        budget.check(name, ours, right, eager.to(ours.dtype), dtype=ours.dtype)


def test_far_from_zero() -> None:
    """Logits around 3000 neither overflow nor lose the loss's digits."""
    call = Call(torch.float32)
    call.h[..., 0], call.weight[:, 0] = 100.0, 30.0
    found, exact = call.results(call.ours), call.results(call.plain, torch.float64)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0, atol=3000 * 2e-6)


def test_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(torch.float64)
    small = call.results(call.ours)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2**30)
    for found, whole in zip(small, call.results(call.ours), strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-13, atol=1e-14)


class Largest(TorchDispatchMode):
    """The most elements of a tensor, and rows of a product, inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        if function is torch.ops.aten.mm.default and args[0].shape[1] == FEATURES:
            self.rows = max(self.rows, args[0].shape[0])
        return found


def test_the_logits_are_never_whole_and_ignored_rows_are_left_out() -> None:
    call = Call(torch.float32)
    call.targets = torch.full((40, 50), -100)
    call.targets[0, :30] = 7
    call.h, call.dloss = torch.randn(40, 50, FEATURES), torch.ones(40, 50)
    with Largest() as seen:
        call.results(call.ours)
    assert seen.rows == 30
    assert seen.elements == call.h.numel()  # 2000 x 24; the logits would be 2000 x 333


def test_nothing_counts() -> None:
    call = Call(torch.float32)
    call.targets = torch.full_like(call.targets, -100)
    assert not any(x.any() for x in call.results(call.ours))
    call.targets, call.h, call.dloss = call.targets[:0], call.h[:0], call.dloss[:0]
    loss, dh, dweight = call.results(call.ours)
    assert loss.shape == (0, 7) and dh.shape == (0, 7, FEATURES) and not dweight.any()


def test_gradients_that_are_not_wanted() -> None:
    call = Call(torch.float64, True)
    exact = call.results(call.plain)
    for wanted in itertools.product((False, True), repeat=3):
        inputs = [x.clone().requires_grad_(want) for x, want in zip(call.inputs, wanted, strict=True)]
        loss = call.ours(*inputs)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward(call.dloss)
        for x, want, gradient in zip(inputs, wanted, exact[1:], strict=True):
            if want:
                torch.testing.assert_close(x.grad, gradient, rtol=1e-12, atol=1e-14)
            else:
                assert x.grad is None


def test_under_transforms_of_torch_func() -> None:
    call = Call(torch.float64, True, 0.5, 3.0)
    exact = call.results(call.plain)[1:]
    found = torch.func.grad(lambda *x: (call.ours(*x) * call.dloss).sum(), (0, 1, 2))(*call.inputs)
    for one, right in zip(found, exact, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-14)


def test_under_autocast() -> None:
    call = Call(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = call.ours(*call.inputs)
    half = Call(torch.float32)
    half.h, half.weight = half.h.bfloat16(), half.weight.bfloat16()
    assert torch.equal(loss, half.ours(*half.inputs))


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("vocabulary", [101, 5])
def test_split_over_ranks(rank_pool: RankPool, vocabulary: int, ranks: int) -> None:
    """5 ids on 4 ranks leave the last rank none."""
    for found in rank_pool.run(parallel_ranks.fused_linear_loss, vocabulary, ranks=ranks):
        for name in ("loss", "dh", "dweight", "dbias"):
            torch.testing.assert_close(found[name], found[f"exact {name}"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets: expected shape \(2,\).*received \(3,\)"),
        ({"targets": torch.zeros(2)}, "targets: expected int64 or int32.*float32"),
        ({"h": torch.zeros(2, 4, dtype=torch.long)}, "h: expected a floating dtype.*int64"),
        ({"weight": torch.zeros(9, 5)}, r"weight: expected \[V, 4\].*\(9, 5\)"),
        ({"weight": torch.zeros(9, 4).double()}, "weight: .*float32.*float64"),
        ({"bias": torch.zeros(8)}, r"bias: expected \[9\].*\(8,\)"),
        ({"softcap": 0.0}, "softcap: .*received 0.0"),
        ({"scale": float("nan")}, "scale: .*received nan"),
        ({"vocab_start": -1}, "vocab_start: .*received -1"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    call = {"h": torch.zeros(2, 4), "weight": torch.zeros(9, 4), "targets": torch.zeros(2, dtype=torch.long), **change}
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**call)
