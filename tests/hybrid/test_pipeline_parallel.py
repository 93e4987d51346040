"""Pipeline parallel. Layers: pure (how blocks and batches are dealt, what is refused); 2 and 4 gloo ranks."""

from __future__ import annotations

import re

import pytest
import torch

from fusemesh.hybrid.pipeline_options import SCHEDULES, PipelineOptions, deal_blocks
from fusemesh.hybrid.pipeline_parallel import clip_gradients, cut
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.ranks import pipeline as pipeline_ranks

INTERLEAVED = PipelineOptions(2, "interleaved1f1b", 2)

distributed = pytest.mark.distributed


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("blocks", [8, 9, 15, 33])
def test_blocks_are_dealt_evenly_in_order(blocks: int, stages: int) -> None:
    parts = deal_blocks(blocks, stages)
    assert [index for part in parts for index in part] == list(range(blocks))
    sizes = [len(part) for part in parts]
    assert len(parts) == stages and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    # It has the head besides.
    assert sizes[-1] == min(sizes)


@pytest.mark.parametrize(
    ("options", "pp", "batch", "expected"),
    [
        (PipelineOptions(), 2, 32, 8),
        (PipelineOptions(), 4, 8, 8),
        (PipelineOptions(), 4, 4, 4),
        (PipelineOptions(), 3, 10, 10),
        (PipelineOptions(5), 4, 10, 5),
        (PipelineOptions(0, "gpipe"), 4, 3, 3),
        (PipelineOptions(1, "gpipe"), 4, 8, 1),
        # 5 would be two rounds, which are not equally long.
        (PipelineOptions(0, "interleaved1f1b", 2), 2, 10, 10),
        (PipelineOptions(3, "interleaved1f1b", 2), 2, 6, 3),
    ],
)
def test_microbatches(options: PipelineOptions, pp: int, batch: int, expected: int) -> None:
    assert options.microbatches_of(pp, batch) == expected


@pytest.mark.parametrize(
    ("options", "pp", "batch", "parts"),
    [
        (PipelineOptions(3), 2, 8, ["pipeline.microbatches: 1f1b on pp2", "received 3", "[2, 4, 8]", "or 0"]),
        (PipelineOptions(2), 4, 8, ["pipeline.microbatches", "at least 4 of them", "received 2", "[4, 8]"]),
        (PipelineOptions(5, "interleaved1f1b", 2), 2, 10, ["pipeline.microbatches", "received 5", "[2, 10]"]),
        (PipelineOptions(3, "gpipe"), 4, 8, ["pipeline.microbatches: gpipe", "8 samples", "[1, 2, 4, 8]"]),
        (PipelineOptions(), 4, 3, ["the.key: 1f1b on pp4", "received 3 samples", "multiple of 4 samples a replica"]),
    ],
)
def test_microbatches_refused(options: PipelineOptions, pp: int, batch: int, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        options.microbatches_of(pp, batch, "the.key")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, "2f2b"), "pipeline.schedule: expected one of ('gpipe', '1f1b', 'interleaved1f1b'), received '2f2b'"),
        ((-1,), "pipeline.microbatches: expected an integer of at least 0, received -1"),
        ((2, "1f1b", 0), "pipeline.virtual_stages: expected an integer of at least 1, received 0"),
        ((2, "1f1b", 2), "pipeline.virtual_stages: expected at least 2 with pipeline.schedule interleaved1f1b and 1"),
        ((2, "interleaved1f1b", 1), "received 1 with interleaved1f1b"),
    ],
)
def test_options_refused(values: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PipelineOptions(*values)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("ranks", "virtual"), [(2, 1), (5, 1), (2, 2)])
def test_a_cut_deals_every_parameter_under_its_name(ranks: int, virtual: int, tied: bool) -> None:
    """Each to one rank, in the model and in a stage; a tied weight to the first and the last."""
    whole = [name for name, _ in pipeline_ranks.plain(tied).named_parameters()]
    names = []
    for rank in range(ranks):
        parts = cut(model := pipeline_ranks.plain(tied), ranks, rank, virtual)
        own = [name for name, _ in model.named_parameters()]
        assert sorted(parts.stages) == list(range(rank, ranks * virtual, ranks))
        staged = {id(p) for stage in parts.stages.values() for p in stage.parameters()}
        assert staged == {id(p) for p in model.parameters()}
        ends = rank in (0, ranks - 1)
        assert parts.shared == ({"embedding.weight": (0, ranks - 1)} if tied and ends else {})
        assert list(model.state_dict()) == own
        names += own
    assert sorted(names) == sorted([*whole, *["embedding.weight"] * tied])


def test_stages_one_after_the_other_are_the_model() -> None:
    """In one process: the stages' composition gives the whole model's logits to the bit."""
    model = pipeline_ranks.plain()
    tokens, _ = pipeline_ranks.batch(3)
    expected = model(tokens)
    h = tokens
    for index, part in enumerate(parts := deal_blocks(5, 3)):
        stage = model.stage(part, first=index == 0, last=index == len(parts) - 1)
        assert stage.input_shapes({"tokens": tuple(tokens.shape)}) == [h.shape]
        h = stage(h)
        assert stage.output_shapes({"tokens": tuple(tokens.shape)}) == [h.shape]
    assert torch.equal(h, expected)


def test_clipping_without_pp_is_torch_s() -> None:
    ours, theirs = pipeline_ranks.plain(), pipeline_ranks.plain()
    for model in (ours, theirs):
        model.loss_and_gradients(*pipeline_ranks.batch(3), 1)
    assert torch.equal(clip_gradients(ours, 0.1), torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@distributed
@pytest.mark.parametrize(
    ("layout", "options", "blocks"),
    [
        ("pp4", PipelineOptions(), [[0, 1], [2], [3], [4]]),
        ("pp2 x tp2", INTERLEAVED, [[0, 1, 3], [0, 1, 3], [2, 4], [2, 4]]),
    ],
)
def test_what_a_rank_holds(rank_pool: RankPool, layout: str, options: PipelineOptions, blocks: list) -> None:
    for rank, names in enumerate(rank_pool.run(pipeline_ranks.held, layout, options)):
        assert sorted({int(name.split(".")[1]) for name in names if name.startswith("blocks.")}) == blocks[rank]
        first, last = rank < len(blocks) // 2 and 0 in blocks[rank], 4 in blocks[rank]
        assert ("embedding.weight" in names) == (first or last)
        assert ("norm.weight" in names) == last


@distributed
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("pp2", PipelineOptions(2)),
        ("pp2 x tp2", PipelineOptions(4, "gpipe")),
        ("pp2", PipelineOptions(4, "interleaved1f1b", 2)),
        ("pp4", PipelineOptions(4)),
        ("pp2 x fsdp2", PipelineOptions(2)),
        ("pp2 x fsdp2", INTERLEAVED),
    ],
    ids=["1f1b", "gpipe", "interleaved", "pp4", "fsdp", "fsdp-interleaved"],
)
def test_calls_of_every_kind(rank_pool: RankPool, layout: str, options: PipelineOptions) -> None:
    rank_pool.run(pipeline_ranks.calls_of_every_kind, layout, options, ranks=2 if layout == "pp2" else 4)


@distributed
@pytest.mark.parametrize("layout", ["pp4", "pp2 x fsdp2", "pp2 x dp2"])
def test_copies_of_a_tied_weight_stay_equal_to_the_bit(rank_pool: RankPool, layout: str) -> None:
    """In mixed precision, clipped, through AdamW: what one copy rounds the other rounds alike."""
    found = rank_pool.run(pipeline_ranks.copies_after, layout, PipelineOptions(4), 4)
    copies = [weight for weight in found if weight is not None]
    assert len(copies) == (2 if layout == "pp4" else 4)
    assert all(torch.equal(copy, copies[0]) for copy in copies)
    assert not torch.equal(copies[0], pipeline_ranks.Transformer(pipeline_ranks.CONFIG, seed=1).embedding.weight)


@distributed
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "plain model",
            r"pp: Own brings no stage\(\), .*pipeline_parallel\.PipelinedModel, or use fsdp or tp in",
        ),
        ("logits", "targets: expected with pp, .*received None"),
        (
            "micro-batches",
            r"pipeline.microbatches: 1f1b on pp2 cuts the 6 samples .*received 4; use one of \[2, 3, 6\]",
        ),
        ("evaluation", "batch: 1f1b on pp2 .*received 1 samples"),
        ("length", "tokens: expected at most max_sequence_length = 8 a sample, received 9"),
    ],
)
def test_refusals(rank_pool: RankPool, what: str, message: str) -> None:
    """Every rank refuses by itself, before it waits for another."""
    for found in rank_pool.run(pipeline_ranks.refused, what, ranks=2):
        assert re.match(message, found), found


@distributed
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_legal_numbers_of_microbatches_are_those_that_torch_runs(rank_pool: RankPool, schedule: str) -> None:
    options = PipelineOptions(0, schedule, 2 if schedule == "interleaved1f1b" else 1)
    legal = [number for number in range(1, 8) if number in options.legal_microbatches(2, number)]
    for found in rank_pool.run(pipeline_ranks.schedules_that_torch_takes, schedule, 7, ranks=2):
        # Fewer than ranks would leave a rank idle throughout; torch's interleaved schedule takes that all the same.
        assert [number for number in found if number >= 2 or schedule == "gpipe"] == legal
