"""Checkpoints: save in one layout, load in any other, merge into one file.

torch.distributed.checkpoint stores every tensor by its global shape and its name in the whole model, and an optimizer's
settings by parameter, so that what one layout wrote another reads; what two stages of a pipeline hold is stored once. A
checkpoint is a folder ``step-00000100`` that appears under that name only when it is whole: it is written beside, given
its marker (``checkpoint.json``, which also holds the caller's small state), and then renamed. A run that dies while
writing leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import json
import os
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
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from .pipeline_parallel import PipelinedModel

MARKER = "checkpoint.json"
_FORMAT = 2
_STEP = "step-"
_UNFINISHED = ".unfinished-"
_REPLACED = f"{_UNFINISHED}old-"
_MODEL, _OPTIMIZER = "model", "optimizer"
# Groups of parameters would be numbered differently on each stage of a pipeline.
_BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)
_T = TypeVar("_T")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _on_first_rank(action: Callable[[], _T]) -> _T:
    """Run ``action`` on rank 0 and return its result on every rank; if it raises there, every rank raises."""
    if not _distributed():
        return action()
    box: list[Any] = [None, None]
    if _rank() == 0:
        try:
            box[0] = action()
        except (OSError, ValueError) as error:
            box[1] = (ValueError if isinstance(error, ValueError) else OSError)(str(error))
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings about its own inner calls, on which a user cannot act."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
        yield


def step_of(directory: str | os.PathLike[str]) -> int:
    """Return the step in a checkpoint's name."""
    return int(Path(directory).name.removeprefix(_STEP))


def all_checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints in this folder, oldest step first."""
    found = [path.parent for path in Path(directory).glob(f"{_STEP}*/{MARKER}")]
    return sorted((path for path in found if path.name.removeprefix(_STEP).isdigit()), key=step_of)


def latest(directory: str | os.PathLike[str]) -> Path:
    """Return the complete checkpoint of the highest step in a folder; the folder itself if it is a checkpoint.

    Raises:
        ValueError: there is none.
    """
    root = Path(directory)
    if (root / MARKER).is_file():
        return root
    _restore_replaced(root)
    found = all_checkpoints(root)
    if not found:
        raise ValueError(f"checkpoint: expected a folder {_STEP}* with {MARKER} in {str(root)!r}, found none")
    return found[-1]


def _restore_replaced(root: Path) -> None:
    """Rename back a checkpoint that was about to be replaced when its run died."""
    for path in root.glob(f"{_REPLACED}*/{MARKER}"):
        final = root / path.parent.name.removeprefix(_REPLACED)
        if not final.exists():
            # Another rank may do the same.
            with suppress(OSError):
                path.parent.rename(final)


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the caller's state that was saved with a checkpoint.

    Raises:
        ValueError: it is no checkpoint, or its format is another version's.
    """
    path = Path(checkpoint, MARKER)
    if not path.is_file():
        raise ValueError(f"checkpoint: expected {MARKER} in {str(checkpoint)!r}, found none: not a whole checkpoint")
    content = json.loads(path.read_text())
    if content.get("format") != _FORMAT:
        raise ValueError(f"checkpoint {str(checkpoint)!r}: expected format {_FORMAT}, received {content.get('format')}")
    return content["state"]


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
        OSError: on every rank, if the folder cannot be written.
    """
    root = Path(directory)
    final, unfinished = root / f"{_STEP}{step:08d}", root / f"{_UNFINISHED}{_STEP}{step:08d}"
    content = json.dumps({"format": _FORMAT, "state": state}, indent=2)

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _restore_replaced(root)
        for leftover in root.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        unfinished.mkdir()

    def finish() -> None:
        (unfinished / MARKER).write_text(content)
        if final.exists():
            # A folder cannot be replaced in one move. The old one first steps aside, so that no reader ever meets a
            # mixture; if the run dies before the next line, it is put back.
            final.rename(root / f"{_REPLACED}{final.name}")
        unfinished.rename(final)
        for old in root.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(old)
        if keep > 0:
            for old in all_checkpoints(root)[:-keep]:
                shutil.rmtree(old)

    _on_first_rank(prepare)
    with _quiet():
        tensors: dict[str, Any] = {}
        tensors[_MODEL], optimizer_state = get_state_dict(
            model, [] if optimizer is None else optimizer, options=_BY_PARAMETER
        )
        if optimizer is not None:
            tensors[_OPTIMIZER] = optimizer_state
        dcp.save(tensors, storage_writer=FileSystemWriter(unfinished), no_dist=not _distributed())
    _on_first_rank(finish)
    return final


def load(
    checkpoint: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Load a checkpoint into a model, and an optimizer if given, of any layout; every rank calls it.

    Args:
        checkpoint: its folder, or a folder of checkpoints, of which the latest is taken.

    Returns:
        The state that was saved with it.

    Raises:
        ValueError: no checkpoint is there, or its tensors are not the model's: the first few names that differ.
    """
    path = _on_first_rank(lambda: latest(checkpoint))
    state = read_state(path)
    with _quiet():
        tensors: dict[str, Any] = {}
        tensors[_MODEL], optimizer_state = get_state_dict(
            model, [] if optimizer is None else optimizer, options=_BY_PARAMETER
        )
        _check_same_tensors(path, _shapes(model, tensors[_MODEL]))
        if optimizer is not None:
            tensors[_OPTIMIZER] = optimizer_state
        dcp.load(tensors, storage_reader=FileSystemReader(path), no_dist=not _distributed())
        set_state_dict(
            model,
            [] if optimizer is None else optimizer,
            model_state_dict=tensors[_MODEL],
            optim_state_dict=tensors.get(_OPTIMIZER, {}),
            options=_BY_PARAMETER,
        )
    return state


def _stored_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Return the metadata of each stored tensor of the model, by its name in the model."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    prefix = f"{_MODEL}."
    return {
        key.removeprefix(prefix): value
        for key, value in stored.items()
        if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
    }


def _shapes(model: nn.Module, tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the global shape of each tensor of the model, those of other stages too, by name."""
    own = {name: tuple(value.shape) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    pipeline = model.pipeline if isinstance(model, PipelinedModel) else None
    if pipeline is None:
        return own
    of_stages: list[Any] = [None] * pipeline.ranks
    dist.all_gather_object(of_stages, own, group=pipeline.group)
    return {name: shape for stage in of_stages for name, shape in stage.items()}


def _check_same_tensors(checkpoint: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    stored = {name: tuple(value.size) for name, value in _stored_tensors(checkpoint).items()}
    if stored != wanted:
        differ = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        lines = [f"{name}: stored {stored.get(name)}, in the model {wanted.get(name)}" for name in differ[:5]]
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} holds another model ({len(differ)} tensors differ): " + "; ".join(lines)
        )


def merge(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a checkpoint's model as one safetensors file, in one process with no process group.

    The tensors are whole, of their true shapes, under the names of the plain model. The state goes into the file's
    metadata, as JSON under ``fusemesh``, so that the file says what it is.

    Args:
        checkpoint: its folder, or a folder of checkpoints, of which the latest is taken.
        output: the file to write; it appears only when it is whole.

    Returns:
        ``{"checkpoint", "output", "tensors", "parameters", "bytes"}``.

    Raises:
        ValueError: no checkpoint is there, or safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError("merge needs safetensors; install it with: pip install 'fusemesh[app]'") from error

    path = latest(checkpoint)
    state = read_state(path)
    tensors = {name: torch.empty(v.size, dtype=v.properties.dtype) for name, v in _stored_tensors(path).items()}
    with _quiet():
        dcp.load({_MODEL: tensors}, storage_reader=FileSystemReader(path), no_dist=True)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".unfinished-{target.name}")
    save_file(tensors, unfinished, metadata={"format": "pt", "fusemesh": json.dumps(state)})
    unfinished.replace(target)
    return {
        "checkpoint": str(path),
        "output": str(target),
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": target.stat().st_size,
    }


def read_merged(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the state of a file that :func:`merge` wrote.

    Raises:
        ValueError: the file is not there, was not written by :func:`merge`, or safetensors is not installed.
    """
    with _open_merged(path) as (file, state):
        return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118 (not a dict)


def read_merged_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state alone of a file that :func:`merge` wrote; raises as :func:`read_merged` does."""
    with _open_merged(path) as (_, state):
        return state


@contextmanager
def _open_merged(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError("a merged model needs safetensors; install it with: pip install 'fusemesh[app]'") from error

    if not Path(path).is_file():
        raise ValueError(f"model: expected a .safetensors file, received {str(path)!r}: not found")
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"model: expected a .safetensors file, received {str(path)!r}: {error}") from error
    with opened as file:
        metadata = file.metadata() or {}
        if "fusemesh" not in metadata:
            raise ValueError(f"model: expected a file that `fusemesh merge` wrote, received {str(path)!r}")
        yield file, json.loads(metadata["fusemesh"])
