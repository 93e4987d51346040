"""The rules of torch.func's transforms that all ops of this floor share, whatever they compute. Torch only.

Ops have a gradient of their own for autograd. torch.func's gradients and forward-mode derivatives are those of the
reference, which the public functions take under a transform; an op called by itself must not give zeros for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from . import compat
from .backend_record import TRANSFORMS

P = ParamSpec("P")
R = TypeVar("R")


def without_tangents(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of the implementation of the op ``name``: it refuses forward mode, which would be lost.

    PyTorch takes an op without a rule for one whose derivative is zero.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if compat.FORWARD in compat.transforms():
                what = TRANSFORMS[compat.FORWARD]
                raise ValueError(
                    f"backend: expected one with a rule for {what}, received a call of fusemesh::{name}, which has "
                    "none; use the public function with backend='auto' or backend='reference'"
                )
            return function(*args, **kwargs)

        return checked

    return decorate


def by_sample(name: str) -> Callable[..., Any]:
    """Return the vmap rule of the op ``name``: a call for each sample, whose results are stacked.

    Autograd of ordinary calls needs it, too, where many gradients are asked for at once (``is_grads_batched``).
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        op = getattr(torch.ops.fusemesh, name).default
        samples = [
            op(*(_sample(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        results = [_stacked(parts) for parts in zip(*samples, strict=True)]
        return tuple(results), tuple([0] * len(x) if isinstance(x, list) else 0 for x in results)

    return rule


def _sample(x: Any, dim: Any, index: int) -> Any:
    """Argument ``x`` of sample ``index``; ``dim`` is the one that vmap maps, None if it is the same for all."""
    if isinstance(x, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_sample(part, at, index) for part, at in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, index)


def _stacked(parts: tuple[Any, ...]) -> Any:
    if isinstance(parts[0], (list, tuple)):
        return [torch.stack(of_one) for of_one in zip(*parts, strict=True)]
    return torch.stack(parts)


def refuse_collectives(function: str, ranks: int) -> None:
    """Raise for a function that communicates, under a transform of torch.func."""
    what = ", ".join(TRANSFORMS[name] for name in compat.transforms())
    raise ValueError(
        f"group: expected one rank in {function} under {what}, received {ranks}, whose collectives have no rule for it; "
        "differentiate with torch.autograd (backward, grad), or call it with group=None on the whole tensors"
    )
