"""Functions that ranks run for the tests of loading: folders into models on a mesh, held against from_pretrained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor

from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.hugging_face.folder import read_folder
from fusemesh.hybrid.hugging_face.load import LoadReport, load_pretrained
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh


@dataclass
class Loaded:
    """The report of one rank, the bytes of the folder, and names whose values are not from_pretrained's."""

    report: LoadReport
    nbytes: int
    wrong: list[str] = field(default_factory=list)


def on_meta(path: str, kind: str) -> Any:
    """The class and sizes of a folder, with no memory."""
    with torch.device("meta"):
        return getattr(transformers, kind).from_config(transformers.AutoConfig.from_pretrained(path))


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, saved or not, under all their names; those of a mesh whole."""
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in held.items()}


def differing(want: Any, got: Any) -> list[str]:
    """Names of which one of the models has none, or another value, to the bit."""
    first, second = tensors(want), tensors(got)
    return [name for name in first.keys() | second.keys() if not _same(first.get(name), second.get(name))]


def _same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def from_folders(world: World, text: str, folders: list[tuple[str, str]]) -> list[Loaded]:
    """Each folder, with its auto class, loaded on the layout."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    found = []
    for path, kind in folders:
        model = parallelize(on_meta(path, kind), mesh, layout)
        report = load_pretrained(model, path)
        want = getattr(transformers, kind).from_pretrained(path)
        found.append(Loaded(report, read_folder(path).nbytes, differing(want, model)))
    return found
