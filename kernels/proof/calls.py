"""The calls of ops as their proof sees them: computed by Triton, told apart, and tried in small."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.call.options import Call
from ..attention.decode.spec import DecodeCall
from ..backend_record import implementation
from ..vocab_loss.chunked import Head
from . import attention, first_use, linear, vocab_loss
from . import decode as decode_trials
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
    operation: str, tensors: tuple[Any, ...], call: Call, values: list[Any], keep_rest: bool, by_name: bool
) -> Any:
    """Return out, lse and, if it is to be kept, out's rest by Triton's kernels, or None: see :func:`first_use.run`.

    Args:
        operation: ``attention`` or ``attention_varlen``.
        tensors: q, k, v.
        values: what the op carries of ``call``.
    """
    q, k, v = tensors
    real = attention.Real(implementation("triton", operation), q, k, v, call, keep_rest=keep_rest)
    return first_use.run(_Attention(f"{operation}_forward", (*tensors, *values, keep_rest), real), by_name)


def attention_backward(
    operation: str, tensors: tuple[Any, ...], call: Call, bias_grad: bool, values: list[Any], by_name: bool
) -> Any:
    """Return dq, dk, dv, dbias and dsinks by Triton's kernels, or None: see :func:`first_use.run`.

    Args:
        operation: ``attention`` or ``attention_varlen``.
        tensors: do, q, k, v, out, lse, dlse, out_rest.
        values: what the op carries of ``call``.
    """
    do, q, k, v, *saved = tensors
    real = attention.Real(implementation("triton", operation), q, k, v, call, (do, *saved), bias_grad)
    return first_use.run(_Attention(f"{operation}_backward", (*tensors, *values, bias_grad), real), by_name)


@dataclass(frozen=True)
class _Decode:
    """A step of decode."""

    arguments: tuple[Any, ...]
    real: DecodeCall
    operation = "attention_decode"
    limit = ""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.real.q.device

    def compute(self) -> Any:
        """Return the results of the op; the caches are appended to."""
        return implementation("triton", "attention_decode").decode(self.real)

    def trials(self, exactly: bool) -> Iterable[Trial]:
        """Yield small calls."""
        return decode_trials.trials(self.real, exactly)


def decode(call: DecodeCall, values: list[Any], by_name: bool) -> Any:
    """Return out and lse by Triton's kernels, or None: see :func:`first_use.run`.

    Args:
        values: what the op carries of ``call``.
    """
    return first_use.run(_Decode(tuple(values), call), by_name)


@dataclass(frozen=True)
class _Linear:
    """A forward or backward of a linear layer."""

    operation: str
    arguments: tuple[Any, ...]
    device: torch.device
    real: linear.Forward | linear.Backward
    limit = ""

    def compute(self) -> Any:
        """Return the results of the op."""
        return self.real.compute()

    def trials(self, exactly: bool) -> Iterable[Trial]:
        """Yield small calls; their sizes always keep their factors of 2."""
        return self.real.trials()


def linear_forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    w_up: torch.Tensor | None,
    activation: str | None,
    flags: dict[str, Any],
    by_name: bool,
) -> Any:
    """Return y, slope and slope_up by Triton's kernel, or None: see :func:`first_use.run`."""
    real = linear.Forward(x, w, bias, w_up, activation, flags)
    arguments = (x, w, bias, w_up, activation, flags["save_slope"], flags["save_slope_up"])
    return first_use.run(_Linear("linear_forward", arguments, x.device, real), by_name)


def linear_backward(tensors: tuple[Any, ...], flags: dict[str, bool], by_name: bool) -> Any:
    """Return dx, dw, dbias and dw_up by Triton's kernels, or None: see :func:`first_use.run`.

    Args:
        tensors: dy, x, w, w_up, slope, slope_up.
    """
    dy, x, w, w_up, slope, slope_up = tensors
    arguments = (*tensors, *flags.values())
    return first_use.run(
        _Linear("linear_backward", arguments, dy.device, linear.Backward(dy, x, w, w_up, slope, slope_up, flags)),
        by_name,
    )


@dataclass(frozen=True)
class _VocabLoss:
    """A forward or backward of the head's product with the cross entropy."""

    operation: str
    arguments: tuple[Any, ...]
    device: torch.device
    real: vocab_loss.Forward | vocab_loss.Backward
    limit = ""

    def compute(self) -> Any:
        """Return the results of the op."""
        return self.real.compute()

    def trials(self, exactly: bool) -> Iterable[Trial]:
        """Yield small calls; their sizes always keep their factors of 2."""
        return self.real.trials()


def vocab_loss_forward(h: torch.Tensor, head: Head, local: torch.Tensor, by_name: bool) -> Any:
    """Return the sums by Triton's kernel, or None: see :func:`first_use.run`."""
    real = vocab_loss.Forward(h, head, local)
    arguments = (h, head.weight, head.bias, local, head.scale, head.softcap)
    return first_use.run(_VocabLoss("vocab_loss_forward", arguments, h.device, real), by_name)


def vocab_loss_backward(
    rows: torch.Tensor,
    h: torch.Tensor,
    head: Head,
    local: torch.Tensor,
    wanted: tuple[bool, bool, bool],
    by_name: bool,
) -> Any:
    """Return the gradients of h, weight and bias by Triton's kernel, or None: see :func:`first_use.run`."""
    real = vocab_loss.Backward(rows, h, head, local, wanted)
    arguments = (rows, h, head.weight, head.bias, local, head.scale, head.softcap, *wanted)
    return first_use.run(_VocabLoss("vocab_loss_backward", arguments, h.device, real), by_name)
