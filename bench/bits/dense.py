"""Attention of batches, on PyTorch's tape and by its two halves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusemesh
from bench.bits.draw import DTYPES, FP8, LETTERS, Draw, Tensors, add, with_gradients, with_second_gradients
from bench.bits.mods import score_mod
from fusemesh import Origin


@dataclass(frozen=True)
class Attention:
    """One call of attention. ``options`` go to the function as they are."""

    dtype: str = "fp32"
    B: int = 2
    H: int = 2
    Hkv: int = 2
    Sq: int = 37
    Sk: int = 45
    D: int = 16
    Dv: int = 16
    size: float = 1.0  # of q
    layout: str = "bhsd"
    mask: str | None = None  # the letters of its dimensions that are not 1 ("" for none), or a word of over_scores
    bias: str | None = None  # likewise
    bias_dtype: str | None = None  # as q's
    alibi: str | None = None  # "h" or "bh"
    mod: str | None = None
    sinks: str | None = None  # the dtype, or "same"
    lse: bool = False
    needs: tuple[str, ...] = ("q", "k", "v", "x", "bias", "sinks", "table")  # what gradients are computed of
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """[B, H, Sq, Sk]."""
        return self.B, self.H, self.Sq, self.Sk


def over_scores(kind: str, sizes: tuple[int, int, int, int], make: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """A tensor that broadcasts to the scores: what is drawn by ``make``, and the view of it that a call is given."""
    b, h, m, n = sizes
    if kind == "matrix":
        drawn = make(m, n)
        return drawn, drawn
    if kind == "transposed":
        drawn = make(b, h, n, m)
        return drawn, drawn.mT
    if kind == "expanded":
        drawn = make(1, h, 1, n)
        return drawn, drawn.expand(sizes)
    assert set(kind) <= set(LETTERS), kind
    drawn = make(*(size if letter in kind else 1 for letter, size in zip(LETTERS, sizes, strict=True)))
    return drawn, drawn


def mask_of(draw: Draw, kind: str, sizes: tuple[int, int, int, int]) -> Tensor:
    """A mask: of a kind of over_scores, with whole tiles hidden, or all hidden."""
    if kind == "tiles":
        blocks = [torch.arange(length) // 32 for length in sizes[2:]]
        return (blocks[0][:, None] == blocks[1]) & draw.bools(*sizes[2:], share=0.9)
    if kind == "nothing":
        return torch.zeros(sizes[2:], dtype=torch.bool)
    return over_scores(kind, sizes, draw.bools)[1]


def heads_of(
    draw: Draw, layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype, size: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A tensor [B, H, S, D]: the leaf, and the view of it in a layout."""
    B, H, S, D = shape
    if layout == "bshd":
        leaf = draw.leaf(B, S, H, D, dtype=dtype, size=size)
        return leaf, leaf.transpose(1, 2)
    if layout == "strided":
        leaf = draw.leaf(B, H, S, 2 * D, dtype=dtype, size=size)
        return leaf, leaf[..., ::2]
    if layout == "expanded":
        leaf = draw.leaf(1, H, S, D, dtype=dtype, size=size)
        return leaf, leaf.expand(shape)
    if layout == "sliced":
        leaf = draw.leaf(B, H, S + 3, D + 1, dtype=dtype, size=size)
        return leaf, leaf[:, :, 3:, 1:]
    assert layout == "bhsd", layout
    leaf = draw.leaf(*shape, dtype=dtype, size=size)
    return leaf, leaf


def qkv_of(draw: Draw, case: Attention) -> tuple[list[Tensor], Tensors]:
    """q, k and v of a call, and the leaves that they are views of."""
    dtype = DTYPES[case.dtype]
    if case.layout == "projection":  # as one matmul makes them, side by side
        widths = [case.H * case.D, case.Hkv * case.D, case.Hkv * case.Dv]
        x = draw.leaf(case.B, case.Sq, sum(widths), dtype=dtype, size=case.size)
        parts = zip(torch.split(x, widths, -1), (case.H, case.Hkv, case.Hkv), strict=True)
        return [part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part, heads in parts], {"x": x}
    if case.layout == "one":  # one tensor as all three
        x = draw.leaf(case.B, case.H, case.Sq, case.D, dtype=dtype, size=case.size)
        return [x, x, x], {"x": x}
    shapes = {
        "q": (case.B, case.H, case.Sq, case.D),
        "k": (case.B, case.Hkv, case.Sk, case.D),
        "v": (case.B, case.Hkv, case.Sk, case.Dv),
    }
    leaves, views = {}, []
    for name, shape in shapes.items():
        leaves[name], view = heads_of(draw, case.layout, shape, dtype, case.size if name == "q" else 1.0)
        views.append(view)
    return views, leaves


def features_of(draw: Draw, case: Attention, lengths: tuple[int, int] | None = None) -> tuple[dict[str, Any], Tensors]:
    """The options of a call that are drawn, and those of them that have a gradient."""
    sizes = case.sizes if lengths is None else (case.B, case.H, *lengths)
    options, leaves = dict(case.options), {}
    dtype = DTYPES[case.dtype]
    if case.mask is not None:
        options["mask"] = mask_of(draw, case.mask, sizes)
    if case.bias is not None:
        of = dtype if case.bias_dtype is None else DTYPES[case.bias_dtype]
        leaves["bias"], options["bias"] = over_scores(case.bias, sizes, functools.partial(draw.leaf, dtype=of))
    if case.alibi is not None:
        options["alibi_slopes"] = draw.normal(*(case.B, case.H) if case.alibi == "bh" else (case.H,)).abs() / 8
    if case.sinks is not None:
        of = dtype if case.sinks == "same" else DTYPES[case.sinks]
        leaves["sinks"] = options["sinks"] = draw.leaf(case.H, dtype=of)
    if case.mod is not None:
        options["score_mod"], of_mod = score_mod(draw, case.mod)
        leaves.update(of_mod)
    return options, leaves


def dense(draw: Draw, backend: str, *, case: Attention, second: bool = False) -> Tensors:
    """flash_attention and its gradients."""
    qkv, leaves = qkv_of(draw, case)
    options, more = features_of(draw, case)
    leaves.update(more)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in case.needs)
    if not case.needs:
        qkv = [x.detach() for x in qkv]
    result = fusemesh.flash_attention(*qkv, **options, return_lse=case.lse, backend=backend)
    outputs = {"out": result[0], "lse": result[1]} if isinstance(result, tuple) else {"out": result}
    if not case.needs:
        return outputs
    return (with_second_gradients if second else with_gradients)(draw, outputs, leaves)


def halves(draw: Draw, backend: str, *, case: Attention) -> Tensors:
    """attention_forward, and attention_backward of what it returned; with ``lse`` a gradient of the lse as well."""
    with torch.no_grad():
        qkv, _ = qkv_of(draw, case)
        options, _ = features_of(draw, case)
    options = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
    qkv = [x.detach() for x in qkv]
    out, lse = fusemesh.attention_forward(*qkv, **options, backend=backend)
    do = draw.normal(*out.shape, dtype=out.dtype)
    dlse = draw.normal(*lse.shape, dtype=lse.dtype) if case.lse else None
    gradients = fusemesh.attention_backward(
        do, *qkv, out, lse, dlse, bias_grad="bias" in options, **options, backend=backend
    )
    found = {name: gradient for name, gradient in gradients._asdict().items() if gradient is not None}
    return {"out": out, "lse": lse, **found}


def ring(draw: Draw, backend: str, *, dtype: torch.dtype) -> Tensors:
    """Both halves over two shards of the keys, as a ring of processes would call them."""
    q, k, v = (draw.normal(2, heads, 41, 24, dtype=dtype) for heads in (4, 2, 2))
    shards = (slice(0, 19), slice(19, 41))
    at = [Origin(k=shard.start) for shard in shards]
    parts = [
        fusemesh.attention_forward(q, k[:, :, shard], v[:, :, shard], causal=True, origin=origin, backend=backend)
        for shard, origin in zip(shards, at, strict=True)
    ]
    out, lse = fusemesh.merge_attention([part[0] for part in parts], [part[1] for part in parts])
    do = draw.normal(*out.shape, dtype=dtype)
    result = {"out": out, "lse": lse}
    for i, (shard, origin) in enumerate(zip(shards, at, strict=True)):
        gradients = fusemesh.attention_backward(
            do, q, k[:, :, shard], v[:, :, shard], out, lse, causal=True, origin=origin, backend=backend
        )
        result.update({f"{name}{i}": g for name, g in gradients._asdict().items() if g is not None})
    return result


def merged(draw: Draw, backend: str, *, dtype: torch.dtype, sinks: bool = False, hidden: bool = False) -> Tensors:
    """merge_attention of attention over three parts of the keys, with gradients through all of it."""
    leaves = {name: draw.leaf(2, heads, 33, 16, dtype=dtype) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    if sinks:
        leaves["sinks"] = draw.leaf(4)
    parts = []
    for at in (slice(0, 5), slice(5, 20), slice(20, 33)):
        k, v = leaves["k"][:, :, at], leaves["v"][:, :, at]
        options: dict[str, Any] = {"causal": True, "origin": Origin(k=at.start + 2)} if hidden else {}
        parts.append(fusemesh.flash_attention(leaves["q"], k, v, return_lse=True, backend=backend, **options))
    out, lse = fusemesh.merge_attention([p[0] for p in parts], [p[1] for p in parts], leaves.get("sinks"))
    return with_gradients(draw, {"out": out, "lse": lse}, leaves)


def fp8(draw: Draw, backend: str, *, descale: str | None, options: dict[str, Any], extras: bool = False) -> Tensors:
    """The forward in fp8."""
    q, k, v = (draw.normal(2, heads, 37, dim, size=4.0).to(FP8) for heads, dim in ((4, 48), (2, 48), (2, 32)))
    factors = {
        None: None,
        "numbers": (0.25, None, 0.5),
        "tensors": (0.3, torch.tensor([0.41]), draw.normal(2, 2).abs() + 0.1),
    }[descale]
    if extras:
        options = {**options, "bias": draw.normal(1, 4, 1, 37, dtype=torch.bfloat16), "sinks": draw.normal(4)}
    out, lse = fusemesh.flash_attention(q, k, v, descale=factors, return_lse=True, backend=backend, **options)
    return {"out": out, "lse": lse}


def autocast(draw: Draw, backend: str) -> Tensors:
    """fp32 tensors under autocast to bf16: attention, and a linear layer."""
    leaves = {name: draw.leaf(2, 2, 37, 16) for name in ("q", "k", "v")}
    leaves |= {"x": draw.leaf(9, 24), "w": draw.leaf(40, 24)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fusemesh.flash_attention(*(leaves[name] for name in "qkv"), causal=True, backend=backend)
        y = fusemesh.fused_linear(leaves["x"], leaves["w"], activation="gelu", backend=backend)
    return with_gradients(draw, {"out": out, "y": y}, leaves)


BOTTOM = {"causal": True, "align": "bottom_right"}
EVERYTHING: dict[str, Any] = {
    "B": 2,
    "H": 2,
    "Hkv": 1,
    "Sq": 41,
    "Sk": 53,
    "D": 33,
    "Dv": 20,
    "layout": "bshd",
    "mask": "bmn",
    "bias": "hmn",
    "alibi": "h",
    "mod": "table",
    "sinks": "same",
    "lse": True,
    "options": {**BOTTOM, "window": (25, None), "softcap": 3.0, "dropout_p": 0.15, "seed": -5, "scale": 0.3},
}
WITHOUT_MOD: dict[str, Any] = {**EVERYTHING, "mod": None, "mask": "bn", "bias": "bhmn", "alibi": "bh"}
FAR = Origin(q=torch.tensor(2**33 + 5), k=torch.tensor([2**33 + 2]), head=3, batch=torch.tensor(5, dtype=torch.int32))

DENSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "lse": {"lse": True},
    "causal": {"Sq": 45, "options": {"causal": True}},
    "causal_top_left": {"options": {"causal": True, "align": "top_left"}},
    "causal_bottom_right": {"options": BOTTOM},
    "rows_without_a_key": {"Sq": 50, "Sk": 21, "options": BOTTOM},
    "rows_without_a_key_lse": {"Sq": 50, "Sk": 21, "lse": True, "sinks": "same", "options": BOTTOM},
    "window": {"options": {"window": (9, 3), "align": "bottom_right"}},
    "window_left": {"Sq": 70, "Sk": 70, "B": 1, "lse": True, "options": {"window": (6, None), "align": "top_left"}},
    "window_right": {"options": {"window": (None, 4), "align": "top_left"}},
    "window_causal": {"Sq": 70, "Sk": 70, "B": 1, "options": {"window": (11, 5), "causal": True}},
    "mask_matrix": {"mask": "matrix"},
    "mask_bhmn": {"mask": "bhmn"},
    "mask_bn": {"mask": "bn", "lse": True},
    "mask_hm": {"mask": "hm"},
    "mask_bh": {"mask": "bh"},
    "mask_transposed": {"mask": "transposed"},
    "mask_expanded": {"mask": "expanded"},
    "mask_tiles": {"Sq": 70, "Sk": 70, "B": 1, "mask": "tiles", "options": {"causal": True}},
    "mask_nothing": {"mask": "nothing", "lse": True},
    "bias_matrix": {"bias": "matrix"},
    "bias_bhmn": {"bias": "bhmn"},
    "bias_hmn": {"bias": "hmn", "lse": True},
    "bias_bmn": {"bias": "bmn"},
    "bias_mn": {"bias": "mn", "options": BOTTOM},
    "bias_bhn": {"bias": "bhn"},
    "bias_n": {"bias": "n", "lse": True},
    "bias_bhm": {"bias": "bhm", "lse": True},
    "bias_m": {"bias": "m"},
    "bias_h": {"bias": "h"},
    "bias_one": {"bias": ""},
    "bias_transposed": {"bias": "transposed"},
    "bias_expanded": {"bias": "expanded"},
    "bias_without_gradient": {"bias": "hmn", "needs": ("q", "k", "v")},
    "bias_alone": {"bias": "hmn", "needs": ("bias",)},
    "bias_and_mask": {"bias": "hmn", "mask": "bn", "options": BOTTOM},
    "alibi": {"alibi": "h", "options": {"align": "bottom_right"}},
    "alibi_of_batches": {"alibi": "bh", "lse": True, "options": {"align": "top_left"}},
    "softcap": {"options": {"softcap": 1.5}},
    "score_mod_table": {"mod": "table", "lse": True, "options": {"align": "bottom_right"}},
    "score_mod_numbers": {"mod": "sharper", "H": 4, "Sk": 37},
    "score_mod_learnt": {"mod": "learnt", "Sk": 37},
    "sinks": {"sinks": "same"},
    "sinks_lse_bias": {"sinks": "same", "lse": True, "bias": "bm"},
    "dropout": {"options": {"dropout_p": 0.3, "seed": 2**40 + 7}},
    "dropout_seed_tensor": {"lse": True, "bias": "hmn", "options": {"dropout_p": 0.2, "seed": torch.tensor([-3])}},
    "dropout_seed_drawn": {"options": {"dropout_p": 0.25}},
    "origin": {"lse": True, "options": {"causal": True, "origin": Origin(q=30, k=14, head=1, batch=2)}},
    "origin_tensors": {"options": {"causal": True, "origin": FAR}},
    "origin_of_dropout": {"mod": "table", "options": {"dropout_p": 0.3, "seed": 9, "origin": FAR}},
    "grouped_heads": {"H": 6, "Hkv": 2, "options": BOTTOM},
    "one_key_head": {"H": 5, "Hkv": 1, "bias": "bhmn", "lse": True},
    "dims": {"D": 64, "Dv": 32},
    "dims_odd": {"D": 33, "Dv": 20, "Sq": 33, "Sk": 31, "bias": "hn"},
    "dims_wide": {"D": 24, "Dv": 80, "B": 1},
    "layout_bshd": {"layout": "bshd", "H": 4, "Hkv": 2},
    "layout_strided": {"layout": "strided"},
    "layout_expanded": {"layout": "expanded"},
    "layout_sliced": {"layout": "sliced", "lse": True},
    "layout_projection": {"layout": "projection", "H": 4, "Hkv": 2, "Sk": 37, "Dv": 24, "options": {"causal": True}},
    "layout_one": {"layout": "one", "Sk": 37},
    "one_query": {"Sq": 1, "lse": True},
    "one_key": {"Sk": 1, "bias": "hmn"},
    "no_queries": {"Sq": 0, "bias": "n", "options": BOTTOM},
    "no_keys": {"Sk": 0, "lse": True, "sinks": "same"},
    "no_batches": {"B": 0},
    "scores_of_60": {"size": 20.0, "lse": True},
    "scale": {"options": {"scale": -0.3}},
    "not_deterministic": {"options": {"deterministic": False}},
    "forward_alone": {"needs": (), "lse": True, "mask": "mn"},
    "q_alone": {"needs": ("q",)},
    "v_alone": {"needs": ("v",), "options": BOTTOM},
    "everything": EVERYTHING,
    "everything_but_mods": WITHOUT_MOD,
}
HALVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lse": {"lse": True},
    "bias_hmn": {"bias": "hmn"},
    "bias_n": {"bias": "n"},
    "bias_m": {"bias": "m", "lse": True},
    "bias_expanded": {"bias": "expanded"},
    "sinks": {"sinks": "fp32", "options": BOTTOM},
    "dropout": {"options": {"dropout_p": 0.3, "seed": torch.tensor(11)}},
    "layout": {"layout": "bshd", "H": 4, "mask": "bhmn"},
    "everything": EVERYTHING,
    "everything_but_mods": WITHOUT_MOD,
}


def add_dense() -> None:
    """Attention of batches."""
    for name, changed in DENSE.items():
        for dtype in DTYPES:
            add(f"dense/{name}/{dtype}", functools.partial(dense, case=Attention(dtype, **changed)))
    mixed: dict[str, Any] = {"bias_dtype": "fp32", "bias": "hmn", "sinks": "fp32"}
    for dtype in ("bf16", "fp16"):
        add(f"dense/mixed_dtypes/{dtype}", functools.partial(dense, case=Attention(dtype, **mixed)))
    for name, dtype, changed in (
        ("plain", "fp32", {}),
        ("torch", "fp64", {"bias": "hmn"}),
        ("everything", "fp32", EVERYTHING),
        ("everything_but_mods", "bf16", WITHOUT_MOD),
    ):
        run = functools.partial(dense, case=Attention(dtype, **changed), second=True)
        add(f"second_gradients/{name}/{dtype}", run)
    for name, changed in HALVES.items():
        for dtype in ("fp32", "bf16"):
            add(f"halves/{name}/{dtype}", functools.partial(halves, case=Attention(dtype, **changed)))
    for dtype in ("fp64", "fp32", "bf16"):
        add(f"ring/{dtype}", functools.partial(ring, dtype=DTYPES[dtype]))
        add(f"merge/plain/{dtype}", functools.partial(merged, dtype=DTYPES[dtype]))
    add("merge/sinks/fp32", functools.partial(merged, dtype=torch.float32, sinks=True))
    add("merge/rows_without_a_key/fp32", functools.partial(merged, dtype=torch.float32, hidden=True))
    add(
        "merge/sinks_and_rows_without_a_key/fp16",
        functools.partial(merged, dtype=torch.float16, sinks=True, hidden=True),
    )
    add("fp8/plain", functools.partial(fp8, descale=None, options={}))
    add("fp8/numbers", functools.partial(fp8, descale="numbers", options={"causal": True}))
    add("fp8/tensors", functools.partial(fp8, descale="tensors", options={"softcap": 5.0, "window": (7, 2)}))
    add("fp8/bias_and_sinks", functools.partial(fp8, descale="tensors", options={"causal": True}, extras=True))
    add("autocast", autocast)
