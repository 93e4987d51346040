"""Distributed layer: encoders and encoder-decoders equal one process in every layout, and so do their tokens."""

from __future__ import annotations

import pytest
import torch

from fusemesh.hybrid.layout import Layout
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


LAYOUTS = [
    ("dp2 x tp2", True),
    ("pp2 x tp2", False),
    ("tp4", True),
    ("tp4", False),
    ("fsdp2 x tp2", True),
    ("pp2 x tp2", True),
    ("pp2 x fsdp2", True),
    ("dp2 x pp2", True),
]
# Each kind in one layout with stages and one without, as far as it differs there; the others in the long sweep.
NOW = [
    ("class", "dp2 x tp2", True),
    ("class", "pp2 x fsdp2", True),
    ("span", "dp2 x tp2", True),
    ("span", "pp2 x tp2", False),
    ("translation", "pp2 x tp2", False),
    ("translation", "pp2 x fsdp2", True),
    ("translation-tied", "dp2 x tp2", True),
    ("translation-tied", "pp2 x fsdp2", True),
]


@pytest.mark.parametrize(
    ("kind", "layout", "sequence_parallel"),
    [
        pytest.param(kind, *layout, marks=[] if (kind, *layout) in NOW else [pytest.mark.slow])
        for layout in LAYOUTS
        for kind in KINDS
    ],
)
def test_a_step_in_fp64(
    rank_pool: RankPool,
    expected: dict[str, ranks.Found],
    kind: str,
    layout: str,
    sequence_parallel: bool,
) -> None:
    found = rank_pool.run(ranks.on_layout, kind, layout, torch.float64, "reference", sequence_parallel)
    check(found, expected[kind], 1e-12)


@pytest.mark.parametrize(
    ("kind", "layout", "virtual"),
    [
        ("translation-tied", "pp4", 1),
        ("translation", "pp2 x tp2", 2),
        pytest.param("translation", "pp4", 1, marks=pytest.mark.slow),
        pytest.param("translation-tied", "pp2 x tp2", 2, marks=pytest.mark.slow),
    ],
)
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


GREEDY: dict = {}
BEAMS = {"num_beams": 3}


# Every layout searches in one of the two ways, each way with and without stages; the other in the long sweep.
@pytest.mark.parametrize(
    ("kind", "layout", "options"),
    [
        pytest.param(kind, layout, options, id=f"{kind}-{layout}-{name}", marks=marks)
        for kind, layout, now in (
            ("decoder", "dp2 x tp2", BEAMS),
            ("decoder", "pp2 x tp2", GREEDY),
            ("translation", "fsdp2 x tp2", GREEDY),
            ("translation", "pp2 x tp2", BEAMS),
            ("translation", "pp4", BEAMS),
        )
        for name, options in (("greedy", GREEDY), ("beams", BEAMS))
        for marks in ([] if options is now else [pytest.mark.slow],)
    ],
)
def test_generated_tokens(rank_pool: RankPool, kind: str, layout: str, options: dict) -> None:
    arguments = (torch.float64, "reference", options)
    (want,) = rank_pool.run(ranks.generated, kind, None, *arguments, ranks=1)
    assert {len(row) for row in want} != {0}
    assert rank_pool.run(ranks.generated, kind, layout, *arguments) == [want] * 4


@pytest.mark.parametrize("kind", ["decoder", "translation"])
@pytest.mark.parametrize("layout", ["single", "fsdp2"])
def test_a_cache_changes_nothing_in_bf16(rank_pool: RankPool, kind: str, layout: str) -> None:
    """A layer that is cast fills the caches that it is called with, not copies of them."""
    for cached, anew in rank_pool.run(ranks.generated_in_bf16, kind, layout, ranks=Layout.parse(layout).world_size):
        assert cached == anew and len({tuple(row) for row in cached}) > 1


def test_a_layer_that_is_cast_writes_into_its_arguments(rank_pool: RankPool) -> None:
    ((dtypes, out),) = rank_pool.run(ranks.written, ranks=1)
    assert {*dtypes, out} == {torch.bfloat16}
