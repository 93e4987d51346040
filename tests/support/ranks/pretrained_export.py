"""Hugging Face models on a mesh, written as folders by all ranks."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fusemesh
from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.hugging_face.export import ExportReport, export_pretrained
from fusemesh.hybrid.hugging_face.exports import placing, slices
from fusemesh.hybrid.hugging_face.exports.documents import keep_small_files
from fusemesh.hybrid.hugging_face.folder import read_folder
from fusemesh.hybrid.hugging_face.merge import EXPORT, export_plan
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh


def loaded(world: World, text: str, kind: str, folder: str, dtype: torch.dtype | None = None) -> Any:
    """Return a folder's model on a mesh, in another dtype if one is given."""
    layout = Layout.parse(text)
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype or "auto")
    return fusemesh.parallelize(model, build_mesh(layout, world), layout)


def exported(world: World, text: str, cases: list[tuple[str, str, str]], dtype: torch.dtype | None = None) -> list[Any]:
    """Load each (kind, folder, target), change nothing, export it; return the reports."""
    found: list[ExportReport] = []
    for kind, folder, target in cases:
        found.append(export_pretrained(loaded(world, text, kind, folder, dtype), target, folder))
    return found


def counted(world: World, text: str, kind: str, folder: str, target: str) -> dict[tuple[str, int, int], int]:
    """Export; return how often this rank has written which bytes of which file, without headers.

    Already parts of 500 bytes are written by all that hold them, each a share. Ranks send each other no weights.
    """
    model = loaded(world, text, kind, folder)
    found: Counter[tuple[str, int, int]] = Counter()
    before = os.pwrite

    def pwrite(file: int, content: Any, at: int) -> int:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if at:
            found[path.name, at, len(content)] += 1
        return before(file, content, at)

    placing.os.pwrite = pwrite  # type: ignore[attr-defined]
    slices.SHARED_FROM, shared_from = 500, slices.SHARED_FROM
    try:
        with _NoWeightsSent():
            export_pretrained(model, target, folder)
    finally:
        placing.os.pwrite = before  # type: ignore[attr-defined]
        slices.SHARED_FROM = shared_from
    return dict(found)


class _NoWeightsSent(TorchDispatchMode):
    """Raise where a collective is given numbers in floating point."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sent = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            assert not any(x.is_floating_point() for x in sent), func
        return func(*args, **(kwargs or {}))


def refused(world: World, text: str, kind: str, folder: str, target: str, rank: int, number: int) -> str:
    """Export where one rank's writes fail from the n-th one on; return what this rank says."""
    model = loaded(world, text, kind, folder)
    before, left = os.pwrite, [number]

    def pwrite(file: int, content: Any, at: int) -> int:
        left[0] -= 1
        if world.rank == rank and left[0] < 0:
            raise OSError(28, os.strerror(28))
        return before(file, content, at)

    placing.os.pwrite = pwrite  # type: ignore[attr-defined]
    try:
        export_pretrained(model, target, folder)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        placing.os.pwrite = before  # type: ignore[attr-defined]
    return ""


def killed(world: World, text: str, kind: str, folder: str, target: str, rank: int) -> None:
    """Export, in the middle of which one rank is killed."""
    model = loaded(world, text, kind, folder)
    before, left = os.pwrite, [3]

    def pwrite(file: int, content: Any, at: int) -> int:
        left[0] -= 1
        if world.rank == rank and left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(file, content, at)

    placing.os.pwrite = pwrite  # type: ignore[attr-defined]
    export_pretrained(model, target, folder)


def saved_into(world: World, text: str, kind: str, folder: str, target: str, size: str) -> None:
    """Save a folder's model as Hugging Face saves, in files of a size."""
    loaded(world, text, kind, folder).save_pretrained(target, max_shard_size=size)


def saving_refused(world: World, folder: str, target: str) -> dict[str, str]:
    """What save_pretrained says of its options that are not for a model on a mesh."""
    model, found = loaded(world, "fsdp2", "AutoModelForCausalLM", folder), {}
    for option in ("push_to_hub", "distributed_checkpoint", "safe_serialization"):
        try:
            model.save_pretrained(target, **{option: option != "safe_serialization"})
        except ValueError as error:
            found[option] = str(error)
    return found


def checkpointed(world: World, text: str, kind: str, folder: str, run: str, target: str) -> None:
    """Change every weight of a folder's model, in fp32, save it as a run's checkpoint, and export it."""
    model, source = loaded(world, text, kind, folder, torch.float32), read_folder(folder)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            parameter.mul_(1.37)
    state = {"metadata": {EXPORT: export_plan(model, source)}}
    checkpoint.save(run, model, None, state, step=1)
    if world.rank == 0:
        keep_small_files(source.path, Path(run))
    export_pretrained(model, target, source)
