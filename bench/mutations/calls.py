"""Small calls that launch each kernel with lengths that reach every edge, so that a fault in its text can show.

Whether a fault shows depends on the number of a loop's rounds modulo the stages of its pipeline, and that of a bound
only where an index equals it: lengths go through 1 to 7 tiles, and end at every pair of columns of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fusemesh.kernels.attention.decode.api import flash_attention_decode
from fusemesh.kernels.attention.dense.api import flash_attention
from fusemesh.kernels.attention.gpu import decode_tiles
from fusemesh.kernels.attention.varlen.api import flash_attention_varlen
from fusemesh.kernels.matmul.api import fused_linear

Calls = list[tuple[str, Callable[[], Any]]]
EDGES = [8 * group + odd for group in range(16) for odd in (5, 2)]  # every 8 columns, odd and even, within 128
# (Sq, Sk) for every edge of keys, with queries behind the last key.
BEHIND = [(2 + edge + (5 * i) % 32, 1 + edge) for i, edge in enumerate(EDGES)]


def lengths() -> list[tuple[int, int]]:
    """Return (Sq, Sk): rounds of both loops, then every edge of keys with queries behind it, then edges of queries."""
    rounds = [(97, 200), (128, 250), (70, 24), *((70, 128 * n + 24) for n in range(1, 6)), (70, 88)]
    rounds += [*((64 * n + 24, 70) for n in range(1, 6)), (128, 256), (192, 64)]
    rounds += [(5, 128 * n + 8) for n in range(2, 5)]
    # A tile that every query sees, and keys that end within the next; blocks of rows that end anywhere in late rounds.
    rounds += [(20, 150), (1, 128), (1, 256), (264, 70), (312, 70), *((70, 384 + edge) for edge in (56, 88, 120))]
    return [*rounds, *BEHIND, *((edge, edge + 40) for edge in EDGES[:16]), (200, 328)]


def attention(causal: bool, bias: bool = False) -> Calls:
    """Forward and backward in bf16 at D 64; with a bias, of all heads together, that has a gradient."""

    def call(queries: int, keys: int) -> None:
        g = torch.Generator().manual_seed(1000 * queries + keys)
        heads = 4 if bias else 1  # over which the gradient of a bias is summed
        sizes = ((heads, queries), (heads, keys), (heads, keys), (heads, queries))
        q, k, v, do = (torch.randn(1, *s, 64, generator=g).bfloat16() for s in sizes)
        if (queries, keys) in BEHIND:  # far below 0, which is the score of keys that are not there
            q, k = 6 * q.abs(), -6 * k.abs()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        options: dict[str, Any] = {"causal": causal}
        if causal:  # every key is seen by some query
            options["align"] = "bottom_right" if keys >= queries else "top_left"
        if bias:
            options["bias"] = torch.randn(1, 1, queries, keys, generator=g).bfloat16().requires_grad_()
            leaves.append(options["bias"])
        out = flash_attention(*leaves[:3], **options, backend="triton")
        assert isinstance(out, torch.Tensor)
        torch.autograd.grad(out, leaves, do)

    # Rows of a bias are read 16 bytes at a time where they are multiples of that: one text.
    sizes = [(a, -(-b // 16) * 16) for a, b in lengths()[::2]] if bias else lengths()
    return [(f"{a}x{b}", functools.partial(call, a, b)) for a, b in sizes]


def linear() -> Calls:
    """gelu(x w + b) and its gradients in bf16."""

    def call(rows: int, inner: int, columns: int) -> None:
        g = torch.Generator().manual_seed(rows + 1000 * inner + columns)
        x, w, dy = (torch.randn(*s, generator=g).bfloat16() for s in ((rows, inner), (columns, inner), (rows, columns)))
        leaves = [x.requires_grad_(), (w / inner**0.5).requires_grad_(), torch.randn(columns, generator=g).bfloat16()]
        leaves[2].requires_grad_()
        y = fused_linear(*leaves, activation="gelu", backend="triton")
        torch.autograd.grad(y, leaves, dy)

    # Rows may be any; features are multiples of 16, so that copies are asynchronous.
    sizes = [(97, 176, 112)]
    sizes += [(40, 64 * n + 48, 48) for n in range(6)] + [(40, 48, 64 * n + 48) for n in range(6)]
    sizes += [(40, 48, 16 * n) for n in (5, 6, 8, 9, 10)] + [(32 * n, 48, 48) for n in range(1, 6)]
    sizes += [(64 * n + 24, 48, 48) for n in range(5)] + [(256 + edge, 48, 48) for edge in (8, 40, 56)]
    sizes += [(1 + edge, 16 * (1 + i % 9), 16 * (1 + (5 * i) % 9)) for i, edge in enumerate(EDGES)]
    return [("x".join(map(str, s)), functools.partial(call, *s)) for s in sizes]


def decode() -> Calls:
    """Decode of 4 queries a head, 16 rows, over a paged cache in three splits, with an append; slots unused are NaN."""
    page, pages = 4, 400

    def call(*lens: int, foreign: bool = False, below: bool = False) -> None:
        g = torch.Generator().manual_seed(abs(sum(lens)))
        batch = len(lens)
        q = torch.randn(batch, 4, 4, 64, generator=g).bfloat16()
        k, v = (torch.randn(batch * pages, 1, page, 64, generator=g).bfloat16() for _ in range(2))
        new = [torch.randn(batch, 1, 2, 64, generator=g).bfloat16() for _ in range(2)]
        if below:  # scores so far below 0 that a sum or a 0 in the place of a maximum makes a weight infinite
            q, k, new[0] = 40 * q.abs(), -k.abs(), -new[0].abs()
        table = torch.randperm(batch * pages, generator=g).view(batch, pages).int()
        used = torch.zeros(batch * pages, page, dtype=torch.bool)
        for b, length in enumerate(lens):
            used[table[b].long()] = (torch.arange(pages * page) < length).view(pages, page)
        for cache in (k, v):
            cache[~used[:, None]] = torch.nan
        if foreign:  # the new keys belong to pages that the cache does not have
            for b, page_of in enumerate((-1, batch * pages)):
                table[b, lens[b] // page] = page_of
        options = {"k_new": new[0], "v_new": new[1], "block_table": table, "backend": "triton"}
        with decode_tiles.force(splits=3):
            flash_attention_decode(q, k, v, cache_lens=torch.tensor(lens, dtype=torch.int32), **options)

    rounds = [(500, 300), (1500, 3), (1290, 600), (1027, 900), (771, 135), (515, 250), (259, 128)]
    sizes = [*rounds, *((256 + edge, 3) for edge in EDGES), (-1, page * pages - 1), (page * pages, page * pages - 2)]
    found: Calls = [("x".join(map(str, s)), functools.partial(call, *s)) for s in sizes]
    found.append(("scores below 0", functools.partial(call, 771, 135, below=True)))
    return [*found, ("foreign pages", functools.partial(call, 100, 250, foreign=True))]


def packed() -> Calls:
    """Packed sequences, causal, forward and backward in bf16 at D 64."""

    def call(*pairs: tuple[int, int]) -> None:
        g = torch.Generator().manual_seed(sum(map(sum, pairs)))
        starts = [torch.tensor([0, *(p[i] for p in pairs)]).cumsum(0).int() for i in (0, 1)]
        most = [max(p[i] for p in pairs) for i in (0, 1)]
        q, do = (torch.randn(int(starts[0][-1]), 1, 64, generator=g).bfloat16() for _ in range(2))
        k, v = (torch.randn(int(starts[1][-1]), 1, 64, generator=g).bfloat16() for _ in range(2))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = flash_attention_varlen(*leaves, *starts, *most, causal=True, align="bottom_right", backend="triton")
        torch.autograd.grad(out, leaves, do)

    every = lengths()
    sizes = [((90, 40), (0, 7), (150, 200)), ((33, 0), (5, 9)), *((pair, (9, 17)) for pair in every[1:])]
    # Behind the last sequence no row follows that could be read.
    sizes += [((9, 17), pair) for pair in [*BEHIND, *((110, 128 + edge) for edge in (5, 40, 75, 100))]]
    return [(" ".join(f"{a}x{b}" for a, b in s), functools.partial(call, *s)) for s in sizes]


# Each family's calls, and which kernels of theirs are changed.
FAMILIES: dict[str, tuple[Callable[[], Calls], tuple[str, ...]]] = {
    "causal": (
        lambda: attention(True),
        ("attention_forward", "attention_dkdv", "attention_dq", "attention_delta"),
    ),
    "linear": (linear, ("linear_forward", "linear_dgrad", "linear_wgrad")),
    "decode": (decode, ("decode_split", "decode_combine", "decode_append")),
    "packed": (packed, ("attention_forward",)),
    "bias": (lambda: attention(False, bias=True), ("attention_dbias",)),
}
