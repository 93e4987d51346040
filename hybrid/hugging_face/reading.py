"""Parts of tensors read from files into tensors that are there: explicit reads, no memory map, no needless copy."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .folder import Folder, TensorOnDisk

STAGING = 2**22  # bytes, of each thread: what fits a core's caches costs little to cast
_PIECE = 2**25  # bytes of a job
_LONGEST = 2**30  # bytes of one read; Linux reads 2 GiB at most


class Reader:
    """The files of a folder, open; :meth:`read` counts in ``requested`` the bytes that it asks for."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.requested = 0
        self._files: dict[str, int] = {}
        self._staging = bytearray()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        self._staging = bytearray()

    @torch.no_grad()
    def read(self, tensor: TensorOnDisk, part: tuple[slice, ...], own: torch.Tensor, *, transposed: bool) -> None:
        """Read a part of a tensor on disk into ``own``, of any dtype and device; transposed if it is [n, m] on disk."""
        if not own.numel():
            return
        target = own.t() if transposed else own
        direct = own.device.type == "cpu" and own.dtype == tensor.dtype and target.is_contiguous()
        if direct:
            self._fill(tensor, part, _bytes_of(target))
            return
        for piece, values in self._pieces(tensor, part):
            target[piece].copy_(values)

    @torch.no_grad()
    def equals(self, tensor: TensorOnDisk, part: tuple[slice, ...], own: torch.Tensor, *, transposed: bool) -> bool:
        """Return whether a part of a tensor on disk has the values of ``own``, cast as :meth:`read` does."""
        if not own.numel():
            return True
        target = own.t() if transposed else own
        # As bits: NaN equals itself.
        return all(
            torch.equal(_bits(values.to(own.device, own.dtype)), _bits(target[piece]))
            for piece, values in self._pieces(tensor, part)
        )

    def _pieces(self, tensor: TensorOnDisk, part: tuple[slice, ...]) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield parts of the part, each with its values on the CPU, which the next piece writes over."""
        shape = [one.stop - one.start for one in part]
        if not shape:
            yield ..., self._staged(tensor, part, shape)
            return
        row = tensor.dtype.itemsize
        for rows in shape[1:]:
            row *= rows
        step = max(1, STAGING // max(row, 1))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            piece = (slice(part[0].start + start, part[0].start + stop), *part[1:])
            yield slice(start, stop), self._staged(tensor, piece, [stop - start, *shape[1:]])

    def _staged(self, tensor: TensorOnDisk, part: tuple[slice, ...], shape: list[int]) -> torch.Tensor:
        size = tensor.dtype.itemsize
        for rows in shape:
            size *= rows
        if len(self._staging) < size:
            self._staging = bytearray(size)
        self._fill(tensor, part, memoryview(self._staging)[:size])
        count = size // tensor.dtype.itemsize
        return torch.frombuffer(self._staging, dtype=tensor.dtype, count=count).reshape(shape)

    def _fill(self, tensor: TensorOnDisk, part: tuple[slice, ...], buffer: memoryview) -> None:
        """Fill ``buffer`` with a part of a tensor, in its order."""
        file, done = self._file(tensor.file), 0
        length, offsets = runs(tensor, part)
        for offset in offsets:
            self._read(file, tensor.file, buffer[done : done + length], offset)
            done += length
        assert done == len(buffer), (done, len(buffer))

    def _read(self, file: int, name: str, buffer: memoryview, offset: int) -> None:
        while len(buffer):
            wanted = buffer[:_LONGEST]
            self.requested += len(wanted)
            got = os.preadv(file, [wanted], offset)
            if not got:
                raise ValueError(
                    f"{self.folder.path / name}: expected {len(buffer)} more bytes at {offset}, received the end of "
                    "the file; it has changed since its header was read: load again when nobody writes to it"
                )
            buffer, offset = buffer[got:], offset + got

    def _file(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(self.folder.path / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[name]


class Job(NamedTuple):
    """A part of a tensor on disk, and the tensor that it is to fill."""

    tensor: TensorOnDisk
    part: tuple[slice, ...]
    own: torch.Tensor
    transposed: bool


def read_all(folder: Folder, jobs: Iterable[Job], threads: int) -> int:
    """Do all of ``jobs`` in so many threads; return the bytes that were asked for."""
    waiting = iter([piece for job in jobs for piece in _split(job)])
    lock = threading.Lock()

    def work() -> int:
        with open_folder(folder) as reader:
            while True:
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return reader.requested
                reader.read(job.tensor, job.part, job.own, transposed=job.transposed)

    if threads == 1:
        return work()
    with ThreadPoolExecutor(threads) as pool:
        return sum(done.result() for done in [pool.submit(work) for _ in range(threads)])


def _split(job: Job) -> Iterator[Job]:
    """Yield a large job as several of some rows each, which threads share."""
    rows = job.own.shape[0] if job.own.dim() > 1 and not job.transposed else 0
    step = max(1, rows * _PIECE // max(1, job.own.nbytes))
    if rows <= step:
        yield job
        return
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first = slice(job.part[0].start + start, job.part[0].start + stop)
        yield job._replace(part=(first, *job.part[1:]), own=job.own[start:stop])


@contextmanager
def open_folder(folder: Folder) -> Iterator[Reader]:
    """Yield a reader of the folder, and close its files."""
    reader = Reader(folder)
    try:
        yield reader
    finally:
        reader.close()


def runs(tensor: TensorOnDisk, part: tuple[slice, ...]) -> tuple[int, Iterator[int]]:
    """Return the length in bytes of the contiguous runs that a part of a tensor is on disk, and where each begins."""
    strides = [tensor.dtype.itemsize]
    for rows in tensor.shape[:0:-1]:
        strides.insert(0, strides[0] * rows)
    dim, length = len(part), tensor.dtype.itemsize
    while dim:
        dim -= 1
        length *= part[dim].stop - part[dim].start
        if part[dim] != slice(0, tensor.shape[dim]):
            break
    first = tensor.offset + sum(one.start * stride for one, stride in zip(part, strides, strict=False))
    steps = [
        range(0, (one.stop - one.start) * stride, stride) for one, stride in zip(part[:dim], strides[:dim], strict=True)
    ]
    return length, (first + sum(chosen) for chosen in itertools.product(*steps))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
