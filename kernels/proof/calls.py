"""The calls of ops as their proof sees them: computed by Triton, told apart, and tried in small."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.call.options import Call
from ..attention.decode.spec import DecodeCall
from ..backend_record import implementation
from . import attention, decode, first_use, linear
from .trial import Trial


@dataclass(frozen=True)
class _Attention:
    """A forward or backward of attention, of batches or packed."""

    operation: str
    arguments: tuple[Any, ...]
    real: attention.Real

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.real.q.device

    @property
    def limit(self) -> str:
        """Lengths that a user's mod allows, where they are shorter than those of a whole trial."""
        return attention.limit(self.real)

    def compute(self) -> Any:
        """Return the results of the op."""
        return self.real.compute()

    def trials(self, exactly: bool) -> Iterable[Trial]:
        """Yield small calls."""
        return attention.trials(self.real, exactly)


def attention_forward(
    operation: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, values: list[Any], by_name: bool
) -> Any:
    """Return out and lse by Triton's kernels, or None: see :func:`first_use.run`.

    Args:
        operation: ``attention`` or ``attention_varlen``.
        values: what the op carries of ``call``.
    """
    real = attention.Real(implementation("triton", operation), q, k, v, call)
    return first_use.run(_Attention(f"{operation}_forward", (q, k, v, *values), real), by_name)


def attention_backward(
    operation: str, tensors: tuple[Any, ...], call: Call, bias_grad: bool, values: list[Any], by_name: bool
) -> Any:
    """Return dq, dk, dv, dbias and dsinks by Triton's kernels, or None: see :func:`first_use.run`.

    Args:
        operation: ``attention`` or ``attention_varlen``.
        tensors: do, q, k, v, out, lse, dlse.
        values: what the op carries of ``call``.
    """
    do, q, k, v, out, lse, dlse = tensors
    real = attention.Real(implementation("triton", operation), q, k, v, call, (do, out, lse, dlse), bias_grad)
    return first_use.run(_Attention(f"{operation}_backward", (*tensors, *values, bias_grad), real), by_name)
