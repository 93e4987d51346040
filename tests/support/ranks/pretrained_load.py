"""Functions that ranks run for the tests of loading: folders into models on a mesh, held against from_pretrained."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor

from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.hugging_face import reading
from fusemesh.hybrid.hugging_face.families import prepare
from fusemesh.hybrid.hugging_face.folder import read_folder
from fusemesh.hybrid.hugging_face.load import LoadReport, load_pretrained
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh


@dataclass
class Loaded:
    """The report of one rank, the bytes of the folder, names whose values are not from_pretrained's, and all names."""

    report: LoadReport
    nbytes: int
    wrong: list[str]
    held: list[str]


# Of ranks, which all write to one terminal.
transformers.logging.disable_progress_bar()


def on_meta(path: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The class and sizes of a folder, with no memory."""
    with torch.device("meta"):
        return getattr(transformers, kind).from_config(transformers.AutoConfig.from_pretrained(path), dtype=dtype)


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, saved or not, under all their names; those of a mesh whole."""
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in held.items()}


def differing(want: Any, got: Any, *, stage: bool = False) -> list[str]:
    """Names of which one of the models has none, or another value, to the bit; a stage may lack some."""
    first, second = tensors(want), tensors(got)
    names = second.keys() if stage else first.keys() | second.keys()
    return [name for name in names if not _same(first.get(name), second.get(name))]


def _same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def from_folders(world: World, text: str, folders: list[tuple[str, str]]) -> list[Loaded]:
    """Each folder, with its auto class, loaded on the layout."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    found = []
    for path, kind in folders:
        model, want = on_meta(path, kind), getattr(transformers, kind).from_pretrained(path)
        for each in (model, want):
            prepare(each)
        model = parallelize(model, mesh, layout)
        report = load_pretrained(model, path)
        wrong = differing(want, model, stage=layout.pp > 1)
        held = sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
        found.append(Loaded(report, read_folder(path).nbytes, wrong, held))
    return found


def in_bf16(world: World, text: str, folders: list[tuple[str, str]]) -> list[float]:
    """The largest difference of logits of each folder, from fp32 weights computed in bf16, from from_pretrained's."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    ids = torch.arange(1, 13).repeat(2, 1)
    found = []
    for path, kind in folders:
        want = getattr(transformers, kind).from_pretrained(path, dtype=torch.bfloat16).eval()
        model = on_meta(path, kind)
        prepare(model)
        model = parallelize(model, mesh, layout, dtype=torch.bfloat16)
        load_pretrained(model, path)
        assert {x.dtype for x in model.parameters()} == {torch.float32}
        given = {"decoder_input_ids": ids} if want.config.is_encoder_decoder else {}
        with torch.no_grad():
            logits = [each.eval()(ids, **given).logits for each in (want, model)]
        found.append((logits[0].double() - logits[1].double()).abs().max().item())
    return found


def refusals(world: World, text: str, path: str, kind: str, fault: str) -> tuple[str, int]:
    """What loading says on a rank of a mesh, and how many tensors were read before; ``fault``: on one rank alone."""
    layout = Layout.parse(text)
    model = parallelize(on_meta(path, kind), build_mesh(layout, world), layout)
    if fault == "file" and world.rank == 1:
        # Seen by this rank alone, as a network file system may show it.
        folder = read_folder(path)
        sizes = {name: size + 1 for name, size in folder.sizes.items()}
        given: Any = dataclasses.replace(folder, sizes=sizes)
    else:
        given = read_folder(path) if fault == "file" else path
    before = reading.Reader.read
    count = [0]

    def counted(*args: Any, **kwargs: Any) -> None:
        count[0] += 1
        before(*args, **kwargs)

    reading.Reader.read = counted  # type: ignore[method-assign]
    try:
        load_pretrained(model, given)
    except ValueError as error:
        return str(error), count[0]
    finally:
        reading.Reader.read = before  # type: ignore[method-assign]
    return "", count[0]


def new_heads(world: World, text: str, path: str, kind: str, seed: int) -> tuple[LoadReport, dict[str, torch.Tensor]]:
    """The report, and what the folder lacks, whole."""
    layout = Layout.parse(text)
    model = parallelize(on_meta(path, kind), build_mesh(layout, world), layout)
    report = load_pretrained(model, path, seed=seed)
    whole = tensors(model)
    return report, {name: whole[name] for name in report.newly_initialised}


def trained(world: World, text: str, path: str, kind: str) -> tuple[bool, float]:
    """Whether a tied weight is one parameter after loading and after a step, and the loss of the second step."""
    layout = Layout.parse(text)
    model = parallelize(on_meta(path, kind), build_mesh(layout, world), layout)
    load_pretrained(model, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(1, 9).repeat(2, 1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss / layout.replicas
        loss.backward()
        optimizer.step()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return tied, loss.item() * layout.replicas


def peak(world: World, text: str, path: str, kind: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes that loading adds to this process's memory at most, those of its own parts, and those it asked for."""
    layout = Layout.parse(text)
    model = parallelize(on_meta(path, kind).to(dtype), build_mesh(layout, world), layout)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    report = load_pretrained(model, path)
    added = _status("VmHWM") - before
    own = {id(x): x.to_local().nbytes for x in model.parameters() if isinstance(x, DTensor)}
    return added, sum(own.values()), report.bytes_requested


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
