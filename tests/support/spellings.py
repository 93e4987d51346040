"""One number, flag or pair in the types in which a caller may have it: Python's, numpy's, PyTorch's."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch


def numbers(value: float) -> dict[str, Any]:
    """The number in every type that holds it exactly (multiples of 1/4 below 256)."""
    found: dict[str, Any] = {
        "float": float(value),
        **{f"np.{dtype}": getattr(np, dtype)(value) for dtype in ("float64", "float32", "float16")},
        **{f"0-d {dtype}": torch.tensor(value, dtype=getattr(torch, dtype)) for dtype in ("float32", "bfloat16")},
        "0-d complex": torch.tensor(complex(value)),
        "0-d array": np.array(value),
        "[1]": torch.tensor([float(value)]),
        "[1] array": np.array([float(value)]),
        "Fraction": Fraction(value),
        "Decimal": Decimal(value),
    }
    if value == int(value):
        found |= integers(int(value))
    return found


def integers(value: int) -> dict[str, Any]:
    """The integer in every type of integers."""
    found: dict[str, Any] = {
        "int": value,
        **{f"np.{dtype}": getattr(np, dtype)(value) for dtype in ("int64", "int32", "int16")},
        "0-d int64": torch.tensor(value),
        "0-d int array": np.array(value),
    }
    if value in (0, 1):
        found |= {"bool": bool(value), "np.bool": np.bool_(value), "0-d bool": torch.tensor(bool(value))}
    return found


def pairs(left: int, right: int) -> dict[str, Any]:
    """Two integers in every type that flash-attn takes for two."""
    return {
        "tuple": (left, right),
        "list": [left, right],
        "array": np.array([left, right]),
        "tensor": torch.tensor([left, right]),
        "int32 tensor": torch.tensor([left, right], dtype=torch.int32),
        "float tensor": torch.tensor([left, right], dtype=torch.float32),
        "numpy's": (np.int64(left), np.int32(right)),
        "0-d tensors": (torch.tensor(left), torch.tensor(right)),
        "size": torch.Size([left, right]) if min(left, right) >= 0 else [left, right],
    }


WRONG_NUMBERS: dict[str, Any] = {
    "text": "0.5",
    "None": None,
    "complex": 0.5 + 1j,
    "list": [0.5],
    "two": torch.ones(2),
    "meta": torch.ones((), device="meta"),
    "object": object(),
}
WRONG_PAIRS: dict[str, Any] = {
    "int": 3,
    "None": None,
    "text": "21",
    "three": (1, 2, 3),
    "tensor of three": torch.tensor([1, 2, 3]),
    "matrix": torch.ones(2, 2, dtype=torch.int64),
    "halves": (1.5, 0),
    "half tensor": torch.tensor([1.5, 0.0]),
    "texts": ("1", "2"),
}
