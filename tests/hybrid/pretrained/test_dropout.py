"""Layer: hybrid, some of it on gloo ranks. Every layout, and every cut of a batch, drops what one process does."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import dropout as imported

from fusemesh.hybrid.dropout import DropoutByPosition, check_layers_stay, dropout_of
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.hybrid.recompute import recompute_blocks
from tests.support.pretrained import training
from tests.support.pretrained.folders import PRETRAINED
from tests.support.ranks import dropout as ranks

FP64 = 1e-12
ALL = [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]
FIRST = {name: family.kinds[0] for name, family in PRETRAINED.items()}


@functools.cache
def on_one(name: str, kind: str) -> ranks.Learned:
    return ranks.on_one(name, kind, {})


def wrong(found: ranks.Learned, want: ranks.Learned) -> dict[str, float]:
    return {name: error for name, error in training.errors(found, want).items() if not error <= FP64}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def sometimes(cases: Any, quick: Any) -> list[Any]:
    return [case if case in quick else slow(*case) for case in cases]


@pytest.mark.parametrize(("name", "kind"), sometimes(ALL, [("gpt2", FIRST["gpt2"])]))
def test_parts_of_a_batch_drop_what_the_batch_does(name: str, kind: str) -> None:
    want = on_one(name, kind)
    assert not wrong(ranks.on_one(name, kind, {}, 4), want)
    assert not wrong(ranks.on_one(name, kind, {}, 2, wider=3), want), "padding is counted"
    none = ranks.on_one(name, kind, {}, p=0.0)
    assert abs(none["loss"] - want["loss"]) > 1e-4 * abs(want["loss"]), "nothing is dropped"


@pytest.mark.parametrize(("name", "kind"), sometimes(ALL, [("gpt2", FIRST["gpt2"])]))
def test_our_attention_drops_what_eager_attention_does(name: str, kind: str) -> None:
    """Its weights are dropped by F.dropout, ours in the kernel: of one seed, name and position."""
    assert not wrong(ranks.on_one(name, kind, {"attn_implementation": "eager"}), on_one(name, kind))


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("dp2", {"parts": 2}),
    ("fsdp2", {}),
    ("tp2", {"parts": 2}),
    ("pp2", {"microbatches": 4}),
    ("fsdp2", {"recompute": "full"}),
    ("tp2", {"recompute": "full"}),
    ("pp2", {"parts": 2, "recompute": "full"}),
]
QUICK = [("pp2", "t5", {"parts": 2, "recompute": "full"})]
MORE: list[tuple[str, str, dict[str, Any]]] = [
    ("pp2 x tp2", "t5", {}),
    ("pp2 x tp2", "gpt2", {"recompute": "full"}),
    ("dp2 x tp2", "bart", {"recompute": "full"}),
    ("pp4", "marian", {}),
    ("pp2", "llama", {"schedule": "interleaved1f1b", "virtual_stages": 2, "recompute": "full"}),
    ("pp2", "bert", {"schedule": "gpipe", "microbatches": 4}),
    ("dp2", "bart", {"changed": {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}}),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        *QUICK,
        *(
            slow(text, name, options)
            for name in PRETRAINED
            for text, options in LAYOUTS
            if (text, name, options) not in QUICK
        ),
        *(slow(*case) for case in MORE),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x.replace(" ", ""),
)
def test_a_layout_drops_what_one_process_does(
    rank_pool: RankPool, text: str, name: str, options: dict[str, Any]
) -> None:
    changed = options.get("changed", {})
    options = {key: x for key, x in options.items() if key != "changed"}
    want = ranks.on_one(name, FIRST[name], changed) if changed else on_one(name, FIRST[name])
    layout = Layout.parse(text)
    found = rank_pool.run(ranks.on_layout, text, name, FIRST[name], changed, options, ranks=layout.world_size)
    assert set().union(*found) == want.keys()
    for own in found:
        assert layout.pp > 1 or own.keys() == want.keys()
        assert not wrong(own, {key: want[key] for key in own})


@pytest.mark.parametrize(("bug", "parts"), [("samples", 2), ("name", 1)])
def test_a_fault_of_one_process_is_caught(bug: str, parts: int) -> None:
    assert wrong(ranks.on_one("t5", FIRST["t5"], {}, parts, bug=bug), on_one("t5", FIRST["t5"]))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("text", "bug", "options"),
    [("tp2", "place", {}), ("dp2", "samples", {}), ("fsdp2", "again", {"recompute": "full"})],
)
def test_a_fault_of_a_layout_is_caught(rank_pool: RankPool, text: str, bug: str, options: dict[str, Any]) -> None:
    found = rank_pool.run(ranks.on_layout, text, "t5", FIRST["t5"], {}, {**options, "bug": bug}, ranks=2)
    assert all(wrong(own, on_one("t5", FIRST["t5"])) for own in found)


class Calls(nn.Module):
    """Dropout in all forms: a module, called twice, another, a function, and one imported by its name."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.first, self.second = p, nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        calls = (self.first, self.first, self.second, functools.partial(F.dropout, p=self.p), self.function)
        return [call(x) for call in (*calls, functools.partial(torch.dropout, p=self.p, train=True))]

    def function(self, x: torch.Tensor) -> torch.Tensor:
        return imported(x.clone(), self.p, inplace=True)


def masks(p: float, step: int = 0, seed: int = 0, first: int = 0, shape: tuple[int, ...] = (16, 32, 64)) -> list[Any]:
    model = Calls(p)
    dropout = DropoutByPosition(model)
    dropout.at(step, first, seed)
    with dropout.forward(shape[0]):
        found = model(torch.ones(shape, dtype=torch.float64))
    for x in found:
        assert set(x.unique().tolist()) == {0.0, 1 / (1 - p)}
    return [x > 0 for x in found]


def agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first == second).double().mean())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_how_much_is_kept_and_that_calls_are_independent(p: float) -> None:
    """Within six standard deviations of what independent bits give."""
    found = masks(p)
    number = found[0].numel()
    found += [masks(p, **other)[0] for other in ({"step": 1}, {"seed": 1}, {"first": 16})]
    for mask in found:
        assert abs(float(mask.double().mean()) - (1 - p)) < 6 * (p * (1 - p) / number) ** 0.5
        # Along samples, positions and features.
        pairs = [(mask.narrow(dim, 0, size - 1), mask.narrow(dim, 1, size - 1)) for dim, size in enumerate(mask.shape)]
        for pair in (*pairs, (mask[..., 4:], mask[..., :-4])):
            assert abs(agreement(*pair) - (1 - 2 * p * (1 - p))) < 6 * 0.5 / pair[0].numel() ** 0.5
    for i, first in enumerate(found):
        for second in found[:i]:
            assert abs(agreement(first, second) - (1 - 2 * p * (1 - p))) < 6 * 0.5 / number**0.5


def test_a_part_of_the_samples_and_fewer_positions_and_features_lose_the_same() -> None:
    for whole, part in zip(masks(0.5), masks(0.5, first=5, shape=(3, 7, 6)), strict=True):
        assert torch.equal(whole[5:8, :7, :6], part)


def test_each_call_without_at_is_a_step_of_its_own() -> None:
    model = Calls(0.5)
    dropout = dropout_of(model)
    assert dropout_of(model) is dropout
    found = []
    for _ in range(2):
        with dropout.forward(4):
            found.append(model(torch.ones(4, 64))[0])
    assert not torch.equal(*found)
    with dropout.forward(4):
        model.eval()
        assert torch.equal(model.first(torch.ones(4, 64)), torch.ones(4, 64))


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled_before", [False, True])
@pytest.mark.parametrize("part", ["", "first"])
def test_what_is_compiled_drops_the_same(part: str, is_compiled_before: bool) -> None:
    """torch.compile runs what drops by position as it is."""
    found = []
    for compiled in (False, True):
        model: Any = Calls(0.5)
        if compiled and part:
            setattr(model, part, torch.compile(getattr(model, part), backend="eager"))
        elif compiled:
            model = torch.compile(model, backend="eager")
        if compiled and is_compiled_before:
            model(torch.ones(4, 64))
        dropout = DropoutByPosition(model)
        for step in range(3):
            dropout.at(step, 4)
            with dropout.forward(4):
                found.append(torch.stack(model(torch.ones(4, 64))))
    assert all(map(torch.equal, found[:3], found[3:]))


def test_what_is_computed_again_in_another_thread_drops_the_same() -> None:
    """As on a GPU, whose part of backward runs in one of autograd's threads."""
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64)))
        if again:
            recompute_blocks([model[1]])
        dropout = DropoutByPosition(model)
        dropout.at(3, 4)
        with dropout.forward(4):
            value = model(torch.ones(4, 64)).square().sum()
        thread = threading.Thread(target=value.backward)
        thread.start()
        thread.join()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


class Draws(nn.Module):
    """A model with a config that says no word of what it draws."""

    config = type("Config", (), {})()

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(x)


class Dropping(Draws):
    def __init__(self, draw: Any) -> None:
        super().__init__(draw)
        self.config = type("Config", (), {})()
        self.config.dropout = 0.1


REFUSED = [
    (Draws, lambda x: F.dropout(x, 0.1), "expected Draws to draw random numbers by F.dropout and our attention alone"),
    (Dropping, lambda x: F.alpha_dropout(x, 0.1, training=True), "received a model that draws from torch's generators"),
    (
        Dropping,
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1),
        "received F.scaled_dot_product_attention with dropout_p=0.1; use attn_implementation='fusemesh'",
    ),
    (Dropping, lambda x: F.dropout(x[:1], 0.1), "expected the 2 samples of this call along dim 0, received 1"),
    (
        Dropping,
        lambda x: F.dropout(x[..., None, None, None], 0.1),
        r"expected \[B, F\], .*of shape \(2, 3, 4, 1, 1, 1\)",
    ),
]


@pytest.mark.parametrize(("kind", "draw", "message"), REFUSED)
def test_what_would_differ_silently_is_refused(kind: Any, draw: Any, message: str) -> None:
    model = kind(draw)
    with pytest.raises(ValueError, match=message), DropoutByPosition(model).forward(2):
        model(torch.ones(2, 3, 4))


def test_checkpointing_of_transformers_own_is_refused() -> None:
    model = ranks.build("bert", FIRST["bert"], {})
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient_checkpointing_enable\(\): .*use parallelize\(\.\.\., recompute="):
        ranks.learned(model, range(8), 1)


@pytest.mark.parametrize("text", ["fsdp2", "pp2"])
@pytest.mark.parametrize("key", ["encoder_layerdrop", "decoder_layerdrop"])
def test_layers_left_out_by_chance_are_refused_where_others_wait_for_them(text: str, key: str) -> None:
    model = ranks.build("bart", FIRST["bart"], {key: 0.5})
    with pytest.raises(ValueError, match=rf"{key}: expected 0 on {text}, .*received 0.5; set it to 0"):
        check_layers_stay(model, Layout.parse(text))
    check_layers_stay(model, Layout.parse("dp2 x tp2"))
