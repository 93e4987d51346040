"""Transforms of torch.func over whole models and over other libraries' signatures, by the backend that ``auto`` takes.

Layer: one process. Directional derivatives are compared with those of plain attention, gradients of single samples with
a loop of backward().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import fusemesh
from fusemesh.integrations import flash_attn
from fusemesh.integrations.pytorch import sdpa

TOKENS, TARGETS = (torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
LENGTHS = torch.tensor([3, 7, 5])
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 40}
Call = Callable[..., torch.Tensor]


def transformer(backend: str = "auto", **changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"intermediate_size": 48, "max_sequence_length": 16, "local_window": 3}
    return fusemesh.Transformer(fusemesh.TransformerConfig(**sizes | changes), backend)


def parameters(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}


def tangents(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(x.shape, generator=generator).to(x.dtype) for name, x in values.items()}


def directional(model: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The derivative of the output along a fixed direction of all parameters, in this dtype."""
    model, values = model.to(dtype), parameters(model, dtype)

    def call(values: dict[str, torch.Tensor]) -> torch.Tensor:
        out = functional_call(model, values, args, kwargs)
        return getattr(out, "logits", out)

    found = jvp(call, (values,), (tangents(values),))[1]
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(values[name], t) for name, t in tangents(values).items()}
        dual = forward_ad.unpack_dual(call(duals)).tangent
    assert dual is not None and torch.equal(dual, found)
    return found


def close(have: torch.Tensor, want: torch.Tensor) -> None:
    """Of two whole models, one in fp32: by the largest derivative."""
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(have.double(), want.double(), rtol=0, atol=2e-5 * want.abs().max().item())


def test_forward_mode_through_our_transformer() -> None:
    model = transformer()
    have, want = (directional(model, dtype, TOKENS) for dtype in (torch.float32, torch.float64))
    close(have, want)
    have, want = (directional(model, dtype, TOKENS, TARGETS) for dtype in (torch.float32, torch.float64))
    close(have, want)
    named = transformer("cpu")
    with pytest.raises(ValueError, match=r"a rule for forward-mode derivatives .* received 'cpu'"):
        directional(named, torch.float32, TOKENS)


@pytest.mark.parametrize(
    ("changes", "args", "inputs"),
    [
        ({}, (TOKENS, TARGETS), {}),
        (
            {"architecture": "encoder", "output": "class", "num_classes": 3},
            (TOKENS, TARGETS[:, :1] % 3),
            {"lengths": LENGTHS},
        ),
        ({"architecture": "encoder-decoder"}, (TOKENS, TARGETS), {"lengths": LENGTHS, "target_tokens": TARGETS}),
    ],
    ids=["decoder", "class", "encoder-decoder"],
)
def test_gradients_of_single_samples(changes: dict[str, Any], args: Any, inputs: dict[str, torch.Tensor]) -> None:
    model = transformer(**changes)

    def loss(values: Any, args: Any, inputs: Any) -> torch.Tensor:
        one = {name: x[None] for name, x in inputs.items()}
        return functional_call(model, values, tuple(x[None] for x in args), one)

    have = vmap(grad(loss), in_dims=(None, 0, 0))(parameters(model), args, inputs)
    for i in range(3):
        model.zero_grad()
        model(*(x[i : i + 1] for x in args), **{name: x[i : i + 1] for name, x in inputs.items()}).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(have[name][i], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights: bool) -> None:
    """Against PyTorch's module, which has the same parameters; a vmapped batch is that of a loop."""
    ours = fusemesh.MultiheadAttention(32, 4, batch_first=True)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, 3, 5, 32)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 4] = True

    def call(module: Any) -> Call:
        return lambda x: module(x, x, x, key_padding_mask=hidden[: len(x)], need_weights=need_weights)

    have = jvp(call(ours), (x,), (t,))[1] if need_weights else (jvp(lambda x: call(ours)(x)[0], (x,), (t,))[1],)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        pair = (x.double(),), (t.double(),)
        want = jvp(call(theirs), *pair)[1] if need_weights else (jvp(lambda x: call(theirs)(x)[0], *pair)[1],)
    for a, b in zip(have, want, strict=True):
        close(a, b)
    mapped = vmap(lambda x: call(ours)(x[None])[0][0])(x)
    torch.testing.assert_close(mapped, call(ours)(x)[0], rtol=1e-4, atol=1e-5)


def test_hugging_face_models() -> None:
    """Derivatives are those of its eager attention; padding may differ from sample to sample."""
    transformers = pytest.importorskip("transformers")
    from fusemesh.integrations import transformers as fusemesh_transformers

    fusemesh_transformers.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
    found = []
    for name in ("fusemesh", "eager"):
        config._attn_implementation = name
        model = transformers.LlamaForCausalLM(config)
        if found:
            model.load_state_dict(found[0][0].state_dict())
        found.append((model, directional(model, torch.float32, TOKENS)))
    close(found[0][1], found[1][1])
    model, values = found[0][0], parameters(found[0][0])
    padding = (torch.arange(7) < LENGTHS[:, None]).long()

    def logits(values: Any, tokens: Any, padding: Any) -> Any:
        return functional_call(model, values, (tokens[None],), {"attention_mask": padding[None]}).logits

    have = vmap(logits, in_dims=(None, 0, 0))(values, TOKENS, padding)
    with torch.no_grad():
        want = torch.stack([logits(values, *one) for one in zip(TOKENS, padding, strict=True)])
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_other_libraries_signatures() -> None:
    qkv, t = torch.randn(2, 2, 5, 3, 2, 16)
    q, k, v = qkv.transpose(1, 3).unbind(2)

    def by_formula(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.transpose(1, 3).unbind(2)
        return fusemesh.flash_attention(q, k, v, causal=True, backend="reference").transpose(1, 2)

    want = jvp(by_formula, (qkv.double(),), (t.double(),))[1]
    close(jvp(lambda x: flash_attn.flash_attn_qkvpacked_func(x, causal=True), (qkv,), (t,))[1], want)
    have = jvp(
        lambda q: sdpa.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),
        (q,),
        (t.transpose(1, 3).unbind(2)[0],),
    )[1]
    only_q = torch.zeros_like(t)
    only_q[:, :, 0] = t[:, :, 0]
    close(have, jvp(by_formula, (qkv.double(),), (only_q.double(),))[1])
    with fusemesh.use_backend("cpu"), pytest.raises(ValueError, match="received 'cpu', whose attention has none"):
        jvp(lambda x: flash_attn.flash_attn_qkvpacked_func(x), (qkv,), (t,))
    cache, lens = torch.randn(2, 8, 2, 16), torch.tensor([3, 4], dtype=torch.int32)
    query, tangent = qkv[:, :1, 0], t[:, :1, 0]
    with pytest.raises(ValueError, match="decode has no derivative"):
        jvp(lambda q: flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lens), (query,), (tangent,))
