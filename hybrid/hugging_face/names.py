"""Which tensor of a Hugging Face folder each tensor of a model is: prefixes, old names, tied names, what may miss.

The rules are from_pretrained's: a folder of a base model serves a model with a head and the other way round; old names
of norms are known; a class says which names may be missing or more. Where from_pretrained would go on with a part of
the model at random, this refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import compat
from .folder import Folder, TensorOnDisk
from .sources import Source, sources_of

# Names of norms in folders that TensorFlow's or the first PyTorch models have written.
_OLD = ((re.compile(r"LayerNorm\.gamma"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta"), "LayerNorm.bias"))
# Buffers that older versions of many classes have saved.
_NO_LONGER_SAVED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Match:
    """How a model and a folder fit.

    Args:
        found: for each name of the model's state dict that is in the folder the tensor's name there.
        sources: for each name of the model's state dict where it stands.
        doubles: for a name in ``found`` further tensors of the folder that are tied to it, and must be equal.
        tied: groups of names on disk of the model's that are one tensor.
        missing: names of the state dict that the folder lacks and that the model's class would save.
        computed: those that it does not save: their values follow from the config.
        used: names in the folder that ``found`` and ``doubles`` name.
        ignored: names in the folder that the model's class does without, as it says.
    """

    found: dict[str, str]
    sources: dict[str, Source]
    doubles: dict[str, list[str]]
    tied: list[tuple[str, ...]]
    missing: list[str]
    computed: list[str] = field(default_factory=list)
    used: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()


def match(model: nn.Module, folder: Folder, state: Mapping[str, torch.Tensor] | None = None) -> Match:
    """Return how the names of ``model``, whole or on a mesh, fit the folder's.

    Args:
        state: from :func:`own_state`, where it is known.

    Raises:
        ValueError: two tensors of the folder are one of the model's, or tensors are missing without which it is not the
            model of the folder; all are named.
    """
    state = own_state(model) if state is None else state
    sources = sources_of(model)
    ties = tied_names(model, state)
    wanted = {source.name for source in sources.values()} | {name for group in ties for name in group}
    held = _names_on_disk(model, folder, wanted)
    group_of = {name: group for group in ties for name in group}
    found: dict[str, str] = {}
    doubles: dict[str, list[str]] = {}
    lacking = []
    for name, source in sources.items():
        present = [held[other] for other in group_of.get(source.name, (source.name,)) if other in held]
        if not present:
            lacking.append(name)
            continue
        found[name] = present[0]
        if len(present) > 1:
            doubles[name] = present[1:]
    may_lack = compat.may_be_missing(model)
    computed = [name for name in lacking if _matches(may_lack, sources[name].name)]
    missing = [name for name in lacking if name not in computed]
    _check_missing(model, folder, sorted({sources[name].name for name in missing}))
    used = {*found.values(), *(other for others in doubles.values() for other in others)}
    may_have = [*compat.may_be_unexpected(model), *_NO_LONGER_SAVED]
    ignored = {name for name in folder.tensors if name not in used and _matches(may_have, name)}
    return Match(found, sources, doubles, ties, missing, computed, frozenset(used), frozenset(ignored))


def own_state(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Return what the state dict names: the parameters and buffers themselves, tied ones as one object.

    Args:
        names: the state dict's, where they are known: to make one of a model on a mesh takes a while.
    """
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {name: held[name] for name in (names or model.state_dict()) if name in held}


def tied_names(model: nn.Module, state: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Return the groups of names that are one tensor, each with the name first under which transformers saves it.

    Of a stage of a pipeline the names on other stages are among them.
    """
    groups: dict[str, list[str]] = {}
    for target, source in compat.tied_weights(model).items():
        groups.setdefault(source, [source]).append(target)
    by_object: dict[int, list[str]] = {}
    for name, value in state.items():
        by_object.setdefault(id(value), []).append(name)
    for names in by_object.values():
        known = next((group for group in groups.values() if any(name in group for name in names)), None)
        if known is not None:
            known.extend(name for name in names if name not in known)
        elif len(names) > 1:
            groups[names[0]] = names
    return [tuple(group) for group in groups.values() if any(name in state for name in group)]


def check_tied(model: nn.Module, state: Mapping[str, torch.Tensor], ties: Iterable[tuple[str, ...]]) -> None:
    """Raise ValueError unless the names of each group are one object: its gradients would be those of two weights."""
    for group in ties:
        names = [name for name in group if name in state]
        for other in names[1:]:
            if state[other] is not state[names[0]]:
                raise ValueError(
                    f"model: expected {names[0]!r} and {other!r} to be one parameter, as config.tie_word_embeddings "
                    f"says, received two of {type(model).__name__}; torch's to_empty() unties: call "
                    "model.tie_weights() after it, or give the model as it was built on meta"
                )


def check_tensors(folder: Folder, matched: Match, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, naming what differs, unless each tensor has on disk the model's shape and kind of dtype."""
    wrong = []
    ends: dict[str, int] = {}
    for name, on_disk in matched.found.items():
        source = matched.sources[name]
        if source.length is not None:
            ends[on_disk] = max(ends.get(on_disk, 0), source.start + source.length)
    for name, first in matched.found.items():
        for on_disk in (first, *matched.doubles.get(name, ())):
            tensor, source, own = folder.tensors[on_disk], matched.sources[name], state[name]
            shape = list(own.shape)[::-1] if source.transposed else list(own.shape)
            if source.length is not None:
                shape[source.dim] = ends[on_disk]
            if tensor.shape != tuple(shape):
                wrong.append(f"{on_disk!r} of {tensor.file}: expected shape {shape}, received {list(tensor.shape)}")
            elif own.is_floating_point() != tensor.dtype.is_floating_point:
                wrong.append(f"{on_disk!r} of {tensor.file}: expected {own.dtype}, received {tensor.dtype}")
    if wrong:
        raise ValueError(
            f"{folder.path}: config.json and the files are not of one model: {'; '.join(dict.fromkeys(wrong[:5]))}"
            f"{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}; take all files of the folder from one place, "
            "and do not change sizes in config.json"
        )


def part_on_disk(tensor: TensorOnDisk, source: Source, part: tuple[slice, ...]) -> tuple[slice, ...]:
    """Return the part of the tensor on disk that a part of the model's tensor is, before it is transposed."""
    found = list(part[::-1] if source.transposed else part)
    if source.length is not None:
        own = found[source.dim]
        found[source.dim] = slice(own.start + source.start, own.stop + source.start)
    assert len(found) == len(tensor.shape)
    return tuple(found)


def _names_on_disk(model: nn.Module, folder: Folder, wanted: set[str]) -> dict[str, str]:
    """Return for each of the model's names on disk that the folder has the folder's name of it."""
    prefix = getattr(model, "base_model_prefix", "")
    held: dict[str, str] = {}
    for name in folder.tensors:
        own = own_name(name, prefix, wanted)
        if own in held and own in wanted:
            raise ValueError(
                f"{folder.path}: expected one tensor for {own!r}, received {held[own]!r} and {name!r}, which are "
                "names of the same; save the folder again with the one of them that is right"
            )
        held[own] = name
    return held


def own_name(name: str, prefix: str, wanted: set[str]) -> str:
    """Return the model's own name for a name of the folder; its prefix is left out, or put before, where that fits."""
    new = name
    for old, now in _OLD:
        new = old.sub(now, new)
    for candidate in (new, name):
        if prefix and candidate.startswith(f"{prefix}.") and candidate[len(prefix) + 1 :] in wanted:
            return candidate[len(prefix) + 1 :]
        if prefix and f"{prefix}.{candidate}" in wanted:
            return f"{prefix}.{candidate}"
        if candidate in wanted:
            return candidate
    # Classes of one family may call their body by two names, as Llama's for spans; from_pretrained goes on without it.
    other = f"{prefix}.{new.partition('.')[2]}"
    return other if other in wanted else new


def _check_missing(model: nn.Module, folder: Folder, names: list[str]) -> None:
    """Raise ValueError if what is missing is no new head: from_pretrained would draw it at random and go on."""
    prefix = getattr(model, "base_model_prefix", "")
    prefix = f"{prefix}." if prefix and hasattr(model, prefix) else None
    tables = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight.requires_grad  # else they are computed, as sinusoids are
    }
    body = [
        name
        for name in names
        if re.search(r"\.\d+\.", name)  # in a list of blocks
        or name in tables
        or (prefix is not None and name.startswith(prefix) and "pooler" not in name)
    ]
    if body:
        shown = ", ".join(map(repr, body[:5])) + (", ..." if len(body) > 5 else "")
        raise ValueError(
            f"{folder.path}: expected all tensors of {type(model).__name__} but those of a new head, received none for "
            f"{len(body)} of its names on disk: {shown}; the files are of another model than config.json says, or "
            "not all of it: take all files of the folder from one place"
        )


def _matches(patterns: Iterable[Any], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
