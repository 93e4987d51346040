"""Recompute: a block keeps its input for backward, which computes the block again, in place of all that it saves.

By torch.utils.checkpoint around a block's own forward. Hooks, such as those by which fully_shard gathers parameters,
stay around it and run once. Numbers are the same to the bit: torch's generators are set back, and dropout by position
is that of the first time. Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .dropout_calls import again

RECOMPUTE = ("none", "full")


def check_recompute(recompute: str, blocks: int) -> None:
    """Raise ValueError unless ``recompute`` is one of :data:`RECOMPUTE`, and the model has blocks for it."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute: expected one of {', '.join(RECOMPUTE)}, received {recompute!r}")
    if recompute != "none" and not blocks:
        raise ValueError(
            f"recompute: expected a model whose layers are in a nn.ModuleList, which are what {recompute!r} computes "
            "again, received one without; put them in one, or use recompute='none'"
        )


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let each of ``blocks`` keep its inputs alone; it stays the same object. Its caches are not filled in training."""
    for block in blocks:
        if "forward" not in vars(block) and any(True for _ in block.parameters()):
            vars(block)["forward"] = _Recomputed(block)


class _Recomputed:
    """A block's forward."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Of the class that the block has then: placing it derives others.
        forward = type(self.block).forward
        if not (self.block.training and torch.is_grad_enabled()):
            return forward(self.block, *args, **kwargs)
        args = tuple(_without_cache(value) for value in args)
        given = {name: _without_cache(value) for name, value in kwargs.items()}
        if given.get("use_cache"):
            given["use_cache"] = False
        run = functools.partial(forward, self.block, **given)
        return checkpoint(run, *args, use_reentrant=False, context_fn=_contexts)


def _without_cache(value: Any) -> Any:
    """Return ``value``; None for Hugging Face's caches of keys and values, which a second forward would fill again."""
    return None if hasattr(value, "get_seq_length") and hasattr(value, "update") else value


def _contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), again()
