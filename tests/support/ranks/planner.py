"""The ranks' part of tests/hybrid/test_planner*.py: a real model on a mesh, and the bytes that it really holds."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fusemesh.config import TrainingConfig
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.consistency import quick_sum
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.run.optimizer import build_optimizer
from fusemesh.transformer import Transformer, TransformerConfig

# A vocabulary and a width that nothing divides evenly, and fewer kv heads than tp4 has ranks.
_SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 92,
    "max_sequence_length": 64,
}
CONFIGS = {
    "decoder": TransformerConfig(**_SIZES),
    "decoder-bias": TransformerConfig(**_SIZES, use_bias=True),
    # Three classes, which leave a rank of tp4 none.
    "class": TransformerConfig(**_SIZES, architecture="encoder", output="class", num_classes=3),
    "span": TransformerConfig(**_SIZES, architecture="encoder", output="span", local_window=8),
    "translation": TransformerConfig(**_SIZES, architecture="encoder-decoder", use_bias=True),
    "translation-tied": TransformerConfig(**_SIZES, architecture="encoder-decoder", tie_embeddings=True),
}


def sample(config: TransformerConfig, samples: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens, targets and inputs of some samples without padding; a question is one token long."""
    tokens = torch.zeros(samples, config.max_sequence_length, dtype=torch.long)
    if config.architecture == "decoder":
        return tokens, tokens, {}
    inputs = {"lengths": torch.full((samples,), config.max_sequence_length)}
    if config.output == "class":
        return tokens, tokens[:, :1], inputs
    if config.output == "span":
        return tokens, torch.ones_like(tokens[:, :2]), {**inputs, "span_starts": torch.ones(samples, dtype=torch.long)}
    return tokens, tokens, {**inputs, "target_tokens": tokens}


def stored(world: World, text: str, config: TransformerConfig, virtual_stages: int = 1) -> dict[str, Any]:
    """This rank's place; after a step its parameters' shapes, and bytes of them, gradients and optimizer states."""
    layout = Layout.parse(text)
    schedule = "interleaved1f1b" if virtual_stages > 1 else "1f1b"
    options = PipelineOptions(0, schedule, virtual_stages)
    model = parallelize(Transformer(config), build_mesh(layout, world), layout, pipeline=options)
    optimizer = build_optimizer(model, TrainingConfig())
    tokens, targets, inputs = sample(config, layout.pp)
    model.loss_and_gradients(tokens, targets, targets.numel(), **inputs)
    optimizer.step()
    found: dict[str, Any] = {"at": layout.coordinates(world.rank), "parameters": 0, "gradients": 0, "optimizer": 0}
    found["shapes"] = {name: _shape(parameter) for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        assert parameter.grad is not None
        found["parameters"] += _bytes(parameter)
        found["gradients"] += _bytes(parameter.grad)
        found["optimizer"] += sum(_bytes(state) for state in optimizer.state[parameter].values())
    return found


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple((x.to_local() if isinstance(x, DTensor) else x).shape)


def _bytes(x: torch.Tensor) -> int:
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.numel() * local.element_size()


def saved(world: World, text: str, config: TransformerConfig, samples: int, sequence_parallel: bool) -> int:
    """Bytes of the tensors, parameters left out, that autograd keeps of one forward pass on this rank."""
    layout = Layout.parse(text)
    model: nn.Module = parallelize(
        Transformer(config), build_mesh(layout, world), layout, sequence_parallel=sequence_parallel
    )
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens, targets, inputs = sample(config, samples)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(tokens, targets, **inputs)
        # One shard keeps its layers' parameters copied out from forward to backward, and these are what is kept.
        locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        parameters = {p.untyped_storage().data_ptr() for p in locals_}
    del loss
    return sum(size for place, size in kept.items() if place not in parameters)


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, of those that were known before the block or made within it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known: Any = WeakIdKeyDictionary()
        self.now = self.peak = 0
        for parameter in model.parameters():
            self.see(parameter)

    def see(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        if x.is_meta or storage in self.known:
            return
        self.known[storage] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, storage.nbytes())

    def gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for x in torch.utils._pytree.tree_leaves(args):
            if isinstance(x, torch.Tensor) and not isinstance(x, DTensor):
                # Made before the block by somebody else, who keeps it.
                self.known.setdefault(x.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and not isinstance(x, DTensor):
                self.see(x)
        return result


def recomputed(world: World, text: str, config: TransformerConfig, samples: int, sequence_parallel: bool) -> int:
    """Bytes of tensors, parameters left out, that a forward whose blocks are computed again leaves on this rank."""
    layout = Layout.parse(text)
    model: nn.Module = parallelize(
        Transformer(config),
        build_mesh(layout, world),
        layout,
        sequence_parallel=sequence_parallel,
        recompute="full",
    )
    tokens, targets, inputs = sample(config, samples)
    with Live(model) as live:
        loss = model(tokens, targets, **inputs)
        locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        parameters = {p.untyped_storage().data_ptr() for p in locals_}
        kept = {}
        for storage, size in list(live.known.items()):
            # One that is gone may have left its object in Python.
            with contextlib.suppress(RuntimeError):
                kept[storage.data_ptr()] = storage.nbytes() if size else 0
    loss.backward()
    return sum(size for place, size in kept.items() if place not in parameters)


def cutting(world: World, text: str, config: TransformerConfig) -> tuple[int, int]:
    """The most bytes that are there while a model is cut, and those left of it afterwards."""
    layout = Layout.parse(text)
    mesh = build_mesh(layout, world)
    made = [Transformer(config)]
    # Models are compared by a table of 256 KiB, which is made once for all of them.
    quick_sum(next(made[0].parameters()))
    with Live(made[0]) as live:
        model = parallelize(made.pop(), mesh, layout)
    return live.peak, sum(_bytes(parameter) for parameter in model.parameters())
