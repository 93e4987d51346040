"""Layer: one process, Triton's interpreter. What rounding takes from the output, kept for the backward's delta."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from fusemesh import attention_backward, attention_forward, flash_attention, flash_attention_varlen, merge_attention
from fusemesh.kernels.backend_record import records
from fusemesh.kernels.measure.cases import AttentionCase

interpreted = pytest.param("triton", marks=pytest.mark.interpreter)
KEEPING = [name for name, record in records().items() if record.keeps_rest and name != "triton"]
BACKENDS = [*KEEPING, interpreted]
FUSED = [*(name for name in KEEPING if name != "reference"), interpreted]
HALF = (torch.bfloat16, torch.float16)


def drawn(dtype: torch.dtype, sq: int = 19, sk: int = 40, heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and do; v has a mean, of which the rounding of out is most of delta's error."""
    generator = torch.Generator().manual_seed(seed)
    q, do = (torch.randn(1, heads, sq, 32, generator=generator) for _ in range(2))
    k, v = (torch.randn(1, heads, sk, 32, generator=generator) for _ in range(2))
    return [x.to(dtype) for x in (q, k, v + 1, do)]


def errors(found: Any, want: Any) -> list[float]:
    """Errors relative to the norm."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, want, strict=True)]


def wanted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> list[torch.Tensor]:
    """dq and dk in fp64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    p = torch.softmax(leaves[0] @ leaves[1].mT / q.shape[3] ** 0.5, -1)
    return list(torch.autograd.grad(p @ leaves[2], leaves[:2], do.double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_out_and_its_rest_are_the_output_before_rounding(dtype: torch.dtype, backend: str) -> None:
    q, k, v, _ = drawn(dtype)
    exact = torch.softmax(q.double() @ k.double().mT / 32**0.5, -1) @ v.double()
    out, lse, rest = attention_forward(q, k, v, return_rest=True, backend=backend)
    plain, plain_lse = attention_forward(q, k, v, backend=backend)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
    assert rest.dtype == dtype and rest.stride() == out.stride()
    ulp = torch.finfo(dtype).eps * out.float().abs()
    assert (rest.float().abs() <= ulp / 2 + 1e-7).all() and rest.any()
    alone = (out.double() - exact).abs().mean()
    assert (out.double() + rest.double() - exact).abs().mean() < 0.75 * alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_gradients_of_saturated_rows(dtype: torch.dtype, backend: str) -> None:
    """Without the rest dq and dk are off by twice as much at logits this large; with it no more than at small ones."""
    q, k, v, do = drawn(dtype, 64, 64)
    q = q * 8
    out, lse, rest = attention_forward(q, k, v, return_rest=True, backend=backend)
    assert (rest is None) == (dtype == torch.float32)
    found = [attention_backward(do, q, k, v, out, lse, out_rest=x, backend=backend)[:2] for x in (None, rest)]
    without, with_rest = (errors(x, wanted(q, k, v, do)) for x in found)
    if rest is None:
        assert without == with_rest
        return
    assert all(a < 0.75 * b for a, b in zip(with_rest, without, strict=True))
    if backend != "reference":  # whose autograd goes through the formula
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        by_autograd = torch.autograd.grad(flash_attention(*leaves, backend=backend), leaves[:2], do)
        assert all(torch.equal(a, b) for a, b in zip(by_autograd, found[1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.0050), (torch.float16, 0.0006)], ids=str)
def test_errors_at_every_size_of_logits(dtype: torch.dtype, most: float, backend: str) -> None:
    """Of out alone they grow with the logits, in bf16 to 0.0070."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 2, 256, 64, generator=generator) for _ in range(4))
    for scale in (1, 2, 4, 8):
        x = [part.to(dtype) for part in (q * scale, k, v + 1)]
        leaves = [part.clone().requires_grad_() for part in x]
        found = torch.autograd.grad(flash_attention(*leaves, backend=backend), leaves[:2], do.to(dtype))
        assert max(errors(found, wanted(*x, do.to(dtype)))) <= most, scale


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_packed_sequences_take_their_own_rows(dtype: torch.dtype, backend: str) -> None:
    q, k, v, do = drawn(dtype, 40, 40)
    whole = [x.clone().requires_grad_() for x in (q * 8, k, v)]
    parts = [slice(0, 13), slice(13, 33)]  # and 7 rows of padding
    wants = []
    for part in parts:
        leaves = [x.detach()[:, :, part].requires_grad_() for x in whole]
        wants.append(torch.autograd.grad(flash_attention(*leaves, backend=backend), leaves, do[:, :, part]))
    rows = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in whole]
    cu = torch.tensor([0, 13, 33])
    out = flash_attention_varlen(*rows, cu, cu, 20, 20, backend=backend)
    found = torch.autograd.grad(out, rows, do[0].transpose(0, 1))
    for x, *want in zip(found, *wants, strict=True):
        for part, of_part in zip(parts, want, strict=True):
            torch.testing.assert_close(x[part].transpose(0, 1)[None], of_part, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_ring_merge_their_rests(backend: str) -> None:
    q, k, v, do = drawn(torch.bfloat16, 64, 64)
    q = q * 8
    parts = [
        attention_forward(q, k[:, :, keys], v[:, :, keys], return_rest=True, backend=backend)
        for keys in (slice(0, 30), slice(30, 64))
    ]
    outs, lses, rests = zip(*parts, strict=True)
    out, lse, rest = merge_attention(outs, lses, out_rests=rests)
    exact = torch.softmax(q.double() @ k.double().mT / 32**0.5, -1) @ v.double()
    assert (out.double() + rest.double() - exact).abs().mean() < 0.75 * (out.double() - exact).abs().mean()
    plain = merge_attention(outs, lses)
    assert len(plain) == 2 and torch.equal(lse, plain[1])
    found = [
        errors(attention_backward(do, q, k, v, out, lse, out_rest=x, backend=backend)[:2], wanted(q, k, v, do))
        for x in (None, rest)
    ]
    assert all(a < 0.75 * b for a, b in zip(found[1], found[0], strict=True))


def test_merging_without_a_rest_of_each_part() -> None:
    out, lse = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5)
    half = out.bfloat16()
    merged, _, rest = merge_attention([half, half], [lse, lse], out_rests=[None, torch.zeros_like(half)])
    assert rest.dtype == torch.bfloat16 and torch.equal(merged, half)
    assert merge_attention([out], [lse], out_rests=[None])[2] is None
    for wrong, message in (([None], "a tuple or list of 2"), ([None, lse.bfloat16()], "shape .1, 2, 5, 8.")):
        with pytest.raises(ValueError, match=rf"out_rests.*{message}"):
            merge_attention([half, half], [lse, lse], out_rests=wrong)


@pytest.mark.interpreter
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_it_is_kept_where_a_backward_will_read_it_alone(packed: bool) -> None:
    from fusemesh.kernels.attention.gpu import dense, varlen

    module = varlen if packed else dense
    asked: list[bool] = []
    original = module.forward

    def forward(*arguments: Any, keep_rest: bool = False) -> Any:
        asked.append(keep_rest)
        return original(*arguments, keep_rest=keep_rest)

    def call(dtype: torch.dtype, requires_grad: bool) -> None:
        q, k, v, _ = drawn(dtype, 19, 19)
        if packed:
            cu = torch.tensor([0, 19])
            rows = [x[0].transpose(0, 1).requires_grad_(requires_grad) for x in (q, k, v)]
            flash_attention_varlen(*rows, cu, cu, 19, 19, backend="triton")
        else:
            flash_attention(*(x.requires_grad_(requires_grad) for x in (q, k, v)), backend="triton")

    with mock.patch.object(module, "forward", forward):
        call(torch.bfloat16, True)
        call(torch.bfloat16, False)
        call(torch.float32, True)
        with torch.no_grad():
            call(torch.float16, True)
    assert asked == [True, False, False, False]


@pytest.mark.interpreter
def test_a_rest_that_is_lost_or_of_other_rows_is_outside_the_budget() -> None:
    """Where the softmax is constant, and dq therefore 0."""
    from fusemesh.kernels.attention.gpu import dense

    case = AttentionCase(dtype="bf16", B=1, H=1, Hkv=1, Sq=19, Sk=1, D=64, Dv=64, dropout=0.2)
    x = case.inputs()
    want = case.expected(x)
    original = dense.backward

    def run(change: Any) -> None:
        def backward(*arguments: Any, out_rest: Any, **options: Any) -> Any:
            return original(*arguments, out_rest=change(out_rest), **options)

        with mock.patch.object(dense, "backward", backward):
            case.check(case.compute(x, "triton"), want)

    run(lambda rest: rest)
    for change in (lambda rest: None, lambda rest: rest.roll(1, 2), lambda rest: -rest):
        with pytest.raises(AssertionError, match="outside the error budget: dq"):
            run(change)


def test_where_auto_falls_back_to_a_backend_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's results are as its fake promises, and the gradients those of the rounded output."""
    from fusemesh.kernels import backends
    from fusemesh.kernels.attention.call.options import Call
    from fusemesh.kernels.attention.call.spec import AttentionSpec
    from fusemesh.kernels.attention.dense.ops import FIELDS
    from fusemesh.kernels.proof import first_use

    monkeypatch.setattr(first_use, "run", lambda call, by_name: None)
    q, k, v, do = drawn(torch.bfloat16)
    values = FIELDS.pack(Call(AttentionSpec(0.2)))
    rests = {}
    for name in ("torch", "reference"):
        monkeypatch.setattr(backends, "instead_of", lambda without, request, name=name: records()[name])
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _, rest = torch.ops.fusemesh.attention_forward(*leaves, *values, "auto", keep_rest=True)
        assert rest.shape == out.shape and rest.stride() == out.stride() and not rest.requires_grad
        found = torch.autograd.grad(out, leaves, do)
        assert all(x.isfinite().all() and x.any() for x in found)
        rests[name] = rest
    assert not rests["torch"].any() and rests["reference"].any()


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("backend", [interpreted])
def test_compiled_and_eager_training_give_equal_bits(backend: str, packed: bool) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        if packed:
            cu = torch.tensor([0, 5, 19])
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            return flash_attention_varlen(q, k, v, cu, cu, 14, 14, backend=backend)
        return flash_attention(q, k, v, backend=backend)

    q, k, v, _ = drawn(torch.bfloat16, 19, 19)
    found = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q * 8, k, v)]
        out = function(*leaves)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", [interpreted])
def test_gradients_of_gradients_and_of_many_outputs_at_once(backend: str) -> None:
    q, k, v, do = drawn(torch.bfloat16, 9, 9)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = flash_attention(*leaves, backend=backend)
    first = torch.autograd.grad(out, leaves, do, create_graph=True)
    second = torch.autograd.grad(sum(x.float().square().sum() for x in first), leaves)
    assert all(x.isfinite().all() and x.any() for x in second)
    out = flash_attention(*leaves, backend=backend)
    many = torch.autograd.grad(out, leaves, torch.stack([do, 2 * do]), is_grads_batched=True)
    assert all(torch.equal(x[0], one.detach()) for x, one in zip(many, first, strict=True))
    mapped = torch.func.vmap(lambda x: flash_attention(x, leaves[1], leaves[2], backend=backend))
    pair = torch.autograd.grad(mapped(torch.stack([leaves[0], leaves[0]]))[0], leaves[:1], do)
    assert torch.equal(pair[0], first[0].detach())
