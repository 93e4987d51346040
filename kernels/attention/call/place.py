"""Which heads and samples of the whole a module of a sharded model attends to: dropout's bits depend on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .spec import Origin


class Place(NamedTuple):
    """The part of the whole that a module computes, parts of one size being counted from 0.

    ``fusemesh.parallelize`` sets it, as the attribute ``fusemesh_place``, on modules that contain others.
    """

    heads: int = 0
    samples: int = 0

    def origin(self, q: torch.Tensor, k: torch.Tensor, align: str | None) -> Origin:
        """Return the origin of q [B, H, Sq, D] and k, which counts queries as ``align`` does."""
        at_q = k.shape[2] - q.shape[2] if align == "bottom_right" else 0
        return Origin(q=at_q, head=self.heads * q.shape[1], batch=self.samples * q.shape[0])


def place_of(module: Any) -> Place | None:
    """Return the place of a module whose model is split; None where the module computes the whole."""
    place: Place | None = getattr(module, "fusemesh_place", None)
    return place
