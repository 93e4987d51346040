"""Layer: hybrid, on gloo ranks. Every layout and every cut of a batch drops what one process does."""

from __future__ import annotations

import pytest
import torch

from tests.support.pretrained.folders import PRETRAINED
from tests.support.ranks import dropout as ranks

FP64 = 1e-12


def check(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    total = torch.stack([x.norm() for x in want.values()]).norm()
    # Gradients that vanish by cancellation, as those of keys' biases, are noise.
    errors = {name: float((found[name] - x).norm() / max(x.norm(), 1e-4 * total)) for name, x in want.items()}
    assert max(errors.values()) <= FP64, {name: error for name, error in errors.items() if not error <= FP64}


@pytest.mark.parametrize("name", PRETRAINED)
def test_parts_of_a_batch_drop_what_the_batch_does(name: str) -> None:
    for kind in PRETRAINED[name].kinds[:1]:
        want = ranks.on_one(name, kind, {})
        check(ranks.on_one(name, kind, {}, parts=4), want)
