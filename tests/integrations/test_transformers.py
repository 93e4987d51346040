"""Layer: application. Hugging Face models through attn_implementation="fusemesh" give eager's logits and gradients."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fusemesh
from fusemesh.integrations.transformers import interface as ours
from fusemesh.kernels import backends
from fusemesh.kernels.testing import budget
from tests.support import fresh_process
from tests.support.hugging_face import FAMILIES, Family, KeepDouble, exact, padding, results, tokens

SIDES = [None, "left", "right"]


@pytest.fixture(autouse=True)
def registered(request: pytest.FixtureRequest) -> None:
    family = FAMILIES.get(getattr(request.node, "callspec", None) and request.node.callspec.params.get("name", ""))
    if family is not None and not family.is_routed():
        pytest.skip(f"transformers {family.since} or later routes it; see test_transformers_models.py")
    ours.register()
    backends.reset_call_counts()


@contextlib.contextmanager
def made_masks() -> Iterator[list[torch.Tensor | None]]:
    """Every mask that transformers asks for within the block."""
    made: list[torch.Tensor | None] = []

    def record(**arguments: Any) -> torch.Tensor | None:
        made.append(ours.attention_mask(**arguments))
        return made[-1]

    transformers.AttentionMaskInterface.register("fusemesh", record)
    try:
        yield made
    finally:
        ours.register()


def equal(actual: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-11) -> None:
    """Equal up to the tolerance, tensor by tensor, relative to the largest element; gradients that are zero are."""
    assert actual.keys() == want.keys()
    largest = max(x.abs().max().item() for x in want.values())
    for name, x in want.items():
        size = x.abs().max().item()
        # The gradient of a bias of all keys is zero by cancellation, and then rounding is all there is.
        size = size if size > 1e-12 * largest else largest
        assert actual[name].shape == x.shape, name
        assert (actual[name] - x).abs().max().item() <= tolerance * size, name


def within_budget(actual: dict[str, torch.Tensor], family: Family, *args: Any, **kwargs: Any) -> None:
    """fp32 results against eager's in fp64, by how far eager in fp32 is off."""
    want = joined(exact(family, *args, **kwargs))
    eager = joined(results(family.build("eager"), *args, **kwargs))
    actual = joined(actual)
    assert actual.keys() == want.keys()
    for name, x in want.items():
        budget.check(name, actual[name], x, eager[name])


def joined(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BERT's three biases of a layer as one, as GPT-2 has them: that of the keys is zero by cancellation, alone."""
    found = dict(gradients)
    for name in [name for name in found if name.endswith("self.key.bias")]:
        parts = [found.pop(name.replace("key", part)) for part in ("query", "key", "value")]
        found[name.replace("key.", "")] = torch.cat(parts)
    return found


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_eagers_in_fp64(name: str, side: str | None) -> None:
    family = FAMILIES[name]
    inputs = tokens(), padding(side)
    want = exact(family, *inputs)
    with fusemesh.use_backend("reference"):
        actual = exact(family, *inputs, implementation="fusemesh")
    assert backends.call_counts() == {("attention_forward", "reference"): family.calls}
    equal(actual, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_in_fp32_is_within_the_budget(name: str) -> None:
    family = FAMILIES[name]
    actual = results(family.build("fusemesh"), tokens(), padding("left"))
    within_budget(actual, family, tokens(), padding("left"))
    counts = backends.call_counts()
    assert sum(n for (operation, _), n in counts.items() if operation == "attention_forward") == family.calls


@pytest.mark.interpreter
@pytest.mark.parametrize("name, side", [(name, SIDES[i % 3]) for i, name in enumerate(FAMILIES)])
def test_triton_is_within_the_budget(name: str, side: str | None) -> None:
    family = FAMILIES[name]
    with fusemesh.use_backend("triton"):
        actual = results(family.build("fusemesh"), tokens(), padding(side))
    counts = {("attention_forward", "triton"): family.calls, ("attention_backward", "triton"): family.calls}
    assert backends.call_counts() == counts
    within_budget(actual, family, tokens(), padding(side))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["mistral", "t5"])
def test_triton_without_padding_is_within_the_budget(name: str) -> None:
    family = FAMILIES[name]
    with fusemesh.use_backend("triton"):
        actual = results(family.build("fusemesh"), tokens(1, 19))
    assert backends.call_counts()[("attention_backward", "triton")] == family.calls
    within_budget(actual, family, tokens(1, 19))


# Two sequences in one row, and the second of a row of three; their positions start again.
PACKED = torch.tensor([[*range(7), *range(5)], [*range(3), *range(6), *range(3)]])


@pytest.mark.parametrize("name", ["llama", "mistral", "llama4", "gpt2", "gemma2", "gpt_oss"])
def test_packed_sequences_keep_apart(name: str) -> None:
    family = FAMILIES[name]
    want = exact(family, tokens(), position_ids=PACKED)
    alone = exact(family, tokens()[:1, :7], gradients=False)["logits"]
    with fusemesh.use_backend("reference"):
        equal(exact(family, tokens(), implementation="fusemesh", position_ids=PACKED), want)
    torch.testing.assert_close(want["logits"][0:7], alone, rtol=1e-9, atol=1e-9)


def generate(family: Family, implementation: str, side: str | None, cache: str, backend: str) -> Any:
    is_double = backend == "reference"
    model = family.build(implementation)
    mode: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if is_double:
        model, mode = model.double(), KeepDouble()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with mode, torch.no_grad(), fusemesh.use_backend(backend):
        return model.generate(
            tokens(2, 9),
            attention_mask=padding(side, 2, 9) if side else torch.ones(2, 9, dtype=torch.int64),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "llama4", "gpt2", "t5", "gemma2", "gpt_oss"])
def test_generation_with_a_cache_equals_eagers(name: str, side: str | None, cache: str) -> None:
    family = FAMILIES[name]
    want = generate(family, "eager", side, cache, "reference")
    actual = generate(family, "fusemesh", side, cache, "reference")
    # T5 runs its encoder once, and five times a decoder of two layers with self- and cross-attention.
    steps = 2 + 5 * 4 if name == "t5" else 5 * family.calls
    assert backends.call_counts() == {("attention_forward", "reference"): steps}
    assert torch.equal(actual.sequences, want.sequences)
    for a, w in zip(actual.scores, want.scores, strict=True):
        assert (a - w).abs().max() <= 1e-11 * w.abs().max()


@pytest.mark.interpreter
@pytest.mark.parametrize("name, cache", [("mistral", "dynamic"), ("llama", "static"), ("gemma2", "dynamic")])
def test_triton_generates_what_eager_does(name: str, cache: str) -> None:
    family = FAMILIES[name]
    actual = generate(family, "fusemesh", "left", cache, "triton")
    assert backends.call_counts() == {("attention_forward", "triton"): 5 * family.calls}
    eager = generate(family, "eager", "left", cache, "torch")
    want = generate(family, "eager", "left", cache, "reference")
    assert torch.equal(actual.sequences, want.sequences)
    for step, (a, w, e) in enumerate(zip(actual.scores, want.scores, eager.scores, strict=True)):
        budget.check(f"scores of step {step}", a, w, e)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "gpt_oss"])
def test_later_chunks_of_a_prompt_stand_at_the_last_key(name: str) -> None:
    """With a cache, four queries meet more keys: no mask is made, and they are aligned to the end."""
    family = FAMILIES[name]
    want = exact(family, tokens(2, 13), gradients=False)["logits"].reshape(2, 13, -1)
    model = family.build("fusemesh").double()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # until 5.24
    cache, parts = None, []
    with made_masks() as made, KeepDouble(), torch.no_grad(), fusemesh.use_backend("reference"):
        for ids in tokens(2, 13).split([5, 4, 4], dim=1):
            out = model(ids, use_cache=True, **{name: cache})
            cache = out[name]
            parts.append(out.logits)
    assert len(made) >= 3 and all(mask is None for mask in made)
    assert (torch.cat(parts, 1) - want).abs().max() <= 1e-11 * want.abs().max()


class Shapes(TorchDispatchMode):
    """The shapes of everything that torch computes within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return result


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert", "gemma2", "gpt_oss"])
def test_unpadded_models_make_no_mask(name: str) -> None:
    """Neither None nor all ones for a mask has anything of the size Sq * Sk computed outside the kernels."""
    length = 19
    model = FAMILIES[name].build("fusemesh")
    for mask in (None, torch.ones(1, length, dtype=torch.int64)):
        with made_masks() as made, Shapes() as shapes, torch.no_grad(), fusemesh.use_backend("triton"):
            model(tokens(1, length), attention_mask=mask)
        assert made and all(x is None for x in made)
        square = {shape for shape in shapes.seen if shape.count(length) > 1}
        assert (1, length) in shapes.seen and not square
    with Shapes() as shapes, torch.no_grad():
        FAMILIES[name].build("eager")(tokens(1, length))
    assert any(shape[-2:] == (length, length) for shape in shapes.seen), "the check above sees nothing"


SLIDES = {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}


@pytest.mark.parametrize(
    "model, config, options",
    [
        ("PhimoeForCausalLM", "PhimoeConfig", {"sliding_window": 5, "num_local_experts": 2}),
        ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**SLIDES, "num_experts": 2}),
    ],
)
def test_a_window_that_is_not_passed_on_raises(model: str, config: str, options: dict[str, Any]) -> None:
    """These models' code slides by the mask alone; where the window hides a key, None would have it seen."""
    base = {key: value for key, value in FAMILIES["llama"].options.items() if key != "head_dim"}
    family = Family(model, config, {**base, "hidden_size": 64, "num_experts_per_tok": 2, **options})
    with pytest.raises(ValueError, match=r"sliding_window: expected the window of 5 keys.*attn_implementation='sdpa'"):
        family.build("fusemesh")(tokens())
    short = tokens(2, 5)  # here it hides none
    with fusemesh.use_backend("reference"):
        equal(exact(family, short, implementation="fusemesh"), exact(family, short))
        padded = exact(family, tokens(), padding("left"), implementation="fusemesh")  # here the mask says it
    equal(padded, exact(family, tokens(), padding("left")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output_attentions": True}, "output_attentions: expected False"),
        ({"sinks": torch.zeros(1, 2, 3, 1)}, "sinks: expected None.*s_aux"),
        ({"head_mask": torch.ones(2)}, "head_mask: expected None"),
    ],
    ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_what_would_be_ignored_is_refused(change: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match=message):
        ours.attention(torch.nn.Module(), q, q, q, None, **change)


@pytest.mark.parametrize("window", [None, 3])
def test_sequences_that_share_a_row_by_flash_attn_s_bounds(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 11, 16, dtype=torch.float64) for heads in (4, 2, 2))
    sinks, bounds = torch.randn(4, dtype=torch.float64), torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    layer, options = torch.nn.Module(), {"sliding_window": window, "softcap": 2.0, "s_aux": sinks, "scaling": 0.3}
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    found = ours.attention(layer, q, k, v, None, **options, **lengths)[0]
    for start, end in ((0, 4), (4, 5), (5, 11)):
        part = [x[:, :, start:end] for x in (q, k, v)]
        torch.testing.assert_close(found[:, start:end], ours.attention(layer, *part, None, **options)[0])


@pytest.mark.parametrize("mask_kind", ["none", "bool", "float"])
def test_bias_softcap_sinks_and_masks_meet_in_one_call(mask_kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 16, dtype=torch.float64) for heads in (4, 2, 2))
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(5, 5, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    if mask_kind != "none":  # a mask is the whole truth, also where it lets a query see a later key
        seen[0, 0, :, 0], seen[1, 0, 0, 4] = False, True
    mask = {"none": None, "bool": seen, "float": torch.where(seen, 0.0, -torch.inf).double()}[mask_kind]
    layer = torch.nn.Module()
    layer.is_causal = True
    with fusemesh.use_backend("reference"):
        out, weights = ours.attention(layer, q, k, v, mask, scaling=0.5, softcap=2.0, s_aux=sinks, position_bias=bias)
    assert weights is None and out.is_contiguous()
    scores = 2.0 * torch.tanh(0.5 * q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 2.0) + bias
    scores = torch.cat([scores.masked_fill(~seen, -torch.inf), sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1)
    want = (scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)).transpose(1, 2)
    actual = torch.autograd.grad(out.square().sum(), (bias, sinks))
    for a, w in zip((out, *actual), (want, *torch.autograd.grad(want.square().sum(), (bias, sinks))), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-12, atol=1e-12)


def test_dropout_only_in_training() -> None:
    family, ids = FAMILIES["llama"], tokens()
    model = family.build("fusemesh", attention_dropout=0.5)
    with fusemesh.use_backend("reference"), torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(plain, model(ids).logits)
        model.train()
        assert not torch.allclose(plain, model(ids).logits)


@pytest.mark.parametrize("name, makes_mask", [("llama", False), ("mistral", False), ("llama4", True), ("bert", False)])
def test_compiled_models_are_one_graph(name: str, makes_mask: bool) -> None:
    """Without a cache, transformers itself looks for packed sequences, and has a mask made, where it compiles."""
    model, ids = FAMILIES[name].build("fusemesh"), tokens()
    options = {} if name == "bert" else {"use_cache": True}
    shapes: list[tuple[int, ...]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        shapes.extend(tuple(x.shape) for x in values if isinstance(x, torch.Tensor))
        return graph.forward

    compiled = torch.compile(lambda x: model(x, **options).logits, backend=look, fullgraph=True)
    with torch.no_grad(), fusemesh.use_backend("reference"):
        torch.testing.assert_close(compiled(ids), model(ids, **options).logits, rtol=1e-5, atol=1e-5)
    masks = [shape for shape in shapes if shape == (2, 1, 12, 12)]
    assert shapes and bool(masks) == makes_mask


def test_transformers_is_imported_by_register_alone() -> None:
    code = """
            import sys
            import fusemesh
            import fusemesh.integrations.transformers as ours
            import fusemesh.integrations.pytorch.sdpa
            print("transformers" in sys.modules)
            sys.modules["transformers"] = None  # as if it were not installed
            try:
                ours.register()
            except ImportError as error:
                print(error)
            """
    loaded, message = fresh_process.run(code).splitlines()
    assert loaded == "False"
    assert message.startswith("fusemesh.integrations.transformers.register() needs transformers 4.57 or later")
