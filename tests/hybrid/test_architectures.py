"""Distributed layer: encoders and encoder-decoders equal one process in every layout, and so do their tokens."""

from __future__ import annotations

import pytest
import torch

from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.ranks import architecture as ranks

pytestmark = pytest.mark.distributed

KINDS = ("class", "span", "translation", "translation-tied")


@pytest.fixture(scope="module")
def expected(rank_pool: RankPool) -> dict[str, ranks.Found]:
    return {kind: rank_pool.run(ranks.one_process, kind, torch.float64, "reference", ranks=1)[0] for kind in KINDS}


def check(found: list[ranks.Found], want: ranks.Found, tolerance: float) -> None:
    held = {name for rank in found for name in rank.gradients}
    assert held == want.gradients.keys()
    for rank in found:
        assert rank.loss == pytest.approx(want.loss, rel=tolerance)
        assert rank.norm == pytest.approx(want.norm, rel=tolerance)
        pairs = {name: (rank.gradients[name], want.gradients[name]) for name in rank.gradients}
        for name, (a, b) in {**pairs, "logits": (rank.logits, want.logits)}.items():
            assert a.shape == b.shape, name
            hidden = b == float("-inf")
            assert torch.equal(a == float("-inf"), hidden), name
            difference = (a - b).masked_fill(hidden, 0).abs().max()
            # The bias of keys without positions moves all scores of a row alike: its gradient is exactly zero.
            scale = want.gradients[name.replace("key", "query")] if name.endswith("cross_attention.key.bias") else b
            assert difference <= tolerance * scale.masked_fill(scale.isinf(), 0).abs().max(), (name, difference.item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layout", "sequence_parallel", "virtual"),
    [
        ("dp2 x tp2", True, 1),
        ("pp2 x tp2", False, 1),
        pytest.param("tp4", True, 1, marks=pytest.mark.slow),
        pytest.param("tp4", False, 1, marks=pytest.mark.slow),
        pytest.param("fsdp2 x tp2", True, 1, marks=pytest.mark.slow),
        pytest.param("pp2 x tp2", True, 1, marks=pytest.mark.slow),
        ("pp2 x fsdp2", True, 1),
        pytest.param("dp2 x pp2", True, 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_in_fp64(
    rank_pool: RankPool,
    expected: dict[str, ranks.Found],
    kind: str,
    layout: str,
    sequence_parallel: bool,
    virtual: int,
) -> None:
    found = rank_pool.run(ranks.on_layout, kind, layout, torch.float64, "reference", sequence_parallel, virtual)
    check(found, expected[kind], 1e-12)


@pytest.mark.parametrize("kind", ["translation", "translation-tied"])
@pytest.mark.parametrize(("layout", "virtual"), [("pp4", 1), ("pp2 x tp2", 2)])
def test_stages_within_encoder_and_decoder(
    rank_pool: RankPool, expected: dict[str, ranks.Found], kind: str, layout: str, virtual: int
) -> None:
    """One block a stage: the memory travels beside h."""
    found = rank_pool.run(ranks.on_layout, kind, layout, torch.float64, "reference", True, virtual)
    check(found, expected[kind], 1e-12)


def test_padding_and_what_no_target_counts_change_nothing(expected: dict[str, ranks.Found]) -> None:
    """The comparison would not see it if both sides looked at padding."""
    for kind in KINDS:
        model = ranks.build(kind, torch.float64, "reference")
        tokens, targets, inputs = ranks.batch(kind)
        before = model.loss(tokens, targets, **inputs)
        behind = torch.arange(ranks.LENGTH) >= inputs["lengths"][:, None]
        changed = tokens.masked_fill(behind, 7)
        assert torch.equal(model.loss(changed, targets, **inputs), before)
        assert not torch.equal(
            model.loss(changed, targets, **{**inputs, "lengths": inputs["lengths"] + behind.sum(1)}), before
        )


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("decoder", "dp2 x tp2"),
        ("decoder", "pp2 x tp2"),
        ("translation", "fsdp2 x tp2"),
        ("translation", "pp2 x tp2"),
        ("translation", "pp4"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generated_tokens(rank_pool: RankPool, kind: str, layout: str, options: dict) -> None:
    arguments = (torch.float64, "reference", options)
    (want,) = rank_pool.run(ranks.generated, kind, None, *arguments, ranks=1)
    assert {len(row) for row in want} != {0}
    assert rank_pool.run(ranks.generated, kind, layout, *arguments) == [want] * 4
