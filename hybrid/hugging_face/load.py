"""load_pretrained(): a Hugging Face folder into a model, whole or on a mesh, each rank reading the bytes of its parts.

Names, shapes and dtypes are checked on every rank before a byte is read. Then each rank reads its parts where they are
to stand. What several ranks of one dp replica hold alike (norms under tp, repeated key heads, a tied weight on two
stages) is read by one of them, into its own part, and sent from there; so a rank holds its shard and one piece of a
tensor, and the ranks of a replica ask together for no more than the files hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..checkpoint import together
from ..placed import PlacedPart, make_empty
from .folder import Folder, check_files, read_folder
from .initial import set_initial_values
from .names import Match, check_tensors, check_tied, match, own_state
from .parts import Parts
from .ties import untie_as_saved


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, by the names on disk; the same on every rank but for ``bytes_requested``.

    Args:
        missing: names that the model's class would save and the folder lacks.
        unexpected: tensors of the folder that the model has no place for.
        newly_initialised: of ``missing``, those that were drawn by the model's class: they are to be trained.
        tied: groups of names that are one tensor.
        bytes_requested: by this rank, of the files.
        notes: what a user should know of the folder, one line each.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    newly_initialised: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    bytes_requested: int
    notes: tuple[str, ...] = ()


def load_pretrained(
    model: nn.Module,
    folder: Folder | str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Load the tensors of a folder into ``model``, in place.

    With a model on a mesh every rank calls it. One on meta is given memory; buffers that no folder holds are computed.

    Args:
        model: of a class of transformers, whole, or from :func:`fusemesh.hybrid.apply.parallelize` in any layout.
        folder: from :func:`read_folder`, or its path, which one rank reads for all.
        dtype: of the floating-point parameters and saved buffers; None keeps the model's own. What the model's class
            keeps in fp32 stays so.
        seed: of what the folder lacks, a new head; the same in every layout.
        device: for a model on meta that is on no mesh; None is the CPU.

    Raises:
        ValueError: on every rank; the folder cannot be loaded, or is not this model's.
    """
    placed = any(isinstance(module, PlacedPart) for module in model.modules())
    if not isinstance(folder, Folder):
        path = folder
        folder = together.on_first_rank(lambda: read_folder(path)) if placed else read_folder(path)
    held: Folder = folder
    everywhere: Callable[[Callable[[], Any]], list[Any]] = together.on_every_rank if placed else (lambda act: [act()])
    if not placed:
        untie_as_saved(model, held)
    found: list[tuple[Match, dict[str, torch.Tensor]]] = []

    def check() -> tuple[list[str], list[str], list[tuple[str, ...]], set[str]]:
        state = own_state(model)
        matched = match(model, held, state)
        check_tied(model, state, matched.tied)
        check_tensors(held, matched, state)
        check_files(held)
        found.append((matched, state))
        missing = [matched.sources[name].name for name in matched.missing]
        return missing, sorted(matched.ignored), matched.tied, set(matched.used)

    checked = everywhere(check)
    matched, before = found[0]
    _give_memory(model, before, dtype, device)
    state = own_state(model, before)
    check_tied(model, state, matched.tied)
    rank = together.rank() if placed else 0
    parts = Parts(held, matched, state, _replica(model))
    shared = parts.shared() if placed else {}
    requested = everywhere(lambda: parts.read(shared, rank))[rank]
    parts.send(shared, rank)
    everywhere(lambda: set_initial_values(model, state, [*matched.missing, *matched.computed], seed))
    check_tied(model, own_state(model, before), matched.tied)
    used = {name for part in checked for name in (*part[1], *part[3])}
    missing = tuple(dict.fromkeys(name for part in checked for name in part[0]))
    return LoadReport(
        missing=missing,
        unexpected=tuple(name for name in held.tensors if name not in used),
        newly_initialised=missing,
        tied=tuple(dict.fromkeys(group for part in checked for group in part[2])),
        bytes_requested=requested,
        notes=held.notes,
    )


def _give_memory(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Give the model its dtype, and memory if it is on meta."""
    if dtype is not None:
        _cast(model, dtype)
    if not any(value.is_meta for value in state.values()):
        return
    on_mesh = next((value for value in state.values() if isinstance(value, DTensor)), None)
    if on_mesh is None:
        make_empty(model, lambda: model.to_empty(device=device or "cpu"))
        return
    kind = on_mesh.device_mesh.device_type
    model.to_empty(device=torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a state dict holds, but for what the model's class keeps in fp32."""
    saved = model.state_dict().keys()
    kept = {
        name: (module, own, buffer)
        for prefix, module in model.named_modules()
        for own, buffer in module.named_buffers(recurse=False)
        if (name := f"{prefix}.{own}" if prefix else own) not in saved
    }
    model.to(dtype)
    for module, own, buffer in kept.values():
        setattr(module, own, buffer)
    for name, module in model.named_modules():
        if any(re.search(rf"(^|\.){pattern}$", name) for pattern in compat.kept_in_fp32(model, dtype)):
            module.to(torch.float32)


def _replica(model: nn.Module) -> int:
    """Return this rank's place on dp: the ranks of one place hold every tensor among themselves."""
    mesh = next((x.device_mesh for x in model.parameters() if isinstance(x, DTensor)), None)
    if mesh is None or "dp" not in (mesh.mesh_dim_names or ()):
        return 0
    return mesh.get_local_rank("dp")
