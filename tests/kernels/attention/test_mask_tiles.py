"""Layer: kernels, Triton's interpreter. Tiles that a boolean mask hides whole are listed rightly, and are not visited.

That a tile is not visited is seen from NaN in what only it would read: a product with probabilities of 0 would be NaN.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fusemesh import flash_attention_varlen
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.gpu import mask_tiles
from fusemesh.kernels.attention.gpu.mode import scores_of
from fusemesh.kernels.measure.cases import AttentionCase
from tests.support.attention_cases import DTYPES, compare, guarded_outputs, run

pytestmark = pytest.mark.interpreter

TILE = 32  # of the interpreter, both ways


@pytest.fixture(autouse=True)
def poisoned_lists() -> Iterator[None]:
    """What the lists' kernel does not write is an index far outside."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, 2**30, dtype=dtype, device=device)

    with mock.patch.object(mask_tiles, "torch", types.SimpleNamespace(empty=empty, int32=torch.int32)):
        yield


def blocks(rows: int, columns: int, shown: float, generator: torch.Generator, tile: int = 16) -> torch.Tensor:
    """A mask [rows, columns] whose tiles are hidden whole, shown whole, or shown in one element."""
    m, n = -(-rows // tile), -(-columns // tile)
    kind = torch.rand(m, n, generator=generator)
    whole = (kind < shown).repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    for i, j in ((kind > 0.9).nonzero()).tolist():
        whole[i * tile + (3 * i + j) % tile, j * tile + (i + 5 * j) % tile] = True
    return whole[:rows, :columns].clone()


@pytest.mark.parametrize("along_keys", [True, False])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 16), (16, 128)])
@pytest.mark.parametrize("shape", [(1, 1, 100, 333), (2, 1, 64, 64), (1, 3, 33, 1), (2, 3, 1, 40)], ids=str)
@pytest.mark.parametrize("step", [16384, 1024])
def test_lists(
    along_keys: bool, block_m: int, block_n: int, shape: tuple[int, ...], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``before`` and ``list`` of every block are those that a loop over slices of the mask finds."""
    monkeypatch.setattr(mask_tiles, "_STEP", step)
    generator = torch.Generator().manual_seed(sum(shape))
    mask = torch.stack([blocks(*shape[2:], 0.4, generator) for _ in range(shape[0] * shape[1])]).reshape(shape)
    scores = scores_of(Call(AttentionSpec(1.0), mask=mask))
    found = mask_tiles.shown_tiles(scores, block_m, block_n, along_keys=along_keys)
    table = found.p_tiles
    assert table is not None and found.stride_block % 16 == 0
    row_block, column_block = (block_m, block_n) if along_keys else (block_n, block_m)
    turned = mask if along_keys else mask.transpose(2, 3)
    for b in range(shape[0]):
        for h in range(shape[1]):
            for i in range(-(-turned.shape[2] // row_block)):
                at = b * found.stride_b + h * found.stride_h + i * found.stride_block
                part = turned[b, h, i * row_block : (i + 1) * row_block]
                seen = [bool(tile.any()) for tile in part.split(column_block, 1)]
                line = table.flatten()[at : at + 2 * found.half].tolist()
                assert line[: len(seen) + 1] == [sum(seen[:j]) for j in range(len(seen) + 1)]
                listed = line[found.half :][: sum(seen)]
                assert listed == [j for j, any_seen in enumerate(seen) if any_seen]


DOCUMENTS = AttentionCase(B=2, H=2, Hkv=1, Sq=113, Sk=203, dlse=True)
CASES = {
    "mask": DOCUMENTS,
    "of_heads": replace(DOCUMENTS, H=2, Hkv=2, mask="hmn"),
    "causal": replace(DOCUMENTS, causal=True, align="bottom_right"),
    "causal_from_the_left": replace(DOCUMENTS, causal=True),
    "window": replace(DOCUMENTS, window=(40, 17), device_origin=(60, -5, 3, 5)),
    "over_keys": replace(DOCUMENTS, mask="bn", causal=True, align="bottom_right"),
    "over_queries": replace(DOCUMENTS, mask="m", window=(100, None)),
    "bias": replace(DOCUMENTS, bias="hmn", mask="bmn"),
    "bias_over_keys": replace(DOCUMENTS, bias="n", mask="bmn"),
    "all_features": replace(
        DOCUMENTS, mask="bmn", bias="mn", softcap=3.0, alibi="h", mod=True, sinks=True, dropout=0.2, window=(None, 50)
    ),
}


def mask_of(case: AttentionCase) -> torch.Tensor:
    """A mask in the dims that the case names (default "mn"), most tiles of which are hidden whole."""
    dims = case.mask or "mn"
    generator = torch.Generator().manual_seed(7)
    b, h = (n if name in dims else 1 for name, n in (("b", case.B), ("h", case.H)))
    m, n = (size if name in dims else 1 for name, size in (("m", case.Sq), ("n", case.Sk)))
    return torch.stack([blocks(m, n, 0.3, generator, tile=40) for _ in range(b * h)]).reshape(b, h, m, n)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "fp32") for name in CASES),
        *(pytest.param(name, "bf16", marks=[pytest.mark.slow] if name != "all_features" else []) for name in CASES),
    ],
)
def test_results(name: str, dtype: str) -> None:
    case = replace(CASES[name], dtype=dtype)
    case = replace(case, mask=case.mask or "mn")
    mask = mask_of(case)
    hidden = sum(not tile.any() for rows in mask.split(TILE, 2) for tile in rows.split(TILE, 3))
    assert hidden >= (1 if case.mask == "m" else 2)
    with guarded_outputs():
        result = run(case, mask=mask)
    compare(case, result, mask=mask)
    if name == "all_features":
        again = run(case, mask=mask)
        assert all(torch.equal(result[key], again[key]) for key in result)


@pytest.mark.parametrize("dims", ["mn", "hmn", "n", "m", "bn", "bm", "bh"])
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=[] if dtype == "fp32" else [pytest.mark.slow]) for dtype in DTYPES]
)
def test_hidden_tiles_are_not_visited(dims: str, dtype: str) -> None:
    """NaN in the keys, values, queries and gradients of tiles that the mask hides from all others changes nothing."""
    case = AttentionCase(dtype=dtype, B=2, H=2, Hkv=2, Sq=4 * TILE, Sk=5 * TILE, mask=dims, bias="hmn")
    x = case.inputs()
    mask = x["mask"]
    assert mask is not None
    keys, queries = slice(TILE, 3 * TILE), slice(2 * TILE, 3 * TILE)
    mask[:] = True
    mask[:, :, :, 2::7] = False
    if "n" in dims:
        mask[..., keys] = False
    if "m" in dims:
        mask[:, :, queries] = False
    if dims == "bh":
        mask[1] = False
    want = run(case, mask=mask)
    poisoned = {name: x[name].clone() for name in ("q", "k", "v", "do")}  # type: ignore[union-attr]
    if "n" in dims:
        poisoned["k"][:, :, keys] = math.nan
        poisoned["v"][:, :, keys] = math.nan
    if "m" in dims:
        poisoned["q"][:, :, queries] = math.nan
    if dims == "bh":
        for name in ("q", "k", "v"):
            poisoned[name][1] = math.nan
    found = run(case, mask=mask, **poisoned)
    for name, value in want.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_hidden_tiles_of_packed_sequences_are_not_visited(align: str) -> None:
    """The mask is by position within each sequence, and the lists are those of the longest."""
    lengths_q, lengths_k = (70, 0, 128, 31), (100, 20, 160, 64)
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    generator = torch.Generator().manual_seed(0)
    shapes = ((int(cu_q[-1]), 2, 16), (int(cu_k[-1]), 1, 16), (int(cu_k[-1]), 1, 16))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    mask = torch.rand(1, 2, 128, 160, generator=generator) > 0.1
    mask[..., TILE : 2 * TILE] = False
    bias = torch.randn(1, 2, 128, 160, generator=generator, requires_grad=True)
    do = torch.randn(shapes[0], generator=generator)

    def call(backend: str, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        out = flash_attention_varlen(
            q, k, v, cu_q, cu_k, 128, 160, causal=True, align=align, mask=mask, bias=bias, backend=backend
        )
        return [out, *torch.autograd.grad(out, (q, k, v, bias), do)]

    want = call("triton", k, v)
    for found, exact in zip(want, call("reference", k, v), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    hidden = torch.cat(
        [start + torch.arange(TILE, min(n, 2 * TILE)) for start, n in zip(cu_k, lengths_k, strict=False) if n > TILE]
    )
    k, v = (x.detach().index_fill(0, hidden, math.nan).requires_grad_() for x in (k, v))
    assert all(torch.equal(found, value) for found, value in zip(call("triton", k, v), want, strict=True))
