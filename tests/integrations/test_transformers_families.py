"""Layer: application. Twelve more architectures through attn_implementation="fusemesh" equal eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusemesh
from fusemesh.integrations.transformers import interface as ours
from fusemesh.kernels import backends
from fusemesh.kernels.testing import budget
from tests.support.hugging_face import KeepDouble, padding, tokens
from tests.support.hugging_face_families import MODELS, Model, exact, results

# One of each kind in the interpreter; the long sweep takes the others.
SHORT = ["qwen3", "modernbert", "bart", "vit"]
GENERATING = [name for name, family in MODELS.items() if family.generates]


@pytest.fixture(autouse=True)
def registered(request: pytest.FixtureRequest) -> None:
    family = MODELS.get(getattr(request.node, "callspec", None) and request.node.callspec.params.get("name", ""))
    if family is not None and not family.is_routed():
        pytest.skip(f"transformers {family.since} or later routes it; see test_transformers_models.py")
    ours.register()
    backends.reset_call_counts()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_eagers_in_fp64(name: str, side: str | None) -> None:
    family = MODELS[name]
    want = exact(family, side)
    with fusemesh.use_backend("reference"):
        actual = exact(family, side, "fusemesh")
    assert backends.call_counts() == {("attention_forward", "reference"): family.calls}
    equal(actual, want)


# Two sequences in the first row and three in the second; their positions start again.
PACKED = torch.tensor([[*range(7), *range(5)], [*range(3), *range(6), *range(3)]])


@pytest.mark.parametrize("name", [name for name, family in MODELS.items() if family.kind == "decoder"])
def test_packed_sequences_keep_apart(name: str) -> None:
    family = MODELS[name]
    want = exact(family, None, position_ids=PACKED)
    with fusemesh.use_backend("reference"):
        equal(exact(family, None, "fusemesh", position_ids=PACKED), want)
    whole = exact(family, None)["output"]
    assert not torch.allclose(whole[0, 7:], want["output"][0, 7:])
    torch.testing.assert_close(whole[0, :7], want["output"][0, :7], rtol=1e-9, atol=1e-9)


def equal(actual: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Within 1e-11 of the largest element of each tensor, and what rounding leaves of gradients that cancel to zero."""
    assert actual.keys() == want.keys()
    largest = max(x.abs().max().item() for x in want.values())
    for name, x in want.items():
        assert actual[name].shape == x.shape, name
        error, allowed = (actual[name] - x).abs().max().item(), 1e-11 * x.abs().max().item() + 1e-15 * largest
        assert error <= allowed, f"{name}: {error} > {allowed}"


def within_budget(
    actual: dict[str, torch.Tensor], family: Model, side: str | None, ratio: tuple[float, float] | None = None
) -> None:
    """fp32 against eager's in fp64, by how far eager in fp32 is off; what is zero by cancellation apart."""
    want, eager = exact(family, side), results(family.build("eager"), family, side)
    largest = max(x.abs().max().item() for x in want.values())
    for name, x in want.items():
        if x.abs().max().item() > 1e-12 * largest:
            # At least its own size is what a gradient of absolute values has.
            budget.check(name, actual[name], x, eager[name], absolute=None if name == "output" else x, ratio=ratio)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_triton_is_within_the_budget(name: str) -> None:
    family, side = MODELS[name], "left"
    with fusemesh.use_backend("triton"):
        actual = results(family.build("fusemesh"), family, side)
    counts = {("attention_forward", "triton"): family.calls, ("attention_backward", "triton"): family.calls}
    assert backends.call_counts() == counts
    within_budget(actual, family, side)


@pytest.mark.parametrize("name", MODELS)
def test_auto_in_fp32_is_within_the_budget(name: str) -> None:
    family = MODELS[name]
    actual = results(family.build("fusemesh"), family, "left")
    # The op's own budget is test_cpu_matrix.py's matter, and its results here are within it. Behind two layers the few
    # numbers of a projection whose gradients cancel (CLIP's keys) are off by up to 7 times eager's largest error, which
    # is itself one draw; the means are as ever.
    within_budget(actual, family, "left", ratio=(8, 2))
    counts = backends.call_counts()
    assert sum(n for (operation, _), n in counts.items() if operation == "attention_forward") == family.calls


def generate(family: Model, implementation: str, cache: str) -> Any:
    """Five tokens in fp64, greedily, after a prompt of which the first has padding on the left."""
    model = family.build(implementation).double()
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    if family.kind == "audio":
        options["input_features"] = family.inputs(None)["input_features"].double()
    else:
        options |= {"inputs": tokens(2, 9), "attention_mask": padding("left", 2, 9)}
    limits = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with KeepDouble(), torch.no_grad(), fusemesh.use_backend("reference"):
        return model.generate(**options, **limits, output_scores=True, return_dict_in_generate=True)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_equals_eagers(name: str, cache: str) -> None:
    family = MODELS[name]
    want = generate(family, "eager", cache)
    assert not backends.call_counts()
    actual = generate(family, "fusemesh", cache)
    # An encoder runs once; its decoder's layers attend to themselves and to it at each of five steps.
    steps = 2 + 5 * 4 if family.calls == 6 else 5 * family.calls
    assert backends.call_counts() == {("attention_forward", "reference"): steps}
    assert torch.equal(actual.sequences, want.sequences)
    for a, w in zip(actual.scores, want.scores, strict=True):
        seen = w.isfinite()
        assert (a - w)[seen].abs().max() <= 1e-11 * w[seen].abs().max()


def test_there_are_many_and_of_every_kind() -> None:
    assert len(MODELS) >= 12
    assert {family.kind for family in MODELS.values()} == {"decoder", "encoder", "pair", "vision", "audio", "towers"}
