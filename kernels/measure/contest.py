"""A contest: each contender computes a case's result, which is checked against fp64 and only then timed.

The contenders are FuseMesh's backends; whom a benchmark compares them with stands in bench/peers/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import backends
from . import results, timing
from .cases import AttentionCase, DecodeCase, LinearCase
from .cases.common import Inputs, Tensors

OURS = ("reference", "torch", "cpu", "triton")
TimedCase = AttentionCase | DecodeCase | LinearCase


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's forward; ``ours`` tells FuseMesh's backends from the others."""

    name: str
    ours: bool
    forward: Callable[[Inputs], torch.Tensor]
    differentiable: bool = True


Outputs = Callable[[TimedCase, Contender, Inputs, str], Tensors]


def our_backend(case: TimedCase, backend: str) -> Contender:
    """Return FuseMesh's backend of this name as a contender, through the public function."""
    differentiable = "backward" in case.directions and not (backend == "cpu" and case.op == "attention")
    return Contender(backend, True, lambda x: case.run(x, backend), differentiable)


def our_backends(case: TimedCase, device: torch.device | str) -> list[Contender]:
    """Return FuseMesh's backends that compute the case on ``device``."""
    if torch.device(device).type == "cuda":
        names: tuple[str, ...] = ("triton",)
    else:
        names = ("reference", "torch", "cpu") if case.op == "attention" else ("reference", "torch")
    return [our_backend(case, name) for name in names if backends.why_unavailable(name, device) is None]


def outputs(case: TimedCase, contender: Contender, inputs: Inputs, direction: str) -> Tensors:
    """Return what a contender computes: the result, or the gradients of the inputs that have one."""
    if direction == "forward":
        with torch.no_grad():
            return {case.result: contender.forward(inputs)}
    gradients = backward_call(case, contender, inputs)()
    return {f"d{name}": gradient for name, gradient in zip(case.leaves(inputs), gradients, strict=True)}


def backward_call(case: TimedCase, contender: Contender, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return a call that runs the backward alone, any number of times: the forward has run and its tape is kept."""
    leaves = case.leaves(inputs)
    tape = {**inputs, **{name: inputs[name].detach().requires_grad_() for name in leaves}}
    result = contender.forward(tape)
    wanted, upstream = [tape[name] for name in leaves], inputs[case.upstream]
    return lambda: torch.autograd.grad(result, wanted, upstream, retain_graph=True)


def timed_call(case: TimedCase, contender: Contender, inputs: Inputs, direction: str) -> Callable[[], Any]:
    """Return the call that is timed: the forward without a tape, or the backward alone."""
    if direction == "backward":
        return backward_call(case, contender, inputs)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return contender.forward(inputs)

    return forward


def compare(
    case: TimedCase,
    direction: str,
    device: torch.device | str,
    roofline: timing.Roofline,
    contenders: list[Contender],
    *,
    outputs: Outputs = outputs,
    **times: Any,
) -> list[dict[str, Any]]:
    """Check, then time, every contender on one case; return a row for each (:func:`results.row`).

    A contender whose result is outside the error budget, or that raises, gets a row that says so and holds no time.

    Args:
        case, direction, device: what is computed, and where.
        roofline: the ceilings that times are compared with.
        contenders: those to run.
        outputs: how a contender's results are computed; a dry run gives its own.
        times: passed to :func:`timing.time_call`.
    """
    inputs = case.inputs(device)
    expected = case.expected_at_ends(inputs, direction)
    rows = []
    for contender in contenders:
        if direction == "backward" and not contender.differentiable:
            continue
        where = (case.op, direction, case.name, contender.name)
        try:
            case.check(outputs(case, contender, inputs, direction), expected)
            taken = timing.time_call(timed_call(case, contender, inputs, direction), device, **times)
        except AssertionError as error:
            rows.append(results.refused(*where, f"WRONG: {error}"))
        except Exception as error:
            rows.append(results.refused(*where, f"did not run: {type(error).__name__}: {error}"))
        else:
            flops, moved = case.flops(direction), case.bytes_moved(direction)
            rows.append(results.row(*where, taken, flops, moved, roofline, "ok"))
    return rows
