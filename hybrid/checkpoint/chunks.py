"""The tensors of a checkpoint's model one part at a time, as they are stored, so that none need be whole in memory."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from .store import MODEL, quiet, unreadable


class StoredModel:
    """A checkpoint's model as its metadata describe it, which are read once.

    Raises:
        CheckpointError: they cannot be read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        try:
            found = FileSystemReader(checkpoint).read_metadata()
        except Exception as error:
            # Whatever a broken pickle raises.
            raise unreadable(checkpoint, error) from error
        prefix, self._places = f"{MODEL}.", found.storage_data
        self.tensors = {
            key.removeprefix(prefix): value
            for key, value in found.state_dict_metadata.items()
            if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
        }

    def parts(self, name: str) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Yield the parts of a tensor, each with the index in the whole at which it begins.

        Raises:
            CheckpointError: they cannot be read.
        """
        for chunk in self.tensors[name].chunks:
            try:
                place = self._places[MetadataIndex(f"{MODEL}.{name}", chunk.offsets)]
                with (self.checkpoint / place.relative_path).open("rb", buffering=0) as file, quiet():
                    stored = _Window(file, place.offset, place.length)
                    part = torch.load(stored, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
                if tuple(part.shape) != tuple(chunk.sizes):
                    raise ValueError(f"{name}: {tuple(chunk.sizes)} expected, {tuple(part.shape)} stored")
            except Exception as error:
                raise unreadable(self.checkpoint, error) from error
            yield tuple(chunk.offsets), part.detach()


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        self._file.seek(self._start + self._at)
        done = 0
        while done < len(into):
            found = self._file.readinto(into[done:])
            if not found:
                break
            done += found
        self._at += done
        return done
