"""Layer: application, on gloo ranks. Every kind of every family of Hugging Face models, on tp, equals one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fusemesh.hybrid.hugging_face.sources import Source
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.pretrained.folders import CAUSAL, CLASSES, PAIRS, PRETRAINED, SPANS
from tests.support.ranks import families as ranks

pytestmark = pytest.mark.distributed

FP64 = 1e-12
# Softmax does not see what is added to the scores of all keys, or of all positions of a span, alike: these gradients
# are 0, and what is computed of them is roundings.
ZERO = re.compile(
    r".*\.(key|k_lin|k_proj|c_attn\.key)\.bias"
    r"|(?P<spans>qa_outputs\.bias|.*\.ln_f\.bias|.*layer\.3\.output(\.LayerNorm|_layer_norm)\.bias"
    r"|model\.decoder\.layers\.1\.final_layer_norm\.bias)"
)


def check(
    found: dict[str, torch.Tensor],
    sources: dict[str, Source],
    want: dict[str, torch.Tensor],
    kind: str,
    tolerance: float,
) -> None:
    """Loss, norm and every gradient; each of the model's own tensors is found, and all of it."""
    errors, covered = {}, dict.fromkeys(want, 0)
    for name, x in found.items():
        source = sources.get(name, Source(name))
        covered[source.name] += x.numel()
        right = source.of(want[source.name])
        assert x.shape == right.shape and x.dtype == right.dtype == torch.float64, name
        scale = right.abs().max()
        if scale <= FP64 * want["norm"]:
            zero = ZERO.fullmatch(name)
            assert zero and (kind == SPANS or not zero["spans"]), f"{name}: nothing flows there"
            scale = want["norm"]
        errors[name] = ((x - right).abs().max() / scale).item()
    assert covered == {name: x.numel() for name, x in want.items()}
    wrong = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not wrong, wrong


ALL = [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]
LAYOUTS = ("tp2", "tp4", "dp2 x tp2", "fsdp2 x tp2")
# Hardest first: a shared relative bias; fused projections; tied biases; repeated keys under norms of heads.
QUICK = {("t5", PAIRS), ("gpt2", CAUSAL), ("phi3", CAUSAL), ("bert", CAUSAL), ("gemma3", CLASSES)}


def cases() -> list[Any]:
    return [
        pytest.param(*(layout, name, kind), marks=[] if layout == "tp2" and (name, kind) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for name, kind in ALL
    ]


@pytest.mark.parametrize(("layout", "name", "kind"), cases())
def test_every_kind_of_every_family_is_one_process(rank_pool: RankPool, layout: str, name: str, kind: str) -> None:
    want = ranks.on_one(name, kind, {})
    number = Layout.parse(layout).world_size
    found = rank_pool.run(ranks.on_layout, layout, name, kind, {}, ranks=number)
    gradients, sources, _ = found[0]
    check(gradients, sources, want, kind, FP64)
