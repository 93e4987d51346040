"""How a function becomes an op of this floor, and the rules of torch.func's transforms that all ops share. Torch only.

Ops have a gradient of their own for autograd. torch.func's gradients and forward-mode derivatives are those of the
reference, which the public functions take under a transform; an op called by itself must not give zeros for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
                raise _no_rule(compat.FORWARD, name)
            return function(*args, **kwargs)

        return checked

    return decorate


def without_functional_gradients(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of the autograd of the op ``name``, which names what torch.library says of its own classes."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                if compat.GRADIENT not in compat.transforms() or "setup_context" not in str(error):
                    raise
                raise _no_rule(compat.GRADIENT, name) from error

        return checked

    return decorate


def _no_rule(transform: str, name: str) -> ValueError:
    """Return the error for a transform of the op ``name``, called by itself or in a program that was traced before."""
    return ValueError(
        f"backend: expected one with a rule for {TRANSFORMS[transform]}, received a call of fusemesh::{name}, which "
        "has none; transform the public function itself, with backend='auto' or backend='reference'; a program that is "
        "exported or traced first keeps the ops of its tracing, so trace it with backend='reference'"
    )


def by_sample(name: str) -> Callable[..., Any]:
    """Return the rule of the op ``name`` for torch.func.vmap: a call for each sample, whose results are stacked."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any, **options: Any) -> tuple[Any, Any]:
        results = _each_sample(name, info.batch_size, in_dims, arguments, options)
        return results, tuple([0] * len(x) if isinstance(x, list) else 0 for x in results)

    return rule


def by_sample_of_gradients(name: str) -> Callable[..., Any]:
    """Return the same rule for the older vmap, in which torch.autograd computes many gradients at once.

    It is there for ``is_grads_batched=True``, which ``torch.autograd.functional.jacobian(vectorize=True)`` asks for.
    """

    def rule(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        level = compat.older_vmap_level()
        if level != 1:
            raise ValueError(
                f"is_grads_batched: expected it once in fusemesh::{name}, received {level} of them, one inside the "
                "other; use torch.func.jacrev or torch.func.hessian"
            )
        found = [compat.samples_of(x, level) if isinstance(x, torch.Tensor) else None for x in arguments]
        inputs = [x if samples is None else samples for x, samples in zip(arguments, found, strict=True)]
        dims = tuple(None if samples is None else 0 for samples in found)
        count = next(len(samples) for samples in found if samples is not None)
        results = _each_sample(name, count, dims, inputs, options)
        return tuple(
            [compat.as_mapped(part, level) for part in x] if isinstance(x, list) else compat.as_mapped(x, level)
            for x in results
        )

    return rule


def _each_sample(
    name: str, count: int, dims: Sequence[Any], arguments: Sequence[Any], options: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the op's results for each of ``count`` samples, stacked; ``dims`` are those that a map goes over."""
    op = getattr(torch.ops.fusemesh, name).default
    # Of no sample the results have their sizes all the same.
    indices = range(max(count, 1))
    calls = [op(*(_sample(x, dim, i) for x, dim in zip(arguments, dims, strict=True)), **options) for i in indices]
    return tuple(
        [torch.stack(of_one)[:count] for of_one in zip(*parts, strict=True)]
        if isinstance(parts[0], (list, tuple))
        else torch.stack(parts)[:count]
        for parts in zip(*calls, strict=True)
    )


def _sample(x: Any, dim: Any, index: int) -> Any:
    """Argument ``x`` of sample ``index``; ``dim`` is the one that is mapped, None if it is the same for all."""
    if isinstance(x, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_sample(part, at, index) for part, at in zip(x, dim, strict=True)]
    if dim is None:
        return x
    return x.select(dim, index) if x.shape[dim] else x.new_zeros(x.movedim(dim, 0).shape[1:])


class _Library(torch.library.Library):
    """A library whose ops name themselves where the autograd of torch.library has no rule for torch.func."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: Any = "", **options: Any) -> None:
        """Register ``fn`` for the op."""
        if dispatch_key == "Autograd":
            fn = without_functional_gradients(op_name)(fn)
        super().impl(op_name, fn, dispatch_key, **options)


# torch.library.custom_op reads a schema with mutated arguments anew at every call, 80 us of decode's 150.
LIBRARY = _Library("fusemesh", "FRAGMENT")
# What each op runs, by its name; tests run it on fake tensors too, in place of the op's fake.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
) -> None:
    """Define the op ``fusemesh::name``.

    Args:
        schema: its arguments and results in the language of torch.library.
        function: computes it, for tensors of any device.
        fake: makes results of the right shapes, dtypes and strides, without computing.
        vmap: the op's rule for torch.func.vmap; None calls it for each sample.
    """
    FUNCTIONS[name] = function
    LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, without_tangents(name)(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusemesh::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"fusemesh::{name}", vmap or by_sample(name), lib=LIBRARY)
    LIBRARY.impl(name, by_sample_of_gradients(name), "Batched")


def refuse_collectives(function: str, ranks: int) -> None:
    """Raise for a function that communicates, under a transform of torch.func."""
    raise ValueError(
        f"group: expected one rank in {function} under {active_transforms()}, received {ranks}, whose "
        "collectives have no rule; differentiate with torch.autograd (backward, grad), or "
        "call it with group=None on the whole tensors"
    )


def active_transforms() -> str:
    """Return the transforms of torch.func under which the code runs, for a message; "" for none."""
    return ", ".join(TRANSFORMS[name] for name in compat.transforms())
