"""Layer: application. Hugging Face models of every family and kind learn as plain transformers does, in stages too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusemesh.hybrid.hugging_face import families
from fusemesh.hybrid.hugging_face.stages import as_trainable
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions, deal_blocks
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.hugging_face import KeepDouble
from tests.support.pretrained import training
from tests.support.pretrained.folders import CAUSAL, CLASSES, PAIRS, PRETRAINED, SPANS
from tests.support.ranks import pretrained as ranks

FP64 = 1e-12
ALL = [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]
# One of each kind of output; the other ways in which families embed, mask, or read an output are slow tests.
QUICK = [
    ("gemma3", CAUSAL),
    ("roberta", SPANS),
    ("marian", PAIRS),
    ("bart", CLASSES),
]


def named(case: Any) -> str:
    if isinstance(case, PipelineOptions):
        return case.schedule
    return str(case).removeprefix("AutoModelFor").replace(" ", "")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize(("name", "kind"), [case if case in QUICK else slow(*case) for case in ALL], ids=named)
def test_a_padded_batch_teaches_what_its_texts_do_one_by_one(name: str, kind: str) -> None:
    """In fp64, against plain transformers; each text alone has no padding that it could attend to or read."""
    with KeepDouble():
        plain = training.build(name, kind, torch.float64)
        model = as_trainable(training.build(name, kind, torch.float64))
        tokens, targets, inputs = training.batch(model)
        number = training.count(targets)
        want: Any = sum(training.losses_of_each(plain, tokens, targets, inputs))
        (want / number).backward()
        found = model.loss_and_gradients(tokens, targets, number, **inputs)
    assert abs(found - want.detach()) <= FP64 * abs(want.detach())
    wrong = {k: e for k, e in training.errors(gradients(model), gradients(plain)).items() if not e <= FP64}
    assert not wrong, wrong


@pytest.mark.parametrize(("name", "kind"), [case if case in QUICK else slow(*case) for case in ALL], ids=named)
def test_stages_one_after_the_other_are_the_model(name: str, kind: str) -> None:
    """In one process, to the bit: what acts on embeddings, and behind the blocks, does so once."""
    model = as_trainable(training.build(name, kind, torch.float32))
    tokens, _, inputs = training.batch(model)
    given = model._complete(tokens, inputs)
    shapes = {key: tuple(x.shape) for key, x in {"tokens": tokens, **given}.items()}
    with torch.no_grad():
        want = model.logits(tokens, **inputs)
        for number in (2, 3, 4):
            state: tuple[torch.Tensor, ...] = (tokens,)
            for index, span in enumerate(deal_blocks(len(model.blocks), number)):
                stage = model.stage(span, first=index == 0, last=index == number - 1)
                assert stage.input_shapes(shapes) == [x.shape for x in state]
                found = stage(*state, **given)
                state = found if isinstance(found, tuple) else (found,)
                assert stage.output_shapes(shapes) == [x.shape for x in state]
            assert torch.equal(state[0], want), number


LOOPED = PipelineOptions(4, "interleaved1f1b", 2)


def check(rank_pool: RankPool, layout: str, name: str, kind: str, options: PipelineOptions, **changed: Any) -> None:
    """Losses, norms, every gradient and parameter, of all ranks together each of the whole model's."""
    want = training.learned_alone(name, kind, **changed)
    if Layout.parse(layout).tp > 1:
        families.prepare(model := training.build(name, kind, torch.float64, **changed))
        want = training.cut_as(want, model)
    held: set[str] = set()
    number = Layout.parse(layout).world_size
    for found in rank_pool.run(ranks.learned, layout, name, kind, options, changed, ranks=number):
        assert not (wrong := training.wrong(found, want, FP64)), wrong
        held |= found["parameters"].keys()
    assert held == want["parameters"].keys()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "name", "kind", "options"),
    [
        ("pp2", "gpt2", CAUSAL, PipelineOptions()),
        *(slow("pp2", name, kind, PipelineOptions()) for name, kind in ALL if (name, kind) != ("gpt2", CAUSAL)),
        *(slow("pp4", name, kind, PipelineOptions()) for name, kind in ALL),
        *(slow("pp2", name, kind, LOOPED) for name, kind in ALL),
        *(slow("dp2 x pp2", name, kind, PipelineOptions()) for name, kind in ALL),
        *(slow("fsdp2 x pp2", name, kind, PipelineOptions()) for name, kind in ALL),
        *(slow("pp2 x tp2", name, kind, PipelineOptions()) for name, kind in ALL),
    ],
    ids=named,
)
def test_stages_on_ranks_learn_as_one_process(
    rank_pool: RankPool, layout: str, name: str, kind: str, options: PipelineOptions
) -> None:
    check(rank_pool, layout, name, kind, options)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("name", "kind"), [(name, family.kinds[0]) for name, family in PRETRAINED.items()], ids=named)
def test_logits_losses_and_states_of_stages_are_the_whole_model_s(rank_pool: RankPool, name: str, kind: str) -> None:
    """In batches of more shapes than schedules are kept for; states are loaded, and gathered again."""
    assert rank_pool.run(ranks.whole_again, "pp2", name, kind, ranks=2) == [[], []]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", CAUSAL), ("bert", CLASSES), ("distilbert", SPANS), ("t5", PAIRS), ("marian", PAIRS), ("bart", CLASSES)],
    ids=named,
)
def test_stages_drop_what_one_process_drops(rank_pool: RankPool, name: str, kind: str) -> None:
    for changes, wrong in rank_pool.run(ranks.dropped, "pp2", name, kind, ranks=2):
        assert not wrong, wrong
        assert changes > 1e-6
