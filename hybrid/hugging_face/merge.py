"""A checkpoint of a pretrained model's training as a Hugging Face folder: in one process, part by part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.checksums import check_files
from ..checkpoint.chunks import StoredModel
from ..checkpoint.folders import CheckpointError, damaged, latest, read_marker
from ..checkpoint.together import on_every_rank
from .export import ExportReport, Options, Plan, plan, write_plan
from .exports import documents
from .exports.names import names_on_disk, whole_names
from .exports.shards import Entry, SourceFiles
from .exports.slices import Box, on_disk
from .exports.target import Files
from .folder import Folder
from .sources import Source

# In the ``metadata`` of a checkpoint's state.
EXPORT = "export"
_FORMAT = 1


def export_plan(model: nn.Module, folder: Folder) -> dict[str, Any]:
    """Return as JSON what :func:`merge_pretrained` must know of a model and its folder; every rank calls it.

    It goes into the checkpoint's state as ``metadata["export"]``.

    Args:
        model: in any layout.
        folder: that the model was loaded from.
    """
    source = SourceFiles.of(folder)
    chosen = names_on_disk(model, source.entries)
    own = {name: (s.name, s.dim, s.start, s.length, s.transposed) for name, s in chosen.items()}
    found = {name: place for part in on_every_rank(lambda: own) for name, place in part.items()}
    whole = whole_names(model)
    return {
        "format": _FORMAT,
        "folder": str(folder.path.absolute()),
        "prefix": getattr(model, "base_model_prefix", ""),
        "config": documents.changed_config(documents.config_text(folder.path), model),
        "source": source.to_json(),
        "tensors": {name: found[name] for name in whole.order if name in found},
        "tied": dict(whole.tied),
    }


def merge_pretrained(
    checkpoint: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write a checkpoint's model as the Hugging Face folder that it was loaded from, with its new weights.

    In one process with no process group. Tensors are read and written one stored part after another, none of them
    larger than the largest tensor. The small files are those that the run has kept, or the folder's itself.

    Args:
        checkpoint: its folder, or a folder of checkpoints, of which the latest is taken.
        target, dtype, max_shard_size: as in :func:`~fusemesh.hybrid.hugging_face.export.export_pretrained`.
        verify: first compare all files of the checkpoint with their checksums.

    Raises:
        ValueError: no checkpoint is there, it is damaged or of no pretrained model, something else is at ``target``, or
            the small files are neither in the run's folder nor where the model came from.
        OSError: the folder cannot be written; nothing of it is left.
    """
    path = latest(checkpoint)
    marker = read_marker(path)
    known = export_of(marker["state"], path)
    if verify:
        check_files(path, marker["files"])
    small = _small_files(path, known)
    stored = StoredModel(path)
    placed = _places(stored, known, path)
    options = Options(SourceFiles.from_json(known["source"]), known["prefix"], dtype, max_shard_size)
    made = plan(_wholes(stored, placed), options)

    def write(files: Files) -> int:
        return sum(_write(files, made, source, stored, name) for name, source in placed.items())

    def write_documents(place: Path) -> None:
        documents.write(place, small, known["config"], dtype)

    return write_plan(Path(target), made, options, write, write_documents)


def export_of(state: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Return what :func:`export_plan` has put into a checkpoint's state.

    Raises:
        CheckpointError: nothing is there, or another version's.
    """
    found: dict[str, Any] | None = (state.get("metadata") or {}).get(EXPORT)
    if found is None:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r}: expected one of a model that was loaded from a Hugging Face folder, "
            "received another's; write its weights as one file by fusemesh.hybrid.checkpoint.merge"
        )
    if found.get("format") != _FORMAT:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r}: expected format {_FORMAT} of its export, received {found.get('format')}; "
            "merge it by the version of FuseMesh that wrote it"
        )
    return found


def is_pretrained(state: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's state is that of a model which :func:`merge_pretrained` writes."""
    return EXPORT in (state.get("metadata") or {})


def _small_files(checkpoint: Path, known: Mapping[str, Any]) -> Path:
    """Return the folder that holds the small files: the run's, or that of the model."""
    places = [checkpoint.parent / documents.KEPT, Path(known["folder"])]
    for place in places:
        if (place / documents.CONFIG).is_file():
            return place
    raise CheckpointError(
        f"checkpoint {str(checkpoint)!r}: expected the tokenizer's and other small files of its model in "
        f"{str(places[0])!r} or {str(places[1])!r}, found neither; copy them, with config.json, into the first of them"
    )


def _places(stored: StoredModel, known: Mapping[str, Any], checkpoint: Path) -> dict[str, Source]:
    """Return for the name of each stored tensor that is written where it stands on disk."""
    tied: Mapping[str, str] = known["tied"]
    found = {}
    for name, (on, dim, start, length, transposed) in known["tensors"].items():
        first = tied.get(name, name)
        # Of tied names some checkpoints hold one alone.
        names = (name, first, *(other for other, of in tied.items() if of == first))
        held = next((other for other in names if other in stored.tensors), None)
        if held is None:
            raise damaged(checkpoint, f"it holds no tensor {name!r}")
        found[held] = Source(on, dim, start, length, transposed)
    return found


def _wholes(stored: StoredModel, placed: Mapping[str, Source]) -> dict[str, Entry]:
    """Return the whole tensors on disk, in their dtypes in the checkpoint."""
    found: dict[str, Entry] = {}
    for name, source in placed.items():
        tensor = stored.tensors[name]
        end = on_disk(Box((0,) * len(tensor.size), tuple(tensor.size)), source).end
        if source.name in found:
            end = tuple(max(a, b) for a, b in zip(end, found[source.name].shape, strict=True))
        found[source.name] = Entry(tensor.properties.dtype, end)
    return found


def _write(files: Files, made: Plan, source: Source, stored: StoredModel, name: str) -> int:
    """Write the stored parts of a tensor in their places; return the number of bytes."""
    done, called = 0, made.names.get(source.name, source.name)
    for start, part in stored.parts(name):
        values = part.transpose(0, 1) if source.transposed else part
        done += files.write(called, on_disk(Box(start, tuple(part.shape)), source), values)
    return done
