"""Tied weights, decided from the config and the file: one tensor in the model, one, two or more in the folder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .. import compat
from .folder import Folder, TensorOnDisk
from .names import Match, match
from .reading import Reader, open_folder

_EVERY = 100  # rows: of as many one is looked at


@torch.no_grad()
def untie_as_saved(model: nn.Module, folder: Folder) -> list[str]:
    """Untie the weights of a whole model that its folder holds as different tensors; return their names.

    A config may say tied where the tensors are not (T5 v1.1's always does, as transformers reads it). from_pretrained
    then leaves them apart, and so does this. It reads a hundredth of their rows; :func:`check_doubles` sees the rest.
    Called before :func:`fusemesh.hybrid.apply.parallelize`, with the same model and folder on every rank.
    """
    matched = match(model, folder)
    untied: list[str] = []
    with open_folder(folder) as reader:
        for name, others in matched.doubles.items():
            base = folder.tensors[matched.found[name]]
            for other in others:
                own = _own_name(matched, name, other, folder)
                if own is not None and own not in untied and _differ(reader, base, folder.tensors[other]):
                    untied.append(own)
    untie(model, untied)
    return untied


def check_doubles(
    folder: Folder, reader: Reader, matched: Match, name: str, own: torch.Tensor, part: tuple[slice, ...]
) -> None:
    """Raise ValueError if the folder holds another tensor for this tied one whose part is not equal."""
    for other in matched.doubles.get(name, ()):
        if not reader.equals(folder.tensors[other], part, own, transposed=matched.sources[name].transposed):
            raise ValueError(
                f"{folder.path}: expected equal tensors {matched.found[name]!r} and {other!r}, which are tied in the "
                "model, received different ones; from_pretrained would leave them apart: set tie_word_embeddings to "
                "false in config.json, or call untie_as_saved(model, folder) before parallelize()"
            )


def _own_name(matched: Match, name: str, other: str, folder: Folder) -> str | None:
    """Return the model's name for the tensor ``other`` of the folder, tied to ``name``."""
    group = next((group for group in matched.tied if name in group), ())
    # The folder's names may lack the model's prefix, or have one more.
    fitting = [own for own in group if own == other or own.endswith(f".{other}") or other.endswith(f".{own}")]
    return fitting[0] if fitting and fitting[0] != group[0] else None


def _differ(reader: Reader, one: TensorOnDisk, two: TensorOnDisk) -> bool:
    """Return whether two tensors differ in shape, dtype or one of some rows."""
    if (one.shape, one.dtype) != (two.shape, two.dtype) or not one.shape:
        return True
    for row in range(one.shape[0] // 2 % _EVERY, one.shape[0], _EVERY):
        part = (slice(row, row + 1), *(slice(0, rows) for rows in one.shape[1:]))
        values = torch.empty([1, *one.shape[1:]], dtype=one.dtype)
        reader.read(one, part, values, transposed=False)
        if not reader.equals(two, part, values, transposed=False):
            return True
    return False


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give these names of a whole model, of tied weights, a weight each of their own."""
    for name in names:
        holder, _, own = name.rpartition(".")
        module = model.get_submodule(holder)
        tied = getattr(module, own)
        setattr(module, own, nn.Parameter(torch.empty_like(tied) if tied.is_meta else tied.clone(), tied.requires_grad))
        compat.untie(model, name)
