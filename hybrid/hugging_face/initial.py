"""Values of tensors that a folder lacks: a new head's, drawn by the model's own class, alike in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..tensor.modules import ColumnParallelLinear, RowParallelLinear, own_slices


@torch.no_grad()
def set_initial_values(model: nn.Module, state: Mapping[str, torch.Tensor], names: list[str], seed: int) -> None:
    """Give the tensors ``names`` of the model the values with which its class begins, each from a seed of its own.

    Every rank draws a tensor whole and keeps its part, so that all layouts begin with the same.

    Raises:
        ValueError: the model's class sets no value for one of them.
    """
    stand_ins = {name: _plain(module) for name, module in model.named_modules() if _is_converted(module)}
    done: set[int] = set()
    for name in names:
        own = state[name]
        if id(own) in done:
            continue
        done.add(id(own))
        value = whole_initial_value(model, name, own, seed, stand_ins)
        local = own.to_local() if isinstance(own, DTensor) else own
        local.copy_(value[own_slices(own)])


def whole_initial_value(
    model: nn.Module, name: str, own: torch.Tensor, seed: int, stand_ins: Mapping[str, nn.Module]
) -> torch.Tensor:
    """Return the whole tensor, on the CPU, with which the model's class begins."""
    value = torch.empty(own.shape, dtype=own.dtype)
    found = set()
    for filling in (0, 1):  # what has one value after both has been set
        value.fill_(filling)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big"))
            compat.initial_value(model, name, value, stand_ins)
        # By their hash: a second copy of a large embedding may not fit.
        found.add(hashlib.blake2b(value.reshape(-1).view(torch.uint8).numpy().data).digest())
    if len(found) > 1:
        raise ValueError(
            f"model: expected initial values of {name!r}, which the folder lacks, received none from "
            f"{type(model).__name__}'s _init_weights; load a folder that has it"
        )
    return value


def _is_converted(module: nn.Module) -> bool:
    return isinstance(module, (ColumnParallelLinear, RowParallelLinear))


def _plain(module: nn.Module) -> nn.Module:
    """Return a torch.nn.Linear, by which a model's class knows what to draw, in the place of a tensor parallel one."""
    with torch.device("meta"):
        return nn.Linear(module.in_features, module.out_features, bias=getattr(module, "bias", None) is not None)  # type: ignore[arg-type]
