"""The calls that a GPU must get right before a kernel counts as proven: bench/on_gpu.py and tests/gpu run these tables.

Within a table the most telling come first: a stage whose time runs out leaves out the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from fusemesh.kernels.measure.cases import AttentionCase, Case, DecodeCase, LinearCase, PackedCase, VocabLossCase
from fusemesh.kernels.measure.cases.common import DTYPES
from fusemesh.kernels.runtime.launch import target_of

REPEATS = 50


def attention(dtype: str = "bf16", **features: Any) -> AttentionCase:
    """Return a call of 203 queries and keys, D 64, two heads to a key head, with these fields in place of its own."""
    fields = {"B": 2, "H": 4, "Hkv": 2, "D": 64, **features}
    fields.setdefault("Sq", 203)
    fields.setdefault("Sk", 203)
    fields.setdefault("Dv", fields["D"])
    # A mask that can hide every key from a query does so.
    fields.setdefault("empty_row", "m" in (fields.get("mask") or ""))
    return AttentionCase(dtype, **fields)


def linear(dtype: str = "bf16", m: int = 203, n: int = 113, k: int = 217, **features: Any) -> LinearCase:
    """Return a layer [m, k] by [n, k] with these features."""
    return LinearCase(dtype, m, k, n, **features)


def loss(dtype: str = "bf16", n: int = 203, v: int = 1001, e: int = 217, **features: Any) -> VocabLossCase:
    """Return the loss of n rows of e features over v tokens with these features."""
    return VocabLossCase(dtype, n, e, v, **features)


def decode(dtype: str = "bf16", lens: tuple[int, ...] = (301, 1, 130), **features: Any) -> DecodeCase:
    """Return a call over caches as long as they must be, sinks in the dtype of q."""
    fields = {"H": 8, "Hkv": 2, "D": 128, "sinks_dtype": dtype, **features}
    fields.setdefault("Dv", fields["D"])
    page = fields.get("page") or 1
    capacity = -(-(max(lens) + fields.get("added", 0)) // page) * page
    return DecodeCase(dtype, lens=lens, capacity=capacity, **fields)


def packed(dtype: str = "bf16", **features: Any) -> PackedCase:
    """Return a call of four sequences, one without queries, with these fields in place of its own."""
    fields = {"lens_q": (203, 0, 1, 130), "lens_k": (203, 9, 65, 71), "D": 64, "dlse": False, **features}
    fields.setdefault("Dv", fields["D"])
    fields.setdefault("align", "bottom_right")
    return PackedCase(dtype, **fields)


def fp8(**features: Any) -> AttentionCase:
    """Return a forward of fp8 with a factor for each of q, k and v, aligned to the last key."""
    fields = {"D": 128, "descale": "tensor", **features}
    if fields.get("causal") or fields.get("window"):
        fields["align"] = "bottom_right"
    return attention("fp8", **fields)


# Each alone, in every dtype.
FEATURES: tuple[dict[str, Any], ...] = (
    {"softcap": 3.0},
    {"alibi": "h"},
    {"mod": True},
    {"sinks": True, "dlse": True},
    {"dropout": 0.2},
    {"origin": (40, 11, 3, 5), "mod": True, "dropout": 0.2},
)

# Features meet each other, odd sizes, head dims that are no power of two, D != Dv, and every kind of mask and bias.
COMBINATIONS: tuple[AttentionCase, ...] = (
    attention("fp32", softcap=3.0, alibi="bh", mod=True, sinks=True, dropout=0.2, bias="hmn", mask="bn", dlse=True),
    attention(softcap=30.0, window=(64, 0), D=256, sinks=True),
    attention(softcap=3.0, alibi="h", D=192, Dv=128, H=8, Hkv=2, causal=True),
    attention(alibi="bh", dropout=0.1, D=80, layout="bshd", Sq=113, Sk=203, align="bottom_right"),
    attention(mod=True, mask="bhmn", D=40, Dv=72, origin=(17, 5, 1, 2), window=(50, 9)),
    attention("fp32", sinks=True, mask="bhmn", D=96, Dv=32, dlse=True, Hkv=1),
    attention("fp16", dropout=0.5, bias="bhmn", D=160, causal=True, sinks=True),
    attention("fp32", dropout=0.2, device_origin=(1000, 900, 3, 5), window=(200, 0), softcap=5.0),
    attention(alibi="h", mod=True, origin=(2**31 + 9, 2**31, 0, 0), causal=True, Sq=129, Sk=65, sinks=True),
    attention("fp16", softcap=3.0, mod=True, bias="n", mask="mn", D=24, Dv=200, layout="padded"),
    attention("fp32", alibi="bh", bias="hmn", sinks=True, Sq=1, Sk=203, align="bottom_right", causal=True),
    attention(dropout=0.1, sinks=True, window=(20, 3), Sq=301, Sk=97, align="bottom_right", dlse=True),
    attention("fp32", mod=True, dropout=0.3, D=256, device_origin=(7, 0, 0, 1), causal=True),
    attention(softcap=30.0, D=128, Sq=2048, Sk=2048, B=1, window=(511, 0), H=8, Hkv=4),
    attention(sinks=True, D=64, Sq=4096, Sk=4096, B=1, window=(127, 0), H=4, Hkv=1),
)

ATTENTION: tuple[AttentionCase, ...] = (
    attention(D=128, Sq=1024, Sk=1024, causal=True),
    attention(D=128, Sq=1024, Sk=1024),
    attention("fp32", bias="hmn", mask="bn", causal=True, dlse=True),
    attention("fp16", D=64, bias="bhmn", window=(40, 17)),
    attention(D=128, softcap=20.0, alibi="h", sinks=True, dropout=0.1, causal=True),
    *(attention(t, causal=True, **feature) for feature in FEATURES for t in DTYPES),
    *COMBINATIONS,
    *(attention(t, D=128, causal=True) for t in ("fp32", "fp16")),
    *(attention(D=d, Dv=dv, causal=c) for d, dv in ((64, 64), (256, 256), (192, 128)) for c in (False, True)),
    *(attention("fp32", D=d, Dv=dv) for d, dv in ((64, 64), (128, 128), (256, 256), (192, 128), (16, 16))),
    attention(D=256, Sq=777, Sk=777, causal=True, H=2, Hkv=2),
    *(attention(Sq=sq, Sk=sk) for sq, sk in ((1, 1), (1, 113), (17, 203), (113, 17), (64, 64), (128, 256))),
    *(
        attention(Sq=sq, Sk=sk, causal=True, align=align)
        for sq, sk in ((203, 113), (113, 203), (1, 203))
        for align in ("top_left", "bottom_right")
    ),
    *(attention(window=window) for window in ((32, 0), (None, 5), (7, None), (0, 0))),
    attention("fp32", Sq=301, Sk=97, window=(20, 3), align="bottom_right", dlse=True),
    *(attention(H=8, Hkv=kv, causal=True) for kv in (1, 2, 8)),
    *(attention(mask=dims) for dims in ("bn", "mn", "bhmn")),
    *(attention(bias=dims) for dims in ("hmn", "n", "bm", "h", "bhmn")),
    attention("fp32", bias="hmn", Sq=129, Sk=65),
    attention(mask="bhmn", bias="hmn", causal=True, window=(64, 0), dlse=True),
    *(attention(layout=layout, causal=True) for layout in ("bshd", "padded")),
    attention("fp32", layout="bshd", dlse=True),
    *(attention(D=d, Dv=dv) for d, dv in ((16, 16), (40, 72), (80, 80), (96, 32), (160, 160))),
    attention(D=128, Sq=4096, Sk=4096, B=1, causal=True),
    attention(D=128, Sq=8192, Sk=8192, B=1, H=2, Hkv=1),
    *(attention("fp16", D=d, Dv=dv, causal=True) for d, dv in ((16, 16), (64, 64), (256, 256), (80, 48))),
)

LINEAR: tuple[LinearCase, ...] = (
    linear(m=2048, n=2048, k=1024, activation="silu", gated=True),
    linear(m=1024, n=4096, k=1024, activation="gelu"),
    linear("fp32", m=512, n=1024, k=768, activation="gelu_tanh"),
    *(linear(t, activation=a) for t in DTYPES for a in (None, "gelu", "gelu_tanh", "silu", "relu2")),
    *(linear(t, activation=a, gated=True) for t in DTYPES for a in ("silu", "gelu")),
    *(linear(t, m=m, n=n, k=k) for t in DTYPES for m, n, k in ((1, 1, 1), (17, 203, 1), (1, 113, 203), (4096, 16, 16))),
    *(linear(t, has_bias=False, activation=a) for t in DTYPES for a in (None, "relu2")),
    *(linear(t, columns=True, activation="silu", gated=True) for t in DTYPES),
)

LOSS: tuple[VocabLossCase, ...] = (
    loss(n=2048, v=32000, e=1024),
    loss(n=300, v=50257, e=768, has_bias=True, softcap=30.0),
    *(loss(t, has_bias=b, softcap=c, scale=s) for t in DTYPES for b, c, s in ((False, None, 1.0), (True, 3.0, 0.5))),
    *(loss(t, n=n, v=v, e=e) for t in DTYPES for n, v, e in ((1, 1, 1), (130, 17, 1), (1, 1029, 203), (9, 5, 256))),
    *(loss(t, n=70, e=256, ignored=3, transposed=True) for t in DTYPES),
)

DECODE: tuple[DecodeCase, ...] = (
    decode(lens=(8191, 100)),
    decode(added=1, page=64, causal=True, lens=(1000, 63, 64)),
    decode(D=576, Dv=512, H=16, Hkv=1, latent=True, lens=(2000, 77)),
    *(decode(t) for t in ("fp16", "fp32")),
    decode(Sq=5, added=5, causal=True, page=16, Dv=64, window=(100, 0), softcap=20.0),
    decode("fp32", alibi="h", sinks=True, bias="hn", D=80, added=2, Sq=2, causal=True),
    decode("fp16", page=128, H=64, Hkv=8, softcap=30.0, sinks=True, lens=(3000, 129)),
    decode(D=576, Dv=512, H=128, Hkv=1, latent=True, page=64, added=1, lens=(500, 64, 63)),
    decode(D=256, window=(255, 0), Sq=3, H=4, Hkv=4, alibi="h"),
)

PACKED: tuple[PackedCase, ...] = (
    packed(causal=True, lens_q=(1000, 3, 517), lens_k=(1000, 3, 517), D=128),
    *(packed(t, causal=c) for t in DTYPES for c in (False, True)),
    packed("fp32", bias="bhmn", softcap=3.0, alibi="h", causal=True, D=80, Dv=48),
    packed(dropout=0.2, window=(50, 9), align="top_left", H=8, Hkv=1),
    packed("fp16", alibi="h", dropout=0.1, window=(64, 0), D=256),
    packed(bias="bhmn", D=192, Dv=128),
)

# The factors are powers of two, so that bf16 holds the inputs exactly, and its budget is the one to keep.
FP8: tuple[AttentionCase, ...] = (
    fp8(Sq=1024, Sk=1024, causal=True),
    fp8(descale="head", D=64, H=8, Sq=113, causal=True),
    fp8(bias="hn", softcap=20.0, sinks=True, descale="head"),
    fp8(D=256, window=(64, 0), Sq=301, Sk=301),
    fp8(D=80, Dv=48, Sq=65, Sk=257),
    fp8(D=192, Dv=128, causal=True, Hkv=4, sinks=True),
    fp8(Sq=1, Sk=203, D=16, descale="head"),
    fp8(Sq=4096, Sk=4096, B=1, causal=True),
)

# Those that run again and again: every repeat gives the same bits.
REPEATED: frozenset[Case] = frozenset(
    (
        *(ATTENTION[i] for i in (0, 2, 4)),
        COMBINATIONS[2],
        attention(D=256, Sq=777, Sk=777, causal=True, H=2, Hkv=2),
        *(LINEAR[i] for i in (0, 2)),
        LOSS[1],
        DECODE[0],
        PACKED[0],
        FP8[0],
    )
)


def fp8_cases(device: torch.device, is_dry: bool) -> tuple[AttentionCase, ...]:
    """Return :data:`FP8`, or nothing on a GPU that has no fp8."""
    if not is_dry:
        from fusemesh.kernels.attention.gpu.backend import has_fp8

        if not has_fp8(target_of(device)):
            return ()
    return FP8


def in_turn(*tables: Iterable[Any]) -> list[Any]:
    """Return the first element of each table, then the second of each, so that a part of it has seen every table."""
    return [case for turn in itertools.zip_longest(*tables) for case in turn if case is not None]


def all_cases(device: torch.device, is_dry: bool) -> list[Case]:
    """Return every case for ``device``."""
    return in_turn(ATTENTION, LINEAR, DECODE, PACKED, LOSS, fp8_cases(device, is_dry))
