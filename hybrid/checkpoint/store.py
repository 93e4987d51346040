"""Saving and loading through torch.distributed.checkpoint.

It stores every tensor by its global shape and its name in the whole model, and an optimizer's settings by parameter, so
that what one layout wrote another reads; what two stages of a pipeline hold is stored once.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..consistency import check_has_memory
from ..outputs import OutputError, cannot_write, free_bytes
from ..pipeline_parallel import PipelinedModel
from . import folders
from .checksums import check_all_there, check_files, checksums_of, merged
from .folders import MARKER, STEP, UNFINISHED, WRITER, CheckpointError, all_checkpoints, damaged, read_marker
from .lock import Lock
from .together import distributed, on_every_rank, on_first_rank

_T = TypeVar("_T")
MODEL, _OPTIMIZER = "model", "optimizer"
# What an entry takes beside a tensor's elements: heads of a zip file, and its line in the metadata.
_BYTES_BESIDE = 1400
# Groups of parameters would be numbered differently on each stage of a pipeline.
_BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's warnings about its own inner calls, on which a user cannot act."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
        yield


class _Writer(FileSystemWriter):
    """Raises the system's own error, which torch hides behind one of its zip writer's."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:
            raise _os_error(error) from error


def _os_error(error: BaseException) -> OSError:
    """Return the system's error behind another, as one that can be sent to other ranks."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno is not None:
            return OSError(inner.errno, inner.strerror)
        inner = inner.__cause__ or inner.__context__
    return OSError(errno.EIO, str(error).splitlines()[0] if str(error) else type(error).__name__)


def save(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    *,
    step: int,
    keep: int = 0,
) -> Path:
    """Save model, optimizer and state as the checkpoint of ``step``; every rank calls it.

    Args:
        directory: the folder of the run's checkpoints, seen by all ranks.
        model, optimizer: sharded or whole; ``optimizer=None`` saves the model alone.
        state: small, JSON.
        step: names the checkpoint; one of the same step is replaced.
        keep: how many of the newest to keep; 0 keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: the model is on meta.
        OSError: on every rank, if it cannot be written: the folder, the bytes needed and free, and the checkpoint that
            is still whole. Nothing of the unfinished one is left.
    """
    check_has_memory("checkpoint.save", model)
    root = Path(directory)
    final = root / f"{STEP}{step:08d}"
    with quiet():
        tensors = _tensors_of(model, optimizer)
    needed = _bytes_of(model, tensors)
    lock: Lock | None = None

    def prepare() -> str:
        nonlocal lock
        root.mkdir(parents=True, exist_ok=True)
        folders.restore_replaced(root)
        folders.remove_leftovers(root)
        free = free_bytes(root)
        if free is not None and free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Another run's of the same step is another folder.
        made = root / f"{UNFINISHED}{secrets.token_hex(4)}-{final.name}"
        made.mkdir()
        lock = Lock(made / WRITER)
        return made.name

    def give_up(error: OSError, unfinished: Path | None = None) -> OutputError:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        folders.restore_replaced(root)
        whole = all_checkpoints(root)
        kept = f"{whole[-1].name} is whole" if whole else "No earlier checkpoint is there"
        return cannot_write(final, error, what="checkpoint", needed=needed, kept=kept)

    def attempt(action: Callable[[], _T], unfinished: Path | None = None) -> _T:
        try:
            return action()
        except OSError as error:
            raise give_up(error, unfinished) from error

    try:
        unfinished = root / on_first_rank(lambda: attempt(prepare))
        try:
            # Each phase ends on all ranks alike: an error of one is raised on every other, too.
            _write(tensors, unfinished)
            parts = on_every_rank(lambda: checksums_of(unfinished))
        except OSError as error:
            cause = error
            failed = on_first_rank(lambda: str(give_up(cause, unfinished)))
            # Where ranks do not share the folder, each has one.
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OutputError(failed) from None
        content = folders.marker_text(state, merged(parts))
        try:
            on_first_rank(
                lambda: attempt(lambda: _put_in_place(unfinished, final, parts, content, keep=keep), unfinished)
            )
        except OutputError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    finally:
        if lock is not None:
            lock.release()
    return final


def _put_in_place(
    unfinished: Path, final: Path, parts: list[dict[str, dict[str, Any]]], content: str, *, keep: int
) -> None:
    """Make the folder that all ranks have written the checkpoint ``final``, and keep the newest ``keep`` (0: all).

    Args:
        parts: the entries of each rank's files.
        content: of the marker.
    """
    root = final.parent
    check_all_there(unfinished, parts)
    with (unfinished / MARKER).open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        # A folder cannot be replaced in one move. The old one first steps aside, so that no reader ever meets a
        # mixture; if the run dies before the next lines, it is put back.
        final.rename(root / f"{folders.REPLACED}{final.name}")
    (unfinished / WRITER).unlink(missing_ok=True)
    unfinished.rename(final)
    # What cannot be removed does no harm to the new one.
    if keep > 0:
        for old in all_checkpoints(root)[:-keep]:
            # Removed in part it would look whole.
            with suppress(OSError):
                old.rename(root / f"{UNFINISHED}removed-{old.name}")
    folders.remove_leftovers(root, ignore_errors=True)


def _write(tensors: dict[str, Any], folder: Path) -> None:
    """Write the tensors; raise the error of the first rank that failed, on every rank."""
    try:
        with quiet():
            dcp.save(tensors, storage_writer=_Writer(folder), no_dist=not distributed())
    except CheckpointException as error:
        raise _first_failure(error) from None
    except OSError as error:
        # Not of a phase that ends on all ranks alike: the others hear of it when this one ends.
        raise RuntimeError(f"checkpoint {str(folder)!r}: {error}") from error


def _first_failure(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed."""
    return error.failures[min(error.failures)][0] if isinstance(error, CheckpointException) else error


def _tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Return what is stored: this rank's part of it, by name."""
    of_model, of_optimizer = get_state_dict(model, [] if optimizer is None else optimizer, options=_BY_PARAMETER)
    return {MODEL: of_model} if optimizer is None else {MODEL: of_model, _OPTIMIZER: of_optimizer}


def _bytes_of(model: nn.Module, tensors: dict[str, Any]) -> int:
    """Return about how many bytes all ranks together will write."""
    own = {
        f"{part}.{name}": _BYTES_BESIDE
        + (value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0)
        for part, values in tensors.items()
        for name, value in values.items()
    }
    return sum(_of_all_stages(model, own).values())


def _of_all_stages(model: nn.Module, own: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of the dictionaries of all stages of the pipeline; ``own`` without one."""
    pipeline = model.pipeline if isinstance(model, PipelinedModel) else None
    if pipeline is None:
        return own
    of_stages: list[Any] = [None] * pipeline.ranks
    dist.all_gather_object(of_stages, own, group=pipeline.group)
    return {name: value for stage in of_stages for name, value in stage.items()}


def load(
    checkpoint: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    verify: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint into a model, and an optimizer if given, of any layout; every rank calls it.

    Args:
        checkpoint: its folder, or a folder of checkpoints, of which the latest is taken.
        verify: first read all files and compare them with their checksums; the ranks share the work.

    Returns:
        The state that was saved with it.

    Raises:
        ValueError: the model is on meta, no checkpoint is there, it is damaged, or its tensors are not the model's: the
            first few names that differ.
    """
    check_has_memory("checkpoint.load", model)
    path = on_first_rank(lambda: folders.latest(checkpoint))
    marker = on_first_rank(lambda: read_marker(path))
    if verify:
        check_files(path, marker["files"])
    with quiet():
        tensors = _tensors_of(model, optimizer)
        shapes = {name: tuple(v.shape) for name, v in tensors[MODEL].items() if isinstance(v, torch.Tensor)}
        _check_same_tensors(path, _of_all_stages(model, shapes))
        read_tensors(path, tensors)
        set_state_dict(
            model,
            [] if optimizer is None else optimizer,
            model_state_dict=tensors[MODEL],
            optim_state_dict=tensors.get(_OPTIMIZER, {}),
            options=_BY_PARAMETER,
        )
    state: dict[str, Any] = marker["state"]
    return state


def read_tensors(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Read a checkpoint's tensors into these; every rank calls it.

    Raises:
        CheckpointError: on every rank, if its files cannot be read.
    """
    try:
        dcp.load(tensors, storage_reader=FileSystemReader(checkpoint), no_dist=not distributed())
    except CheckpointException as error:
        cause = _first_failure(error)
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or not isinstance(cause, Exception):
            raise cause from None
        raise unreadable(checkpoint, cause) from error


def stored_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Return the metadata of each stored tensor of the model, by its name in the model.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:
        # Whatever a broken pickle raises.
        raise unreadable(checkpoint, error) from error
    prefix = f"{MODEL}."
    return {
        key.removeprefix(prefix): value
        for key, value in stored.items()
        if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
    }


def unreadable(checkpoint: Path, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint whose files cannot be read."""
    missing = Path(error.filename).name if isinstance(error, FileNotFoundError) and error.filename else ""
    text = (str(error).splitlines() or [""])[0][:120]
    return damaged(
        checkpoint, f"{missing} is missing" if missing else f"its files cannot be read ({type(error).__name__}: {text})"
    )


def _check_same_tensors(checkpoint: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    stored = {name: tuple(value.size) for name, value in stored_tensors(checkpoint).items()}
    if stored != wanted:
        differ = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        lines = [f"{name}: stored {stored.get(name)}, in the model {wanted.get(name)}" for name in differ[:5]]
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} holds another model ({len(differ)} tensors differ): " + "; ".join(lines)
        )
