"""Numbers, flags and pairs as callers give them, in Python's own types: the one place that says which are taken.

Python's and numpy's numbers, 0-d arrays and 0-d tensors are taken, as PyTorch's functions take them; a bool counts as 0
or 1, so that ``dropout_p=self.training and 0.1`` works. Each function returns None for what it does not take, and the
caller raises the error that names the argument. Python's own numbers come first: they are almost all of the calls, and
the ones that torch.compile traces. A tensor is read on the host, which waits for its device.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...backend_record import has_derivative

_LEAST, _MOST = -(2**63), 2**63 - 1


def as_number(value: Any) -> float | None:
    """Return a real number as a float; None for strings, complex numbers, and tensors with a gradient or dimensions."""
    if not isinstance(value, (int, float)):
        if isinstance(value, torch.Tensor):
            # PyTorch refuses it too: the result would not depend on it as far as autograd is concerned.
            if value.dim() != 0 or has_derivative(value):
                return None
        elif getattr(value, "ndim", 0) != 0 or not hasattr(type(value), "__float__") or np.iscomplexobj(value):
            return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def as_integer(value: Any) -> int | None:
    """Return an integer as an int, or as the symbol that it is.

    None for tensors (see :func:`element`), for floats, and for integers beyond the 64 bits in which ops carry them.
    """
    if isinstance(value, int):
        number = int(value) if isinstance(value, bool) else value
    elif isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    elif isinstance(value, torch.Tensor) or not hasattr(type(value), "__index__"):
        return None
    else:
        try:
            number = operator.index(value)
        except TypeError:
            return None
    # A number that torch.compile traces may be a symbol, which it would have to decide.
    return number if torch.compiler.is_compiling() or _LEAST <= number <= _MOST else None


def as_flag(value: Any) -> bool | None:
    """Return True or False, Python's or numpy's, as a bool; None for whatever else Python would call true or false."""
    if isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, (np.bool_, torch.SymBool)) else None


def as_truth(value: Any) -> bool | None:
    """Return the truth of a bool, a number, one element of a tensor or array, or of None; None for strings and lists.

    For signatures of libraries that convert flags to C++'s bool, which takes all of these.
    """
    if isinstance(value, bool):
        return value
    if not hasattr(type(value), "__bool__"):
        return None
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def as_pair(value: Any) -> tuple[Any, Any] | None:
    """Return the two elements of a sequence, array or tensor, tensors as numbers; None for whatever else."""
    if isinstance(value, (tuple, list)):
        parts = value
    elif getattr(value, "ndim", 0) == 1 or (isinstance(value, Sequence) and not isinstance(value, (str, bytes))):
        parts = tuple(value) if len(value) == 2 else ()
    else:
        return None
    if len(parts) != 2:
        return None
    first, second = parts
    return element(first), element(second)


def element(value: Any) -> Any:
    """Return the one element of a tensor or array as a Python number; whatever else as it is."""
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or has_derivative(value):
            return value
        try:
            number = value.item()
        except RuntimeError:  # it has no contents: on meta, or fake
            return value
        # PyTorch's operators take a complex number on the real axis for a real one, and that for the integer it may be.
        if isinstance(number, complex) and number.imag == 0:
            number = number.real
        return int(number) if isinstance(number, float) and number.is_integer() else number
    is_one = getattr(value, "size", None) == 1 and hasattr(value, "item")
    return value.item() if is_one else value
