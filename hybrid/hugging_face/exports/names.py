"""Under which names a model's tensors are written: the model's own, tied ones once, without what is not saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ... import compat
from ..names import own_name
from ..sources import Source, sources_of

_WHOLE = "fusemesh_whole_names"


@dataclass(frozen=True)
class WholeNames:
    """The names of a whole model's state dict, in its order, and which are tied: a name to the first of its kind."""

    order: tuple[str, ...]
    tied: Mapping[str, str]


def remember_whole_names(model: nn.Module) -> None:
    """Let every Hugging Face model in ``model``, which is whole, know its names and ties when it is cut into stages."""
    for module in model.modules():
        if is_hugging_face(module):
            vars(module)[_WHOLE] = _names_of(module)


def is_hugging_face(module: nn.Module) -> bool:
    """Return whether this is a Hugging Face model."""
    return hasattr(module, "save_pretrained") and hasattr(module, "config")


def whole_names(model: nn.Module) -> WholeNames:
    """Return the names of the whole model, of which this one may be a stage."""
    found: WholeNames | None = vars(model).get(_WHOLE)
    own = _names_of(model)
    # Others, if the user has changed the model since.
    return found if found is not None and set(own.order) <= set(found.order) else own


def _names_of(model: nn.Module) -> WholeNames:
    objects: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    objects.update(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = {}
    order = tuple(model.state_dict())
    for name in order:
        if name in objects and first.setdefault(id(objects[name]), name) != name:
            tied[name] = first[id(objects[name])]
    return WholeNames(order, tied)


def names_on_disk(model: nn.Module, known: Iterable[str] = ()) -> dict[str, Source]:
    """Return where each tensor that is written stands on disk, by its name in this rank's state dict.

    Of tied names those are left out that from_pretrained ties again; if all are such, one stays.

    Args:
        known: the names in the folder that the model came from, of which the one that is there stays.
    """
    whole, sources = whole_names(model), sources_of(model)
    left_out, prefix = compat.names_not_saved(model), getattr(model, "base_model_prefix", "")
    held = renamed(whole.order, known, prefix)
    groups: dict[str, list[str]] = {}
    for name in whole.order:
        if name not in left_out:
            groups.setdefault(whole.tied.get(name, name), []).append(name)
    kept = set()
    for names in groups.values():
        chosen = names
        if len(names) > 1:
            chosen = [name for name in names if not compat.is_tied_again(model, name)] or names[:1]
            there = [name for name in names if name in held]
            if there and not any(name in there for name in chosen):
                chosen = there[:1]
        kept.update(chosen)
    return {name: source for name, source in sources.items() if name in kept}


def renamed(names: Iterable[str], known: Iterable[str], prefix: str) -> dict[str, str]:
    """Return what the folder that a model came from calls each of its tensors; those that it has not are left out."""
    wanted = set(names)
    found = {own_name(name, prefix, wanted): name for name in known}
    return {name: found[name] for name in names if name in found}
