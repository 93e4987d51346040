"""The calls that run on the emulator: every kernel, feature, tile and kind of loop, on sizes that just show them.

A CTA takes hundredths of a second and a compilation a second, so that shapes are small and several share a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.emulated import lengths
from bench.gpu import tables
from fusemesh.kernels.attention.gpu import decode_tiles
from fusemesh.kernels.measure.cases import AttentionCase, Case, DecodeCase, LinearCase, PackedCase, VocabLossCase
from fusemesh.kernels.measure.cases.common import DTYPES
from fusemesh.kernels.runtime.launch import TARGETS
from tests.support import attention_cases, decode_cases, varlen_cases

EMULATED = ("sm_80", "sm_90")
# Sequences of the long tables are cut to this.
_LONGEST = 203


@dataclass(frozen=True)
class Entry:
    """A case, and how it is run."""

    case: Case
    large: bool = False  # the linear layer takes the tiles of large results; the loss goes through many columns at once
    surrounded: bool = False  # inputs lie in seas of NaN

    @property
    def name(self) -> str:
        """The case's name and what is said of its run."""
        return self.case.name + " large tiles" * self.large + " surrounded" * self.surrounded

    def __str__(self) -> str:
        return f"{self.case.op} {self.name}"


def attention(dtype: str = "bf16", S: int = 77, **features: Any) -> AttentionCase:
    """Return a call of S queries and keys, D 64, two heads of one key head, with these fields in place of its own."""
    return tables.attention(dtype, **{"B": 1, "H": 2, "Hkv": 1, "Sq": S, "Sk": S, **features})


def linear(dtype: str = "bf16", m: int = 70, n: int = 80, k: int = 144, **features: Any) -> LinearCase:
    """Return a layer whose rows are aligned, with these fields in place of its own."""
    return LinearCase(dtype, m, k, n, **features)


def small(case: Case) -> Case:
    """Return a case of bench/gpu's tables with sequences of at most 203 and one batch or two."""
    if isinstance(case, AttentionCase):
        return dataclasses.replace(case, Sq=min(case.Sq, _LONGEST), Sk=min(case.Sk, _LONGEST), B=1)
    if isinstance(case, LinearCase):
        sizes = {"rows": 203, "out_features": 144, "in_features": 217}
        return dataclasses.replace(case, **{name: min(getattr(case, name), most) for name, most in sizes.items()})
    if isinstance(case, VocabLossCase):
        sizes = {"rows": 203, "features": 217, "columns": 401}
        return dataclasses.replace(case, **{name: min(getattr(case, name), most) for name, most in sizes.items()})
    if isinstance(case, PackedCase):
        lens = {name: tuple(min(n, _LONGEST) for n in getattr(case, name)) for name in ("lens_q", "lens_k")}
        return dataclasses.replace(case, **lens)
    lens_ = tuple(min(n, 600) for n in case.lens)
    page = case.page or 1
    capacity = -(-(max(lens_) + case.added) // page) * page
    return dataclasses.replace(case, lens=lens_, capacity=capacity, H=min(case.H, 32 * case.Hkv))


def shipped_attention(target: str) -> Iterator[AttentionCase]:
    """Yield, for each dtype and class of head dimensions, calls with and without blocks of scores: every tile."""
    for dtype in DTYPES:
        for d in (64, 128, 256):
            s = lengths.beyond_a_tile(target, dtype, d)
            heads = {"D": d, "H": 2 if d == 64 else 1}
            yield attention(dtype, s, **heads)
            yield attention(dtype, s, **heads, causal=True, dlse=True)
            yield attention(dtype, s, **heads, mask="hmn", bias="hmn", empty_row=True)


def featured_attention() -> Iterator[AttentionCase]:
    """Yield each feature alone in bf16, some in every dtype, and features that meet."""
    for case in attention_cases.FEATURES.values():
        is_placed = case.Sq == case.Sk or case.align or case.device_origin or any(case.origin)
        has_positions = case.causal or case.window or case.alibi or case.mod
        align = "top_left" if has_positions and not is_placed else case.align
        yield dataclasses.replace(case, dtype="bf16", align=align)
    for dtype in ("fp32", "fp16"):
        for feature in tables.FEATURES:
            yield attention(dtype, causal=True, **feature)
    for case in tables.COMBINATIONS:
        yield small(case)  # type: ignore[misc]


def swept_attention(target: str) -> Iterator[AttentionCase]:
    """Yield calls whose loops run no, one, two ... times to beyond what is copied ahead, with and without an edge."""
    one_head = {"H": 1, "Hkv": 1}
    for dtype, d, extra in (
        ("bf16", 64, {}),
        ("bf16", 128, {}),
        ("bf16", 256, {}),
        ("fp16", 64, {}),
        ("fp32", 64, {}),
        ("fp32", 256, {}),
        ("bf16", 64, {"mask": "mn", "bias": "mn"}),
        ("bf16", 64, {"dropout": 0.2}),
    ):
        crowded = bool(extra)
        for sk in lengths.of_attention(target, dtype, d, crowded, ("forward", "dq")):
            yield attention(dtype, Sq=19, Sk=sk, D=d, **one_head, **extra)
        for sq in lengths.of_attention(target, dtype, d, crowded, ("dkdv",)):
            yield attention(dtype, Sq=sq, Sk=19, D=d, **one_head, **extra)
    for dtype, d in (("bf16", 64), ("bf16", 128), ("fp32", 64)):
        s = max(lengths.of_attention(target, dtype, d, False, ("forward", "dq")))
        yield attention(dtype, s, D=d, causal=True, **one_head)


def edged_attention(target: str) -> Iterator[AttentionCase]:
    """Yield calls whose windows and alignments put every edge before, on and behind the border of a tile."""
    for dtype in ("bf16", "fp32"):
        m, n = lengths.tile_of_attention(target, "forward", dtype, 64)
        many = {"dtype": dtype, "H": 1, "Hkv": 1}
        s = m + n + 1
        for left in sorted({0, 1, 15, 16, n - 1, n, n + 1, 2 * n - 1, 2 * n}):
            yield attention(**many, Sq=s, Sk=s, window=(left, 0))
        for right in sorted({1, n - 1, n, n + 1}):
            yield attention(**many, Sq=s, Sk=s, window=(None, right))
        for window in ((0, 0), (n, n), (1, n - 1), (s, s)):
            yield attention(**many, Sq=s, Sk=s, window=window)
        # One query beside a block, keys that end before, at and behind the diagonal: causal from either end.
        for sq, sk in ((m + 1, n - 1), (m + 1, n), (m + 1, n + 1), (m - 1, 2 * n + 1), (m, 2 * n), (1, n + 1)):
            for align in ("top_left", "bottom_right"):
                yield attention(**many, Sq=sq, Sk=sk, causal=True, align=align)
        # Positions apart by about a tile, both ways; keys none of which is seen.
        for origin in (n - 1, n, n + 1, 1 - n, -n, -n - 1, -2 * s):
            yield attention(**many, Sq=m + 1, Sk=n + 1, causal=True, origin=(origin, 0, 0, 0))


def shaped_attention() -> Iterator[AttentionCase]:
    """Yield head dimensions, layouts, groups of heads and lengths."""
    for d, dv in ((16, 16), (24, 200), (33, 17), (40, 72), (80, 80), (96, 32), (160, 160), (192, 128), (192, 129)):
        yield attention(D=d, Dv=dv, causal=True)
    for dtype, d, dv in (("fp32", 16, 16), ("fp32", 192, 128), ("fp32", 33, 40), ("fp16", 80, 48), ("fp16", 16, 256)):
        yield attention(dtype, D=d, Dv=dv)
    for layout in ("bshd", "padded"):
        for dtype in ("bf16", "fp32"):
            yield attention(dtype, layout=layout, causal=True, B=2, H=4, Hkv=2)
    for kv in (1, 2, 4):
        yield attention(H=4, Hkv=kv, B=2)
    for dims in ("bn", "mn", "bhmn", "m", "bh"):
        yield attention(mask=dims, B=2, S=141)
    for dims in ("hmn", "bmn", "n", "bm", "h", "bhmn"):
        yield attention(bias=dims, B=2)
    yield attention("fp32", bias="hmn", B=3, Sq=65, Sk=33)
    yield attention(mask="bhmn", bias="hmn", causal=True, window=(64, 0), dlse=True, sinks=True, B=2)
    for sq, sk in ((1, 1), (1, 113), (113, 1), (64, 64), (17, 203)):
        yield attention(Sq=sq, Sk=sk)


def surrounded() -> Iterator[Case]:
    """Yield the calls whose inputs lie in seas of NaN."""
    yield attention(causal=True, S=141)
    yield attention("fp32", S=77, D=40, bias="mn")
    yield attention("fp16", S=77, D=80, Dv=48, layout="bshd", B=2)
    yield linear(activation="silu", gated=True)
    yield linear("fp32", m=33, n=17, k=23, activation="gelu")
    yield tables.loss(n=33, v=149, e=80)


def linears(target: str) -> Iterator[Entry]:
    """Yield every tile of the linear layer, every epilogue, and loops of every length."""
    epilogues: tuple[dict[str, Any], ...] = ({}, {"activation": "gelu"}, {"activation": "silu", "gated": True})
    for dtype in DTYPES:
        for features in epilogues:
            yield Entry(linear(dtype, **features))
            yield Entry(linear(dtype, m=140, n=272, k=144, **features), large=True)
            yield Entry(linear(dtype, m=17, **features))
            yield Entry(linear(dtype, m=70, n=83, k=149, **features))
            yield Entry(linear(dtype, m=17, n=83, k=149, **features))
        for activation in ("gelu_tanh", "silu", "relu2"):
            yield Entry(linear(dtype, activation=activation))
        yield Entry(linear(dtype, activation="gelu", gated=True))
        yield Entry(linear(dtype, has_bias=False, activation="relu2"))
        yield Entry(linear(dtype, has_bias=False))
        yield Entry(linear(dtype, columns=True, activation="silu", gated=True))
    for m, n, k in ((1, 1, 1), (17, 203, 1), (1, 113, 203), (203, 16, 16)):
        yield Entry(linear(m=m, n=n, k=k))
    for dtype in ("bf16", "fp32"):
        for features in epilogues:
            for shape in lengths.of_linear(target, dtype, features):
                yield Entry(linear(dtype, *shape, **features))


def losses(target: str) -> Iterator[Entry]:
    """Yield every tile of the loss, every feature of a head, and loops over features of every length."""
    for dtype in DTYPES:
        for features in ({}, {"has_bias": True}, {"softcap": 3.0}, {"has_bias": True, "softcap": 3.0, "scale": 0.5}):
            yield Entry(tables.loss(dtype, n=140, v=401, e=144, **features), large=True)
            yield Entry(tables.loss(dtype, n=33, v=283, e=80, **features))
            yield Entry(tables.loss(dtype, n=70, v=149, e=83, **features), large=True)
    for dtype in ("bf16", "fp32"):
        for e in lengths.of_loss(target, dtype):
            yield Entry(tables.loss(dtype, n=17, v=270, e=e), large=True)
    for case in tables.LOSS:
        yield Entry(small(case), large=case.columns > 1000)


def decodes(target: str) -> Iterator[DecodeCase]:
    """Yield decode's features in bf16, some in other dtypes, and every tile over caches of every length."""
    for name, case in decode_cases.FEATURES.items():
        yield dataclasses.replace(case, dtype="bf16", sinks_dtype="bf16")
        if name in ("append", "pages_of_16", "latent", "all_at_once", "starts", "bias_and_mask_and_starts"):
            yield dataclasses.replace(case, dtype="fp16")
            yield case
    for dtype in ("bf16", "fp32"):
        for d, dv, latent in ((64, 64, False), (128, 128, False), (256, 256, False), (576, 512, True)):
            for rows in decode_tiles.ROWS:
                lens = lengths.of_decode(target, dtype, d, dv, latent, rows)
                yield tables.decode(dtype, lens, H=rows, Hkv=1, D=d, Dv=dv, latent=latent)
    for case in tables.DECODE:
        yield small(case)  # type: ignore[misc]
    # Several parts of a cache, the last of them short or empty.
    yield tables.decode(lens=(1030, 300, 256, 0), H=4, Hkv=2, D=64, page=32, causal=True, Sq=2)


def packs(target: str) -> Iterator[PackedCase]:
    """Yield the features of packed sequences in bf16, some in every dtype, and sequences of every length."""
    for name, case in varlen_cases.FEATURES.items():
        yield dataclasses.replace(case, dtype="bf16")
        if name in varlen_cases.IN_HALF_PRECISION:
            yield dataclasses.replace(case, dtype="fp16")
            yield case
    for case in tables.PACKED:
        yield small(case)  # type: ignore[misc]
    for dtype in ("bf16", "fp32"):
        lens_k = tuple(lengths.of_attention(target, dtype, 64, False, ("forward", "dq")))
        some = tuple(17 + i % 3 for i in range(len(lens_k)))
        yield tables.packed(dtype, lens_q=some, lens_k=lens_k, H=1, Hkv=1)
        lens_q = tuple(lengths.of_attention(target, dtype, 64, False, ("dkdv",)))
        some = tuple(17 + i % 3 for i in range(len(lens_q)))
        yield tables.packed(dtype, lens_q=lens_q, lens_k=some, H=1, Hkv=1, causal=True)


def fp8s(target: str) -> Iterator[AttentionCase]:
    """Yield the forward of fp8 where the target has it."""
    from fusemesh.kernels.attention.gpu.backend import has_fp8

    if has_fp8(TARGETS[target]):
        for case in tables.FP8:
            yield small(case)  # type: ignore[misc]
        for sk in lengths.of_attention(target, "fp8", 128, False, ("forward",)):
            yield tables.fp8(B=1, H=1, Hkv=1, Sq=19, Sk=sk)


def entries(target: str) -> list[Entry]:
    """Return the whole matrix for a target, each case once."""
    found: list[Entry] = [Entry(case, surrounded=True) for case in surrounded()]
    cases: Iterable[Iterable[Case]] = (
        shipped_attention(target),
        featured_attention(),
        swept_attention(target),
        edged_attention(target),
        shaped_attention(),
        decodes(target),
        packs(target),
        fp8s(target),
    )
    in_turn = tables.in_turn(*([Entry(case) for case in table] for table in cases), linears(target), losses(target))
    return list(dict.fromkeys([*found, *in_turn]))


def by_chance(target: str) -> list[Entry]:
    """Return the part of the matrix that runs in several orders of warps and CTAs: every kernel, and long loops."""
    longest = max(lengths.of_attention(target, "bf16", 64, False, ("forward", "dq")))
    found: list[Case] = [
        attention(Sq=77, Sk=longest, causal=True, align="bottom_right", H=1),
        attention("fp32", S=lengths.beyond_a_tile(target, "fp32", 64), H=1, sinks=True, dlse=True),
        attention("fp16", S=77, D=128, window=(40, 3), dropout=0.2),
        attention(S=77, mask="bn", bias="n", softcap=3.0),
        linear(m=200, n=208, k=272),
        linear("fp16", m=70, n=83, k=149, activation="gelu"),
        tables.decode(lens=(1030, 300, 256, 0), H=4, Hkv=2, D=64, page=32, causal=True, Sq=2),
        tables.loss(n=140, v=401, e=272, has_bias=True),
    ]
    return [*short(target), *(Entry(case) for case in found)]


def short(target: str) -> list[Entry]:
    """Return the part of the matrix in which every kernel runs once, for every change."""
    n = lengths.tile_of_attention(target, "forward", "bf16", 64)[1]
    found: list[Entry] = [
        Entry(attention(Sq=33, Sk=n + 1, causal=True, align="bottom_right", mask="hmn", bias="hmn", H=1, sinks=True)),
        # Values of which each lane has one: a sum over lanes that is fused with products differs between them.
        Entry(attention("fp32", S=33, D=16, Dv=24, causal=True, H=1)),
        Entry(tables.decode(lens=(600, 1, 130), H=4, Hkv=1, D=64, added=1, page=16, causal=True)),
        Entry(tables.packed(lens_q=(33, 0, 17), lens_k=(n + 1, 9, 5), H=1, Hkv=1, causal=True)),
        Entry(linear(activation="silu", gated=True)),
        # Loops that are long enough to overwrite what products under way read.
        Entry(linear(m=200, n=80, k=80)),
        Entry(linear("fp32", m=33, n=32, k=48, activation="gelu")),
        # Two chunks, and a program of the forward that goes through two tiles of columns.
        Entry(tables.loss(n=33, v=283, e=80, has_bias=True, softcap=3.0, ignored=2), large=True),
    ]
    return found + [Entry(case) for case in fp8s(target) if case.D == 16]
