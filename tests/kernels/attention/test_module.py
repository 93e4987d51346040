"""Layer: one process, CPU, no Triton. MultiheadAttention beside torch.nn's.

In fp64 on the reference everything equals torch's to 1e-12; what torch's does not have, a formula written out.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fusemesh import MultiheadAttention
from fusemesh.kernels import backends
from tests.support.attention_inputs import close
from tests.support.attention_modules import (
    CONSTRUCTORS,
    MASKS,
    B,
    E,
    Formula,
    H,
    L,
    S,
    assert_equal,
    check_rows_without_a_key,
    everything,
    inputs,
    masks,
    pair,
)

FORWARD = "attention_forward"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    backends.reset_call_counts()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_equals_torch(constructor: str, mask: str) -> None:
    """Over torch's whole grid of arguments: outputs, weights, and the gradients of inputs, masks and parameters."""
    theirs, mine = pair(**CONSTRUCTORS[constructor])
    weights = [{"need_weights": False}, {}, {"average_attn_weights": False}]
    for i, how in enumerate(("cross", "self", "key_is_value", "single")):
        qkv = inputs(theirs, how)
        length = qkv[0].shape[0 if how == "single" or not theirs.batch_first else 1]
        for options in weights if how in ("cross", "single") else weights[i % 3 : i % 3 + 1]:
            options = {**options, **masks(mask, how, length)}
            backends.reset_call_counts()
            got = everything(mine, qkv, **options)
            assert backends.call_counts()[FORWARD, "reference"] == 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about two masks of different kinds
                want = everything(theirs, qkv, **options)
            assert_equal(got, want)


class TestIsCausal:
    """torch's hint that attn_mask is the causal mask."""

    @pytest.mark.parametrize("constructor", ["plain", "batch_first", "kdim_vdim"])
    @pytest.mark.parametrize("padding", [None, "bool"])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_equals_torch(self, need_weights: bool, padding: str | None, constructor: str) -> None:
        theirs, mine = pair(**CONSTRUCTORS[constructor])
        for how in ("cross", "self"):
            qkv = inputs(theirs, how)
            length = qkv[0].shape[1 if theirs.batch_first else 0]
            options: dict[str, Any] = {"need_weights": need_weights, "is_causal": True}
            options["attn_mask"] = torch.ones(length, S, dtype=torch.bool).triu(1)
            if padding is not None:
                options["key_padding_mask"] = masks("padding", how, length)["key_padding_mask"]
            assert_equal(everything(mine, qkv, **options), everything(theirs, qkv, **options))

    def test_the_hint_replaces_the_mask_where_no_weights_are_asked_for(self) -> None:
        _, mine = pair()
        qkv, nothing_seen = inputs(mine, "self"), torch.ones(S, S, dtype=torch.bool)
        hinted, _ = mine(*qkv, attn_mask=nothing_seen, is_causal=True, need_weights=False)
        asked, _ = mine(*qkv, causal=True, need_weights=False)
        close(hinted, asked)
        _, weights = mine(*qkv, attn_mask=nothing_seen, is_causal=True)
        assert (weights == 0).all()

    def test_appended_keys_stay_in_sight(self) -> None:
        """torch's own hint hides them, so that need_weights changes its output; here it does not."""
        _, mine = pair(add_bias_kv=True)
        qkv, mask = inputs(mine, "self"), torch.ones(S, S, dtype=torch.bool).triu(1)
        outs = [mine(*qkv, attn_mask=mask, is_causal=True, need_weights=need)[0] for need in (False, True)]
        close(*outs)

    def test_needs_the_mask(self) -> None:
        _, mine = pair()
        with pytest.raises(ValueError, match=r"^attn_mask: expected the causal mask, .*received None; .*causal=True"):
            mine(*inputs(mine), is_causal=True)


class TestParameters:
    @pytest.mark.parametrize("constructor", CONSTRUCTORS)
    def test_state_dicts_load_both_ways_and_start_alike(self, constructor: str) -> None:
        made = []
        for kind in (nn.MultiheadAttention, MultiheadAttention):
            torch.manual_seed(3)
            made.append(kind(E, H, **CONSTRUCTORS[constructor]))
        theirs, mine = (module.state_dict() for module in made)
        assert list(theirs) == list(mine)
        assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
        for module, other in (made, reversed(made)):
            state = {name: torch.randn_like(x) for name, x in other.state_dict().items()}
            assert not any(module.load_state_dict(state))
            assert all(torch.equal(x, state[name]) for name, x in module.state_dict().items())

    def test_more_features_have_keys_of_their_own(self) -> None:
        module = MultiheadAttention(E, H, num_kv_heads=2, sinks=True, alibi_slopes=torch.ones(H), add_bias_kv=False)
        shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
        assert shapes == {
            "in_proj_weight": (E + E, E),
            "in_proj_bias": (E + E,),
            "sinks": (H,),
            "alibi_slopes": (H,),
            "out_proj.weight": (E, E),
            "out_proj.bias": (E,),
        }
        assert (module.sinks == 0).all() and "alibi_slopes" not in dict(module.named_parameters())

    def test_deepcopy_and_to(self) -> None:
        theirs, mine = pair(dtype=torch.float32)
        twin = copy.deepcopy(mine).to(torch.float64)
        assert {x.dtype for x in twin.parameters()} == {torch.float64}
        assert {x.dtype for x in mine.parameters()} == {torch.float32}
        qkv = inputs(twin)
        assert_equal(everything(twin, qkv), everything(theirs.double(), qkv))
        half = copy.deepcopy(mine).to(torch.bfloat16)
        out, weights = half(*(x.detach().bfloat16() for x in qkv))
        assert out.dtype == weights.dtype == torch.bfloat16

    def test_meta_device(self) -> None:
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        module = MultiheadAttention(E, H, device="meta", sinks=True, alibi_slopes=slopes)
        assert {x.device.type for x in module.state_dict().values()} == {"meta"}
        made = MultiheadAttention(E, H, sinks=True, alibi_slopes=slopes)
        module.to_empty(device="cpu").load_state_dict(made.state_dict())
        assert torch.equal(module.alibi_slopes, slopes)


FEATURES: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1},
    "window": {"window": (1, 2)},
    "causal_window": {"window": (2, None)},
    "causal": {},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "sinks": {"sinks": True},
    "causal_all": {
        "num_kv_heads": 2,
        "window": (3, None),
        "softcap": 0.7,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "sinks": True,
    },
}


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("feature", FEATURES)
def test_more_than_torch(feature: str, align: str) -> None:
    """Features that torch's module does not have, against the formula: outputs, weights and all gradients."""
    options = FEATURES[feature]
    module = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, backend="reference", **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    causal = feature.startswith("causal")
    left, right = module.window or (None, None)
    distance = torch.arange(S) - torch.arange(L)[:, None] - (S - L if align == "bottom_right" else 0)
    seen = torch.ones(L, S, dtype=torch.bool)
    seen &= distance >= -(math.inf if left is None else left)
    seen &= distance <= (0 if causal else math.inf if right is None else right)
    qkv = inputs(module)
    for average in (True, False):
        got = everything(module, qkv, average_attn_weights=average, causal=causal, align=align)
        assert_equal(got, everything(Formula(module, average, seen, distance), qkv))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("how", ["attn_mask", "float", "padding", "both"])
def test_rows_without_a_key(how: str, backend: str) -> None:
    """The output is out_proj's bias, weights are zero, nothing is NaN; the other rows are as ever."""
    check_rows_without_a_key(how, backend, torch.float64)


class TestWhoRuns:
    def test_auto_on_the_cpu(self) -> None:
        _, mine = pair(backend="auto")
        qkv = inputs(mine)
        mine(*qkv, need_weights=False)
        assert backends.call_counts() == {(FORWARD, "torch"): 1}
        mine(*qkv)
        assert backends.call_counts() == {(FORWARD, "torch"): 1, (FORWARD, "reference"): 1}

    def test_torch_has_no_weights(self) -> None:
        _, mine = pair(backend="torch")
        with pytest.raises(ValueError, match=r"^backend: expected .* received 'torch', .*return_lse"):
            mine(*inputs(mine))

    @pytest.mark.parametrize("with_container", [False, True], ids=["layer", "encoder"])
    def test_inside_torchs_encoder_layer(self, with_container: bool) -> None:
        """In inference torch's layer calls kernels of its own on the parameters, unless self_attn says not to."""
        layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, dtype=torch.float64).eval()
        theirs: nn.Module = nn.TransformerEncoder(layer, 2) if with_container else layer
        other = copy.deepcopy(layer)
        other.self_attn = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
        other.self_attn.load_state_dict(layer.self_attn.state_dict())
        other.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that its own kernels will not be used
            mine: nn.Module = nn.TransformerEncoder(other, 2) if with_container else other
        x, padding = torch.randn(B, S, E, dtype=torch.float64), torch.zeros(B, S, dtype=torch.bool)
        padding[1, 5:] = True
        with torch.no_grad():
            got, want = (module(x, src_key_padding_mask=padding) for module in (mine, theirs))
        close(got[~padding], want[~padding])
        assert backends.call_counts() == {(FORWARD, "torch"): 2 if with_container else 1}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("constructor", ["batch_first", "kdim_vdim", "bias_kv_zero_attn"])
def test_compiled_whole(constructor: str, need_weights: bool) -> None:
    _, mine = pair(**CONSTRUCTORS[constructor])
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    qkv = inputs(mine)
    options = {"need_weights": need_weights, **masks("bool_and_padding", "cross", L)}
    plain = everything(mine, qkv, **options)
    got = everything(compiled, qkv, **options)
    assert_equal({name.replace("_orig_mod.", ""): x for name, x in got.items()}, plain)


@pytest.mark.parametrize("constructor", ["plain", "bias_kv_zero_attn"])
def test_autocast(constructor: str) -> None:
    """As torch's module, it computes in autocast's dtype with fp32 parameters and masks."""
    theirs, mine = pair(dtype=torch.float32, **CONSTRUCTORS[constructor])
    qkv = inputs(theirs, dtype=torch.float32)
    options = masks("float", "cross", L, torch.float32)
    exact = everything(
        copy.deepcopy(mine).double(),
        [x.detach().double().requires_grad_() for x in qkv],
        **{name: None if x is None else x.detach().double().requires_grad_() for name, x in options.items()},
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = everything(mine, qkv, **options)
    assert got["out"].dtype == torch.bfloat16
    for name, value in got.items():
        assert (value.double() - exact[name]).abs().max() <= 0.03 * exact[name].abs().max(), name


class TestDropout:
    def made(self, **options: Any) -> MultiheadAttention:
        return MultiheadAttention(E, H, 0.4, batch_first=True, dtype=torch.float64, backend="reference", **options)

    def test_not_in_evaluation(self) -> None:
        module = self.made().eval()
        qkv = inputs(module)
        want = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, backend="reference")
        want.load_state_dict(module.state_dict())
        assert_equal(everything(module, qkv), everything(want, qkv))

    @pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "sinks": True}], ids=["plain", "gqa_sinks"])
    def test_the_weights_lose_what_the_output_does(self, options: dict[str, Any]) -> None:
        """The output is that of the returned weights, and these are zero or the whole ones divided by 1 - p."""
        module = self.made(**options)
        qkv = inputs(module)
        out, weights = module(*qkv, average_attn_weights=False)
        v = module._project(*qkv)[2].repeat_interleave(H // module.num_kv_heads, 1)
        close(module.out_proj((weights @ v).transpose(1, 2).flatten(2)), out)
        whole = module.eval()(*qkv, average_attn_weights=False)[1]
        kept = weights != 0
        close(weights, torch.where(kept, whole / 0.6, 0))
        assert 0.5 < kept.double().mean() < 0.7

    def test_the_seed_is_drawn_from_torchs_generator(self) -> None:
        module = self.made()
        qkv = inputs(module)
        outs = []
        for seed, need_weights in ((5, False), (5, True), (6, False)):
            torch.manual_seed(seed)
            outs.append(module(*qkv, need_weights=need_weights)[0])
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


WRONG_CONSTRUCTORS: dict[str, tuple[dict[str, Any], str]] = {
    "embed_dim": ({"embed_dim": 0}, r"^embed_dim: expected an int above 0, received 0; "),
    "num_heads": ({"num_heads": 3}, r"^num_heads: expected a divisor of embed_dim=64, received 3; "),
    "no_heads": ({"num_heads": -4}, r"^num_heads: expected an int above 0, received -4; "),
    "num_kv_heads": ({"num_kv_heads": 3}, r"^num_kv_heads: expected a divisor of num_heads=4, received 3; "),
    "kdim": ({"kdim": 2.5}, r"^kdim: expected an int above 0, received 2.5; "),
    "dropout": ({"dropout": 1.5}, r"^dropout: expected a number in \[0, 1\], received 1.5; "),
    "slopes": ({"alibi_slopes": torch.ones(3)}, r"^alibi_slopes: expected shape \[H\] = \(4,\), received \(3,\); "),
    "window": ({"window": (1, 2), "add_zero_attn": True}, r"^window, alibi_slopes: expected None with .*sinks=True"),
    "alibi": ({"alibi_slopes": torch.ones(H), "add_bias_kv": True}, r"^window, alibi_slopes: .*=a tensor; "),
}


@pytest.mark.parametrize("name", WRONG_CONSTRUCTORS)
def test_wrong_constructor_arguments(name: str) -> None:
    options, message = WRONG_CONSTRUCTORS[name]
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H, **options})


Q, K = torch.zeros(B, L, E), torch.zeros(B, S, E)
WRONG_CALLS: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any], str]] = {
    "dims": ((Q[None], K, K), {}, r"^query: expected 2 or 3 dimensions.*received shape \(1, 2, 7, 64\); "),
    "mixed_dims": ((Q, K[0], K), {}, r"^key: expected 2 or 3 dimensions, as many as query, received shape \(19, 64\)"),
    "features": ((Q, K, K[..., 1:]), {}, r"^value: expected 64 features, received 63 .*vdim"),
    "dtype": ((Q, K, K.half()), {}, r"^value: expected the parameters' dtype torch.float32, received torch.float16; "),
    "batch": ((Q[:1], K, K), {}, r"^key: expected batch and length \(1, 19\), received shape \(2, 19, 64\); "),
    "length": ((Q, K, K[:, 1:]), {}, r"^value: expected batch and length \(2, 19\), received shape \(2, 18, 64\)"),
    "nested": ((torch.nested.nested_tensor([Q[0]], layout=torch.jagged), K, K), {}, r"^query: nested tensors"),
    "padding": ((Q, K, K), {"key_padding_mask": torch.ones(S, B) > 0}, r"^key_padding_mask: expected shape \(2, 19\)"),
    "mask": ((Q, K, K), {"attn_mask": torch.ones(S, L)}, r"^attn_mask: expected shape \(7, 19\) or shape \(8, 7, 19\)"),
    "mask_of_ints": ((Q, K, K), {"attn_mask": torch.ones(L, S).int()}, r"^attn_mask: expected bool .*torch.int32"),
    "align": ((Q, K, K), {"causal": True}, r"^align, origin: expected one of them"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_inputs(name: str) -> None:
    tensors, options, message = WRONG_CALLS[name]
    module = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(NotImplementedError if name == "nested" else ValueError, match=message):
        module(*tensors, **options)


def test_causal_does_not_go_with_appended_keys() -> None:
    module = MultiheadAttention(E, H, batch_first=True, add_zero_attn=True)
    with pytest.raises(ValueError, match=r"^causal: expected False with .*received True; pass a causal attn_mask"):
        module(K, K, K, causal=True)
