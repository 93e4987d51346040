"""How errors about arguments are worded (leaf)."""

from __future__ import annotations

import torch


def wrong(name: str, expected: str, received: object, remedy: str) -> ValueError:
    """The one form of an error about an argument."""
    return ValueError(f"{name}: expected {expected}, received {received}; {remedy}")


# What to say where a shape is wrong as it is if the sequence stands before the heads.
TRANSPOSE = "heads stand second, [B, H, S, D]: where they stand third, pass x.transpose(1, 2)"


def or_transpose(remedy: str, fits: bool, transpose: str = TRANSPOSE) -> str:
    """Return the remedy behind that for tensors in the other order, if what was received would be right for them."""
    return f"{transpose}; {remedy}" if fits else remedy


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "(" + ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) + ")"


def short(value: object) -> str:
    """A value as an error message shows it: a tensor by its shape and dtype, since its contents may be on a device."""
    if isinstance(value, torch.Tensor):
        gradient = ", requires_grad=True" if value.requires_grad else ""
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}{gradient}"
    parts = value if isinstance(value, (tuple, list)) else (value,)
    is_beyond = any(isinstance(x, int) and not -(2**63) <= x < 2**63 for x in parts)
    return f"{value!r}, beyond 64 bits" if is_beyond else repr(value)
