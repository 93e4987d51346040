"""A model in any layout as a Hugging Face folder, without gathering: every rank writes its slices in their places."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.together import on_every_rank, on_first_rank, rank
from ..consistency import check_has_memory
from .exports import documents
from .exports.names import is_hugging_face, names_on_disk, renamed, whole_names
from .exports.shards import (
    MAX_SHARD_SIZE,
    Entry,
    Shard,
    SourceFiles,
    index_name,
    index_text,
    shards_like,
    shards_of_size,
    weights_name,
)
from .exports.slices import Box, Part, local_values, on_disk, own_box, whole_entries, writers
from .exports.target import Files, write_folder
from .folder import Folder, read_folder


@dataclass(frozen=True)
class ExportReport:
    """What an export has written.

    Args:
        path: of the folder.
        files: its safetensors files.
        tensors, parameters, nbytes: of all of them; tensors, elements and bytes.
        written: bytes of tensors that this rank has written.
        left_out: names of the folder that the model came from, which the model does not have.
        added: names that it did not have.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    parameters: int
    nbytes: int
    written: int
    left_out: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How the files of an export are made, beside the tensors.

    Args:
        source: the files to follow; None: none.
        prefix: of the base model, which the names in those may have or not.
        dtype: of all floating-point tensors; None: as in ``source``, or in memory.
        max_shard_size: bytes of a file; None: the files of ``source``.
        variant: of the files' names.
        into: whether the target may hold other files.
        names: what the tensors of the model's state dict are called on disk, of those that are called otherwise.
    """

    source: SourceFiles | None = None
    prefix: str = ""
    dtype: torch.dtype | None = None
    max_shard_size: int | str | None = None
    variant: str | None = None
    into: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The files of an export, and what each tensor is called in them: ``names``, of those that are called otherwise."""

    shards: list[Shard]
    names: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def entries(self) -> dict[str, Entry]:
        """Return the tensors by their names in the files."""
        return {name: entry for shard in self.shards for name, entry in shard.entries.items()}


def export_pretrained(
    model: nn.Module,
    target: str | os.PathLike[str],
    like: Folder | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    small_files: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Write a model of any layout as a Hugging Face folder; every rank calls it, and none holds more than its part.

    With ``like``, tensors have the names, dtypes and files of that folder, config.json is its own with only what
    changed, and the tokenizer's files, chat template and generation config are copied byte for byte.

    Args:
        model: whole, or from :func:`fusemesh.parallelize`.
        target: a folder that is not there, or is empty, or that an export made; it has this name only when it is whole.
        like: the folder that the model was loaded from, or what :func:`export_plan` has returned of it, if it is gone;
            None: the model's own config and dtypes.
        dtype: of all floating-point tensors; None: that of ``like``, tensor by tensor.
        max_shard_size: bytes of a file, or text such as "5GB"; None: the files of ``like``, or 5GB.
        small_files: the folder of the small files, if it is another than ``like``.

    Raises:
        ValueError: something else is at ``target``, or ``like`` is no folder of a model.
        OSError: on every rank, it cannot be written; nothing of it is left.
    """
    if not is_hugging_face(model):
        raise ValueError(
            f"export_pretrained: expected a Hugging Face model, received {type(model).__name__}; its weights "
            "are saved by fusemesh.whole_state_dict or a checkpoint"
        )
    check_has_memory("export_pretrained", model)
    if isinstance(like, (str, os.PathLike)):
        path = like
        like = on_first_rank(lambda: read_folder(path))
    source = config = None
    small = Path(small_files) if small_files is not None else None
    if isinstance(like, Folder):
        source, small, folder = SourceFiles.of(like), small or like.path, like.path
        config = on_first_rank(lambda: documents.config_text(folder))
    elif like is not None:
        source, small, config = SourceFiles.from_json(like["source"]), small or Path(like["folder"]), like["config"]
    if small is not None:
        place = small
        on_first_rank(lambda: documents.check_small_files(place))
    options = Options(source, getattr(model, "base_model_prefix", ""), dtype, max_shard_size)

    def write_documents(place: Path) -> None:
        if config is None or small is None:
            save_configs(model, place, dtype)
        else:
            documents.write(place, small, documents.changed_config(config, model), dtype)

    return export_state(model, target, options, write_documents)


def export_state(
    model: nn.Module, target: str | os.PathLike[str], options: Options, write_documents: Callable[[Path], None]
) -> ExportReport:
    """Write a model's tensors as safetensors files, beside what rank 0 writes; every rank calls it."""
    known = options.source.entries if options.source is not None else {}
    chosen = {
        name: replace(source, name=options.names[name]) if options.names.get(name, name) != name else source
        for name, source in names_on_disk(model, known).items()
    }
    state = own_state(model)
    order = {name: number for number, name in enumerate(whole_names(model).order)}
    own = [
        (name, source, Part(source.name, on_disk(own_box(state[name]), source), state[name].dtype, order[name]))
        for name, source in chosen.items()
    ]
    ranks = on_every_rank(lambda: [part for _, _, part in own])
    held = whole_entries(ranks)
    made = plan(held, options)
    entries = {name: made.entries[made.names.get(name, name)] for name in held}
    mine = writers(ranks, entries, rank())

    def write(files: Files) -> int:
        done = 0
        for name, source, part in own:
            for box in (box for box in mine.get(part.name, ()) if _inside(box, part)):
                values = local_values(state[name], source)
                if box.size:
                    values = values.narrow(0, box.start[0] - part.box.start[0], box.size[0])
                done += files.write(made.names.get(part.name, part.name), box, values)
        return done

    return write_plan(Path(target), made, options, write, write_documents)


def _inside(box: Box, part: Part) -> bool:
    """Return whether a box is made of rows of a part."""
    return all(a <= b and c <= d for a, b, c, d in zip(part.box.start, box.start, box.end, part.box.end, strict=True))


def own_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what this rank holds of the model's tensors, by the names of its state dict."""
    # Called first: it takes back what a forward has gathered.
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters.get(name, value) for name, value in state.items()}


def plan(held: Mapping[str, Entry], options: Options) -> Plan:
    """Return the files of an export.

    Args:
        held: the whole tensors in memory, in the order of the model's state dict.
    """
    source = options.source
    known = source.entries if source is not None else {}
    calls = renamed(held, known, options.prefix)
    main = _main_dtype(known)
    entries = {}
    for name, entry in held.items():
        own = entry.dtype
        if own.is_floating_point:
            before = known[calls[name]].dtype if name in calls else main or own
            own = options.dtype or (before if before.is_floating_point else own)
        entries[name] = Entry(own, entry.shape)
    # A model with a new head has names of its own, which would not go with the base model's.
    names = {name: other for name, other in calls.items() if other != name} if len(calls) == len(held) else {}
    back = {other: names.get(name, name) for name, other in calls.items()}
    entries = {names.get(name, name): entry for name, entry in entries.items()}
    if source is None or options.max_shard_size is not None:
        shards = shards_of_size(entries, options.max_shard_size or MAX_SHARD_SIZE, variant=options.variant)
    else:
        own_names = [
            Shard(s.file, {back.get(n, n): e for n, e in s.entries.items()}, s.metadata) for s in source.shards
        ]
        shards = shards_like(entries, SourceFiles(own_names))
    added = tuple(name for name in held if name not in calls) if source is not None else ()
    return Plan(shards, names, tuple(name for name in known if name not in back), added)


def _main_dtype(entries: Mapping[str, Entry]) -> torch.dtype | None:
    """Return the floating-point dtype in which most bytes are; None if there is none."""
    found: dict[torch.dtype, int] = {}
    for entry in entries.values():
        if entry.dtype.is_floating_point:
            found[entry.dtype] = found.get(entry.dtype, 0) + entry.nbytes
    return max(found, key=lambda dtype: found[dtype], default=None)


def write_plan(
    target: Path,
    made: Plan,
    options: Options,
    write: Callable[[Files], int],
    write_documents: Callable[[Path], None],
) -> ExportReport:
    """Write the files of a plan, and the index; every rank calls it, with a function that writes its own tensors."""
    source = options.source
    written = 0

    def count(files: Files) -> int:
        nonlocal written
        written = write(files)
        return written

    def write_all(place: Path) -> None:
        write_documents(place)
        if [shard.file for shard in made.shards] != [weights_name(options.variant)]:
            changed = source is None or source.entries != made.entries
            text = index_text(made.shards, source.index if source is not None else None, changed)
            (place / index_name(options.variant)).write_text(text, encoding="utf-8")

    write_folder(target, made.shards, count, write_all, into=options.into, variant=options.variant)
    entries = made.entries.values()
    return ExportReport(
        path=target,
        files=tuple(shard.file for shard in made.shards),
        tensors=len(entries),
        parameters=sum(entry.elements for entry in entries),
        nbytes=sum(entry.nbytes for entry in entries),
        written=written,
        left_out=made.left_out,
        added=made.added,
    )


def save_configs(model: Any, place: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and generation_config.json of a Hugging Face model as its save_pretrained does."""
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is not None:
        model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [documents.architecture_of(model)]
    model.config.save_pretrained(place)
    if hasattr(model, "can_generate") and model.can_generate():
        model.generation_config.save_pretrained(place)
