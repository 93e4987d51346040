"""The choice of a backend for one call: the same rule for attention of batches, of packed sequences and decode.

An op says which names it refuses and why, what keeps fused backends from the call, and what ``auto`` takes besides
them; the rule is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from .. import backends
from .errors import wrong

FUSED = ("triton", "cpu")
HEAD_DIMS = (16, 256)  # smallest and largest of a fused backend, decode's apart


class Refusal(NamedTuple):
    """What an error says of a call that a backend cannot do, besides what to change."""

    argument: str
    expected: str
    received: object


def why_not_fused(
    dtype: torch.dtype, sizes: Iterable[tuple[str, int | torch.SymInt, tuple[int, int]]]
) -> Refusal | None:
    """What keeps fused backends from tensors of ``dtype`` whose head dims are ``sizes``, or None.

    Args:
        sizes: for each head dim, the argument that has it, its size, and the smallest and largest that will do.
    """
    if dtype == torch.float64:
        return Refusal("q", "float32, bfloat16 or float16", dtype)
    for name, size, (low, high) in sizes:
        if not low <= size <= high:
            return Refusal(name, f"a head dim from {low} to {high}", size)
    return None


def choose(
    backend: str,
    device: torch.device,
    *,
    operation: str,
    kernels: str,
    refused: Mapping[str, tuple[str, str, str]],
    unfit: Refusal | None,
    otherwise: tuple[str, str],
) -> str:
    """The backend that runs; one given by name runs or raises, ``auto`` chooses and says at INFO what and why.

    Args:
        backend: what the call asks for; ``auto`` leaves it to ``use_backend``, to FUSEMESH_BACKEND and to this rule.
        device: of the call's tensors.
        operation: what the message at INFO calls the op.
        kernels: by which name ``backends.PROVEN_ON_GPU`` knows its Triton kernels.
        refused: the names that cannot do this call: (expected, received, remedy) of the error about ``backend``.
        unfit: what keeps fused backends from this call (:func:`why_not_fused`).
        otherwise: (backend, why) that ``auto`` takes where Triton is not proven or unfit.

    Raises:
        ValueError: no such backend, or the one given by name cannot do this call or not run here.
    """
    name = backends.requested(backend)
    if name in refused:
        expected, received, remedy = refused[name]
        raise wrong("backend", expected, received, remedy)
    if name in FUSED and unfit is not None:
        others = " or ".join(repr(other) for other in ("auto", "reference", "torch") if other not in refused)
        expected = f"{unfit.expected} for backend={name!r}"
        raise wrong(unfit.argument, expected, unfit.received, f"use backend={others}")
    if name != "auto":
        backends.require(name, device)
        return name
    if unfit is None and backends.proven(kernels, device):
        otherwise = ("triton", "proven on this GPU")
    name, why = otherwise
    if not torch.compiler.is_compiling():
        backends.announce(operation, name, why)
    return name
