"""Layer: one process, CPU; the kernels in Triton's interpreter and compiled ahead of time. Packed sequences.

The reference is compared with a loop of fixed-length calls, the kernels with fp64 by the error budget. Sequences of no
queries, no keys and one query are among them, and rows of no sequence, which hold NaN, before, after.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fusemesh import Origin, flash_attention, flash_attention_varlen
from fusemesh.kernels import aot, backends, env
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.packed import Packed
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.varlen import ops as varlen_ops
from fusemesh.kernels.runtime.launch import any_device
from fusemesh.kernels.testing import poison
from tests.support.varlen_cases import FEATURES, IN_HALF_PRECISION, by_loop, run_and_compare


@pytest.mark.parametrize("feature", FEATURES)
def test_reference_is_a_loop_of_fixed_length_calls(feature: str) -> None:
    case = replace(FEATURES[feature], dtype="fp64")
    x = case.inputs(index_dtype=torch.int64 if feature == "plain" else torch.int32)
    want = by_loop(case, x)
    backends.reset_call_counts()
    found = case.compute(x, "reference")
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert backends.call_counts()["attention_varlen_forward", "reference"] == 1


@pytest.mark.interpreter
class TestTriton:
    @pytest.mark.parametrize("feature", FEATURES)
    def test_each_feature(self, feature: str) -> None:
        with poison.poisoned_empty():
            run_and_compare(FEATURES[feature], "triton")

    @pytest.mark.parametrize("feature", IN_HALF_PRECISION)
    def test_half_precision(self, feature: str) -> None:
        with poison.poisoned_empty():
            run_and_compare(replace(FEATURES[feature], dtype="bf16"), "triton", torch.int64)

    def test_same_bits_and_the_backend_meant(self) -> None:
        case = FEATURES["everything"]
        backends.reset_call_counts()
        first, second = (case.compute(case.inputs(index_dtype=t), "triton") for t in (torch.int32, torch.int64))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
        counts = backends.call_counts()
        assert counts["attention_varlen_forward", "triton"] == counts["attention_varlen_backward", "triton"] == 2

    def test_nothing_beyond_the_tensors_is_touched(self) -> None:
        """Inputs lie in seas of NaN, with heads outside rows in memory; outputs have that order, too."""
        case = FEATURES["causal_bottom_right"]
        x = case.inputs()
        want = case.compute(x, "triton")
        for name in ("q", "k", "v", "do"):
            inside = poison.surround(x[name].transpose(0, 1).contiguous())
            x[name] = inside.view.transpose(0, 1)
        with poison.poisoned_empty():
            found = case.compute(x, "triton")
        for name, value in want.items():
            assert torch.equal(value, found[name]), name

    def test_lengths_beyond_max_seqlen_reach_beyond_no_mask(self) -> None:
        """Too small a max_seqlen is the caller's error; the rows beyond are padding then, and nothing else is read."""
        q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
        mask = poison.surround(torch.ones(5, 4, dtype=torch.bool), fill=False).view
        cu = torch.tensor([0, 9])
        out = flash_attention_varlen(q, k, v, cu, cu, 5, 4, mask=mask, backend="triton")
        assert isinstance(out, torch.Tensor) and not out[5:].any() and out[:5].any(2).all()

    def test_shards_drop_what_the_whole_drops(self) -> None:
        check_shards("triton")

    def test_second_derivative(self) -> None:
        def second(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
            generator = torch.Generator().manual_seed(3)
            leaves = [torch.randn(7, 2, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
            cu = torch.tensor([0, 3, 3, 7])
            out = flash_attention_varlen(*leaves, cu, cu, 4, 4, causal=True, align="top_left", backend=backend)
            assert isinstance(out, torch.Tensor)
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

        for mine, want in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
            assert (mine - want).abs().max() <= 2e-6 * want.abs().max()

    def test_opcheck(self) -> None:
        """That what it returns has the promised strides; its autograd is TestOp's matter."""
        arguments = op_arguments(torch.float32, "triton")
        torch.library.opcheck(VARLEN_FORWARD, arguments, test_utils=("test_schema", "test_faketensor"))


VARLEN_FORWARD = torch.ops.fusemesh.attention_varlen_forward.default


def op_arguments(dtype: torch.dtype, backend: str, dropout_p: float = 0.25) -> tuple[Any, ...]:
    """Arguments of the forward op, with every tensor."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    cu = torch.tensor([0, 2, 2, 6])
    mask = torch.rand(1, 1, 4, 4, generator=generator) > 0.2
    tensors = (leaf(6, 2, 16), leaf(6, 1, 16), leaf(6, 1, 16))
    options = {"mask": mask, "bias": leaf(3, 1, 4, 4), "sinks": leaf(2), "seed": torch.tensor([9])}
    spec = AttentionSpec(0.3, None, 0, dropout_p=dropout_p)
    return *tensors, *varlen_ops.FIELDS.pack(Call(spec, **options, packed=Packed(cu, cu, 4, 4, True))), backend


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_longest_lengths_beyond_any_tensor(backend: str) -> None:
    """max_seqlen may be any larger number."""
    x, cu = torch.randn(5, 2, 16), torch.tensor([0, 3, 5])
    options = {"causal": True, "align": "top_left", "backend": backend}
    want = flash_attention_varlen(x, x, x, cu, cu, 3, 3, **options)
    found = flash_attention_varlen(x, x, x, cu, cu, 2**62, 2**56, **options)
    torch.testing.assert_close(found, want)


class TestOp:
    """On the reference, whose formulas are in fp64 here: what fused backends go through."""

    def test_opcheck(self) -> None:
        torch.library.opcheck(VARLEN_FORWARD, op_arguments(torch.float64, "reference"))
        q, k, v, *rest, backend = op_arguments(torch.float64, "reference")
        out, lse, _ = VARLEN_FORWARD(q, k, v, *rest, backend)
        saved = (torch.randn_like(out).requires_grad_(), q, k, v, out.detach(), lse.detach(), torch.randn_like(lse))
        # Tracing it with autograd would need the second derivative, which torch.compile does not take.
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        arguments = (*saved, None, *rest, True, False, backend)
        torch.library.opcheck(torch.ops.fusemesh.attention_varlen_backward.default, arguments, test_utils=utilities)

    def test_gradients(self) -> None:
        q, k, v, *values, backend = op_arguments(torch.float64, "reference")
        whole = varlen_ops.FIELDS.unpack(values)
        bias, sinks = whole.bias, whole.sinks

        def call(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
            return VARLEN_FORWARD(q, k, v, *varlen_ops.FIELDS.pack(whole.replace(bias=bias, sinks=sinks)), backend)[0]

        assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, (q, k, v, bias, sinks), fast_mode=True, atol=1e-4)

    def test_a_bias_over_queries_moves_lse_alone(self) -> None:
        q, k, v, *values, _ = op_arguments(torch.float64, "reference")
        given = varlen_ops.FIELDS.unpack(values)
        packed = dataclasses.replace(given.packed, is_bottom_right=False)
        bias = torch.randn(3, 2, 4, 1, dtype=torch.float64, requires_grad=True)

        def call(bias: torch.Tensor) -> torch.Tensor:
            values = varlen_ops.FIELDS.pack(Call(AttentionSpec(0.3), mask=given.mask, bias=bias, packed=packed))
            out, lse, _ = VARLEN_FORWARD(q.detach(), k.detach(), v.detach(), *values, "reference")
            return out.sum() + lse.masked_fill(lse == -math.inf, 0.0).square().sum()

        assert torch.autograd.gradcheck(call, bias)

    @pytest.mark.parametrize("align", ["top_left", "bottom_right"])
    def test_compiles_as_one_graph_for_all_lengths(self, align: str) -> None:
        graphs: list[Any] = []
        compiled_once = 0

        def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
            graphs.append(module)
            return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

        def call(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, bias: Any) -> Any:
            return flash_attention_varlen(
                q, k, v, cu_q, cu_k, 8, 8, causal=True, align=align, bias=bias, return_lse=True
            )

        torch._dynamo.reset()
        compiled = torch.compile(call, backend=count, fullgraph=True, dynamic=True)
        bias = torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True)
        for lens_q, lens_k in (([3, 4], [5, 4]), ([7, 0], [2, 7]), ([1, 8], [4, 8])):
            cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0) for lens in (lens_q, lens_k))
            q, k, v = (torch.randn(sum(n), 2, 16).double().requires_grad_() for n in (lens_q, lens_k, lens_k))
            mine, want = (f(q, k, v, cu_q, cu_k, bias) for f in (compiled, call))
            gradients = []
            for out, lse in (mine, want):
                loss = out.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()
                gradients.append(torch.autograd.grad(loss, (q, k, v, bias)))
            for a, b in zip((*mine, *gradients[0]), (*want, *gradients[1]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
            # Tracing may start anew within the first call, for the numbers among the arguments.
            compiled_once = compiled_once or len(graphs)
        assert 0 < len(graphs) == compiled_once


class TestSizes:
    @pytest.mark.parametrize("lens_q, lens_k", [([], []), ([0], [0]), ([0, 0], [3, 0]), ([4], [0])], ids=str)
    @pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
    def test_nothing_to_attend_to(self, backend: str, lens_q: list[int], lens_k: list[int]) -> None:
        q, k, v = (torch.randn(sum(n), 2, 16, requires_grad=True) for n in (lens_q, lens_k, lens_k))
        cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0) for lens in (lens_q, lens_k))
        most = max([0, *lens_q]), max([0, *lens_k])
        out, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, *most, return_lse=True, backend=backend)
        assert out.shape == (sum(lens_q), 2, 16) and not out.any() and (lse == -math.inf).all()
        for gradient in torch.autograd.grad(out.sum() + lse.masked_fill(lse == -math.inf, 0.0).sum(), (q, k, v)):
            assert not gradient.any()

    def test_autocast(self) -> None:
        q, k, v = (torch.randn(4, 2, 16) for _ in range(3))
        cu = torch.tensor([0, 4])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = flash_attention_varlen(q, k, v, cu, cu, 4, 4)
        assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16


class TestJagged:
    """Jagged tensors [B, H, j, D] passed to flash_attention."""

    LENGTHS = (3, 1, 0, 6)

    def qkv(self, lengths: tuple[int, ...] = LENGTHS) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Packed leaves [total, H, D], and the jagged tensors made of them."""
        generator = torch.Generator().manual_seed(0)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        leaves = [torch.randn(sum(lengths), heads, 16, generator=generator).double() for heads in (4, 2, 2)]
        leaves = [x.requires_grad_() for x in leaves]
        return leaves, [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in leaves]

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 0), "sinks": torch.zeros(4)}], ids=str)
    def test_is_the_packed_call(self, options: dict[str, Any]) -> None:
        leaves, (q, k, v) = self.qkv()
        backends.reset_call_counts()
        out, lse = flash_attention(q, k, v, **options, return_lse=True)
        assert backends.call_counts() == {("attention_varlen_forward", "reference"): 1}
        assert out.shape == q.shape and (out + q).shape == q.shape and lse.shape == q.shape[:3]
        cu = torch.tensor([0, *self.LENGTHS]).cumsum(0)
        want, want_lse = flash_attention_varlen(*leaves, cu, cu, 6, 6, align="top_left", **options, return_lse=True)
        assert torch.equal(out.values().transpose(0, 1), want) and torch.equal(lse.values(), want_lse)
        found = torch.autograd.grad(out.values().square().sum(), leaves)
        for mine, theirs in zip(found, torch.autograd.grad(want.square().sum(), leaves), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)

    def test_compiles_as_one_graph_for_all_lengths(self) -> None:
        graphs: list[Any] = []

        def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
            graphs.append(module)
            return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return flash_attention(q, k, v, causal=True)

        torch._dynamo.reset()
        compiled = torch.compile(call, backend=count, fullgraph=True, dynamic=True)
        compiled_once = 0
        # Not as many sequences as heads at first: tracing takes sizes that are equal then to be equal always.
        for lengths in ((3, 1, 0, 6, 2), (9, 2, 6), (1, 2, 3, 4, 5, 6)):
            leaves, (q, k, v) = self.qkv(lengths)
            mine, want = (f(q, k, v).values() for f in (compiled, call))
            pairs = [torch.autograd.grad(x.square().sum(), leaves) for x in (mine, want)]
            for a, b in zip((mine, *pairs[0]), (want, *pairs[1]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
            compiled_once = compiled_once or len(graphs)
        assert 0 < len(graphs) == compiled_once

    def test_cross_attention_asks_for_align(self) -> None:
        _, (q, _, _) = self.qkv()
        _, (_, k, v) = self.qkv((2, 4, 1, 3))
        with pytest.raises(ValueError, match="align: expected 'top_left' or 'bottom_right' with causal, received None"):
            flash_attention(q, k, v, causal=True)
        out = flash_attention(q, k, v, causal=True, align="bottom_right")
        assert isinstance(out, torch.Tensor) and out.shape == q.shape

    def test_errors(self) -> None:
        (dense, *_), (q, k, v) = self.qkv()
        _, (_, _, other) = self.qkv((2, 4, 1, 3))
        for arguments, options, message in (
            ((q, dense, v), {}, "k: expected a jagged tensor .* received a dense tensor"),
            ((q, k, None), {}, "v: expected a jagged tensor .* received NoneType"),
            ((q.transpose(1, 2), k, v), {}, "q: expected a jagged tensor .* jagged in dimension 1; where heads stand"),
            ((q, k, other), {}, "v: expected the offsets of k"),
            ((q, k, v), {"origin": Origin(q=1)}, r"origin: expected None or Origin\(head=..., batch=...\)"),
        ):
            with pytest.raises(ValueError, match=message):
                flash_attention(*arguments, **options)


def check_shards(backend: str) -> None:
    """Heads 2 and 3, and sequence 1, compute with dropout what the whole does, told by origin where they stand."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, heads, 16, generator=generator) for heads in (4, 2, 2))
    options = {"dropout_p": 0.5, "seed": 5, "causal": True, "align": "top_left", "backend": backend}
    cu, one = torch.tensor([0, 4, 9]), torch.tensor([0, 5])
    whole = flash_attention_varlen(q, k, v, cu, cu, 5, 5, **options)
    heads = (q[:, 2:], k[:, 1:], v[:, 1:], cu, cu, 5, 5)
    part = flash_attention_varlen(*heads, origin=Origin(head=2), **options)
    last = flash_attention_varlen(q[4:], k[4:], v[4:], one, one, 5, 5, origin=Origin(batch=1), **options)
    assert torch.equal(part, whole[:, 2:]) and torch.equal(last, whole[4:])
    assert not torch.equal(flash_attention_varlen(*heads, **options), part)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_shards_drop_what_the_whole_drops(backend: str) -> None:
    check_shards(backend)


def good() -> dict[str, Any]:
    cu = torch.tensor([0, 3, 5])
    return {
        **{name: torch.randn(5, 2, 16) for name in "qkv"},
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    }


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.randn(1, 5, 2, 16)}, r"q: expected 3 dimensions \[total_q, H, D\], received shape \(1, 5, 2, 16\)"),
    ({"k": None}, r"k: expected a torch.Tensor, received NoneType"),
    ({"k": torch.randn(5, 2, 8)}, r"k: expected q's head dim 16, received 8"),
    ({"v": torch.randn(4, 2, 16)}, r"v: expected k's 5 rows, received 4"),
    ({"origin": Origin(head=torch.tensor(1))}, r"origin: expected None or Origin\(head=..., batch=...\) of ints"),
    ({"v": torch.randn(5, 2, 16).double()}, r"v: expected q's dtype and device, torch.float32 on cpu"),
    ({"q": torch.randn(5, 3, 16)}, r"k: expected a number of heads that divides q's 3, received 2"),
    ({"q": torch.zeros(5, 2, 16, dtype=torch.int32)}, r"q: expected a dtype out of .*int32"),
    ({"cu_seqlens_q": [0, 3, 5]}, r"cu_seqlens_q: expected an int32 or int64 tensor \[B \+ 1\] on cpu, received list"),
    ({"cu_seqlens_q": torch.zeros(3)}, r"cu_seqlens_q: expected .* received shape \(3,\), torch.float32"),
    ({"cu_seqlens_k": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens_k: expected .* received shape \(0,\)"),
    ({"cu_seqlens_k": torch.tensor([0, 5])}, r"cu_seqlens_k: expected as many numbers as cu_seqlens_q, 3, received 2"),
    ({"cu_seqlens_k": torch.zeros(6, dtype=torch.int32)[::2]}, r"cu_seqlens_k: expected a contiguous tensor"),
    ({"max_seqlen_q": torch.tensor(3)}, r"max_seqlen_q: expected an int of at least 0, received a tensor"),
    ({"max_seqlen_k": -1}, r"max_seqlen_k: expected an int of at least 0, received -1"),
    ({"max_seqlen_q": 2**63}, rf"max_seqlen_q: expected an int of at least 0, received {2**63}, beyond 64 bits"),
    ({"causal": True}, r"align: expected 'top_left' or 'bottom_right' with causal, received None"),
    ({"window": (1, 0)}, r"align: expected 'top_left' or 'bottom_right' with window"),
    ({"alibi_slopes": torch.ones(2)}, r"align: expected .* with alibi_slopes"),
    ({"align": "middle"}, r"align: expected one of \('top_left', 'bottom_right'\) or None, received 'middle'"),
    ({"mask": torch.ones(4, 3, dtype=torch.bool)}, r"mask: expected a shape that broadcasts to .* = \(2, 2, 3, 3\)"),
    ({"bias": torch.ones(3, 1, 1, 1)}, r"bias: expected a shape that broadcasts to .* received \(3, 1, 1, 1\)"),
    ({"sinks": torch.ones(3)}, r"sinks: expected a tensor \[H\] = \[2\]"),
    ({"dropout_p": 1.0}, r"dropout_p: expected a number in \[0, 1\), received 1.0"),
    (
        {"backend": "torch"},
        r"backend: expected one that computes attention_varlen \(reference, cpu, triton\), received 'torch'",
    ),
    # What the reference finds when it reads them, and every backend under FUSEMESH_CHECK=1.
    (
        {"cu_seqlens_q": torch.tensor([0, 3, 6])},
        r"cu_seqlens_q: expected numbers that never fall, from 0 to 5, .*\[0, 3, 6\]",
    ),
    ({"cu_seqlens_k": torch.tensor([0, 3, 2])}, r"cu_seqlens_k: expected numbers that never fall"),
    ({"max_seqlen_k": 2}, r"max_seqlen_k: expected at least 3, the longest of cu_seqlens_k, received 2"),
]


@pytest.mark.parametrize("changed, message", ERRORS, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention_varlen(**{**good(), **changed})
    flash_attention_varlen(**good())


def test_contents_are_checked_on_every_backend_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "CHECK", True)
    arguments = {**good(), "cu_seqlens_q": torch.tensor([0, 3, 6]), "backend": "triton"}
    with any_device(), pytest.raises(ValueError, match="cu_seqlens_q: expected numbers that never fall"):
        flash_attention_varlen(**arguments)


def packed_launches(total: int, most: int, sequences: int, align: str) -> Callable[[], None]:
    def run() -> None:
        leaves = [torch.empty(total, heads, 128, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
        cu = torch.empty(sequences + 1, dtype=torch.int32)
        with any_device():
            out = flash_attention_varlen(*leaves, cu, cu, most, most, causal=True, align=align, backend="triton")
            torch.autograd.grad(out, leaves, torch.empty_like(out))

    return run


@pytest.mark.aot
def test_one_kernel_for_all_lengths_without_spills() -> None:
    def run() -> None:
        for total, most, sequences in ((1024, 512, 4), (999, 1, 1), (1000, 333, 16), (2**17 + 1, 2**17, 3)):
            packed_launches(total, most, sequences, "bottom_right")()

    reports = {report.kernel: report for report in aot.compile_launches(run, "sm_90")}
    assert set(reports) == {f"attention_{op}_kernel" for op in ("forward", "delta", "dkdv", "dq")}
    for report in reports.values():
        assert report.launches == 4 and report.fits and not report.atomics, report
        # As the fixed-length kernels: see test_aot.py.
        assert report.loop_spills <= 96, report
        assert report.kernel == "attention_delta_kernel" or report.tensor_core, report
