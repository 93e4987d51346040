"""Parts that the cases share: names of dtypes, random tensors, names of cases, bound score mods."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from ...attention.call import score_mods
from ...attention.call.spec import FP8

Tensors = dict[str, torch.Tensor]
Inputs = dict[str, Any]  # tensors by name; None or missing where the case has not got one
DIRECTIONS = ("forward", "backward")
# Those that tests and tables run through; fp64 is for references, fp8 for GPUs that have it.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL_DTYPES = {**DTYPES, "fp64": torch.float64, "fp8": FP8}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of ``dtype``."""
    return next(name for name, known in ALL_DTYPES.items() if known == dtype)


def heads_name(heads: int, kv_heads: int) -> str:
    """Return ``H8``, or ``H8/2`` where keys have fewer heads."""
    return f"H{heads}" if heads == kv_heads else f"H{heads}/{kv_heads}"


def dims_name(dim: int, v_dim: int) -> str:
    """Return ``D64``, or ``D192/128`` where values have another head dimension."""
    return f"D{dim}" if dim == v_dim else f"D{dim}/{v_dim}"


def features_name(case: Any, without: Iterable[str]) -> list[str]:
    """Return ``name=value`` for every field that is not the default, but for the fields named in ``without``."""
    shown = []
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if field.name not in without and value != field.default:
            shown.append(field.name if value is True else f"{field.name}={value}".replace(" ", ""))
    return shown


def broadcast_shape(dims: str, sizes: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Return a shape [B, H, Sq, Sk] of which the dimensions not named in ``dims``, a subset of "bhmn", are 1."""
    return tuple(size if name in dims else 1 for name, size in zip("bhmn", sizes, strict=True))


def table_mod(table: torch.Tensor) -> score_mods.BoundScoreMod:
    """Return the user's score mod of the cases, bound to its table."""
    # Only cases with the mod need Triton's language.
    from ...testing.table_mod import TABLE_MOD

    return TABLE_MOD(table, weight=0.25)


def numbers_of(mods: list[score_mods.BoundScoreMod]) -> dict[str, Any]:
    """Return the mods as fields of an AttentionSpec."""
    return {
        "mods": tuple(bound.mod.name for bound in mods),
        "params": tuple(number for bound in mods for number in bound.params),
    }


def aux_of(mods: list[score_mods.BoundScoreMod]) -> tuple[torch.Tensor, ...]:
    """Return the tensors of the mods, those of the first one first."""
    return tuple(tensor for bound in mods for tensor in bound.aux)
