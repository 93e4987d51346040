"""The parts of a folder that a rank needs: which it reads, and which one rank of a replica reads for several."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..checkpoint import together
from ..tensor.modules import own_slices
from .folder import Folder
from .names import Match, part_on_disk
from .reading import Job, open_folder, read_all
from .ties import check_doubles

_MOST_THREADS = 4


class Part(NamedTuple):
    """A part of a tensor of the folder, in the dtype in which a rank holds it: equal for ranks that hold it alike."""

    tensor: str
    bounds: tuple[tuple[int, int], ...]
    transposed: bool
    dtype: str


def _job(folder: Folder, part: Part, own: torch.Tensor) -> Job:
    return Job(folder.tensors[part.tensor], tuple(slice(*bound) for bound in part.bounds), own, part.transposed)


def _threads() -> int:
    """Return how many threads this rank may read with: its share of the machine's cores, some at most."""
    ranks = dist.get_world_size() if together.distributed() else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return max(1, min(_MOST_THREADS, cores // max(1, min(local, ranks))))


class Parts:
    """The parts that this rank holds, each once, and what it does to fill them.

    Args:
        state: the model's tensors by name, with memory.
        replica: the rank's place on dp, whose ranks each have all parts among themselves.
    """

    def __init__(self, folder: Folder, matched: Match, state: Mapping[str, torch.Tensor], replica: int) -> None:
        self.folder, self.matched, self.replica = folder, matched, replica
        self.held: dict[Part, tuple[str, torch.Tensor]] = {}
        self._twins: dict[Part, list[torch.Tensor]] = {}
        seen: set[int] = set()
        for name, on_disk in matched.found.items():
            own, source = state[name], matched.sources[name]
            if id(own) in seen:
                continue
            seen.add(id(own))
            where = part_on_disk(folder.tensors[on_disk], source, own_slices(own))
            bounds = tuple((one.start, one.stop) for one in where)
            part = Part(on_disk, bounds, source.transposed, str(own.dtype))
            local = (own.to_local() if isinstance(own, DTensor) else own).detach()
            if part in self.held:
                # Two of the model's that are one in the folder and not tied in the model.
                self._twins.setdefault(part, []).append(local)
            else:
                self.held[part] = (name, local)

    def shared(self) -> dict[Part, list[int]]:
        """Return the ranks of the parts that several ranks of this replica hold, the one that reads it first.

        Every rank calls it. A replica's ranks take turns at reading.
        """
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.replica, list(self.held)))
        holders: dict[Part, list[int]] = {}
        for rank, (replica, parts) in enumerate(everyone):
            if replica == self.replica:
                for part in parts:
                    holders.setdefault(part, []).append(rank)
        found = {}
        for number, part in enumerate(sorted(part for part, ranks in holders.items() if len(ranks) > 1)):
            ranks = holders[part]
            turn = number % len(ranks)
            found[part] = ranks[turn:] + ranks[:turn]
        return found

    def read(self, shared: Mapping[Part, list[int]], rank: int) -> int:
        """Read the parts that no other rank reads for this one; return the bytes that were asked for."""
        mine = [part for part in self.held if shared.get(part, [rank])[0] == rank]
        # In the order of the files.
        mine.sort(key=lambda part: (self.folder.tensors[part.tensor].file, self.folder.tensors[part.tensor].offset))
        jobs = {part: _job(self.folder, part, self.held[part][1]) for part in mine}
        requested = read_all(self.folder, jobs.values(), _threads())
        with open_folder(self.folder) as reader:
            for part, job in jobs.items():
                check_doubles(self.folder, reader, self.matched, self.held[part][0], job.own, job.part)
            return requested + reader.requested

    def send(self, shared: Mapping[Part, list[int]], rank: int) -> None:
        """Send the parts that this rank has read for others, and receive those that others have read for it.

        All ranks go through them in one order, so none waits for one that waits for it.
        """
        for part, ranks in shared.items():
            if rank not in ranks or not self.held[part][1].numel():
                continue
            local = self.held[part][1]
            # As bytes: not every backend sends every dtype.
            wire = local.contiguous().flatten().view(torch.uint8)
            for other in ranks[1:]:
                if rank == ranks[0]:
                    dist.send(wire, other)
                elif rank == other:
                    dist.recv(wire, ranks[0])
            if wire.data_ptr() != local.data_ptr():
                local.copy_(wire.view(local.dtype).view(local.shape))
        for part, twins in self._twins.items():
            for twin in twins:
                twin.copy_(self.held[part][1])
