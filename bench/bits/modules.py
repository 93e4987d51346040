"""Modules: MultiheadAttention, PyTorch's own inside accelerate(), the Transformer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusemesh
from bench.bits.draw import DTYPES, Draw, Tensors, add, with_gradients


def of_module(draw: Draw, module: nn.Module, run: Callable[[], Tensors], leaves: Tensors) -> Tensors:
    """Outputs and gradients of a module whose parameters are drawn."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(draw.normal(*parameter.shape, size=0.3))
    return with_gradients(draw, run(), {**leaves, **dict(module.named_parameters())})


def multihead(
    draw: Draw,
    backend: str,
    *,
    dtype: torch.dtype = torch.float32,
    module: dict[str, Any] | None = None,
    how: str = "cross",
    masks: str = "",
    alibi: bool = False,
    options: dict[str, Any] | None = None,
) -> Tensors:
    """MultiheadAttention: outputs, weights, and the gradients of inputs, float masks and parameters."""
    E, H, L, S, B = 64, 4, 19, 23, 2
    made = {"batch_first": True, **(module or {})}
    if alibi:
        made["alibi_slopes"] = draw.normal(H).abs() / 8
    attention = fusemesh.MultiheadAttention(E, H, dtype=dtype, backend=backend, **made)

    def sequence(length: int, features: int) -> Tensor:
        shape = (length,) if how == "single" else (B, length) if made["batch_first"] else (length, B)
        return draw.leaf(*shape, features, dtype=dtype)

    length = S if how == "self" else L
    leaves = {"query": sequence(length, E)}
    if how == "self":
        qkv = [leaves["query"]] * 3
    else:
        leaves |= {"key": sequence(S, made.get("kdim", E)), "value": sequence(S, made.get("vdim", E))}
        qkv = list(leaves.values())
    given = dict(options or {})
    if "padding" in masks:
        given["key_padding_mask"] = draw.bools(B, S, share=0.2)
    if "bool" in masks:
        given["attn_mask"] = draw.bools(length, S, share=0.3)
    if "float" in masks:
        leaves["attn_mask"] = given["attn_mask"] = draw.leaf(B * H, length, S, dtype=dtype)

    def run() -> Tensors:
        out, weights = attention(*qkv, **given)
        return {"out": out} if weights is None else {"out": out, "weights": weights}

    return of_module(draw, attention, run, leaves)


def replaced(draw: Draw, backend: str, *, what: str) -> Tensors:
    """PyTorch's own functions and modules inside accelerate()."""
    with fusemesh.accelerate(backend=backend):
        if what == "sdpa":
            leaves = {"q": draw.leaf(2, 4, 29, 16), "k": draw.leaf(2, 2, 33, 16), "v": draw.leaf(2, 2, 33, 24)}
            leaves["mask"] = draw.leaf(2, 1, 29, 33)
            q, k, v, mask = leaves.values()
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            causal = F.scaled_dot_product_attention(q[:, :2], k, v, is_causal=True)
            return with_gradients(draw, {"out": out, "causal": causal}, leaves)
        x = draw.leaf(2, 21, 32)
        padding = torch.arange(21) >= torch.tensor([[21], [13]])
        if what == "attention":
            module: nn.Module = nn.MultiheadAttention(32, 2, batch_first=True)
            options: dict[str, Any] = {"key_padding_mask": padding, "need_weights": False}
            return of_module(draw, module, lambda: {"out": module(x, x, x, **options)[0]}, {"x": x})
        layer = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=True)
        module = nn.TransformerEncoder(layer, 1)
        if what == "encoder":
            return of_module(draw, module, lambda: {"out": module(x, src_key_padding_mask=padding)}, {"x": x})
        module.eval()
        with torch.no_grad():
            return {"out": module(x, src_key_padding_mask=padding)}


def transformer(draw: Draw, backend: str, *, what: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """The Transformer: the loss and every gradient, or the tokens that generate() finds."""
    sizes: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    sizes |= {"intermediate_size": 48, "max_sequence_length": 32, "use_bias": True, "initializer_range": 0.2}
    if what == "encoder-decoder":
        sizes["architecture"] = what
    elif what == "encoder":
        sizes |= {"architecture": what, "output": "class", "num_classes": 3, "local_window": 4}
    elif what == "tied":
        sizes |= {"tie_embeddings": True, "local_window": 4, "num_layers": 2}
    model = fusemesh.Transformer(fusemesh.TransformerConfig(**sizes), backend, seed=3, dtype=dtype)
    if what in ("greedy", "sampled", "beams"):
        prompts = [draw.integers(48, 5), draw.integers(48, 3)]
        options: dict[str, Any] = {"greedy": {}, "beams": {"num_beams": 2}}.get(what, {})
        if what == "sampled":
            options = {"sampling": fusemesh.Sampling(temperature=0.8, top_p=0.9), "seed": 5}
        rows = fusemesh.generate(model, prompts, max_new_tokens=5, **options)
        return {f"row{i}": row for i, row in enumerate(rows)}
    inputs: dict[str, Any] = {"tokens": draw.integers(48, 2, 19), "targets": draw.integers(48, 2, 19)}
    if what == "encoder-decoder":
        inputs |= {"target_tokens": draw.integers(48, 2, 11), "targets": draw.integers(48, 2, 11)}
    elif what == "encoder":
        inputs |= {"lengths": torch.tensor([19, 12]), "targets": draw.integers(3, 2, 1)}
    loss = model(**inputs)
    return with_gradients(draw, {"loss": loss}, dict(model.named_parameters()))


def add_modules() -> None:
    """Modules."""
    calls: dict[str, dict[str, Any]] = {
        "plain": {"options": {"need_weights": False}},
        "weights": {},
        "weights_of_heads": {"options": {"average_attn_weights": False}, "masks": "bool"},
        "self": {"how": "self", "options": {"need_weights": False, "causal": True}},
        "self_hint": {"how": "self", "masks": "bool", "options": {"need_weights": False, "is_causal": True}},
        "single": {"how": "single", "module": {"bias": False}},
        "sequence_first": {"module": {"batch_first": False}, "masks": "padding"},
        "other_dims": {"module": {"kdim": 24, "vdim": 40}, "options": {"need_weights": False}},
        "masks_bool": {"masks": "bool padding", "options": {"need_weights": False}},
        "masks_float": {"masks": "float", "options": {"need_weights": False}},
        "masks_of_both_kinds": {"masks": "float padding"},
        "appended_keys": {"module": {"add_bias_kv": True, "add_zero_attn": True}, "masks": "bool"},
        "dropout": {"module": {"dropout": 0.2}},
        "grouped_heads": {"module": {"num_kv_heads": 2}, "options": {"need_weights": False}},
        "sinks_softcap": {"module": {"sinks": True, "softcap": 2.0, "num_kv_heads": 1}},
        "alibi_window": {
            "module": {"window": (7, 0), "sinks": True},
            "alibi": True,
            "options": {"align": "bottom_right", "need_weights": False},
        },
    }
    for name, changed in calls.items():
        add(f"multihead/{name}/fp32", functools.partial(multihead, **changed))
    for dtype, names in (("bf16", ("plain", "sinks_softcap")), ("fp16", ("plain",)), ("fp64", ("plain", "weights"))):
        for name in names:
            add(f"multihead/{name}/{dtype}", functools.partial(multihead, dtype=DTYPES[dtype], **calls[name]))
    for what in ("sdpa", "attention", "encoder", "inference"):
        add(f"accelerate/{what}", functools.partial(replaced, what=what))
    for what in ("decoder", "tied", "encoder", "encoder-decoder", "greedy", "sampled", "beams"):
        add(f"transformer/{what}/fp32", functools.partial(transformer, what=what))
    add("transformer/decoder/bf16", functools.partial(transformer, what="decoder", dtype=torch.bfloat16))
