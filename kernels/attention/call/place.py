"""Which heads and samples of the whole a module of a sharded model attends to: dropout's bits depend on them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from .spec import Origin


class Place(NamedTuple):
    """The part of the whole that a module computes, parts of one size being counted from 0.

    ``fusemesh.parallelize`` sets it, as the attribute ``fusemesh_place``, on modules that contain others.
    """

    heads: int = 0
    samples: int = 0


class Drawing(Protocol):
    """One forward of a model whose dropout takes its bits from positions, as :mod:`fusemesh.hybrid.dropout` has it."""

    first_sample: int

    def next_key(self, samples: int) -> int:
        """Return the seed, an int64 number, of the next call that drops, of so many samples from the first one on."""


class Dropping(NamedTuple):
    """The seed, the origin and the alignment with which a module's attention drops the weights that the whole would."""

    seed: int | None
    origin: Origin | None
    align: str | None


# By thread: a forward that is recomputed may run in one of autograd's.
drawings: dict[int, Drawing] = {}


# Threads that are in a block of without_mask().
_unmasked: set[int] = set()


@contextlib.contextmanager
def without_mask() -> Iterator[None]:
    """Within the block Hugging Face's models make no mask: attention is told the bounds of documents instead."""
    _unmasked.add(threading.get_ident())
    try:
        yield
    finally:
        _unmasked.discard(threading.get_ident())


def makes_no_mask() -> bool:
    """Return whether the code runs within :func:`without_mask`."""
    return bool(_unmasked) and threading.get_ident() in _unmasked


def place_of(module: Any) -> Place | None:
    """Return the place of a module whose model is split; None where the module computes the whole."""
    place: Place | None = getattr(module, "fusemesh_place", None)
    return place


def dropping(module: Any, q: torch.Tensor, k: torch.Tensor, align: str | None) -> Dropping:
    """Return how a module drops weights of q [B, H, Sq, D] and k, which ``align`` aligns.

    A seed of None is to be drawn from torch's generator, alike on every rank.
    """
    drawing = drawings.get(threading.get_ident()) if drawings else None
    place = place_of(module)
    if place is None and drawing is None:
        return Dropping(None, None, align)
    heads, samples = place or Place()
    first = samples * q.shape[0] if drawing is None else drawing.first_sample
    at_q = k.shape[2] - q.shape[2] if align == "bottom_right" else 0
    seed = None if drawing is None else drawing.next_key(q.shape[0])
    return Dropping(seed, Origin(q=at_q, head=heads * q.shape[1], batch=first), None)
