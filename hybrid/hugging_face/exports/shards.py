"""The safetensors files of an export: which tensor stands in which file, at which byte, under which header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..folder import Folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_METADATA = {"format": "pt"}
# As safetensors calls them, and in the order in which it writes them: the widest first, so that each tensor is aligned.
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A whole tensor on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Args:
        file: its name.
        entries: its tensors by name, in the order of their bytes.
        metadata: of its header.
    """

    file: str
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=lambda: dict(_METADATA))

    def header(self) -> bytes:
        """Return what stands before the first tensor, as safetensors writes it: a length, and JSON of it."""
        content: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        at = 0
        for name, entry in self.entries.items():
            offsets = [at, at + entry.nbytes]
            content[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
            at += entry.nbytes
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def offsets(self) -> dict[str, int]:
        """Return the byte of the file at which each tensor begins."""
        found, at = {}, len(self.header())
        for name, entry in self.entries.items():
            found[name] = at
            at += entry.nbytes
        return found

    @property
    def nbytes(self) -> int:
        """Return the size of the file."""
        return len(self.header()) + sum(entry.nbytes for entry in self.entries.values())


@dataclass(frozen=True)
class SourceFiles:
    """What an export takes over from the folder that the model came from: its files, and its index's metadata.

    Args:
        shards: with their tensors.
        index: the index's ``metadata``; None: the folder has no index.
    """

    shards: list[Shard]
    index: dict[str, Any] | None = None

    @property
    def entries(self) -> dict[str, Entry]:
        """Return all tensors by name."""
        return {name: entry for shard in self.shards for name, entry in shard.entries.items()}

    @staticmethod
    def of(folder: Folder) -> SourceFiles:
        """Return those of a folder that was read."""
        by_file: dict[str, dict[str, Entry]] = {}
        for name, tensor in sorted(folder.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            by_file.setdefault(tensor.file, {})[name] = Entry(tensor.dtype, tuple(tensor.shape))
        shards = [Shard(file, entries, dict(folder.metadata)) for file, entries in by_file.items()]
        index = folder.path / INDEX
        if set(by_file) == {WEIGHTS} or not index.is_file():
            return SourceFiles(shards)
        return SourceFiles(shards, json.loads(index.read_text(encoding="utf-8")).get("metadata") or {})

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON."""
        files = {
            shard.file: {
                "metadata": shard.metadata,
                "tensors": [[name, DTYPE_NAMES[e.dtype], list(e.shape)] for name, e in shard.entries.items()],
            }
            for shard in self.shards
        }
        return {"files": files, "index": self.index}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> SourceFiles:
        """Return what :meth:`to_json` has made JSON of."""
        shards = [
            Shard(
                file,
                {name: Entry(_DTYPES[dtype], tuple(shape)) for name, dtype, shape in found["tensors"]},
                dict(found["metadata"]),
            )
            for file, found in content["files"].items()
        ]
        return SourceFiles(shards, content["index"])


def shards_like(entries: Mapping[str, Entry], source: SourceFiles) -> list[Shard]:
    """Return the files of an export as the source's: each tensor in the same file; others in the last one.

    A file whose tensors are the source's, with their dtypes and shapes, has its header, too; of one that differs the
    tensors are ordered as safetensors orders them. A file that no tensor is left for is left out.
    """
    kept = [(shard, {n: entries[n] for n in shard.entries if n in entries}) for shard in source.shards]
    kept = [(shard, found) for shard, found in kept if found]
    new = {name: entry for name, entry in entries.items() if all(name not in found for _, found in kept)}
    if not kept:
        return [Shard(WEIGHTS, _ordered(new))]
    kept[-1][1].update(new)
    return [
        Shard(shard.file, found if _same(found, shard.entries) else _ordered(found), shard.metadata)
        for shard, found in kept
    ]


def _same(found: Mapping[str, Entry], others: Mapping[str, Entry]) -> bool:
    """Return whether the entries are the same, in the same order."""
    return list(found.items()) == list(others.items())


def shards_of_size(entries: Mapping[str, Entry], limit: int | str, *, variant: str | None = None) -> list[Shard]:
    """Return the files of an export, each of at most ``limit`` bytes or of one tensor, cut as save_pretrained cuts.

    Args:
        entries: in the order of the model's state dict.
        limit: bytes, or text such as "5GB".
        variant: as of save_pretrained: "fp16" makes it ``model.fp16.safetensors``.

    Raises:
        ValueError: the limit is none.
    """
    most = _bytes_in(limit)
    large: list[dict[str, Entry]] = []
    last: dict[str, Entry] = {}
    size = 0
    for name, entry in entries.items():
        if entry.nbytes > most:
            large.append({name: entry})
            continue
        if size + entry.nbytes > most:
            large.append(last)
            last, size = {}, 0
        last[name] = entry
        size += entry.nbytes
    parts = [*large, last] if last or not large else large
    begin, end = weights_name(variant).split(".safetensors")[0], ".safetensors"
    suffixes = [f"-{n:05d}-of-{len(parts):05d}" for n in range(1, len(parts) + 1)] if len(parts) > 1 else [""]
    return [Shard(begin + suffix + end, _ordered(part)) for suffix, part in zip(suffixes, parts, strict=True)]


def _bytes_in(limit: int | str) -> int:
    """Return a number of bytes that may be given as text: "5GB"."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?B)\s*", limit, re.IGNORECASE) if isinstance(limit, str) else None
    if isinstance(limit, str) and found is not None:
        with suppress(ValueError):
            return int(float(found[1]) * _UNITS[found[2].upper()])
    if isinstance(limit, int) and limit > 0:
        return limit
    raise ValueError(f"max_shard_size: expected bytes, or text such as '5GB', received {limit!r}")


def weights_name(variant: str | None = None) -> str:
    """Return the name of the file that holds all tensors where there is one alone."""
    return WEIGHTS if not variant else f"model.{variant}.safetensors"


def index_name(variant: str | None = None) -> str:
    """Return the name of the index."""
    return INDEX if not variant else INDEX.removesuffix("json") + f"{variant}.json"


def index_text(shards: Iterable[Shard], metadata: Mapping[str, Any] | None, changed: bool) -> str:
    """Return the index of several files, as save_pretrained writes it.

    Args:
        metadata: of the source's index; None: of none.
        changed: whether the tensors are others than the source's; ``metadata`` are then counted anew.
    """
    shards = list(shards)
    counted: dict[str, Any] = {
        "total_parameters": sum(e.elements for shard in shards for e in shard.entries.values()),
        "total_size": sum(e.nbytes for shard in shards for e in shard.entries.values()),
    }
    if metadata is None:
        metadata = counted
    elif changed:
        metadata = {**metadata, **{key: value for key, value in counted.items() if key in metadata}}
    files = {name: shard.file for shard in shards for name in shard.entries}
    return json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True) + "\n"


def _ordered(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries as safetensors orders them: by dtype, then by name."""
    rank = {dtype: number for number, dtype in enumerate(DTYPE_NAMES)}
    return dict(sorted(entries.items(), key=lambda item: (rank[item[1].dtype], item[0])))
