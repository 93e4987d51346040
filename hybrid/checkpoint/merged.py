"""A model in one safetensors file, which says what it is: written from a checkpoint, checked when it is read.

The metadata of the file hold, beside ``format: pt``, the caller's state as JSON under ``fusemesh``, the number of our
format, and a SHA-256 of the whole file, in which its own digits count as zeros.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..outputs import cannot_write, free_bytes, writing
from .checksums import check_files
from .folders import FORMAT, READABLE, CheckpointError, latest, read_marker
from .store import MODEL, quiet, read_tensors, stored_tensors
from .together import on_first_rank

_STATE, _FORMAT_KEY, _DIGEST = "fusemesh", "fusemesh_format", "fusemesh_sha256"
_UNKNOWN = "0" * 64
_BLOCK = 1 << 20


def merge(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Any]:
    """Write a checkpoint's model as one safetensors file, in one process with no process group.

    The tensors are whole, of their true shapes, under the names of the plain model. The state goes into the file's
    metadata, as JSON under ``fusemesh``, so that the file says what it is.

    Args:
        checkpoint: its folder, or a folder of checkpoints, of which the latest is taken.
        output: the file to write, or a merged file to replace; it appears only when it is whole.
        verify: first compare all files of the checkpoint with their checksums.

    Returns:
        ``{"checkpoint", "output", "tensors", "parameters", "bytes"}``.

    Raises:
        ValueError: no checkpoint is there, it is damaged, ``output`` is a file that this function did not write, or
            safetensors is not installed.
        OSError: the file cannot be written; nothing of it is left.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError("merge needs safetensors; install it with: pip install 'fusemesh[app]'") from error

    target = Path(output)
    _check_replaceable(target)
    path = latest(checkpoint)
    marker = read_marker(path)
    if verify:
        check_files(path, marker["files"])
    tensors = {name: torch.empty(v.size, dtype=v.properties.dtype) for name, v in stored_tensors(path).items()}
    with quiet():
        read_tensors(path, {MODEL: tensors})
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    unfinished = target.parent / f".unfinished-{target.name}"
    metadata = {
        "format": "pt",
        _STATE: json.dumps(marker["state"]),
        _FORMAT_KEY: str(FORMAT),
        _DIGEST: _UNKNOWN,
    }
    try:
        with writing(target, needed=needed):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            free = free_bytes(target.parent)
            if free is not None and free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            unfinished.touch()
            mode = unfinished.stat().st_mode
            try:
                save_file(tensors, unfinished, metadata=metadata)
            except SafetensorError as error:
                # It comes from Rust, and has the system's number in its text alone.
                number = re.search(r"os error (\d+)", str(error))
                if number is None:
                    raise
                raise cannot_write(target, OSError(int(number[1]), str(error)), needed=needed) from error
            # safetensors leaves it to its owner alone, whatever the umask is.
            unfinished.chmod(mode)
            _seal(unfinished)
            unfinished.replace(target)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return {
        "checkpoint": str(path),
        "output": str(target),
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": target.stat().st_size,
    }


def _check_replaceable(target: Path) -> None:
    """Check that nothing is at ``target`` but an empty file or one that :func:`merge` wrote; not of a folder."""
    with writing(target):
        if not target.exists() or target.is_dir() or (target.is_file() and target.stat().st_size == 0):
            return
    with suppress(CheckpointError):
        read_merged_state(target)
        return
    raise CheckpointError(
        f"output: expected a new file, or one that fusemesh merge wrote, received {str(target)!r}, which holds "
        "something else; choose another name, or remove it first"
    )


def _header_of(path: Path) -> bytes:
    """Return the length and the JSON of a safetensors file's header, as they stand in it."""
    with path.open("rb") as file:
        begin = file.read(8)
        return begin + file.read(int.from_bytes(begin, "little"))


def _digits_of(header: bytes) -> tuple[int, int]:
    """Return where the digits of the checksum stand. The quotes of such a text inside a value would be escaped."""
    found = re.search(rb'"%s":"([0-9a-f]{64})"' % _DIGEST.encode(), header)
    assert found is not None
    return found.span(1)


def _digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in whose header the digits of its checksum count as zeros."""
    header = _header_of(path)
    start, end = _digits_of(header)
    found = hashlib.sha256(header[:start] + _UNKNOWN.encode() + header[end:])
    with path.open("rb") as file:
        file.seek(len(header))
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _seal(path: Path) -> None:
    """Write a file's checksum into it."""
    digest, (start, _) = _digest_of(path), _digits_of(_header_of(path))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def read_merged(path: str | os.PathLike[str], *, verify: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the state of a file that :func:`merge` wrote; every rank calls it, if there are ranks.

    Args:
        verify: first compare the file with its checksum, on rank 0.

    Raises:
        ValueError: the file is not there, is damaged, was not written by :func:`merge`, or safetensors is not
            installed.
    """
    with _open_merged(path) as (file, state, digest):
        if verify and digest is not None:
            on_first_rank(lambda: _check(Path(path), digest))
        return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118 (not a dict)


def _check(path: Path, digest: str) -> None:
    if _digest_of(path) != digest:
        raise CheckpointError(
            f"model: {str(path)!r} has changed since fusemesh merge wrote it (its SHA-256 differs); merge the "
            "checkpoint again, copy the file anew, or give --no-verify if the change was meant"
        )


def read_merged_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state alone of a file that :func:`merge` wrote; raises as :func:`read_merged`, without its check."""
    with _open_merged(path) as (_, state, _):
        return state


@contextmanager
def _open_merged(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any], str | None]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError("a merged model needs safetensors; install it with: pip install 'fusemesh[app]'") from error

    if not Path(path).is_file():
        raise CheckpointError(f"model: expected a .safetensors file, received {str(path)!r}: not found")
    try:
        opened = safe_open(path, framework="pt")
    except OSError as error:
        raise CheckpointError(
            f"model: expected a .safetensors file that can be read, received {str(path)!r}: {error.strerror or error}"
        ) from error
    except SafetensorError as error:
        if Path(path).suffix != ".safetensors":
            raise CheckpointError(
                f"model: {str(path)!r} is not a .safetensors file; give a run directory, a checkpoint, or the file "
                "that `fusemesh merge` wrote"
            ) from error
        raise CheckpointError(
            f"model: {str(path)!r} is not a .safetensors file, or is one that is cut off or damaged; merge the "
            "checkpoint again, or copy the file anew"
        ) from error
    with opened as file:
        metadata = file.metadata() or {}
        if _STATE not in metadata:
            raise CheckpointError(f"model: expected a file that `fusemesh merge` wrote, received {str(path)!r}")
        # Files of format 2 do not say so.
        number = metadata.get(_FORMAT_KEY, "2")
        if number not in map(str, READABLE):
            raise CheckpointError(
                f"model {str(path)!r}: expected format {FORMAT}, received {number}; read it by the version of FuseMesh "
                "that wrote it"
            )
        try:
            state = json.loads(metadata[_STATE])
        except ValueError as error:
            raise CheckpointError(
                f"model: {str(path)!r} is damaged: its metadata are not JSON; merge the checkpoint again, or copy the "
                "file anew"
            ) from error
        yield file, state, metadata.get(_DIGEST)
