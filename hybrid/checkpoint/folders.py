"""Folders of checkpoints and their markers: which are there, which is the latest, what a damaged one's error says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..outputs import UserError
from .lock import holder_of

MARKER = "checkpoint.json"
# Format 2 has no checksums and no metadata of the task.
FORMAT, READABLE = 3, (2, 3)
STEP = "step-"
UNFINISHED = ".unfinished-"
REPLACED = f"{UNFINISHED}old-"
# In a folder that is being written: held by the process that writes it.
WRITER = ".writer"
_ASIDE = "aside-"


class CheckpointError(UserError, ValueError):
    """A checkpoint or a merged file is not there, is damaged, or is of another version; names the file and a remedy."""


def step_of(directory: str | os.PathLike[str]) -> int:
    """Return the step in a checkpoint's name."""
    return int(Path(directory).name.removeprefix(STEP))


def all_checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints in this folder, oldest step first."""
    found = [path.parent for path in Path(directory).glob(f"{STEP}*/{MARKER}")]
    return sorted((path for path in found if path.name.removeprefix(STEP).isdigit()), key=step_of)


def latest(directory: str | os.PathLike[str]) -> Path:
    """Return the complete checkpoint of the highest step in a folder; the folder itself if it is a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    root = Path(directory)
    if (root / MARKER).is_file():
        return root
    restore_replaced(root)
    found = all_checkpoints(root)
    if not found:
        raise CheckpointError(f"checkpoint: expected a folder {STEP}* with {MARKER} in {str(root)!r}, found none")
    return found[-1]


def at_step(directory: str | os.PathLike[str], step: int) -> Path:
    """Return the complete checkpoint of this step in a folder, or beside it if the folder is a checkpoint.

    Raises:
        CheckpointError: there is none; lists the steps that are there.
    """
    root = Path(directory)
    if (root / MARKER).is_file():
        root = root.parent
    restore_replaced(root)
    found = {step_of(path): path for path in all_checkpoints(root)}
    if step not in found:
        there = ", ".join(map(str, found)) or "none"
        raise CheckpointError(
            f"--from-step: expected the step of a checkpoint in {str(root)!r} ({there}), received {step}"
        )
    return found[step]


def set_later_aside(directory: str | os.PathLike[str], step: int) -> list[Path]:
    """Rename the checkpoints after ``step``, which a run that goes on from there would mistake for its own.

    Returns:
        Their new places.
    """
    moved = []
    for path in all_checkpoints(directory):
        if step_of(path) > step:
            number = 0
            while (target := path.with_name(f"{_ASIDE}{number}-{path.name}")).exists():
                number += 1
            moved.append(path.rename(target))
    return moved


def restore_replaced(root: Path) -> None:
    """Rename back a checkpoint that was about to be replaced when its run died."""
    for path in root.glob(f"{REPLACED}*/{MARKER}"):
        final = root / path.parent.name.removeprefix(REPLACED)
        if not final.exists() and not any(map(is_being_written, root.glob(f"{UNFINISHED}*"))):
            # Another rank may do the same.
            with suppress(OSError):
                path.parent.rename(final)


def is_being_written(unfinished: Path) -> bool:
    """Return whether a living process writes an unfinished checkpoint."""
    return bool(holder_of(unfinished / WRITER))


def remove_leftovers(root: Path, *, ignore_errors: bool = False) -> None:
    """Remove what dead runs have left unfinished."""
    for path in root.glob(f"{UNFINISHED}*"):
        if not is_being_written(path):
            shutil.rmtree(path, ignore_errors=ignore_errors)


def marker_text(state: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
    """Return the content of the marker: the format, the caller's state, the files, and the checksum of all that."""
    content = {"format": FORMAT, "state": state, "files": files}
    return json.dumps({**content, "sha256": _digest(content)}, indent=2)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_marker(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the marker's ``state`` and ``files``: name to ``bytes`` and ``sha256``; none in format 2.

    Raises:
        CheckpointError: it is no checkpoint, its marker is damaged, or its format is another version's.
    """
    path = Path(checkpoint, MARKER)
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint: expected {MARKER} in {str(checkpoint)!r}, found none: not a whole checkpoint"
        )
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except OSError as error:
        raise damaged(path.parent, f"{MARKER} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise damaged(path.parent, f"{MARKER} is {'not JSON' if text else 'empty'}") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise damaged(path.parent, f"{MARKER} is not what was written")
    if content["format"] not in READABLE:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r}: expected format {FORMAT}, received {content['format']}; read it by the "
            "version of FuseMesh that wrote it"
        )
    expected = content.pop("sha256", None)
    whole = isinstance(content.get("state"), dict) and (
        content["format"] == 2 or (isinstance(content.get("files"), dict) and expected == _digest(content))
    )
    if not whole:
        raise damaged(path.parent, f"{MARKER} is not what was written")
    return {"state": content["state"], "files": content.get("files", {})}


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the caller's state that was saved with a checkpoint; raises as :func:`read_marker` does."""
    state: dict[str, Any] = read_marker(checkpoint)["state"]
    return state


def damaged(checkpoint: Path, reason: str) -> CheckpointError:
    """Return the error for a checkpoint that is not as it was written, with the others that may be taken instead."""
    others = [str(step_of(path)) for path in all_checkpoints(checkpoint.parent) if path.name != checkpoint.name]
    remedy = (
        f"take another checkpoint by --from-step (there are: {', '.join(others)}), or copy this one anew"
        if others
        else "copy it anew from where it was saved; no other checkpoint is beside it"
    )
    return CheckpointError(f"checkpoint {str(checkpoint)!r} is damaged: {reason}; {remedy}")
