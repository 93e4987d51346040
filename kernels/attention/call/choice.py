"""The choice of a backend for one call: the same rule for attention of batches, of packed sequences and decode.

An op says which names it refuses and why, what keeps fused backends from the call, and what ``auto`` takes besides
them; the rule is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from ... import backends
from .errors import wrong

HEAD_DIMS = (16, 256)  # smallest and largest of the Triton kernels, decode's apart
ENGINE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENGINE_MODS = ("softcap", "alibi")  # in the order in which the engine applies them


class Refusal(NamedTuple):
    """What an error says of a call that a backend cannot do, besides what to change."""

    argument: str
    expected: str
    received: object


def why_not_triton(
    dtype: torch.dtype, sizes: Iterable[tuple[str, int | torch.SymInt, tuple[int, int]]]
) -> Refusal | None:
    """What keeps the Triton kernels from tensors of ``dtype`` whose head dims are ``sizes``, or None.

    Args:
        sizes: for each head dim, the argument that has it, its size, and the smallest and largest that will do.
    """
    if dtype == torch.float64:
        return Refusal("q", "float32, bfloat16 or float16", dtype)
    for name, size, (low, high) in sizes:
        if not low <= size <= high:
            return Refusal(name, f"a head dim from {low} to {high}", size)
    return None


def why_not_engine(dtype: torch.dtype, mods: tuple[str, ...]) -> Refusal | None:
    """What keeps the C++ engine from tensors of ``dtype`` and from the score mods of a call, or None."""
    if dtype not in ENGINE_DTYPES:
        return Refusal("q", "float32, bfloat16 or float16", dtype)
    others = [name for name in mods if name not in ENGINE_MODS]
    if others:
        return Refusal("score_mod", "softcap and alibi_slopes alone", repr(others[0]))
    return None


def choose(
    backend: str,
    device: torch.device,
    *,
    operation: str,
    kernels: str,
    refused: Mapping[str, tuple[str, str, str]],
    unfit: Mapping[str, Refusal | None],
    otherwise: tuple[str, str],
) -> str:
    """The backend that runs; one given by name runs or raises, ``auto`` chooses and says at INFO what and why.

    Args:
        backend: what the call asks for; ``auto`` leaves it to ``use_backend``, to FUSEMESH_BACKEND and to this rule.
        device: of the call's tensors.
        operation: what the message at INFO calls the op.
        kernels: by which name ``backends.PROVEN_ON_GPU`` knows its Triton kernels.
        refused: the names that cannot do this call: (expected, received, remedy) of the error about ``backend``.
        unfit: what keeps ``triton`` and ``cpu`` from this call, None where nothing does.
        otherwise: (backend, why) that ``auto`` takes where neither of them is fit: Triton only on GPUs where it is
            proven, the engine on CPUs.

    Raises:
        ValueError: no such backend, or the one given by name cannot do this call or not run here.
    """
    name = backends.requested(backend)
    if name in refused:
        expected, received, remedy = refused[name]
        raise wrong("backend", expected, received, remedy)
    refusal = unfit.get(name)
    if refusal is not None:
        others = " or ".join(repr(other) for other in ("auto", "reference", "torch") if other not in refused)
        expected = f"{refusal.expected} for backend={name!r}"
        raise wrong(refusal.argument, expected, refusal.received, f"use backend={others}")
    if name != "auto":
        backends.require(name, device)
        return name
    if unfit["triton"] is None and backends.proven(kernels, device):
        otherwise = ("triton", "proven on this GPU")
    elif unfit["cpu"] is None and backends.why_unavailable("cpu", device) is None:
        otherwise = ("cpu", "the C++ engine")
    name, why = otherwise
    if not torch.compiler.is_compiling():
        backends.announce(operation, name, why)
    return name
