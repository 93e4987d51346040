"""A Hugging Face folder: which tensors it holds and where, read from its index and headers alone, once."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .refusals import check_config, find_folder, refuse_without_index

_logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# By safetensors' names.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors' own limit


@dataclass(frozen=True)
class TensorOnDisk:
    """One tensor: ``file`` of the folder, dtype, shape, and the byte of the file at which it begins."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Return the number of bytes that the tensor takes in its file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Folder:
    """A folder as its index and headers describe it.

    Args:
        path: of the folder.
        config: config.json, as it is.
        tensors: by their names on disk.
        sizes: bytes of each file that holds one.
        metadata: of the first file's header, such as ``{"format": "pt"}``.
        notes: what a user should know and what is no error, one line each.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorOnDisk]
    sizes: dict[str, int]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """Return the floating-point dtype in which most bytes of the folder are; fp32 if it has none."""
        found: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype.is_floating_point:
                found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.nbytes
        return max(found, key=lambda dtype: found[dtype], default=torch.float32)


def read_folder(path: str | os.PathLike[str]) -> Folder:
    """Return what a folder holds, from its config, index and headers; no tensor is read.

    Raises:
        ValueError: there is no such folder, or it is none that can be loaded; the message names the file and says what
            to do.
    """
    folder = find_folder(path)
    config = _json_object(folder / CONFIG, "give the folder that save_pretrained() or `hf download` has written")
    check_config(config, folder)
    placed = _files_by_tensor(folder, config)
    tensors: dict[str, TensorOnDisk] = {}
    sizes: dict[str, int] = {}
    metadata: dict[str, str] = {}
    holders: dict[str, str] = {}
    files = sorted(set(placed.values())) if placed is not None else [WEIGHTS]
    for file in files:
        found, size, told = read_header(folder / file)
        metadata = metadata or told
        sizes[file] = size
        for name, tensor in found.items():
            if name in holders:
                raise ValueError(
                    f"{folder}: expected each tensor once, received {name!r} in {holders[name]} and in {file}; "
                    f"{INDEX} names both files: download or save the folder again"
                )
            holders[name] = file
            tensors[name] = tensor
    if placed is not None:
        _check_index(folder, placed, holders)
    return Folder(folder, config, tensors, sizes, metadata, _notes(folder, config, tensors, set(files)))


def check_files(folder: Folder) -> None:
    """Raise ValueError if this process does not see the files of ``folder`` as they were when it was read."""
    for name, size in folder.sizes.items():
        path = folder.path / name
        received = f"{path.stat().st_size} bytes" if path.is_file() else f"no such file on {socket.gethostname()}"
        if received != f"{size} bytes":
            raise ValueError(
                f"{path}: expected {size} bytes, as when its header was read, received {received}; give a folder that "
                "all machines see, and load when nobody writes to it"
            )


def read_header(path: Path) -> tuple[dict[str, TensorOnDisk], int, dict[str, str]]:
    """Return the tensors that a safetensors file names, the file's size, and its metadata.

    Raises:
        ValueError: it is no whole safetensors file, or has a dtype that is not known.
    """
    again = "download or save it again"
    size = path.stat().st_size
    with open(path, "rb") as file:
        begin = file.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if begin == b"version ":
            raise ValueError(
                f"{path}: expected a safetensors file, received a pointer of git-lfs; `git lfs pull` fetches it"
            )
        if not 0 < length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError(
                f"{path}: expected a safetensors file, which begins with the length of its header, received {size} "
                f"bytes that begin with {begin!r}; it is truncated or no such file: {again}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__}")
    except ValueError as error:  # of JSON and of Unicode, too
        raise ValueError(f"{path}: expected a header in JSON, received other bytes ({error}); {again}") from None
    metadata = header.pop("__metadata__", None) or {}
    data = 8 + length
    found, end = {}, data
    for name, entry in header.items():
        found[name] = tensor = _tensor(path, name, entry, data)
        end = max(end, tensor.offset + tensor.nbytes)
    if size != end:
        state = "truncated" if size < end else "longer than its tensors"
        raise ValueError(
            f"{path}: expected {end} bytes, as its header says, received {size}: the file is {state}; {again}"
        )
    return found, size, metadata


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorOnDisk:
    """Return one entry of a header as a tensor."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        legal = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError):
        legal, dtype, shape, begin, end = False, None, (), 0, 0
    if not legal:
        raise ValueError(
            f"{path}: expected dtype, shape and data_offsets of {name!r} in the header, received {entry!r}; download "
            "or save the file again"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"{path}: expected a dtype out of {', '.join(DTYPES)} for {name!r}, received {dtype!r}; load a copy of the "
            "model that is not quantised, such as its bfloat16 one"
        )
    found = TensorOnDisk(path.name, DTYPES[dtype], shape, data + begin)
    if found.nbytes != end - begin:
        raise ValueError(
            f"{path}: expected {found.nbytes} bytes for {name!r}, {dtype} of shape {list(shape)}, received "
            f"{end - begin} in data_offsets: the header names a dtype or shape that the file does not have; download "
            "or save it again"
        )
    return found


def _files_by_tensor(folder: Path, config: dict[str, Any]) -> dict[str, str] | None:
    """Return the file of each tensor as the index says, or None for a single file without an index."""
    index = folder / INDEX
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if not index.exists():
        if (folder / WEIGHTS).exists():
            return None
        refuse_without_index(folder, config, present, index=INDEX, single=WEIGHTS)
    written = _json_object(index, "download or save the folder again")
    placed = written.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise ValueError(
            f"{index}: expected a weight_map from names of tensors to files, received {type(placed).__name__}; "
            "download or save the folder again"
        )
    outside = sorted({file for file in placed.values() if Path(file).name != file})
    if outside:
        raise ValueError(f"{index}: expected files of this folder, received {outside[0]!r}; save the folder again")
    absent = sorted({file for file in placed.values() if not (folder / file).is_file()})
    if absent:
        raise ValueError(
            f"{index}: expected the {len(set(placed.values()))} files that it names, of which {', '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not in {folder}; download {'it' if len(absent) == 1 else 'them'} "
            "(`hf download NAME --local-dir DIR` fetches what is missing)"
        )
    return placed


def _check_index(folder: Path, placed: dict[str, str], holders: dict[str, str]) -> None:
    """Raise ValueError unless each tensor is in the file that the index names, and no file holds others."""
    for name, file in placed.items():
        if holders.get(name) != file:
            where = f"it in {holders[name]}" if name in holders else "none of that name"
            raise ValueError(
                f"{folder / file}: expected the tensor {name!r}, which {INDEX} says it holds, received {where}; the "
                "file is of another model or another version: download or save the folder again"
            )
    extra = [name for name in holders if name not in placed]
    if extra:
        raise ValueError(
            f"{folder / holders[extra[0]]}: expected the tensors that {INDEX} names, received {len(extra)} more, such "
            f"as {extra[0]!r}; the file is of another model or another version: download or save the folder again"
        )


def _notes(folder: Path, config: dict[str, Any], tensors: dict[str, TensorOnDisk], read: set[str]) -> tuple[str, ...]:
    """Return what the user should know, one line each; warn of what from_pretrained would read in other files."""
    notes = []
    aside = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in read)
    if aside:
        notes.append(f"{folder}: {', '.join(aside)} not read: {INDEX if WEIGHTS not in read else WEIGHTS} is obeyed")
        if WEIGHTS in aside:
            _logger.warning("%s; from_pretrained would read %s: remove the older of them", notes[-1], WEIGHTS)
    said = config.get("dtype") or config.get("torch_dtype")
    held = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype.is_floating_point}
    if isinstance(said, str) and held and said.removeprefix("torch.") not in held:
        notes.append(f"{folder}: config.json says {said}, the files hold {', '.join(sorted(held))}")
    return tuple(notes)


def _json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: expected a {path.name} in it, received none; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, received other text ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, received a {type(found).__name__}; {remedy}")
    return found
