"""Functions that ranks run for tests/hybrid/test_checkpoint.py: a small model, some steps, save and load."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.checkpoint import store, together
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.transformer import Transformer, TransformerConfig

# One kv head (fewer than tp) and 37 tokens (which no tp divides): both must come back from a checkpoint as they are.
CONFIG = TransformerConfig(
    vocab_size=37,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=1,
    intermediate_size=24,
    max_sequence_length=8,
)


def plain_model(seed: int = 0, tied: bool = False) -> Transformer:
    return Transformer(
        dataclasses.replace(CONFIG, tie_embeddings=tied), backend="reference", seed=seed, dtype=torch.float64
    )


def parse(text: str) -> tuple[Layout, PipelineOptions]:
    """A layout, and for ``"pp2 x tp2 interleaved"`` two stages on each rank."""
    interleaved = text.endswith(" interleaved")
    options = PipelineOptions(2, "interleaved1f1b", 2) if interleaved else PipelineOptions()
    return Layout.parse(text.removesuffix(" interleaved")), options


def placed(world: World, text: str, seed: int, tied: bool) -> tuple[Transformer, torch.optim.Optimizer]:
    layout, options = parse(text)
    model = parallelize(plain_model(seed, tied), build_mesh(layout, world), layout, pipeline=options)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    # Fused: DTensor plans one operation in place of the dozen that the other way takes.
    return model, torch.optim.AdamW(groups, lr=1e-2, fused=True)


def train(model: Transformer, optimizer: torch.optim.Optimizer, layout: Layout, rank: int, steps: range) -> None:
    """Steps on samples that depend on the step alone; each replica takes its rows."""
    for step in steps:
        text = torch.randint(0, CONFIG.vocab_size, (4, 9), generator=torch.Generator().manual_seed(step))
        own = text.chunk(layout.replicas)[layout.replica_of(rank)]
        optimizer.zero_grad()
        model.loss_and_gradients(own[:, :-1], own[:, 1:], 32)
        optimizer.step()


def snapshot(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every parameter and every tensor of the optimizer, whole."""
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        tensors.update({f"{name}/{key}": value for key, value in optimizer.state[parameter].items()})
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in tensors.items()}


def train_and_save(world: World, text: str, folder: str, steps: int, tied: bool) -> dict[str, torch.Tensor]:
    model, optimizer = placed(world, text, 1, tied)
    train(model, optimizer, parse(text)[0], world.rank, range(steps))
    checkpoint.save(folder, model, optimizer, {"step": steps, "layout": text}, step=steps)
    return snapshot(model, optimizer)


def load_and_go_on(
    world: World, text: str, folder: str, steps: range, tied: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """The state, everything just after loading, everything after ``steps`` more, the groups' weight decays."""
    model, optimizer = placed(world, text, 2, tied)
    state = checkpoint.load(folder, model, optimizer)
    loaded = snapshot(model, optimizer)
    train(model, optimizer, parse(text)[0], world.rank, steps)
    return state, loaded, snapshot(model, optimizer), [group["weight_decay"] for group in optimizer.param_groups]


def load_another_model(world: World, text: str, folder: str) -> str:
    """The message with which loading into a model of other tensors fails on this rank."""
    model, optimizer = placed(world, text, 1, True)
    try:
        checkpoint.load(folder, model, optimizer)
    except ValueError as error:
        return str(error)
    return "loaded"


def save_into(world: World, folder: str) -> str:
    """The message with which saving into an impossible folder fails on this rank."""
    model, optimizer = placed(world, f"dp{world.world_size}", 1, False)
    try:
        checkpoint.save(folder, model, optimizer, {}, step=1)
    except OSError as error:
        return str(error)
    return f"saved: {sorted(Path(folder).iterdir())}"


def save_on_full_disks(world: World, text: str, folder: str, full: list[int], step: int) -> str:
    """The message with which saving fails when the disk is full where the ranks of ``full`` write."""
    model, optimizer = placed(world, text, 1, False)
    create = FileSystem.create_stream

    @contextmanager
    def no_space(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            if "w" in mode and world.rank in full:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield stream

    FileSystem.create_stream = no_space  # type: ignore[method-assign, assignment]
    try:
        checkpoint.save(folder, model, optimizer, {}, step=step)
    except OSError as error:
        return str(error)
    finally:
        FileSystem.create_stream = create  # type: ignore[method-assign]
    return "saved"


def save_apart(world: World, folders: list[str]) -> list[str]:
    """The messages with which saving fails: each rank into its own folder; the last cannot read what it wrote."""
    model, optimizer = placed(world, f"fsdp{world.world_size}", 1, False)
    patience, measure, found = together.PATIENCE, store.checksums_of, []
    together.PATIENCE = 0.2

    def unreadable(folder: Path) -> Any:
        if world.rank == world.world_size - 1:
            raise OSError(errno.EIO, "Input/output error")
        return measure(folder)

    for folder, function in ((folders[world.rank], measure), (folders[0], unreadable)):
        store.checksums_of = function
        try:
            checkpoint.save(folder, model, optimizer, {}, step=1)
            found.append("saved")
        except OSError as error:
            found.append(str(error))
        finally:
            store.checksums_of = measure
    together.PATIENCE = patience
    return found


def load_damaged(world: World, text: str, folder: str) -> tuple[str, str]:
    """The messages with which loading a damaged checkpoint fails, with and without a look at the checksums."""
    model, optimizer = placed(world, text, 1, False)
    found = []
    for verify in (True, False):
        try:
            checkpoint.load(folder, model, optimizer, verify=verify)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append("loaded")
    return found[0], found[1]


def load_from(world: World, folder: str) -> str:
    """The message with which loading from a folder without checkpoints fails on this rank."""
    model, optimizer = placed(world, f"dp{world.world_size}", 1, False)
    try:
        checkpoint.load(folder, model, optimizer)
    except ValueError as error:
        return str(error)
    return "loaded"
