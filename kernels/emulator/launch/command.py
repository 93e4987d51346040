"""What ``python -m fusemesh.kernels.aot --emulate`` does: one call on random inputs, compared with the reference."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from ...measure.cases import AttentionCase, LinearCase, VocabLossCase
from .. import COPIES, emulate
from ..hazard import Hazard, UnknownInstruction
from .counts import table

_DIMS = {"B": "b", "H": "h", "Q": "m", "K": "n"}


def case_of(options: argparse.Namespace, dtype: str) -> AttentionCase | LinearCase | VocabLossCase:
    """Return the call that the command's options describe, on small shapes."""
    length = options.length
    if options.kernel == "linear":
        rows, features = length, length + 24
        return LinearCase(dtype, rows, features, features, options.activation, options.gated)
    if options.kernel == "loss":
        return VocabLossCase(dtype, length, length + 24, 2 * length + 24, softcap=options.softcap)
    return AttentionCase(
        dtype,
        B=1,
        H=2,
        Hkv=1,
        Sq=length,
        Sk=length,
        D=options.head_dim,
        Dv=options.v_head_dim or options.head_dim,
        causal=options.causal,
        mask="bmn" if options.mask else None,
        bias=None if options.bias is None else "".join(_DIMS[letter] for letter in options.bias),
    )


def run(options: argparse.Namespace) -> int:
    """Run every target and dtype, with copies that land late and early; return the exit status: 0 if all is right."""
    failed = 0
    for target in options.target:
        for dtype in options.dtype:
            case = case_of(options, dtype)
            print(f"{target} {case.op} {case.name}, seed {options.seed}")
            for line, is_right in _lines(case, target, options):
                failed += not is_right
                print(line)
    return int(failed > 0)


def _lines(case: Any, target: str, options: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Yield what there is to say, and whether it is right."""
    x = case.inputs(seed=options.seed)
    direction = "forward" if options.no_backward else "backward"
    want = case.expected(x, direction)
    outputs: dict[str, dict[str, torch.Tensor]] = {}
    for copies in COPIES[:2]:
        try:
            with emulate(target, copies=copies, counts=True) as emulator:
                outputs[copies] = _forward(case, x) if options.no_backward else case.compute(x, "triton")
        except (Hazard, UnknownInstruction) as error:
            kind = "HAZARD" if isinstance(error, Hazard) else "NOT EMULATED"
            yield f"copies land {copies}: {kind}: {error}", False
            continue
        if copies == COPIES[0]:
            yield table(emulator.counts), True
        try:
            measured = case.check(outputs[copies], want)
        except AssertionError as error:
            yield f"copies land {copies}: WRONG: {error}", False
            continue
        shares = ", ".join(f"{budget.name} {budget.share:.2f}" for budget in measured)
        yield f"copies land {copies}: no hazard; errors as shares of the allowed ones: {shares}", True
    if len(outputs) == 2:
        late, early = outputs.values()
        differing = [name for name in late if not torch.equal(late[name], early[name])]
        if differing:
            yield f"WRONG: other bits by when copies land: {', '.join(differing)}", False


def _forward(case: AttentionCase | LinearCase | VocabLossCase, x: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {case.result: case.run(x, "triton")}
