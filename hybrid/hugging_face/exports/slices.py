"""Which part of which tensor on disk each rank holds, and which rank writes it: every element once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from ...tensor.modules import own_rows, own_slices
from ..sources import Source
from .shards import Entry

# From this many bytes on, ranks that hold the same part write a share of its rows each.
SHARED_FROM = 1 << 20


@dataclass(frozen=True)
class Box:
    """A part of a tensor: in each dimension ``size`` elements from ``start`` on."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.size)

    @property
    def end(self) -> tuple[int, ...]:
        """Return the index behind the last one in each dimension."""
        return tuple(start + size for start, size in zip(self.start, self.size, strict=True))

    def rows(self, first: int, number: int) -> Box:
        """Return ``number`` of its rows, the first of them ``first``."""
        return Box((self.start[0] + first, *self.start[1:]), (number, *self.size[1:]))


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor on disk: where it stands in it, and the dtype in memory.

    ``order`` is the place of the tensor in the state dict of the whole model.
    """

    name: str
    box: Box
    dtype: torch.dtype
    order: int = 0


def own_box(tensor: torch.Tensor) -> Box:
    """Return the part of the whole tensor that this rank's local one is; all of it for a plain tensor."""
    found = own_slices(tensor)
    return Box(tuple(part.start for part in found), tuple(part.stop - part.start for part in found))


def on_disk(box: Box, source: Source) -> Box:
    """Return where a part of the model's tensor stands in the tensor on disk."""
    start, size = box.start, box.size
    if source.transposed:
        start, size = start[::-1], size[::-1]
    if source.start:
        start = (*start[: source.dim], start[source.dim] + source.start, *start[source.dim + 1 :])
    return Box(start, size)


def local_values(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """Return this rank's values, laid out as on disk; a view."""
    local = tensor.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    return local.transpose(0, 1) if source.transposed else local


def whole_entries(ranks: Sequence[Sequence[Part]]) -> dict[str, Entry]:
    """Return the whole tensors of which the ranks hold these parts, in the model's order and their dtypes in memory.

    Raises:
        ValueError: the parts of one do not make a whole.
    """
    found: dict[str, dict[Box, torch.dtype]] = {}
    for part in sorted((part for parts in ranks for part in parts), key=lambda part: part.order):
        found.setdefault(part.name, {})[part.box] = part.dtype
    entries = {}
    for name, boxes in found.items():
        shape = tuple(max(sizes) for sizes in zip(*(box.end for box in boxes), strict=True))
        held = sum(box.elements for box in boxes)
        if held != math.prod(shape):
            raise ValueError(
                f"export: expected all {math.prod(shape):,} elements of {name!r} on the ranks that call it, received "
                f"{held:,}; every rank of the model's mesh calls it"
            )
        entries[name] = Entry(next(iter(boxes.values())), shape)
    return entries


def writers(ranks: Sequence[Sequence[Part]], entries: Mapping[str, Entry], rank: int) -> dict[str, list[Box]]:
    """Return the boxes of each tensor on disk that this rank writes, of those that it holds.

    All ranks come to the same result: each element is written by one rank, and of those that hold it by the one that
    has the least to write; where it is much, each of them writes a share of the rows.

    Args:
        ranks: the parts that each rank holds.
        entries: the tensors on disk, which tell how many bytes a part takes.
    """
    holders: dict[tuple[str, Box], list[int]] = {}
    for number, parts in enumerate(ranks):
        for part in parts:
            holders.setdefault((part.name, part.box), []).append(number)
    load = [0] * len(ranks)
    mine: dict[str, list[Box]] = {}
    # What one rank alone has is no choice.
    for (name, box), held_by in sorted(holders.items(), key=lambda item: len(item[1])):
        nbytes = box.elements * entries[name].dtype.itemsize
        several = sorted(set(held_by), key=lambda number: (load[number], number))
        if nbytes < SHARED_FROM or not box.size:
            several = several[:1]
        for place, number in enumerate(several):
            piece = box
            if box.size:
                share = own_rows(box.size[0], len(several), place)
                piece = box.rows(share.start, share.stop - share.start)
            if not piece.elements:
                continue
            load[number] += piece.elements * entries[name].dtype.itemsize
            if number == rank:
                mine.setdefault(name, []).append(piece)
    return mine
