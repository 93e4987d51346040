"""Layer: one process, CPU. torch.export of modules that call attention, for lengths and batches that are symbols.

Programs of the reference run here; those of the Triton backend are traced through the ops' fakes, with no GPU, and run
in Triton's interpreter. Each is exported at one size and has to give the eager result at two others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from fusemesh import MultiheadAttention, Origin, flash_attention, flash_attention_decode, flash_attention_varlen
from fusemesh.kernels.runtime.launch import any_device
from tests.support import fresh_process

H, Hkv, D, Dv = 4, 2, 16, 24
TRACED, OTHERS = (3, 12, 20), ((2, 7, 9), (5, 33, 21))  # B, Sq, Sk
BATCH, SQ, SK = (Dim(name, min=2, max=4096) for name in ("B", "Sq", "Sk"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Calls(nn.Module):
    """A module that makes one call, with the backend and the options given."""

    def __init__(self, call: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.call, self.options = call, options

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.call(*tensors, **self.options)


class SelfAttention(nn.Module):
    """MultiheadAttention of one tensor, with padding."""

    def __init__(self, backend: str, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        options: dict[str, Any] = {"num_kv_heads": Hkv, "softcap": 5.0, "sinks": True, "backend": backend}
        self.attention = MultiheadAttention(H * D, H, batch_first=True, **options)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> Any:
        options = {"key_padding_mask": padding, "need_weights": self.need_weights, "causal": True}
        return self.attention(x, x, x, **options)


@dataclass(frozen=True)
class Case:
    """A call to export: how a backend's is made, its tensors for sizes B, Sq and Sk, and which of these are symbols."""

    module: Callable[[str], nn.Module]
    tensors: Callable[[int, int, int], tuple[torch.Tensor, ...]]
    dynamic: tuple[dict[int, Any] | None, ...]
    op: str


def batched(B: int, Sq: int, Sk: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(B, H, Sq, D), torch.randn(B, Hkv, Sk, D), torch.randn(B, Hkv, Sk, Dv)


QKV = ({0: BATCH, 2: SQ}, {0: BATCH, 2: SK}, {0: BATCH, 2: SK})


def flash(**options: Any) -> Case:
    def module(backend: str) -> nn.Module:
        return Calls(flash_attention, backend=backend, **options)

    return Case(module, batched, QKV, "attention_forward")


def with_bias() -> Case:
    """A bias with a gradient's shape of its own beside a mask of the keys, both inputs of the program."""

    def call(q: Any, k: Any, v: Any, bias: Any, mask: Any, **options: Any) -> Any:
        return flash_attention(q, k, v, causal=True, align="bottom_right", bias=bias, mask=mask, **options)

    def tensors(B: int, Sq: int, Sk: int) -> tuple[torch.Tensor, ...]:
        return *batched(B, Sq, Sk), torch.randn(H, Sq, Sk), torch.rand(B, 1, 1, Sk) < 0.7

    dynamic = (*QKV, {1: SQ, 2: SK}, {0: BATCH, 3: SK})
    return Case(lambda backend: Calls(call, backend=backend), tensors, dynamic, "attention_forward")


def varlen() -> Case:
    def call(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, **options: Any) -> Any:
        return flash_attention_varlen(q, k, v, cu_q, cu_k, q.shape[0], k.shape[0], **options)

    def tensors(B: int, Sq: int, Sk: int) -> tuple[torch.Tensor, ...]:
        def starts(total: int) -> torch.Tensor:
            return torch.tensor([0, *sorted(torch.randint(0, total, (B - 1,)).tolist()), total], dtype=torch.int32)

        return torch.randn(Sq, H, D), torch.randn(Sk, Hkv, D), torch.randn(Sk, Hkv, Dv), starts(Sq), starts(Sk)

    def module(backend: str) -> nn.Module:
        return Calls(call, causal=True, align="bottom_right", softcap=5.0, return_lse=True, backend=backend)

    starts = Dim("starts", min=3, max=4097)
    return Case(module, tensors, ({0: SQ}, {0: SK}, {0: SK}, {0: starts}, {0: starts}), "attention_varlen_forward")


def decode(paged: bool) -> Case:
    def call(q: Any, k_cache: Any, v_cache: Any, lens: Any, k_new: Any, v_new: Any, table: Any, **options: Any) -> Any:
        more = {"cache_lens": lens, "k_new": k_new, "v_new": v_new, "block_table": table if paged else None}
        return flash_attention_decode(q, k_cache, v_cache, **more, **options)

    def tensors(B: int, Sq: int, Sk: int) -> tuple[torch.Tensor, ...]:
        new = min(Sq, Sk - 1)
        table = torch.randperm(B * 4).view(B, 4)
        cache = (4 * B, Hkv, -(-Sk // 4)) if paged else (B, Hkv, Sk)
        lens = torch.randint(0, Sk - new, (B,), dtype=torch.int32)
        caches = (torch.randn(*cache, D), torch.randn(*cache, Dv))
        return (
            torch.randn(B, H, new, D),
            *caches,
            lens,
            torch.randn(B, Hkv, new, D),
            torch.randn(B, Hkv, new, Dv),
            table,
        )

    def module(backend: str) -> nn.Module:
        slopes = torch.rand(H)
        return Calls(call, causal=True, align="bottom_right", alibi_slopes=slopes, return_lse=True, backend=backend)

    new = {0: BATCH, 2: SQ}
    cache = {0: Dim("pages", min=2, max=4096) if paged else BATCH, 2: SK}
    return Case(module, tensors, (new, cache, cache, {0: BATCH}, new, new, {0: BATCH}), "attention_decode")


def multihead(need_weights: bool) -> Case:
    def module(backend: str) -> nn.Module:
        return SelfAttention(backend, need_weights).eval()

    def tensors(B: int, Sq: int, Sk: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(B, Sq, H * D), torch.rand(B, Sq) < 0.3

    return Case(module, tensors, ({0: BATCH, 1: SQ}, {0: BATCH, 1: SQ}), "attention_forward")


CASES = {
    "plain": flash(),
    "causal": flash(causal=True, align="bottom_right", return_lse=True),
    "window": flash(window=(3, 1), align="top_left"),
    "causal_bias_mask": with_bias(),
    "alibi": flash(alibi_slopes=torch.rand(H), align="bottom_right"),
    "softcap_sinks": flash(softcap=3.0, sinks=torch.randn(H)),
    "dropout": flash(dropout_p=0.2, seed=torch.tensor([5]), align="bottom_right"),
    "origin_on_device": flash(causal=True, origin=Origin(q=torch.tensor(3), k=1)),
    "varlen": varlen(),
    "decode": decode(paged=False),
    "decode_paged": decode(paged=True),
    "module": multihead(need_weights=False),
    "module_weights": multihead(need_weights=True),
}


def exported(case: Case, backend: str, strict: bool) -> tuple[nn.Module, ExportedProgram]:
    """The case's module and its program, traced at one size; lengths and batches are symbols in it."""
    module = case.module(backend)
    # forward takes its tensors as *tensors where it is Calls'.
    dynamic: Any = (case.dynamic,) if isinstance(module, Calls) else case.dynamic
    program = torch.export.export(module, case.tensors(*TRACED), dynamic_shapes=dynamic, strict=strict)
    return module, program


def ops(program: ExportedProgram) -> list[str]:
    """The names of the fused ops in a program."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("fusemesh.")]


def assert_eager_results(module: nn.Module, program: ExportedProgram, case: Case) -> None:
    """The same outputs at two other sizes, and the same contents of what is written in place."""
    run = program.module()
    for sizes in OTHERS:
        mine = case.tensors(*sizes)
        theirs = tuple(x.clone() for x in mine)
        got, want = run(*mine), module(*theirs)
        for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6), (a - b).abs().max()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("name", CASES)
def test_programs_of_the_reference_give_the_eager_result(name: str) -> None:
    module, program = exported(CASES[name], "reference", strict=False)
    assert_eager_results(module, program, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_programs_of_the_triton_backend_hold_its_op(name: str) -> None:
    """One node, whose sizes are symbols, traced as torch.compile traces (strict); nothing has run."""
    with any_device():
        _, program = exported(CASES[name], "triton", strict=True)
    assert ops(program) == [CASES[name].op]
    nodes = [node for node in program.graph.nodes if CASES[name].op in str(node.target)]
    assert "triton" in nodes[0].args
    out, lse, *rest = nodes[0].meta["val"]
    for x in (out, lse):
        assert any(isinstance(size, torch.SymInt) for size in x.shape), x.shape
    assert all(x.shape == (0,) for x in rest), "a program keeps nothing for a backward"


def test_a_saved_program_loads_beside_the_function_that_it_calls(tmp_path: Path) -> None:
    """Which is what registers the op; nothing of ours has to be called first."""
    called = {"flash_attention": "causal", "flash_attention_varlen": "varlen", "flash_attention_decode": "decode"}
    for name in called.values():
        with any_device():
            _, program = exported(CASES[name], "triton", strict=False)
        torch.export.save(program, tmp_path / f"{name}.pt2")
    ops_of = {function: (f"{name}.pt2", CASES[name].op) for function, name in called.items()}
    fresh_process.run(f"""
        import fusemesh, torch

        for function, (file, op) in {ops_of}.items():
            assert not hasattr(torch.ops.fusemesh, op), f"{{op}} was registered before {{function}} was imported"
            getattr(fusemesh, function)
            program = torch.export.load({str(tmp_path)!r} + "/" + file)
            assert f"fusemesh.{{op}}.default" in [str(node.target) for node in program.graph.nodes]
    """)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_programs_of_the_triton_backend_give_the_eager_result(name: str) -> None:
    module, program = exported(CASES[name], "triton", strict=False)
    assert ops(program) == [CASES[name].op]
    assert_eager_results(module, program, CASES[name])
