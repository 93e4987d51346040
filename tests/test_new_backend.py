"""Layer: one process. What a new backend costs: the lines between the marks, and nothing else, reach every caller."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fusemesh
from fusemesh.kernels import backend_record, backends

# --- the backend ---------------------------------------------------------------------------------------------------
from fusemesh.kernels.attention.reference import decode as by_formula_in_decode
from fusemesh.kernels.attention.reference import dense as by_formula
from fusemesh.kernels.attention.reference import varlen as by_formula_packed
from fusemesh.kernels.backend_record import Backend, Refusal, Request, register


class Mine:
    """A library of kernels, which here only passes on to the reference and has no dropout."""

    forward, backward = staticmethod(by_formula.forward), staticmethod(by_formula.backward)

    @staticmethod
    def linear(x: Any, w: Any, bias: Any, *, activation: Any, w_up: Any) -> Any:
        return F.linear(x, w, bias)


def refuses_dropout(request: Request) -> Refusal | None:
    dropout_p = 0.0 if request.call is None else request.call.spec.dropout_p
    return Refusal("dropout_p", "0.0", dropout_p) if dropout_p else None


def add() -> Backend:
    modules = {"attention": Mine, "attention_varlen": by_formula_packed, "attention_decode": by_formula_in_decode}
    return register(
        Backend("mine", {**modules, "linear": Mine}, limits=refuses_dropout, differentiable=frozenset({"linear"})),
        before="reference",
    )


# --- its end -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def mine() -> Iterator[Backend]:
    record = add()
    backends.reset_call_counts()
    yield record
    backend_record.unregister("mine")


def ran() -> set[str]:
    """The operations that ran on the backend since the last look."""
    found = {operation for operation, backend in backends.call_counts() if backend == "mine"}
    assert all(backend == "mine" for _, backend in backends.call_counts())
    backends.reset_call_counts()
    return found


def test_it_is_at_most_thirty_lines() -> None:
    lines = inspect.getsource(sys.modules[__name__]).split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("# --- the"))
    end = next(i for i, line in enumerate(lines) if line.startswith("# --- its"))
    assert len([line for line in lines[first + 1 : end] if line.strip()]) <= 30


def test_the_functions_of_attention_reach_it() -> None:
    q, k, v = (torch.randn(2, heads, 6, 8, requires_grad=True) for heads in (4, 2, 2))
    out = fusemesh.flash_attention(q, k, v, causal=True, sinks=torch.randn(4, requires_grad=True), backend="mine")
    torch.autograd.grad(out.sum(), [q, k, v])
    assert ran() == {"attention_forward", "attention_backward"}
    rows = [x.detach()[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    cu = torch.tensor([0, 2, 6])
    with fusemesh.use_backend("mine"):
        fusemesh.flash_attention_varlen(*rows, cu, cu, 4, 4)
        cache = [x.detach().clone() for x in (k, v)]
        fusemesh.flash_attention_decode(q.detach()[:, :, :1], *cache, cache_lens=torch.tensor([3, 6]))
        fusemesh.fused_linear(q, torch.randn(5, 8))
    assert ran() == {"attention_varlen_forward", "attention_decode", "linear_forward"}


def test_what_it_refuses_is_an_error_before_anything_runs() -> None:
    q = torch.randn(1, 1, 4, 8)
    expected = r"^dropout_p: expected 0.0 for backend='mine', received 0.5; use backend='auto' or 'reference'$"
    with pytest.raises(ValueError, match=expected):
        fusemesh.flash_attention(q, q, q, dropout_p=0.5, seed=1, backend="mine")
    assert ran() == set()


def test_auto_takes_it_where_it_is_willing() -> None:
    backend_record.unregister("mine")
    willing = Backend("mine", {"attention": Mine}, automatic=lambda request: "it is ours")
    register(willing, before=next(iter(backend_record.records())))
    q = torch.randn(1, 1, 4, 8)
    fusemesh.flash_attention(q, q, q)
    assert ran() == {"attention_forward"}


def test_accelerate_and_the_hugging_face_integration_reach_it() -> None:
    q = torch.randn(1, 2, 5, 8)
    with fusemesh.accelerate("mine"):
        F.scaled_dot_product_attention(q, q, q)
        torch.nn.MultiheadAttention(16, 2, batch_first=True)(*[torch.randn(1, 4, 16)] * 3)
    assert ran() == {"attention_forward"}
    transformers = pytest.importorskip("transformers")
    from fusemesh.integrations import transformers as fusemesh_transformers

    fusemesh_transformers.register()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=50, attn_implementation="fusemesh")
    with fusemesh.use_backend("mine"), torch.no_grad():
        transformers.LlamaForCausalLM(config)(torch.arange(6)[None])
    assert ran() == {"attention_forward"}


def test_doctor_names_it() -> None:
    from fusemesh.commands import doctor

    findings = doctor.examine()
    assert findings["backends"]["cpu"]["mine"] is None
    assert "mine" in doctor.describe(findings)
