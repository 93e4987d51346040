"""Layer: kernels, ahead of time. What attention's kernels take, and which of it is compiled in."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusemesh import Origin, flash_attention, flash_attention_varlen
from fusemesh.kernels import aot
from fusemesh.kernels.runtime.launches import any_device

KERNELS = Path(aot.__file__).parent
MOST_ARGUMENTS = 20


def test_no_jit_function_takes_more_than_20_arguments() -> None:
    found = {}
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found[f"{path.relative_to(KERNELS)}:{node.name}"] = len(node.args.args)
    assert "attention/gpu/passes.py:attention_dkdv_kernel" in found
    assert {name: number for name, number in found.items() if number > MOST_ARGUMENTS} == {}


def leaf(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def dense(length: int, window: int, position: int) -> Callable[[], None]:
    """A call with the bias and the mask that every pass reads, and its gradients."""

    def run() -> None:
        q, k, v = (leaf(2, heads, length, 16) for heads in (4, 2, 2))
        bias = leaf(1, 4, length, length)
        mask = torch.empty(2, 1, length, length, dtype=torch.bool)
        origin = Origin(q=position, k=position, head=position, batch=position)
        with any_device():
            out = flash_attention(
                q,
                k,
                v,
                window=(window, 0),
                origin=origin,
                mask=mask,
                bias=bias,
                softcap=30.0 + position,
                backend="triton",
            )
            torch.autograd.grad(out, (q, k, v, bias), torch.empty_like(out))

    return run


def packed(length: int, total: int) -> Callable[[], None]:
    def run() -> None:
        q, k, v = (leaf(total, heads, 16) for heads in (4, 2, 2))
        cu = torch.empty(3, dtype=torch.int32)
        with any_device():
            out = flash_attention_varlen(
                q, k, v, cu, cu, length, length, causal=True, align="bottom_right", backend="triton"
            )
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))

    return run


@pytest.mark.aot
@pytest.mark.parametrize(
    ("first", "others"),
    [
        (dense(512, 100, 0), (dense(1040, 16, 1), dense(2064, 1, 16), dense(1072, 2063, 1023))),
        (packed(512, 1024), (packed(1, 1000), packed(16, 2048), packed(513, 4104))),
    ],
    ids=["dense", "packed"],
)
def test_nothing_is_compiled_again_for_other_numbers(
    first: Callable[[], None], others: tuple[Callable[[], None], ...]
) -> None:
    """Lengths, windows, positions and the numbers of mods change from call to call; the machine code does not."""
    reports = aot.compile_launches(first, "sm_80")

    def all_of_them() -> None:
        first()
        for run in others:
            run()

    again = aot.compile_launches(all_of_them, "sm_80")
    assert [report.kernel for report in again] == [report.kernel for report in reports]
    assert [report.launches for report in again] == [(1 + len(others)) * report.launches for report in reports]
