"""Floor 1: a backend's record refuses exactly what its implementation does not compute.

Every feature, backend and operation: where ``refuse`` is None the implementation runs, and gives what the reference
gives; elsewhere it raises the refusal as its error, before anything runs. Triton's rows run in its interpreter.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  which the interpreter looks for beside a jit function

import fusemesh
from fusemesh.kernels import backend_record, backends
from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.call.options import Options
from fusemesh.kernels.attention.call.packed import Packed
from fusemesh.kernels.attention.call.validation import normalise
from fusemesh.kernels.attention.decode.spec import DecodeCall
from fusemesh.kernels.backend_record import Request, implementation

B, H, HKV, S, D = 2, 4, 2, 24, 16
BACKENDS = [
    pytest.param("reference"),
    pytest.param("torch"),
    pytest.param("cpu"),
    pytest.param("triton", marks=pytest.mark.interpreter),
]


def _plain(s: torch.Tensor, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> torch.Tensor:
    return s * 0.5


def _with_table(s: torch.Tensor, i_b: Any, i_h: Any, i_q: Any, i_k: Any, table: torch.Tensor) -> torch.Tensor:
    return s + table[i_h % 2].to(s.dtype)


TORCH_ONLY = score_mods.register_score_mod(score_mods.ScoreMod("refusals_torch_only", None, None, _plain))
WITH_TABLE = score_mods.register_score_mod(
    score_mods.ScoreMod("refusals_with_table", None, None, _with_table, num_aux=1, aux_grad=True)
)


@triton.jit
def _halved(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_s * 0.5


@triton.jit
def _halved_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_ds * 0.5


WHOLE = score_mods.register_score_mod(score_mods.ScoreMod("refusals_whole", _halved, _halved_backward, _plain))
FORWARD_ONLY = score_mods.register_score_mod(score_mods.ScoreMod("refusals_forward_only", _halved, None, _plain))


def options(feature: str) -> dict[str, Any]:
    """The options of a call that has the feature."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": dict,
        "causal": lambda: {"causal": True, "align": "bottom_right"},
        "window": lambda: {"window": (5, 3), "align": "bottom_right"},
        "mask": lambda: {"mask": normal(1, 1, 1, S) > -0.5},
        "bias": lambda: {"bias": normal(1, H, 1, S)},
        "softcap": lambda: {"softcap": 3.0},
        "alibi": lambda: {"alibi_slopes": normal(H).abs(), "align": "bottom_right"},
        "sinks": lambda: {"sinks": normal(H)},
        "dropout": lambda: {"dropout_p": 0.3, "seed": 5},
        "mod_of_torch": lambda: {"score_mod": TORCH_ONLY(), "align": "bottom_right"},
        "mod": lambda: {"score_mod": WHOLE(), "align": "bottom_right"},
        "mod_forward": lambda: {"score_mod": FORWARD_ONLY(), "align": "bottom_right"},
        "mod_aux_gradient": lambda: {
            "score_mod": WITH_TABLE(normal(2).requires_grad_()),
            "align": "bottom_right",
        },
    }
    return found[feature]()


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "fp8": torch.float8_e4m3fn}
FEATURES = (
    *("plain", "causal", "window", "mask", "bias", "softcap", "alibi", "sinks", "dropout"),
    *("mod_of_torch", "mod", "mod_forward", "mod_aux_gradient"),
)
# (feature, dtype, D, whether a gradient is asked for): every feature in fp32, and what the limits are about.
CASES = [
    *((feature, "fp32", D, needs_grad) for feature in FEATURES for needs_grad in (False, True)),
    *(("plain", dtype, D, False) for dtype in ("bf16", "fp64", "fp8")),
    *(("plain", "fp32", dim, False) for dim in (8, 300)),
]
# Positions, dropout and a user's mods are not options of decode; nor is fp8.
OF_DECODE = ("plain", "causal", "window", "mask", "bias", "softcap", "alibi", "sinks")


@dataclasses.dataclass
class Trial:
    """One call as the records and the implementations take it."""

    request: Request
    run: Callable[[Any], list[torch.Tensor]]  # out, and dq where a gradient is asked for, of an implementation


def dense(feature: str, dtype: torch.dtype, dim: int, needs_grad: bool) -> Trial:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, heads, S, dim, generator=generator).to(dtype) for heads in (H, HKV, HKV))
    call = normalise(q, k, Options(**options(feature)))
    request = Request("attention", q.device, dtype, (dim, dim), call, needs_grad)

    def run(module: Any) -> Any:
        out, lse = module.forward(q, k, v, call)
        if not needs_grad:
            return [out]
        if lse is None:  # PyTorch's own function, on its own tape
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return [out, torch.autograd.grad(module.forward(*leaves, call)[0], leaves[0], out)[0]]
        with torch.no_grad():
            return [out, module.backward(out, q, k, v, out, lse, None, call, bias_grad=call.bias is not None)[0]]

    return Trial(request, run)


def packed(feature: str, dtype: torch.dtype, dim: int, needs_grad: bool) -> Trial:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B * S, heads, dim, generator=generator).to(dtype) for heads in (H, HKV, HKV))
    like = torch.empty(B, H, S, dim, dtype=dtype), torch.empty(B, HKV, S, dim, dtype=dtype)
    cu = torch.arange(0, (B + 1) * S, S)
    call = normalise(*like, Options(**options(feature)))
    call = call.replace(origin=None, descale=None, packed=Packed(cu, cu, S, S, True))
    request = Request("attention_varlen", q.device, dtype, (dim, dim), call, needs_grad)

    def run(module: Any) -> Any:
        out, lse = module.forward(q, k, v, call)
        if not needs_grad:
            return [out]
        with torch.no_grad():
            return [out, module.backward(out, q, k, v, out, lse, None, call, bias_grad=call.bias is not None)[0]]

    return Trial(request, run)


def decode(feature: str, dtype: torch.dtype, dim: int, needs_grad: bool) -> Trial:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(B, heads, n, dim, generator=generator).to(dtype) for heads, n in ((H, 2), (HKV, S), (HKV, S))
    )
    call = normalise(q, k, Options(**{"align": "bottom_right", **options(feature)}))
    lengths = torch.tensor([S, 7])
    step = DecodeCall(q, k, v, lengths, None, None, None, None, dim, call)
    return Trial(step.request(), lambda module: [module.decode(step)[0]])


TRIALS = {"attention": dense, "attention_varlen": packed, "attention_decode": decode}


def cases() -> Iterator[Any]:
    for operation in TRIALS:
        for feature, dtype, dim, needs_grad in CASES:
            if operation == "attention_decode" and (feature not in OF_DECODE or needs_grad or dtype == "fp8"):
                continue
            if operation == "attention_varlen" and dtype == "fp8":  # refused by the contract, before any backend
                continue
            name = f"{operation}-{feature}-{dtype}-{dim}" + ("-gradient" if needs_grad else "")
            yield pytest.param(operation, feature, dtype, dim, needs_grad, id=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "feature", "dtype", "dim", "needs_grad"), list(cases()))
def test_refuses_exactly_what_does_not_run(
    backend: str, operation: str, feature: str, dtype: str, dim: int, needs_grad: bool
) -> None:
    trial = TRIALS[operation](feature, DTYPES[dtype], dim, needs_grad)
    record = backend_record.records()[backend]
    if record.unavailable(torch.device("cpu")) is not None:
        pytest.skip(f"{backend} is not in this installation")
    refusal = record.refuse(trial.request)
    if not record.computes(operation):
        assert refusal is not None and refusal.argument == "backend"
        return
    module = implementation(backend, operation)
    if refusal is not None:
        with pytest.raises(ValueError, match=f"^{refusal.argument}: expected "):
            trial.run(module)
        return
    got = trial.run(module)
    want = trial.run(implementation("reference", operation))
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), right.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_linear_layers_refuse_exactly_what_does_not_run(backend: str, dtype: str) -> None:
    from fusemesh.kernels.matmul.api import fused_linear

    x, w = torch.randn(3, 16, dtype=DTYPES[dtype]), torch.randn(5, 16, dtype=DTYPES[dtype])
    refusal = backend_record.records()[backend].refuse(Request("linear", x.device, x.dtype))
    if refusal is None:
        torch.testing.assert_close(fused_linear(x, w, backend=backend), x @ w.t(), rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(ValueError, match=r"^x: expected "):
            fused_linear(x, w, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_loss_refuses_exactly_what_does_not_run(backend: str, dtype: str) -> None:
    h, weight = torch.randn(3, 16, dtype=DTYPES[dtype]), torch.randn(5, 16, dtype=DTYPES[dtype])
    refusal = backend_record.records()[backend].refuse(Request("vocab_loss", h.device, h.dtype))
    call = (h, weight, torch.tensor([0, 4, 2]))
    if refusal is None:
        want = torch.nn.functional.cross_entropy(h @ weight.t(), call[2], reduction="none")
        have = fusemesh.fused_linear_cross_entropy(*call, backend=backend)
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(ValueError, match=rf"^{refusal.argument}: expected "):
            fusemesh.fused_linear_cross_entropy(*call, backend=backend)


def test_the_cases_see_both_answers() -> None:
    """Every backend with limits refuses some of the cases, for each kind of reason, and takes others."""
    seen: dict[str, set[str]] = {name: set() for name in ("torch", "cpu", "triton")}
    is_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for operation, feature, dtype, dim, needs_grad in (case.values for case in cases()):
        trial = TRIALS[operation](feature, DTYPES[dtype], dim, needs_grad)
        for name, arguments in seen.items():
            refusal = backends.records()[name].refuse(trial.request)
            arguments.add("none" if refusal is None else refusal.argument)
    assert seen["torch"] == {"none", "backend"}
    assert seen["cpu"] >= {"none", "q", "score_mod"} or "backend" in seen["cpu"]
    assert seen["triton"] >= ({"none"} if is_interpreting else set()) | {"q", "score_mod"}


# The rows of README's table of attention, in its order: operation, features, and dtypes other than fp32.
TABLE: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("attention", ("plain", "causal", "mask"), ()),
    ("attention", ("bias",), ()),
    ("attention", ("window", "lse"), ()),
    ("attention", ("softcap", "alibi", "sinks", "dropout"), ()),
    ("attention", ("mod",), ()),
    ("attention_varlen", ("plain", "causal", "mask", "bias", "window", "softcap", "alibi", "sinks", "dropout"), ()),
    ("attention_decode", OF_DECODE, ()),
    ("attention", ("plain",), ("fp8",)),
)
ROOT = Path(__file__).parents[2]


def takes(backend: str, operation: str, feature: str, dtype: str, needs_grad: bool) -> bool:
    request = TRIALS[operation]("plain" if feature == "lse" else feature, DTYPES[dtype], D, needs_grad).request
    if feature == "lse":
        request = dataclasses.replace(request, needs_lse=True)
    return backend_record.records()[backend].refuse(request) is None


def cells(page: str) -> list[dict[str, str]]:
    """The rows of a README's table of attention, by backend."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (table,) = re.findall(
        r"^\|[^|\n]*\| reference \| torch \| cpu \(C\+\+\) \| triton .*\n\|[-|]*\n((?:\|.*\n)+)", text, re.M
    )
    columns = ("reference", "torch", "cpu", "triton")
    return [dict(zip(columns, (x.strip() for x in row.split("|")[2:6]), strict=True)) for row in table.splitlines()]


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tables_say_what_the_records_refuse(backend: str, page: str) -> None:
    if backend_record.records()[backend].unavailable(torch.device("cpu")) is not None:
        pytest.skip(f"{backend} is not in this installation")
    rows = cells(page)
    for row, (operation, features, dtypes) in zip(rows, TABLE, strict=False):
        cell = row[backend]
        assert cell in ("F B", "F", "-"), row
        for dtype in dtypes or ("fp32",):
            forward = [takes(backend, operation, feature, dtype, False) for feature in features]
            assert set(forward) == {cell != "-"}, (row, features, forward)
            # fp8 with a gradient is refused by the contract, a cache with one too, before any backend is asked.
            if cell == "F B":
                assert all(takes(backend, operation, feature, dtype, True) for feature in features), row
    floats = rows[len(TABLE)][backend]
    names = ["fp32", "bf16", "fp64"] if floats in ("all", "全部") else [x for x in floats.split(", ") if x in DTYPES]
    assert names == [name for name in ("fp32", "bf16", "fp64") if takes(backend, "attention", "plain", name, True)]
    computes_linear = "linear" in backend_record.records()[backend].implementations
    assert rows[-1][backend] == ("F B" if computes_linear else "-")
    of_loss = Request("vocab_loss", torch.device("cpu"), torch.float32)
    assert rows[-2][backend] == ("F B" if backend_record.records()[backend].refuse(of_loss) is None else "-")


def test_what_docs_say_of_dropout_is_what_the_records_say() -> None:
    text = " ".join((ROOT / "docs/attention.md").read_text(encoding="utf-8").split())
    (named,) = re.findall(r"every backend that has dropout \(([^)]*)\)", text)
    spec = dense("dropout", torch.float32, D, True).request
    records = backend_record.records().values()
    # A backend's limits, whatever this machine has.
    have = {x.name for x in records if "attention" in x.implementations and x.limits(spec) is None}
    assert set(re.findall(r"`(\w+)`", named)) == have


@pytest.mark.parametrize("cap", [3e38, 1e38, 1e-37, 1e-45])
def test_auto_computes_a_softcap_that_the_engine_refuses(cap: float) -> None:
    q = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    found, want = (fusemesh.flash_attention(q, q, q, softcap=cap, backend=x) for x in ("auto", "reference"))
    assert torch.equal(found, want)
    with pytest.raises(ValueError, match=r"^softcap: expected a number between 1e-37 and 1e\+38 for backend='cpu'"):
        fusemesh.flash_attention(q, q, q, softcap=cap, backend="cpu")


@pytest.mark.parametrize("origin", [-5, 2**60])
def test_windows_as_wide_as_integers(origin: int) -> None:
    q = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    at = fusemesh.Origin(q=origin)
    for window, same in (((2**63 - 1, None), None), ((None, 2**63 - 1), None), ((2**62, 2**62), None)):
        for backend in ("cpu", "reference"):
            found, want = (
                fusemesh.flash_attention(q, q, q, window=x, origin=at, backend=backend) for x in (window, same)
            )
            assert torch.equal(found, want), (window, backend)
